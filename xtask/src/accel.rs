//! Where guests run: on this host's KVM if a probe guest runs there, else in the nested machine.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use clap::Args;
use serde::Deserialize;

use crate::progress;

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accel {
    /// On this host's KVM.
    Host,
    /// In the emulated machine.
    Nested,
}

/// `--host` and `--nested`.
#[derive(Args, Debug, Clone, Copy, Default)]
#[group(multiple = false)]
pub(crate) struct Force {
    /// Run guests on this host's KVM
    #[arg(long)]
    host: bool,
    /// Run guests in the emulated nested machine
    #[arg(long)]
    nested: bool,
}

/// `nowait doctor --json`, as far as we read it.
#[derive(Deserialize)]
struct Doctor {
    checks: Vec<Check>,
}

#[derive(Deserialize)]
struct Check {
    name: String,
    status: Status,
    #[serde(default)]
    found: String,
}

#[derive(Deserialize, PartialEq, Eq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Status {
    Pass,
    Warn,
    Fail,
    Skip,
}

/// Asks the probe guest, unless the user has decided; prints one line that says which and why.
pub(crate) fn choose(force: Force, nowait: &Path) -> Result<Accel> {
    let (accel, why) = if force.host {
        (Accel::Host, "--host".to_owned())
    } else if force.nested {
        (Accel::Nested, "--nested".to_owned())
    } else {
        decide(&doctor(nowait)?)
    };
    let what = match accel {
        Accel::Host => "on this host's KVM",
        Accel::Nested => "in the emulated nested machine",
    };
    progress::line("guests run", &format!("{what}: {why}"));
    Ok(accel)
}

/// The report of `nowait doctor` about this host. Its exit code says that something is missing, which
/// the report says better.
fn doctor(nowait: &Path) -> Result<String> {
    let output = Command::new(nowait)
        .args(["doctor", "--json", "-"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", nowait.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn decide(report: &str) -> (Accel, String) {
    let doctor: Doctor = match serde_json::from_str(report) {
        Ok(doctor) => doctor,
        Err(error) => {
            return (Accel::Nested, format!("no report from `nowait doctor` ({error})"));
        }
    };
    let say = |check: &Check| {
        let found = check.found.trim();
        if found.is_empty() { check.name.clone() } else { format!("{}: {found}", check.name) }
    };
    let Some(guest) = doctor.checks.iter().find(|check| check.name == "kvm.guest") else {
        return (Accel::Nested, "`nowait doctor` has no check kvm.guest".to_owned());
    };
    if !matches!(guest.status, Status::Pass | Status::Warn) {
        return (Accel::Nested, format!("the probe guest failed here ({})", say(guest)));
    }
    // A KVM alone is of no use to us: what else fails here (userfaultfd above all) decides too.
    let needed = |check: &&Check| !check.name.starts_with("nested");
    let failed = doctor.checks.iter().filter(needed).find(|check| check.status == Status::Fail);
    match failed {
        Some(check) => (Accel::Nested, say(check)),
        None => (Accel::Host, "the probe guest ran here".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Accel, decide};

    fn report(guest: &str, uffd: &str) -> String {
        format!(
            r#"{{"schema":"nowait.doctor/1","checks":[
                {{"name":"kvm.guest","status":"{guest}","found":"x"}},
                {{"name":"uffd.open","status":"{uffd}"}}]}}"#
        )
    }

    #[test]
    fn the_probe_guest_decides() {
        assert_eq!(decide(&report("pass", "pass")).0, Accel::Host);
        assert_eq!(decide(&report("fail", "pass")).0, Accel::Nested);
        assert_eq!(decide(&report("skip", "pass")).0, Accel::Nested);
        assert_eq!(decide(&report("pass", "fail")).0, Accel::Nested);
        assert_eq!(decide("").0, Accel::Nested);
    }
}
