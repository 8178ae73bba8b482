//! From facts to checks: pure functions, one file per subject.

mod host;
mod kvm;
mod uffd;

pub(super) use kvm::CAPABILITIES;

use super::facts::{Access, Facts, Identity};
use super::report::{Check, Status};

/// The way out for a host that cannot run guests.
const USE_NESTED: &str = "use the nested machine: `cargo xtask demo --nested`";

/// All checks that decide whether this host can run a guest directly.
pub(super) fn of_this_host(facts: &Facts) -> Vec<Check> {
    let mut checks = kvm::checks(facts);
    checks.extend(uffd::checks(facts));
    checks.extend(host::checks(facts));
    checks
}

/// QEMU: a must only where the host cannot run guests itself.
pub(super) fn nested_qemu(facts: &Facts, host_can: bool) -> Check {
    const NEEDED_FOR: &str = "the nested machine, for hosts whose KVM cannot run guests";
    match &facts.qemu {
        Some(version) => check("nested.qemu", NEEDED_FOR).pass(version),
        None => {
            let status = if host_can { Status::Warn } else { Status::Fail };
            check("nested.qemu", NEEDED_FOR).not_passed(
                status,
                "qemu-system-x86_64 is not on the PATH",
                "`sudo apt-get install qemu-system-x86` (`cargo xtask demo --nested` does it)",
            )
        }
    }
}

/// A check that has no result yet.
struct Unfinished {
    name: String,
    needed_for: &'static str,
}

fn check(name: impl Into<String>, needed_for: &'static str) -> Unfinished {
    Unfinished { name: name.into(), needed_for }
}

impl Unfinished {
    fn finish(self, status: Status, found: String, remedy: Option<String>) -> Check {
        Check { name: self.name, status, found, needed_for: self.needed_for, remedy }
    }

    fn pass(self, found: impl Into<String>) -> Check {
        self.finish(Status::Pass, found.into(), None)
    }

    fn skip(self, found: impl Into<String>) -> Check {
        self.finish(Status::Skip, found.into(), None)
    }

    fn warn(self, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        self.not_passed(Status::Warn, found, remedy)
    }

    fn fail(self, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        self.not_passed(Status::Fail, found, remedy)
    }

    fn not_passed(
        self,
        status: Status,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Check {
        self.finish(status, found.into(), Some(remedy.into()))
    }
}

/// What was found and what to do about a device node that exists but is not for us; `None` for
/// every other kind of access.
fn denied(path: &str, access: &Access, identity: &Identity) -> Option<(String, String)> {
    let Access::Denied { owner, group, gid, mode } = access else {
        return None;
    };
    let found = format!(
        "{path} belongs to {owner}:{group} with mode {mode:04o}, and user id {} may not open it",
        identity.uid
    );
    const GROUP_READ_WRITE: u32 = 0o060;
    let remedy = if identity.uid == 0 {
        format!(
            "root is refused by the container's device rules: start the container with \
             `--device {path}`"
        )
    } else if mode & GROUP_READ_WRITE == GROUP_READ_WRITE
        && *gid != 0
        && !identity.gids.contains(gid)
    {
        format!("join its group: `sudo usermod -aG {group} $USER`, then log in again")
    } else {
        format!("`sudo setfacl -m u:$USER:rw {path}` (until the next boot; a udev rule keeps it)")
    };
    Some((found, remedy))
}
