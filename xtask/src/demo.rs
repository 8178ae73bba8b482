//! `cargo xtask demo`: from nothing to the table of stalls.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Args;
use tempfile::TempDir;

use crate::accel::{self, Accel, Force};
use crate::exit::{self, Exit};
use crate::{binaries, child, images, nested, paths, setup, signals};

/// What is measured if nothing else is asked for: a preset of `nowait stall`.
const SCENARIO: &str = "quick";
/// When the nested machine is ended: five rounds of a preset take half an hour in it.
const TIMEOUT_S: u64 = 7200;
/// What is left of that when `nowait stall` is asked to stop, in seconds: time to write what was measured.
const TIME_TO_WRITE_S: u64 = 60;
/// The page that is always made, in the target directory.
const PAGE: &str = "demo.html";

/// The command line of `demo`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    #[command(flatten)]
    force: Force,
    /// What to measure: a TOML file, or quick, overcommit, snapshot-like, mixed, worst
    #[arg(long, value_name = "PRESET|FILE", default_value = SCENARIO)]
    scenario: String,
    /// Numbers of guest CPUs, each 1 to 32
    #[arg(long, value_name = "N,…", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=32))]
    cpus: Option<Vec<u32>>,
    /// Async page fault modes to compare
    #[arg(long, value_name = "APF,…", value_delimiter = ',',
        value_parser = ["off", "host", "kernel", "user"])]
    apf: Option<Vec<String>>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// How much of the guest's memory is in memory, compressed pages included
    #[arg(long, value_name = "SIZE")]
    resident_limit: Option<String>,
    /// Where the rest of it goes
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// How often each mode has its turn
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: Option<u32>,
    /// Write all results as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the page with plots to FILE [default: demo.html in the target directory]
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the summary as Markdown too
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Write runs and gates as JUnit XML too
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write all overruns as an HdrHistogram interval log too
    #[arg(long, value_name = "FILE")]
    hlog: Option<PathBuf>,
    /// Fail (exit code 3) if this holds, for example 'user.overrun.p99 > 2ms'
    #[arg(long, value_name = "EXPRESSION")]
    fail_if: Vec<String>,
    /// Fail (exit code 3) if something is worse than in this result of an earlier `--json`
    #[arg(long, value_name = "FILE", requires = "tolerance")]
    baseline: Option<PathBuf>,
    /// By how much it may be worse
    #[arg(long, value_name = "N%", requires = "baseline")]
    tolerance: Option<String>,
    /// Stop an emulated machine after this many seconds, with what was measured till then
    #[arg(long, value_name = "S", default_value_t = TIMEOUT_S,
        value_parser = clap::value_parser!(u64).range(2 * TIME_TO_WRITE_S..=86_400))]
    timeout: u64,
    /// Further options for `nowait stall`, after `--`
    #[arg(last = true)]
    stall: Vec<String>,
}

/// A file that `nowait stall` writes: the option, its name in the nested machine, and where it goes.
type Output<'a> = (&'static str, &'static str, &'a Path);

impl Options {
    fn outputs<'a>(&'a self, page: &'a Path) -> Vec<Output<'a>> {
        let page = Some(self.html.as_deref().unwrap_or(page));
        [
            ("--json", "stall.json", self.json.as_deref()),
            ("--html", "stall.html", page),
            ("--markdown", "stall.md", self.markdown.as_deref()),
            ("--junit", "stall.xml", self.junit.as_deref()),
            ("--hlog", "stall.hlog", self.hlog.as_deref()),
        ]
        .into_iter()
        .filter_map(|(option, name, file)| Some((option, name, file?)))
        .collect()
    }

    /// The scenario's file, if it is one.
    fn scenario_file(&self) -> Option<&Path> {
        let path = Path::new(&self.scenario);
        path.is_file().then_some(path)
    }

    /// The same with pipes replaced by copies of what they give.
    fn spooled(&self, dir: &Path) -> Result<Options> {
        let mut options = self.clone();
        if let Some(file) = spool(Path::new(&self.scenario), &dir.join("scenario.toml"))? {
            options.scenario = file.to_string_lossy().into_owned();
        }
        if let Some(file) = &self.baseline {
            options.baseline = spool(file, &dir.join("baseline.json"))?.or(options.baseline);
        }
        Ok(options)
    }

