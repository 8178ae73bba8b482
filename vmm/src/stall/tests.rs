//! The whole driver, with a shell script in place of `nowait run`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nowait_wire::agent::{PROTOCOL, Report, encode_line};

use super::document::tests::{BOOT, host, result};
use super::*;

/// A driver whose guest is this script; `$REPORTS` in it is a file with all reports of one boot.
fn driver(dir: &Path, script: &str, options: &[&str]) -> Driver {
    let mut all = vec!["--cpus", "2", "--apf", "host", "--duration", "10ms"];
    all.extend(options);
    let args = plan::tests::parse(&all).unwrap();
    let plan = Plan::new(&args).unwrap();
    let mut lines = encode_line(&Report::Hello {
        protocol: PROTOCOL,
        kernel: "6.12".into(),
        cpus: BOOT.vcpus,
        mem_total_kib: 1,
    })
    .unwrap();
    for workload in &plan.workloads(2) {
        lines.extend(encode_line(&Report::Result(result(workload, 2))).unwrap());
        lines.extend(encode_line(&Report::Host(host())).unwrap());
    }
    let (reports, program) = (dir.join("reports"), dir.join("guest"));
    fs::write(&reports, lines).unwrap();
    let script =
        format!("#!/bin/sh\n[ \"$1\" ] || exit 0\nREPORTS={}\n{script}\n", reports.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    // Another test's child may hold the script open for writing until it executes its own program.
    while Command::new(&program)
        .status()
        .is_err_and(|e| e.kind() == io::ErrorKind::ExecutableFileBusy)
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    Driver {
        document: Document::new(&args, &plan),
        stop: Arc::new(AtomicBool::new(false)),
        headed: false,
        args,
        plan,
        program,
    }
}

fn outcome(script: &str, options: &[&str]) -> (Result<(), StallError>, Document, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path(), script, options);
    let mut out = Vec::new();
    let result = driver.run(&mut out);
    driver.document.judge(&driver.plan);
    if result.is_ok() {
        table::foot(&mut out, &driver.document).unwrap();
    }
    (result, driver.document, String::from_utf8(out).unwrap())
}

#[test]
fn a_good_guest_gives_all_rows() {
    let check = "[ \"$(wc -l < /proc/self/fd/0)\" = 6 ] || exit 14";
    let (result, document, table) = outcome(&format!("{check}; cat $REPORTS"), &[]);
    result.unwrap();
    assert!(document.complete, "{:?}", document.failures);
    assert_eq!(document.runs.len(), 5);
    assert_eq!(table.lines().count(), 12, "{table}");
    assert!(verdict(document, 5).is_ok());
}

#[test]
fn a_guest_that_dies_keeps_the_rows_it_made() {
    let (result, document, table) = outcome("head -n 5 $REPORTS; echo boom >&2; exit 12", &[]);
    result.unwrap();
    assert_eq!((document.runs.len(), document.complete), (2, false));
    assert_eq!(document.failures[0].message, "boom");
    assert!(table.contains("missing: host with 2 vCPUs: boom"), "{table}");
    let error = verdict(document, 5).unwrap_err();
    assert_eq!(error.exit_code(), exit::MEASUREMENT);
    assert!(error.to_string().contains("2 of 5"));
    assert!(error.to_string().ends_with("; first trouble: host with 2 vCPUs: boom"), "{error}");
}

#[test]
fn a_guest_that_hangs_is_given_up_in_time() {
    let start = Instant::now();
    let script = "head -n 3 $REPORTS; exec sleep 1000";
    let (result, document, _) = outcome(script, &["--timeout", "1"]);
    result.unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(document.failures[0].message, "4 runs were not over within 1 s");
}

#[test]
fn an_operand_that_the_child_refuses_ends_it_all() {
    let (result, document, table) = outcome("echo \"nowait: kernel 'k': no\" >&2; exit 4", &[]);
    let error = result.unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().as_str()), (exit::OPERAND, "kernel 'k': no"));
    assert!(document.runs.is_empty() && table.is_empty());
}

#[test]
fn garbage_from_a_guest_costs_only_its_rows() {
    for garbage in ["echo garbage", "cat $REPORTS $REPORTS", "head -c 400000 /dev/zero"] {
        let (result, document, _) = outcome(&format!("{garbage}; exec sleep 1000"), &[]);
        result.unwrap();
        assert_eq!((document.failures.len(), document.complete), (1, false), "{garbage}");
    }
}

#[test]
fn a_signal_ends_it_and_the_child_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    let script = format!("echo $$ > {}; exec sleep 1000", pid.display());
    let mut driver = driver(dir.path(), &script, &[]);
    let stop = Arc::clone(&driver.stop);
    let thread = std::thread::spawn(move || driver.run(&mut Vec::new()));
    let pid = loop {
        match fs::read_to_string(&pid) {
            Ok(text) if text.ends_with('\n') => break text.trim().to_owned(),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    stop.store(true, Ordering::Relaxed);
    let error = thread.join().unwrap().unwrap_err();
    assert_eq!(error.exit_code(), exit::STOPPED);
    assert!(!Path::new("/proc").join(pid).exists());
}

#[test]
fn data_errors_are_no_success() {
    let (result, mut document, _) = outcome("cat $REPORTS", &[]);
    result.unwrap();
    document.runs[1].data_errors = 3;
    let error = verdict(document, 5).unwrap_err();
    assert_eq!(error.exit_code(), exit::MEASUREMENT);
    assert!(error.to_string().starts_with("3 pages"));
}
