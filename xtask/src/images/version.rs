//! Versions in package names.

/// The name among `names` that is `<prefix><version><suffix>` with the highest version; the version
/// begins with `series` and has at least `parts` numbers (meta packages have fewer).
pub(crate) fn newest(
    names: &[String],
    prefix: &str,
    suffix: &str,
    series: &[u64],
    parts: usize,
) -> Option<String> {
    names
        .iter()
        .filter_map(|name| {
            let version = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            let dotted = version.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
            let numbers = numbers(version);
            let whole = dotted.split('.').all(|part| !part.is_empty());
            (whole && dotted.split('.').count() >= parts && numbers.starts_with(series))
                .then_some((numbers, name))
        })
        .max()
        .map(|(_, name)| name.clone())
}

/// The numbers in a version, in order.
pub(crate) fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::newest;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn the_newest_of_a_series() {
        let names = names(&[
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-cloud-amd64-dbg",
            "linux-image-cloud-amd64",
        ]);
        let find = |series: &[u64]| newest(&names, "linux-image-", "-cloud-amd64", series, 3);
        assert_eq!(find(&[6, 12]).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(find(&[6, 1]).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(find(&[]).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(find(&[7]), None);
    }

    #[test]
    fn source_packages() {
        let names = names(&["linux-source-6.1", "linux-source-6.12", "linux-source-6.8.0"]);
        let find = |series: &[u64]| newest(&names, "linux-source-", "", series, 2);
        assert_eq!(find(&[6, 12]).as_deref(), Some("linux-source-6.12"));
        assert_eq!(find(&[6, 8]).as_deref(), Some("linux-source-6.8.0"));
    }
}
