// Draws what the page has as data: percentile curves and time lines, by uPlot.
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  // Each mode has a dash pattern and a mark of its own, so that no colour is needed.
  const LINES = {
    off: { dash: [9, 4], mark: "square" },
    host: { dash: [9, 3, 2, 3], mark: "diamond" },
    kernel: { dash: [4, 3], mark: "triangle" },
    user: { dash: [], mark: "circle" },
    idle: { dash: [1, 3], mark: null },
  };
  const QUANTITIES = {
    overrun: { y: "late by at most", x: "percentile of heartbeats" },
    stall: { y: "stall of at most", x: "percentile of vCPU stalls" },
    access: { y: "access takes at most", x: "percentile of accesses" },
  };
  // How many vCPUs have their time lines on the page at once.
  const VCPUS = 4;
  const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
  // Room at the right for the lines' names, in CSS pixels.
  const NAMES = 54;

  const line = (name) => LINES[name] || LINES.idle;
  const variable = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (name) => variable("--mode-" + (name in LINES ? name : "idle"));

  function digits(value) {
    const v = Math.abs(value);
    const decimals = v === 0 || v >= 99.95 ? 0 : v >= 9.995 ? 1 : v >= 0.0995 ? 2 : v >= 0.00995 ? 3 : 4;
    return String(Number(value.toFixed(decimals)));
  }
  function time(us) {
    if (us == null) return "–";
    if (us < 999.5) return digits(us) + "\u00a0µs";
    if (us < 999500) return digits(us / 1e3) + "\u00a0ms";
    return digits(us / 1e6) + "\u00a0s";
  }
  const seconds = (s) => (s == null ? "–" : digits(s) + " s");
  const percent = (share) => (share == null ? "–" : digits(share) + " %");
  // A percentile from its place on the scale of nines.
  function percentile(x, nines) {
    if (x == null) return "–";
    if (x > nines) return "max";
    return Number((100 * (1 - 10 ** -x)).toFixed(Math.max(0, Math.ceil(x - 1.001)))) + " %";
  }

  // A mark, as a path around (x, y).
  function mark(ctx, kind, x, y, r) {
    ctx.beginPath();
    if (kind === "circle") ctx.arc(x, y, r, 0, 2 * Math.PI);
    if (kind === "square") ctx.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
    if (kind === "diamond") polygon(ctx, [[x, y - r * 1.3], [x + r * 1.3, y], [x, y + r * 1.3], [x - r * 1.3, y]]);
    if (kind === "triangle") polygon(ctx, [[x, y - r * 1.2], [x + r * 1.2, y + r], [x - r * 1.2, y + r]]);
  }
  function polygon(ctx, points) {
    points.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
    ctx.closePath();
  }

  // The legend's entry: the line as it is drawn, and its name.
  function key(name) {
    const ratio = window.devicePixelRatio || 1;
    const canvas = document.createElement("canvas");
    canvas.width = 32 * ratio;
    canvas.height = 12 * ratio;
    canvas.style.cssText = "width:32px;height:12px";
    canvas.setAttribute("aria-hidden", "true");
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.strokeStyle = ctx.fillStyle = color(name);
    ctx.lineWidth = 2;
    ctx.setLineDash(line(name).dash);
    ctx.beginPath();
    ctx.moveTo(0, 6);
    ctx.lineTo(32, 6);
    ctx.stroke();
    if (line(name).mark) {
      mark(ctx, line(name).mark, 16, 6, 3.6);
      ctx.fill();
    }
    const label = document.createElement("span");
    label.className = "key";
    label.append(canvas, name);
    return label;
  }

  // Draws marks on the lines, and the lines' names at their ends.
  function decorate(marked) {
    return (u) => {
      const ctx = u.ctx;
      const ratio = uPlot.pxRatio;
      const ends = [];
      const { left, top, width, height } = u.bbox;
      ctx.save();
      u.series.forEach((series, s) => {
        if (s === 0 || !series.show) return;
        const values = u.data[s];
        const kind = line(series.name).mark;
        ctx.fillStyle = color(series.name);
        const at = (i) => [u.valToPos(u.data[0][i], "x", true), u.valToPos(values[i], series.scale, true)];
        const inside = ([x, y]) => x >= left - 1 && x <= left + width + 1 && y >= top - 1 && y <= top + height + 1;
        for (const i of marked(s)) {
          if (kind && values[i] != null && inside(at(i))) {
            mark(ctx, kind, ...at(i), 3.6 * ratio);
            ctx.fill();
          }
        }
        let last = null;
        values.forEach((value, i) => {
          if (value != null && u.data[0][i] <= u.scales.x.max) last = i;
        });
        if (last != null) {
          const y = Math.min(Math.max(at(last)[1], top), top + height);
          ends.push({ name: series.name, x: Math.min(at(last)[0], left + width), y, to: y });
        }
      });
      // Names keep their distance: first down, then up from the bottom.
      const gap = 14 * ratio;
      ends.sort((a, b) => a.y - b.y);
      ends.forEach((end, i) => i && (end.to = Math.max(end.to, ends[i - 1].to + gap)));
      let most = top + height;
      for (const end of ends.slice().reverse()) {
        end.to = Math.min(end.to, most);
        most = end.to - gap;
      }
      ctx.font = FONT.replace("12px", 12 * ratio + "px");
      ctx.textAlign = "left";
      ctx.textBaseline = "middle";
      ctx.lineWidth = ratio;
      ctx.setLineDash([]);
      for (const end of ends) {
        ctx.fillStyle = ctx.strokeStyle = color(end.name);
        ctx.beginPath();
        ctx.moveTo(left + width + ratio, end.y);
        ctx.lineTo(left + width + 7 * ratio, end.to);
        ctx.stroke();
        ctx.fillText(end.name, left + width + 10 * ratio, end.to);
      }
      ctx.restore();
    };
  }

  // Powers of ten, and 2 and 5 times these where there are few.
  function logarithmic(min, max) {
    const splits = [];
    const few = Math.log10(max / min) < 2.2;
    for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power++) {
      for (const m of few ? [1, 2, 5] : [1]) {
        const value = m * 10 ** power;
        if (value >= min * 0.999 && value <= max * 1.001) splits.push(value);
      }
    }
    return splits;
  }
  // To the next 1, 2 or 5, outwards; at least one power of ten.
  function logarithmicRange(min, max) {
    if (min == null || max == null) return [1, 1000];
    const round = (value, up) => {
      const power = 10 ** Math.floor(Math.log10(value) + 1e-9);
      const steps = up ? [1, 2, 5, 10] : [5, 2, 1];
      return power * (steps.find((m) => (up ? m * power >= value * 0.999 : m * power <= value * 1.001)) || 1);
    };
    const low = round(Math.max(min, 1), false);
    return [low, Math.max(round(max, true), low * 10)];
  }

  const axis = (more) => ({
    stroke: () => variable("--quiet"),
    font: FONT,
    labelFont: FONT,
    labelSize: 18,
    grid: { stroke: () => variable("--grid"), width: 1 },
    ticks: { stroke: () => variable("--line"), width: 1, size: 5 },
    ...more,
  });
  const timeAxis = (label) =>
    axis({
      label,
      size: 58,
      splits: (u, i, min, max) => logarithmic(min, max),
      filter: (u, splits) => splits,
      values: (u, splits) => splits.map(time),
    });
  const series = (name, more) => ({
    name,
    label: key(name),
    stroke: () => color(name),
    width: 2,
    dash: line(name).dash,
    points: { show: false },
    spanGaps: true,
    value: (u, value) => time(value),
    ...more,
  });

  // All plots on the page, for a change of width or colours.
  const plots = new Map();
  function draw(element, make) {
    const old = plots.get(element);
    if (old) old.u.destroy();
    const width = element.clientWidth;
    const { opts, values } = make(width);
    const u = new uPlot({ width, ...opts }, values, element);
    u.root.querySelectorAll(".u-legend th").forEach((th, i) => {
      if (i === 0) return;
      th.tabIndex = 0;
      th.setAttribute("role", "button");
      th.setAttribute("aria-label", "show or hide " + opts.series[i].name);
      th.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          th.click();
        }
      });
    });
    plots.set(element, { u, make });
    widths.observe(element);
  }
  function remove(element) {
    const plot = plots.get(element);
    if (!plot) return;
    plot.u.destroy();
    widths.unobserve(element);
    plots.delete(element);
  }
  const again = () => plots.forEach((plot, element) => draw(element, plot.make));
  const widths = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const plot = plots.get(target);
      const width = target.clientWidth;
      if (plot && width > 0 && width !== plot.u.width) plot.u.setSize({ width, height: plot.u.height });
    }
  });

  function curves(plot, large) {
    const words = QUANTITIES[plot.quantity];
    const { nines } = plot;
    const splits = [0, Math.log10(2)];
    for (let x = 1; x <= nines + 1; x++) splits.push(x);
    return (width) => ({
      values: [plot.x, ...plot.curves.map((curve) => curve.us)],
      opts: {
        height: large ? (width < 500 ? 300 : 380) : 260,
        padding: [12, NAMES, 0, 0],
        scales: {
          x: { time: false },
          y: { distr: 3, range: (u, min, max) => logarithmicRange(min, max) },
        },
        axes: [
          axis({
            label: words.x + " (%)",
            size: 28,
            splits: () => splits,
            filter: (u, all) => all,
            // On a narrow plot numbers only, and no 0 beside the 50.
            values: (u, all) =>
              all.map((x) => (u.width < 800 && x === 0 ? "" : percentile(x, nines).replace(" %", u.width < 500 ? "" : " %"))),
          }),
          timeAxis(words.y),
        ],
        series: [
          { label: "percentile", value: (u, x) => percentile(x, nines) },
          ...plot.curves.map((curve) => series(curve.name, curve.name === "idle" ? { width: 1.5 } : {})),
        ],
        legend: { markers: { show: false } },
        cursor: { drag: { x: true, y: false }, points: { size: 7 } },
        hooks: { draw: [decorate(() => plot.marks)] },
      },
    });
  }

  // Lines of one vCPU: each mode's slices, on one axis of time.
  function timeLine(modes, values, more) {
    const tables = modes.map((mode) => {
      const points = values(mode);
      const x = points.map((_, i) => (i * mode.slice_us) / 1e6);
      // The last slice has its length, too.
      return [[...x, (points.length * mode.slice_us) / 1e6], [...points, points[points.length - 1]]];
    });
    return (width) => ({
      values: uPlot.join(tables),
      opts: {
        height: 190,
        padding: [12, NAMES, 0, 0],
        ...more,
        series: [
          { label: "time", value: (u, s) => seconds(s) },
          ...modes.map((mode) =>
            series(mode.name, {
              width: 1.5,
              dash: line(mode.name).dash,
              paths: uPlot.paths.stepped({ align: 1 }),
              ...more.each,
            })
          ),
        ],
        legend: { markers: { show: false } },
        cursor: { drag: { x: true, y: false }, points: { size: 6 }, sync: { key: "time-lines" } },
        hooks: {
          draw: [
            decorate((s) => {
              const marked = [];
              const step = Math.max(5, Math.round(tables[s - 1][0].length / 8));
              for (let i = Math.round((step * s) / (modes.length + 1)); i < tables[s - 1][0].length; i += step) marked.push(i);
              return marked;
            }),
          ],
        },
      },
    });
  }
  const timeX = () => axis({ label: "time in the run (s)", size: 28, values: (u, all) => all.map(digits) });
  const overrunLine = (modes, vcpu) =>
    timeLine(modes, (mode) => mode.overrun_us[vcpu].map((us) => Math.max(us, 1)), {
      scales: { x: { time: false }, y: { distr: 3, range: (u, min, max) => logarithmicRange(min, max) } },
      axes: [timeX(), timeAxis("longest overrun")],
    });
  const stallLine = (modes, vcpu) =>
    timeLine(modes, (mode) => mode.stall_us[vcpu].map((us) => (100 * us) / Math.max(mode.slice_us, 1)), {
      scales: { x: { time: false }, y: { range: (u, min, max) => [0, Math.max(1, max || 0) * 1.05] } },
      axes: [timeX(), axis({ label: "stalled", size: 58, values: (u, all) => all.map(percent) })],
      each: { value: (u, value) => percent(value) },
    });

  const groupSelects = [...document.querySelectorAll("select.group-select")];
  const round = document.getElementById("round");
  const vcpus = document.getElementById("vcpus");
  const timeLines = document.getElementById("time-line-plots");
  let group = data.headline;

  function option(select, value, text) {
    const element = document.createElement("option");
    element.value = value;
    element.textContent = text;
    select.append(element);
  }

  function showTimeLines() {
    const chosen = data.time_lines.find((of) => of.group === group && of.round === Number(round.value));
    timeLines.querySelectorAll(".plot").forEach(remove);
    timeLines.textContent = "";
    if (!chosen) return;
    const first = Number(vcpus.value) || 0;
    const most = Math.max(...chosen.modes.map((mode) => mode.overrun_us.length));
    for (let vcpu = first; vcpu < Math.min(first + VCPUS, most); vcpu++) {
      const row = document.createElement("div");
      row.className = "columns";
      timeLines.append(row);
      const overruns = chosen.modes.filter((mode) => (mode.overrun_us[vcpu] || []).length);
      const stalls = chosen.modes.filter((mode) => mode.stall_us && (mode.stall_us[vcpu] || []).length);
      const title = "vCPU " + vcpu + ": ";
      if (overruns.length) timeFigure(row, title + "longest overrun of each slice", overrunLine(overruns, vcpu));
      if (stalls.length) timeFigure(row, title + "share of time stalled", stallLine(stalls, vcpu));
    }
  }
  function timeFigure(row, title, make) {
    const figure = document.createElement("figure");
    const heading = document.createElement("h4");
    const plot = document.createElement("div");
    heading.textContent = title;
    plot.className = "plot";
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", title + ", a line for each mode");
    figure.append(heading, plot);
    row.append(figure);
    draw(plot, make);
  }

  function showGroup(index) {
    group = index;
    groupSelects.forEach((select) => (select.value = String(index)));
    document.querySelectorAll("[data-group]").forEach((element) => {
      element.hidden = element.dataset.group !== String(index);
    });
    document.querySelectorAll("[data-plot]").forEach((element) => {
      const [of, quantity] = element.dataset.plot.split("/");
      if (Number(of) === index) draw(element, curves(data.groups[index][quantity], quantity === "overrun"));
      else remove(element);
    });
    round.textContent = vcpus.textContent = "";
    const of = data.time_lines.filter((each) => each.group === index);
    of.forEach((each) => option(round, each.round, each.round));
    const most = Math.max(0, ...of.flatMap((each) => each.modes.map((mode) => mode.overrun_us.length)));
    for (let first = 0; first < most; first += VCPUS) {
      const last = Math.min(first + VCPUS, most) - 1;
      option(vcpus, first, first === last ? first : first + " to " + last);
    }
    round.parentElement.hidden = round.options.length < 2;
    vcpus.parentElement.hidden = vcpus.options.length < 2;
    showTimeLines();
  }

  if (data.groups.length) {
    groupSelects.forEach((select) => select.addEventListener("change", () => showGroup(Number(select.value))));
    round.addEventListener("change", showTimeLines);
    vcpus.addEventListener("change", showTimeLines);
    showGroup(group);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  // On paper: light, and with all values.
  let opened = [];
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.print = "";
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((details) => (details.open = true));
    again();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.print;
    opened.forEach((details) => (details.open = false));
    again();
  });
  // For tests: what is drawn now.
  window.nowait = { data, plots: () => [...plots].map(([element, { u }]) => ({ element, u })) };
  document.documentElement.dataset.ready = "";
})();
