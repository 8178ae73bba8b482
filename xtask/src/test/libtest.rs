//! The output of libtest and of libtest-mimic: counts, failures, and skips with their reasons.
//!
//! libtest has no skip: a test that cannot run here prints a line `SKIP: reason` and passes. With
//! `--show-output` that line stands below `---- name stdout ----`; such a test is counted as skipped.
//! libtest-mimic says `test name ... ignored (reason)`.

/// What was counted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Tests that passed.
    pub(crate) passed: usize,
    /// Tests that failed.
    pub(crate) failed: usize,
    /// Tests that were skipped.
    pub(crate) skipped: usize,
    /// Skipped tests and why.
    pub(crate) skips: Vec<(String, String)>,
    /// Names of what failed.
    pub(crate) failures: Vec<String>,
    /// Failed tests and what they said: the first lines and the last, each cut to a line of a terminal.
    pub(crate) words: Vec<(String, Vec<String>)>,
}

/// How many lines of what a failed test said are kept, of its beginning and of its end.
const FIRST_WORDS: usize = 2;
const LAST_WORDS: usize = 40;
/// How much of each.
const WORDS_CHARS: usize = 160;

impl Counts {
    /// Adds another count to this one.
    pub(crate) fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.skips.extend(other.skips);
        self.failures.extend(other.failures);
        self.words.extend(other.words);
    }

    /// A run that failed: counted as a failed test unless its failed tests are counted already.
    pub(crate) fn note_failure(&mut self, what: String) {
        if self.failed == 0 {
            self.failed = 1;
            self.failures.push(what);
        }
    }

    /// Whether there was no test at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed + self.skipped == 0
    }

    /// The line that sums up.
    pub(crate) fn line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Reads the output of one or more test programs.
#[derive(Default)]
pub(crate) struct Parser {
    counts: Counts,
    /// The test whose output we are in, until it is known to be a skip.
    output_of: Option<String>,
    /// Tests that passed by libtest's count and said SKIP.
    passed_as_skip: usize,
    /// Programs that began and have not summed up.
    open: usize,
    /// Tests that began in the present program.
    names: Vec<String>,
    /// We are in a list of failed tests.
    in_failures: bool,
    /// We are in what the last of `counts.words` said.
    in_words: bool,
}

