//! Kernel configuration: does every option of a fragment hold in the final `.config`?

use std::collections::HashMap;

/// The options of `fragment` that `config` does not have as asked, one line each.
pub(crate) fn lost(fragment: &str, config: &str) -> Vec<String> {
    let have: HashMap<&str, &str> = config.lines().filter_map(option).collect();
    fragment
        .lines()
        .filter_map(option)
        .filter_map(|(name, wanted)| {
            // "is not set" and absent are the same.
            let found = have.get(name).copied().unwrap_or("n");
            (found != wanted).then(|| format!("{name}: wanted {wanted}, got {found}"))
        })
        .collect()
}

/// `CONFIG_X=v` or `# CONFIG_X is not set` as name and value.
fn option(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if let Some(rest) = line.strip_prefix("# ") {
        let name = rest.strip_suffix(" is not set")?;
        return name.starts_with("CONFIG_").then_some((name, "n"));
    }
    line.starts_with("CONFIG_").then(|| line.split_once('=')).flatten()
}

#[cfg(test)]
mod tests {
    use super::lost;

    #[test]
    fn survivors_and_losses_are_told_apart() {
        let config = "CONFIG_A=y\nCONFIG_N=32\n# CONFIG_B is not set\nCONFIG_C=y\n";
        assert!(lost("# comment\nCONFIG_A=y\nCONFIG_N=32\n", config).is_empty());
        assert!(lost("# CONFIG_B is not set\n# CONFIG_Z is not set\n", config).is_empty());
        assert_eq!(lost("CONFIG_B=y\n", config), ["CONFIG_B: wanted y, got n"]);
        assert_eq!(lost("# CONFIG_C is not set\n", config), ["CONFIG_C: wanted n, got y"]);
        assert_eq!(lost("CONFIG_Q=y\n", config), ["CONFIG_Q: wanted y, got n"]);
    }
}
