//! Cuts what arrives on the agent channel into lines of bounded length.

use nowait_wire::agent::{LineError, MAX_LINE_BYTES};

/// Bytes that have arrived and are not yet a line.
#[derive(Default)]
pub(crate) struct Lines {
    pending: Vec<u8>,
    /// The line that is arriving is too long: drop the rest of it.
    too_long: bool,
}

impl Lines {
    /// Takes bytes in; gives each line that they complete, without its newline, or says that it was
    /// too long. Empty lines are left out.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<Result<Vec<u8>, LineError>> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                if self.pending.len() + 1 == MAX_LINE_BYTES {
                    self.too_long = true;
                    self.pending.clear();
                }
                if !self.too_long {
                    self.pending.push(byte);
                }
            } else if std::mem::take(&mut self.too_long) {
                lines.push(Err(LineError::TooLong));
            } else if !self.pending.is_empty() {
                lines.push(Ok(std::mem::take(&mut self.pending)));
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_arrive() {
        let mut lines = Lines::default();
        assert!(lines.push(b"a").is_empty());
        let got: Vec<_> = lines.push(b"b\n\ncd\ne").into_iter().flatten().collect();
        assert_eq!(got, [b"ab", b"cd"]);
        let got: Vec<_> = lines.push(b"\n").into_iter().flatten().collect();
        assert_eq!(got, [b"e"]);
    }

    #[test]
    fn a_line_that_is_too_long_is_dropped_whole() {
        let mut lines = Lines::default();
        assert!(lines.push(&vec![b'x'; 3 * MAX_LINE_BYTES]).is_empty());
        assert!(lines.pending.len() <= MAX_LINE_BYTES);
        let got = lines.push(b"yy\nz\n");
        assert!(matches!(got[0], Err(LineError::TooLong)));
        assert_eq!(got[1].as_deref().unwrap(), b"z");
        let got = lines.push(&[vec![b'x'; MAX_LINE_BYTES - 1], vec![b'\n']].concat());
        assert_eq!(got[0].as_ref().unwrap().len(), MAX_LINE_BYTES - 1);
    }
}
