//! Text into HTML and into its scripts. A guest or a scenario may contain anything; here it becomes harmless.
//!
//! Elements and attributes are maud's, which escapes whatever it is given. What is left is JSON inside of a
//! script element, where a browser looks for `</script` and `<!--` whatever JSON says.

use serde::Serialize;

/// JSON that may stand in a script element: the same value, without a character that means something to HTML,
/// or that ends a line to JavaScript.
///
/// # Errors
/// What serde says.
pub(super) fn json<T: Serialize>(value: &T) -> Result<String, String> {
    let text = serde_json::to_string(value).map_err(|error| error.to_string())?;
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            // All of them are inside of strings: JSON's own syntax has none.
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => escaped.push(c),
        }
    }
    Ok(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    #[test]
    fn what_would_end_a_script_is_escaped() {
        for (text, expected) in [
            ("</script>", r#""\u003c/script\u003e""#),
            ("<!-- & \"", r#""\u003c!-- \u0026 \"""#),
            ("\u{2028}\u{2029}\\u003c", r#""\u2028\u2029\\u003c""#),
        ] {
            assert_eq!(json(&text).unwrap(), expected);
        }
    }

    proptest! {
        #[test]
        fn any_text_comes_back_and_means_nothing_to_html(text: String, html in "[<>&/!\u{2028}a-]*") {
            for text in [text, html] {
                let escaped = json(&[&text]).unwrap();
                let harmful = escaped.contains(['<', '>', '&', '\u{2028}', '\u{2029}']);
                prop_assert!(!harmful);
                let value: Value = serde_json::from_str(&escaped).unwrap();
                prop_assert_eq!(value[0].as_str(), Some(text.as_str()));
            }
        }
    }
}
