//! Requests to a control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take at all.
const LIMIT: Duration = Duration::from_secs(60);

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub code: u16,
    /// The body.
    pub body: String,
    /// From the connection on.
    pub took: Duration,
}

impl Answer {
    /// The number of a series of Prometheus text, `None` when it is not shown.
    ///
    /// # Panics
    /// When it is no number.
    #[must_use]
    pub fn metric(&self, series: &str) -> Option<f64> {
        let mut lines = self.body.lines().filter_map(|line| line.rsplit_once(' '));
        let (_, number) = lines.find(|(name, _)| *name == series)?;
        Some(number.parse().expect("a number"))
    }
}

/// Asks, and reads the whole answer.
///
/// # Errors
/// When nobody listens, or the answer is none.
pub fn ask(socket: &Path, first_line: &str, body: &str) -> io::Result<Answer> {
    let asked = Instant::now();
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let length = body.len();
    let request = format!("{first_line} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let took = asked.elapsed();
    let parsed = reply.split_once("\r\n\r\n").and_then(|(head, body)| {
        let code = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { code, body: body.to_owned(), took })
    });
    parsed.ok_or_else(|| io::Error::other(format!("no answer: {reply}")))
}
