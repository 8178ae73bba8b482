//! A setting of the host's kernel, put back when dropped.

use std::fs;

use anyhow::{Context, Result};

/// How many pages the host reads from swap at a fault, as a power of two.
pub(crate) const PAGE_CLUSTER: &str = "/proc/sys/vm/page-cluster";
/// What the host backs by huge pages: always, madvise (QEMU asks for them) or never.
pub(crate) const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// A changed setting.
pub(crate) struct Setting {
    file: &'static str,
    before: String,
}

impl Setting {
    /// Changes it.
    pub(crate) fn change(file: &'static str, value: &str) -> Result<Self> {
        let before = current(file)?;
        fs::write(file, value).with_context(|| format!("writing {value} to {file}"))?;
        Ok(Self { file, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.file, &self.before) {
            eprintln!("peers-bench: {} stays changed: {error}", self.file);
        }
    }
}

/// Its value; where the file lists all values, the one in brackets.
pub(crate) fn current(file: &str) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    Ok(selected(&text).to_owned())
}

fn selected(text: &str) -> &str {
    let in_brackets = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    in_brackets.map_or(text.trim(), |(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::selected;

    #[test]
    fn a_value_alone_or_in_a_list() {
        assert_eq!(selected("3\n"), "3");
        assert_eq!(selected("always [madvise] never\n"), "madvise");
    }
}
