//! Serving the host's requests on the agent channel.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};

use nowait_wire::agent::{
    LineError, PROTOCOL, Report, Request, RunResult, decode_line, encode_line,
};

use crate::init::{Asked, Signals};
use crate::lines::Lines;
use crate::workload::{Runner, WorkloadError};
use crate::{exec, procfs, sys};

/// The second UART, COM2.
const CHANNEL: &str = "/dev/ttyS1";

/// Serves requests until one, or a signal, asks for the end of the guest.
pub(crate) fn run(signals: &Signals) -> io::Result<Asked> {
    sys::lock_memory().map_err(|e| explain("cannot lock the agent in memory", e))?;
    let mut channel = open().map_err(|e| explain("cannot open the agent channel /dev/ttyS1", e))?;
    send(&mut channel, &hello()?)?;
    let (mut lines, mut buffer) = (Lines::default(), [0; 4096]);
    let mut runner = Runner::marking();
    loop {
        let [signalled, readable] = sys::wait_readable([signals.file(), &channel], None)?;
        while signalled && let Some(asked) = signals.next() {
            match asked {
                Asked::Reap => while sys::reap_one().is_some() {},
                end => return Ok(end),
            }
        }
        if !readable {
            continue;
        }
        let count = channel.read(&mut buffer)?;
        if count == 0 {
            return Err(io::Error::other("the agent channel /dev/ttyS1 hung up"));
        }
        for line in lines.push(&buffer[..count]) {
            match answer(line, &mut runner) {
                Some(report) => send(&mut channel, &report)?,
                None => return Ok(Asked::PowerOff),
            }
        }
    }
}

fn explain(what: &str, e: io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{what}: {e}"))
}

fn open() -> io::Result<File> {
    let channel = OpenOptions::new().read(true).write(true).open(CHANNEL)?;
    sys::make_raw(&channel)?;
    Ok(channel)
}

fn hello() -> io::Result<Report> {
    Ok(Report::Hello {
        protocol: PROTOCOL,
        kernel: procfs::kernel_release()?,
        cpus: sys::cpus()?.len() as u32,
        mem_total_kib: procfs::meminfo_kib("MemTotal")?,
    })
}

/// Carries one request out; `None` when it asks for the end of the guest.
fn answer(line: Result<Vec<u8>, LineError>, runner: &mut Runner) -> Option<Report> {
    Some(match line.and_then(|line| decode_line(&line)) {
        Ok(Request::PowerOff) => return None,
        Ok(Request::Exec { command }) => exec::exec(&command),
        Ok(Request::Run(workload)) => report(runner.run(&workload)),
        Ok(Request::Record { workload, touches }) => report(runner.record(&workload, touches)),
        Err(e) => Report::Error { message: e.to_string() },
    })
}

fn report(result: Result<RunResult, WorkloadError>) -> Report {
    match result {
        Ok(result) => Report::Result(result),
        Err(e) => Report::Error { message: e.to_string() },
    }
}

fn send(channel: &mut File, report: &Report) -> io::Result<()> {
    let line = encode_line(report).or_else(|e| {
        encode_line(&Report::Error {
            message: format!("cannot report the result: {e}; ask for a shorter run"),
        })
    });
    channel.write_all(&line.map_err(io::Error::other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_answered_with_an_error() {
        let mut runner = Runner::default();
        for line in [
            Ok(b"garbage".to_vec()),
            Ok(b"{\"request\":\"dance\"}".to_vec()),
            Ok(vec![0xff; 10]),
            Err(LineError::TooLong),
        ] {
            let report = answer(line, &mut runner);
            assert!(matches!(report, Some(Report::Error { .. })), "{report:?}");
        }
        assert_eq!(answer(Ok(b"{\"request\":\"power_off\"}".to_vec()), &mut runner), None);
    }
}