    /// The `nowait stall` command line, for images in `images`; `outputs` are options and files.
    fn stall(
        &self,
        nowait: &str,
        images: &str,
        named: &Named,
        outputs: &[(&str, String)],
    ) -> Vec<String> {
        let mut words = vec![
            nowait.to_owned(),
            "stall".to_owned(),
            "--kernel".to_owned(),
            format!("{images}/vmlinux"),
            "--initrd".to_owned(),
            format!("{images}/initramfs.cpio"),
            "--scenario".to_owned(),
            named.scenario.clone(),
        ];
        let cpus = self.cpus.as_ref();
        let cpus = cpus.map(|cpus| cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
        for (name, value) in [
            ("--cpus", cpus),
            ("--apf", self.apf.as_ref().map(|apf| apf.join(","))),
            ("--memory", self.memory.clone()),
            ("--resident-limit", self.resident_limit.clone()),
            ("--store", self.store.clone()),
            ("--rounds", self.rounds.map(|rounds| rounds.to_string())),
            ("--baseline", named.baseline.clone()),
            ("--tolerance", self.tolerance.clone()),
        ] {
            words.extend(value.into_iter().flat_map(|value| [name.to_owned(), value]));
        }
        words.extend(self.fail_if.iter().flat_map(|gate| ["--fail-if".to_owned(), gate.clone()]));
        for (option, file) in outputs {
            words.extend([(*option).to_owned(), file.clone()]);
        }
        words.extend(self.stall.iter().cloned());
        words
    }
}

/// Inputs as `nowait stall` finds them.
struct Named {
    scenario: String,
    baseline: Option<String>,
}

/// The command behind a guest that is not measured. In its first seconds the emulator translates the
/// code of host and guest for the first time: without this the first row, which has no paging, showed a
/// p99 of 267 ms, and behind three such guests one of 0.5 to 1 ms. `seconds` from then on it gets a SIGTERM,
/// and so writes its results.
fn warmed_up(command: Vec<String>, seconds: u64) -> Vec<String> {
    const SCRIPT: &str = "nowait run --kernel /images/vmlinux --initrd /images/initramfs.cpio \
        --cmdline nowait.agent=poweroff --console none 2> /dev/null; exec timeout \"$@\"";
    let words = ["sh", "-c", SCRIPT, "demo"].map(str::to_owned);
    words.into_iter().chain([seconds.to_string()]).chain(command).collect()
}

/// Runs it; the exit code of `nowait stall`.
pub(crate) fn demo(options: &Options) -> Result<u8> {
    let page = paths::target().join(PAGE);
    let outputs = options.outputs(&page);
    refuse_misplaced(&options.stall)?;
    if let Some((option, ..)) = outputs.iter().find(|(.., file)| *file == Path::new("-")) {
        let message = format!("{option} -: the table has standard output; name a file");
        return Err(Exit::error(exit::OPERAND, message));
    }
    for (_, _, file) in outputs.iter().filter(|(_, _, file)| *file != page) {
        paths::check_writable(file)?;
    }
    let start = SystemTime::now();
    // Read twice, by the check and by the measurement: what can be read only once is kept.
    let spool = TempDir::with_prefix("nowait-").context("cannot make a temporary directory")?;
    let options = &options.spooled(spool.path())?;
    setup::setup()?;
    let nowait = binaries::nowait()?;
    let show = |path: &Path| path.to_string_lossy().into_owned();
    let files: Vec<_> = outputs.iter().map(|(o, _, file)| (*o, show(file))).collect();
    let named = Named {
        scenario: options.scenario.clone(),
        baseline: options.baseline.as_deref().map(show),
    };
    // By its own names, and before minutes of work.
    let words = options.stall(&show(&nowait), &show(&images::dir()), &named, &files);
    let own = options.stall.iter().take_while(|word| *word != "--");
    if own.into_iter().any(|word| child::HELP.contains(&word.as_str())) {
        return child::foreground(Command::new(&nowait).args(["stall", "--help"]));
    }
    let accel = accel::choose(options.force, &nowait)?;
    check(&words, accel)?;
    let images = images::images()?;
    let code = match accel {
        Accel::Host => child::foreground(Command::new(&words[0]).args(&words[1..]))?,
        Accel::Nested => {
            let files: Vec<_> =
                outputs.iter().map(|(o, name, _)| (*o, format!("/results/{name}"))).collect();
            let inside = |name: &str| format!("/given/{name}");
            let named = Named {
                scenario: match options.scenario_file() {
                    Some(_) => inside("scenario.toml"),
                    None => options.scenario.clone(),
                },
                baseline: options.baseline.as_ref().map(|_| inside("baseline.json")),
            };
            let words = options.stall("/bin/nowait", "/images", &named, &files);
            let words = warmed_up(words, options.timeout - TIME_TO_WRITE_S);
            let mut run = nested::Run::new("demo", words);
            run.timeout = Duration::from_secs(options.timeout);
            run.hold.add(&nowait, "bin/nowait");
            run.hold.images(&images);
            if let Some(file) = options.scenario_file() {
                run.hold.add(file, "given/scenario.toml");
            }
            if let Some(file) = &options.baseline {
                run.hold.add(file, "given/baseline.json");
            }
            run.waits = true;
            run.grace = Duration::from_secs(TIME_TO_WRITE_S / 2);
            let ended = run.go();
            let code = match &ended {
                Ok(code) => *code,
                Err(_) if signals::seen().is_some() => STOPPED,
                Err(_) => return ended,
            };
            // What was measured is there also when it is partial, or a gate failed.
            let partial = WITH_RESULTS.contains(&code);
            for (_, name, file) in &outputs {
                match run.bring(name, file) {
                    Err(_) if !partial || ended.is_err() => {}
                    brought => brought?,
                }
            }
            // By a signal: with its code, not with that of the command.
            match ended {
                Ok(_) => code,
                Err(stopped) => {
                    show_page(&outputs, start);
                    return Err(stopped);
                }
            }
        }
    };
    show_page(&outputs, start);
    Ok(code)
}

/// Copies what a pipe gives into a file; `None` for everything else.
fn spool(from: &Path, to: &Path) -> Result<Option<PathBuf>> {
    if !from.metadata().is_ok_and(|data| data.file_type().is_fifo()) {
        return Ok(None);
    }
    let copy = || io::copy(&mut File::open(from)?, &mut File::create(to)?);
    copy().with_context(|| format!("cannot read {}", from.display()))?;
    Ok(Some(to.to_owned()))
}

/// Files that `nowait stall` alone would write may be left in the machine: `demo` has these options itself.
fn refuse_misplaced(behind: &[String]) -> Result<()> {
    const OURS: [&str; 6] = ["--json", "--html", "--markdown", "--junit", "--hlog", "--baseline"];
    let ours = |word: &&String| OURS.contains(&word.split('=').next().unwrap_or_default());
    let options = behind.iter().take_while(|word| *word != "--");
    match options.into_iter().find(ours) {
        None => Ok(()),
        Some(word) => Err(Exit::error(
            exit::USAGE,
            format!("{word} stands behind `--`: give it before, where it is an option of `demo`"),
        )),
    }
}

/// Has `nowait stall` check its operands, as they are called here; the machine would have other names for them.
fn check(words: &[String], accel: Accel) -> Result<()> {
    let mut command = Command::new(&words[0]);
    // Before a guest's command, if there is one.
    command.args([&words[1], "--check"]).args(&words[2..]);
    if accel == Accel::Nested {
        command.env("NOWAIT_ACCEL", "nested");
    }
    match child::foreground(&mut command)? {
        0 => Ok(()),
        // It has said why.
        code => Err(Exit::error(code, "")),
    }
}

/// Says where the page is, if there is one that was written since `start`.
fn show_page(outputs: &[Output<'_>], start: SystemTime) {
    if let Some((_, _, file)) = outputs.iter().find(|(option, ..)| *option == "--html")
        && file.metadata().and_then(|data| data.modified()).is_ok_and(|time| time >= start)
    {
        eprintln!("xtask: the page with its plots: {}", file.display());
    }
}

/// Exit codes of `nowait stall` with results: all well; a gate failed; a signal ended it; runs are incomplete.
const WITH_RESULTS: [u8; 4] = [0, 3, STOPPED, 18];
const STOPPED: u8 = 16;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn parse(words: &[&str]) -> Result<Options, clap::Error> {
        Cli::try_parse_from([&["demo"], words].concat()).map(|cli| cli.options)
    }

    #[test]
    fn wrong_options_are_refused_before_anything_is_set_up() {
        for wrong in ["--apf=fast", "--apf=host,", "--cpus=0", "--cpus=1,33", "--cpus=two"] {
            assert!(parse(&[wrong]).is_err(), "{wrong}");
        }
        assert!(parse(&["--host", "--nested"]).is_err());
    }

    #[test]
    fn files_are_named_before_the_dashes() {
        let refused = |words: &[&str]| {
            refuse_misplaced(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
                .is_err()
        };
        assert!(refused(&["--threads", "8", "--html", "a"]) && refused(&["--json=a"]));
        assert!(!refused(&["--threads", "8", "--", "make", "--json"]));
    }

    #[test]
    fn options_reach_the_measuring_command() {
        let options = parse(&[
            "--apf",
            "kernel",
            "--cpus",
            "1,4",
            "--fail-if",
            "kernel.pages < 1",
            "--rounds",
            "2",
            "--junit",
            "j.xml",
            "--",
            "--duration",
            "1s",
        ])
        .unwrap();
        let page = Path::new("page.html");
        let outputs = options.outputs(page);
        assert_eq!(
            outputs,
            [("--html", "stall.html", page), ("--junit", "stall.xml", Path::new("j.xml"))]
        );
        let named = Named { scenario: "quick".into(), baseline: None };
        let files = [("--json", "out.json".to_owned())];
        let words = options.stall("nowait", "/images", &named, &files).join(" ");
        assert!(
            words.ends_with(
                "--scenario quick --cpus 1,4 --apf kernel --rounds 2 --fail-if kernel.pages < 1 \
                 --json out.json --duration 1s"
            ),
            "{words}"
        );
    }
}
