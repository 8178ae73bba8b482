//! One run of `nowait run`, described and then judged.

use std::ffi::OsString;
use std::fs;
use std::ops::Deref;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nowait_wire::agent::{
    HostStalls, Kind, Report, Request, RunResult, Workload, decode_line, encode_line,
};
use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::process::{self, Finished};
use crate::{initramfs, nowait_bin, vmlinux};

/// How long one guest may take, in the emulated machine.
pub const GUEST_LIMIT: Duration = Duration::from_secs(120);

/// A guest that has yet to run.
#[derive(Debug)]
pub struct Guest {
    args: Vec<OsString>,
    requests: Vec<Request>,
    limit: Duration,
    /// What starts nowait, if something else does.
    starter: Vec<OsString>,
}

impl Guest {
    /// Any kernel.
    #[must_use]
    pub fn kernel(path: &Path) -> Self {
        let args = vec!["run".into(), "--kernel".into(), path.into()];
        Self { args, requests: Vec::new(), limit: GUEST_LIMIT, starter: Vec::new() }
    }

    /// Our kernel with the agent.
    #[must_use]
    pub fn linux() -> Self {
        Self::kernel(&vmlinux()).args(["--initrd".as_ref(), initramfs().as_os_str()])
    }

    /// More arguments for `nowait run`.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Have nowait run in this cgroup. The host never kills it for want of memory.
    #[must_use]
    pub fn within(mut self, cgroup: &Cgroup) -> Self {
        self.starter = cgroup.starter();
        self
    }

    /// Another time limit.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Have the agent run a shell command.
    #[must_use]
    pub fn exec(self, command: &str) -> Self {
        self.request(Request::Exec { command: command.into() })
    }

    /// Have the agent run a workload of this kind.
    #[must_use]
    pub fn workload(self, kind: Kind, threads: u32, pages: u32) -> Self {
        let workload = Workload { kind, threads, duration_ms: 60_000, pages, ..Workload::IDLE };
        self.request(Request::Run(workload))
    }

    /// Any request to the agent.
    #[must_use]
    pub fn request(mut self, request: Request) -> Self {
        self.requests.push(request);
        self
    }

    /// Runs it to its end. With requests, the guest is powered off after the last.
    ///
    /// # Panics
    /// When the process cannot be started or does not end in time.
    #[must_use]
    pub fn run(self) -> End {
        self.run_beside(|| ())
    }

    /// As [`Guest::run`], and does something else meanwhile.
    ///
    /// # Panics
    /// As [`Guest::run`], and when the other thing does.
    #[must_use]
    pub fn run_beside(self, meanwhile: impl FnOnce()) -> End {
        self.try_run_beside(meanwhile).unwrap_or_else(|stuck| panic!("{stuck}"))
    }

    /// As [`Guest::run`].
    ///
    /// # Errors
    /// What is known of a guest that did not end in time.
    ///
    /// # Panics
    /// When the process cannot be started.
    pub fn try_run(self) -> Result<End, String> {
        self.try_run_beside(|| ())
    }

    fn try_run_beside(mut self, meanwhile: impl FnOnce()) -> Result<End, String> {
        let files = TempDir::new().expect("a temporary directory");
        let at = |name: &str| files.path().join(name);
        self.args.extend(["--json".into(), at("run.json").into()]);
        if !self.requests.is_empty() {
            self.requests.push(Request::PowerOff);
            let lines: Vec<u8> = self
                .requests
                .iter()
                .flat_map(|r| encode_line(r).expect("a short request"))
                .collect();
            fs::write(at("requests"), lines).expect("the requests can be written");
            self.args.extend(["--requests".into(), at("requests").into()]);
            self.args.extend(["--report".into(), at("report").into()]);
        }
        let bin = nowait_bin().into_os_string();
        let words: Vec<_> = self.starter.iter().chain([&bin]).chain(&self.args).collect();
        let finished = thread::scope(|scope| {
            let run = || process::try_run(Command::new(words[0]).args(&words[1..]), self.limit);
            let running = scope.spawn(run);
            meanwhile();
            running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let reports = fs::read(at("report")).unwrap_or_default();
        let reports = reports
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| decode_line(line).expect("nowait writes whole reports"))
            .collect();
        let json = fs::read(at("run.json"))
            .ok()
            .map(|bytes| serde_json::from_slice(&bytes).expect("nowait writes whole JSON"));
        Ok(End { finished, reports, json })
    }
}

/// How a guest ended.
#[derive(Debug)]
pub struct End {
    finished: Finished,
    /// Every report of the agent.
    pub reports: Vec<Report>,
    /// What `--json` wrote.
    pub json: Option<serde_json::Value>,
}

impl Deref for End {
    type Target = Finished;

    fn deref(&self) -> &Finished {
        &self.finished
    }
}

impl End {
    /// The output of the `index`-th shell command, which must have succeeded.
    ///
    /// # Panics
    /// When there was no such command or it failed.
    #[must_use]
    pub fn exec_output(&self, index: usize) -> &str {
        let exec = self.reports.iter().filter_map(|report| match report {
            Report::Exec { status, output } => Some((*status, output)),
            _ => None,
        });
        match exec.clone().nth(index) {
            Some((0, output)) => output,
            other => {
                panic!("command {index}: {other:?}; reports {:?}\n{}", self.reports, self.stdout)
            }
        }
    }

    /// The results of the workloads.
    ///
    /// # Panics
    /// When the agent reported an error.
    #[must_use]
    pub fn results(&self) -> Vec<&RunResult> {
        self.reports
            .iter()
            .filter_map(|report| match report {
                Report::Result(result) => Some(result),
                Report::Error { message } => panic!("the agent reports: {message}"),
                _ => None,
            })
            .collect()
    }

    /// What the host saw of each workload.
    #[must_use]
    pub fn host_stalls(&self) -> Vec<&HostStalls> {
        self.reports
            .iter()
            .filter_map(|report| match report {
                Report::Host(seen) => Some(seen),
                _ => None,
            })
            .collect()
    }

    /// A number of the JSON summary, by its JSON pointer.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn number(&self, pointer: &str) -> u64 {
        let json = self.json.as_ref().expect("the run wrote its JSON");
        let value = json.pointer(pointer).and_then(serde_json::Value::as_u64);
        value.unwrap_or_else(|| panic!("no number at {pointer} in {json:#}"))
    }
}
