//! Draws the lines of a benchmark's report as SVG: percentiles, with logarithmic axes.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use serde::Deserialize;

/// What we read of a report (tests/src/figures.rs).
#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    series: Vec<Series>,
}

#[derive(Deserialize)]
struct Series {
    name: String,
    /// Quantile, and the value there in microseconds.
    points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (720, 400);
/// Readable in print and for the colour-blind (Okabe and Ito); each line has its own marks, too.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 0, 0),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// Draws the report in `json` to `svg`.
pub(crate) fn percentiles(json: &Path, svg: &Path, title: &str) -> Result<()> {
    let text = std::fs::read(json).with_context(|| format!("reading {}", json.display()))?;
    let report: Report = serde_json::from_slice(&text).context("the report")?;
    draw(&report.series, svg, title).map_err(|error| anyhow!("drawing {}: {error}", svg.display()))
}

/// Nines of a quantile: 0.9 is 1, 0.99 is 2.
fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile.min(0.999_999)).log10()
}

fn draw(series: &[Series], svg: &Path, title: &str) -> Result<(), Box<dyn std::error::Error>> {
    let values = || series.iter().flat_map(|series| series.points.iter().map(|point| point.1));
    let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(1.0, f64::max));
    let most = series.iter().flat_map(|series| &series.points).map(|point| nines(point.0));
    let most = most.fold(1.0, f64::max);
    let root = SVGBackend::new(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(38)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most, (low.max(1.0)..high * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("percentile of all heartbeats")
        .y_desc("late by (microseconds)")
        .x_labels(6)
        .x_label_formatter(&|nines| {
            format!("{}", (1.0 - 10_f64.powf(-nines)) * 100.0).chars().take(6).collect()
        })
        .y_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    for (index, series) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points = || series.points.iter().map(|(quantile, value)| (nines(*quantile), *value));
        let mark = move |(x, y): (f64, f64)| -> DynElement<'static, SVGBackend<'_>, (f64, f64)> {
            match index % 3 {
                0 => Circle::new((x, y), 4, colour.filled()).into_dyn(),
                1 => TriangleMarker::new((x, y), 6, colour.filled()).into_dyn(),
                _ => Cross::new((x, y), 5, colour.stroke_width(2)).into_dyn(),
            }
        };
        chart
            .draw_series(LineSeries::new(points(), colour.stroke_width(2)))?
            .label(series.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
        chart.draw_series(points().map(mark))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_a_picture_with_every_line() {
        let files = tempfile::tempdir().unwrap();
        let (json, svg) = (files.path().join("a.json"), files.path().join("a.svg"));
        let report = r#"{"series":[{"name":"off","points":[[0.5,20000],[0.99,60000]]},
            {"name":"user","points":[[0.5,200],[0.99,1500],[1.0,4000]]}]}"#;
        std::fs::write(&json, report).unwrap();
        percentiles(&json, &svg, "overrun").unwrap();
        let picture = std::fs::read_to_string(&svg).unwrap();
        for text in ["<svg", "off", "user", "overrun", "polyline"] {
            assert!(picture.contains(text), "no {text} in {picture}");
        }
    }
}