impl Parser {
    /// Takes one line.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            (self.in_failures, self.in_words) = (false, false);
            self.names.clear();
            self.result(rest);
        } else if line == "failures:" {
            (self.in_failures, self.in_words) = (true, false);
        } else if let Some(name) = self.failed_header(line) {
            self.counts.words.push((name, Vec::new()));
            self.in_words = true;
        } else if is_title(line) {
            self.open += 1;
            (self.output_of, self.in_words) = (None, false);
        } else if self.in_words {
            self.word(line);
        } else if self.in_failures && line.starts_with("    ") {
            self.failure(line.trim());
        } else if let Some(name) = output_header(line) {
            self.output_of = Some(name.to_owned());
        } else if let Some(reason) = line.trim_start().strip_prefix("SKIP:") {
            if let Some(name) = self.output_of.take() {
                self.counts.skips.push((name, reason.trim().to_owned()));
                self.passed_as_skip += 1;
            }
        } else if let Some(rest) = line.strip_prefix("test ") {
            self.test(rest);
        }
    }

    /// A program began and has not summed up.
    pub(crate) fn is_open(&self) -> bool {
        self.open > 0
    }

    /// The counts. A program that began and never summed up has died: a failed test.
    pub(crate) fn finish(self) -> Counts {
        let mut counts = self.counts;
        let skipped = self.passed_as_skip.min(counts.passed);
        counts.passed -= skipped;
        counts.skipped += skipped;
        for _ in 0..self.open {
            counts.failed += 1;
            counts.failures.push("a test program died before it summed up".to_owned());
        }
        counts
    }

    /// `name ... ok`, `name ... ignored, reason`, `name ... ignored (reason)`; the verdict may stand on a later
    /// line when the test prints, so failures are taken from the list that follows.
    fn test(&mut self, rest: &str) {
        let Some((name, verdict)) = rest.split_once(" ... ") else {
            return;
        };
        let name = name.trim();
        self.names.push(name.to_owned());
        if let Some(reason) = verdict.strip_prefix("ignored") {
            let reason = reason.trim_start_matches([',', ' ', '(']).trim_end_matches(')');
            let reason = if reason.is_empty() { "ignored" } else { reason };
            self.counts.skips.push((name.to_owned(), reason.to_owned()));
        }
    }

    /// A line of the list of failures, which may also be a line of a failed test's own output.
    fn failure(&mut self, name: &str) {
        if self.names.iter().any(|begun| begun == name)
            && !self.counts.failures.iter().any(|failed| failed == name)
        {
            self.counts.failures.push(name.to_owned());
        }
    }

    /// `---- name ----` of libtest-mimic or `---- name stdout ----`, above what a failed test said.
    fn failed_header(&self, line: &str) -> Option<String> {
        let name = line.strip_prefix("---- ")?.strip_suffix(" ----")?;
        let name = name.strip_suffix(" stdout").unwrap_or(name);
        (self.in_failures && self.names.iter().any(|begun| begun == name)).then(|| name.to_owned())
    }

    /// A line that a failed test said.
    fn word(&mut self, line: &str) {
        let Some((_, words)) = self.counts.words.last_mut() else { return };
        if line.trim().is_empty() {
            return;
        }
        words.push(line.chars().take(WORDS_CHARS).collect());
        if words.len() > FIRST_WORDS + LAST_WORDS {
            words.remove(FIRST_WORDS);
        }
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; …`
    fn result(&mut self, rest: &str) {
        self.open = self.open.saturating_sub(1);
        for part in rest.split([';', '.']) {
            let Some((number, what)) = part.trim().split_once(' ') else {
                continue;
            };
            let Ok(number) = number.parse::<usize>() else {
                continue;
            };
            match what {
                "passed" => self.counts.passed += number,
                "failed" => self.counts.failed += number,
                "ignored" => self.counts.skipped += number,
                _ => {}
            }
        }
    }
}

/// What a program of libtest-mimic that died in the middle had counted, and how many of its tests had ended.
/// They run one after the other: the last that began had not.
pub(super) fn so_far(text: &str) -> (Counts, usize) {
    let mut begun: Vec<(&str, Option<bool>)> = Vec::new();
    let mut counts = Counts::default();
    for line in text.lines() {
        let (name, verdict) = match line.strip_prefix("test ").and_then(|l| l.split_once(" ... ")) {
            Some((name, verdict)) => {
                begun.push((name.trim(), None));
                (name.trim(), verdict)
            }
            None => (begun.last().map_or("", |last| last.0), line),
        };
        let Some((_, failed)) = begun.last_mut() else { continue };
        if verdict == "ok" || verdict == "FAILED" {
            *failed = Some(verdict == "FAILED");
        } else if let Some(reason) = verdict.strip_prefix("ignored") {
            let reason = reason.trim_start_matches([',', ' ', '(']).trim_end_matches(')');
            counts.skips.push((name.to_owned(), reason.to_owned()));
            *failed = None;
        }
    }
    begun.pop();
    let skipped = |name: &str| counts.skips.iter().any(|(skip, _)| skip == name);
    let (mut passed, mut failures, mut ignored) = (0, Vec::new(), 0);
    for (name, failed) in &begun {
        match failed {
            Some(true) => failures.push((*name).to_owned()),
            _ if skipped(name) => ignored += 1,
            _ => passed += 1,
        }
    }
    (counts.passed, counts.failed, counts.skipped) = (passed, failures.len(), ignored);
    counts.failures = failures;
    (counts, begun.len())
}

/// `---- name stdout ----`
fn output_header(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

/// `running 3 tests`
fn is_title(line: &str) -> bool {
    let count = line.strip_prefix("running ").and_then(|rest| rest.split_once(" test"));
    count.is_some_and(|(number, plural)| {
        number.parse::<usize>().is_ok() && matches!(plural, "" | "s")
    })
}

#[cfg(test)]
mod tests {
    use super::{Counts, FIRST_WORDS, LAST_WORDS, Parser, WORDS_CHARS, so_far};

    fn parse(text: &str) -> Counts {
        let mut parser = Parser::default();
        text.lines().for_each(|line| parser.line(line));
        parser.finish()
    }

    #[test]
    fn libtest_with_a_skip() {
        let counts = parse(
            "\nrunning 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... ignored, slow\n\
             test d ... FAILED\n\nsuccesses:\n\n---- b stdout ----\nSKIP: no /dev/kvm\n\n\n\
             successes:\n    a\n    b\n\nfailures:\n\n---- d stdout ----\n    e\n\nfailures:\n    d\n\n\
             test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; \
             finished in 0.01s\n",
        );
        assert_eq!(counts.line(), "1 passed, 1 failed, 2 skipped");
        assert_eq!(counts.failures, ["d"]);
        let skip = |name: &str, why: &str| (name.to_owned(), why.to_owned());
        assert_eq!(counts.skips, [skip("c", "slow"), skip("b", "no /dev/kvm")]);
    }

    #[test]
    fn libtest_mimic_and_sums() {
        let counts = parse(
            "running 2 tests\ntest boot::pvh  ... ok\ntest swap       ... ignored (no swap)\n\n\
             test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished \
             in 1.00s\n\nrunning 1 test\ntest x ... ok\n\ntest result: ok. 1 passed; 0 failed; \
             0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        assert_eq!(counts.line(), "2 passed, 0 failed, 1 skipped");
        assert_eq!(counts.skips, [("swap".to_owned(), "no swap".to_owned())]);
    }

    #[test]
    fn what_failed_tests_said_is_kept_cut() {
        let lines = (0..100).map(|line| format!("line {line}\n")).collect::<String>();
        let long = "x".repeat(500);
        let counts = parse(&format!(
            "running 3 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... FAILED\n\nfailures:\n\n\
             ---- b ----\ntest panicked: of b\n---- d ----\n{lines}\n---- c stdout ----\n{long}\n    a\n\n\n\
             failures:\n    b\n    c\n\ntest result: FAILED. 1 passed; 2 failed; 0 ignored\n"
        ));
        assert_eq!(counts.failures, ["b", "c"]);
        let [(b, of_b), (c, of_c)] = &counts.words[..] else { panic!("{:?}", counts.words) };
        assert_eq!((b.as_str(), c.as_str()), ("b", "c"));
        // No test d began: a line of what b said.
        assert_eq!(of_b[..FIRST_WORDS], ["test panicked: of b", "---- d ----"]);
        assert_eq!(of_b.len(), FIRST_WORDS + LAST_WORDS);
        assert_eq!(of_b.last().unwrap(), "line 99");
        assert_eq!(of_c[..], ["x".repeat(WORDS_CHARS), "    a".to_owned()]);
    }

    #[test]
    fn a_dead_program_is_a_failure() {
        let counts = parse("running 2 tests\ntest a ... ok\ntest b ... ");
        assert_eq!(counts.line(), "0 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn a_program_that_died_has_counted_what_ended_before() {
        let text = "\nrunning 5 tests\ntest a::one   ... ok\ntest a::two ... noise\nmore\nFAILED\n\
            test b::three ... ignored (no disk)\ntest b::four ... said\nok\ntest c::five ... \n";
        let (counts, ended) = so_far(text);
        assert_eq!(ended, 4);
        assert_eq!((counts.passed, counts.failed, counts.skipped), (2, 1, 1));
        assert_eq!(counts.failures, ["a::two"]);
        assert_eq!(counts.skips, [("b::three".to_owned(), "no disk".to_owned())]);
        assert_eq!(so_far("").1, 0);
    }
}
