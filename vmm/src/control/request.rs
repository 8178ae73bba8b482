//! What a client asks for: the bytes of an HTTP request to a command, or to why not. No sockets here.

use guest_memory::MIN_RESIDENT_LIMIT_BYTES;

use super::reply::{Reply, Status};
use crate::paging::{BadThreshold, Threshold};
use crate::size;

/// The longest head of a request, in bytes.
pub(super) const MAX_HEAD_BYTES: usize = 8 << 10;
/// The longest body of a request, in bytes.
pub(super) const MAX_BODY_BYTES: usize = 256;
/// The most parts of RAM whose pages are counted, and how many they are when nobody says.
pub(super) const MAX_CELLS: u32 = 1024;
const CELLS: u32 = 64;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// The counters, as text.
    Metrics,
    /// Keep the vCPUs out of the guest.
    Pause,
    /// Let them go on.
    Resume,
    /// Another resident limit, in bytes; `None` is none.
    Limit(Option<u64>),
    /// Move all of guest RAM to the store.
    Evict,
    /// Pages by state, in so many parts of RAM.
    Pages(u32),
    /// From which expected latency on the guest is told of a page.
    Threshold(Threshold),
}

/// How far a request has come.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Parsed {
    /// There has to come more.
    Partial,
    /// It is whole.
    Command(Command),
    /// It will not be done; this is the answer.
    Refused(Reply),
}

/// Reads as much of a request as has come. Never asks for more than [`MAX_HEAD_BYTES`] and
/// [`MAX_BODY_BYTES`] together.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    match try_parse(bytes) {
        Ok(Some(command)) => Parsed::Command(command),
        Ok(None) => Parsed::Partial,
        Err(reply) => Parsed::Refused(reply),
    }
}

fn try_parse(bytes: &[u8]) -> Result<Option<Command>, Reply> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let head_bytes = match request.parse(bytes) {
        Ok(httparse::Status::Complete(head_bytes)) if head_bytes <= MAX_HEAD_BYTES => head_bytes,
        Ok(httparse::Status::Partial) if bytes.len() <= MAX_HEAD_BYTES => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            let line = format!("at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers");
            return Err(Reply::refuse(Status::HeadTooLarge, line));
        }
        Err(error) => {
            return Err(Reply::refuse(Status::BadRequest, format!("not HTTP/1.1: {error}")));
        }
    };
    let wanted = Wanted::find(request.method.unwrap_or(""), request.path.unwrap_or(""))?;
    let body_bytes = body_bytes(request.headers)?;
    match bytes[head_bytes..].get(..body_bytes) {
        Some(body) => wanted.command(body).map(Some),
        None => Ok(None),
    }
}

/// What there is.
const KNOWN: &str = "there are GET /metrics, GET /pages?cells=N, POST /pause, POST /resume, PUT /limit, \
                     PUT /threshold, POST /evict";

/// A command whose body has yet to be read.
enum Wanted {
    Plain(Command),
    Limit,
    Threshold,
}

impl Wanted {
    fn find(method: &str, target: &str) -> Result<Self, Reply> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (wanted, methods): (Self, &[&str]) = match path {
            "/metrics" => (Self::Plain(Command::Metrics), &["GET"]),
            "/pause" => (Self::Plain(Command::Pause), &["POST"]),
            "/resume" => (Self::Plain(Command::Resume), &["POST"]),
            "/evict" => (Self::Plain(Command::Evict), &["POST"]),
            "/limit" => (Self::Limit, &["PUT", "POST"]),
            "/threshold" => (Self::Threshold, &["PUT", "POST"]),
            "/pages" => {
                let cells = cells(query).map_err(|line| Reply::refuse(Status::BadRequest, line))?;
                (Self::Plain(Command::Pages(cells)), &["GET"])
            }
            _ => {
                return Err(Reply::refuse(Status::NotFound, KNOWN));
            }
        };
        if methods.contains(&method) {
            return Ok(wanted);
        }
        let line = format!("{path} takes {}", methods.join(" or "));
        Err(Reply::refuse(Status::WrongMethod(methods), line))
    }

    fn command(&self, body: &[u8]) -> Result<Command, Reply> {
        match self {
            Self::Plain(command) => Ok(*command),
            Self::Limit => limit(body)
                .map(Command::Limit)
                .map_err(|line| Reply::refuse(Status::BadRequest, line)),
            Self::Threshold => threshold(body)
                .map(Command::Threshold)
                .map_err(|error| Reply::refuse(Status::BadRequest, error.to_string())),
        }
    }
}

/// The length of the body, which a client that sends one has to say.
fn body_bytes(headers: &[httparse::Header<'_>]) -> Result<usize, Reply> {
    let mut length = None;
    for header in headers {
        if header.name.eq_ignore_ascii_case("Transfer-Encoding") {
            let line = "send the body with a Content-Length, not in chunks";
            return Err(Reply::refuse(Status::LengthRequired, line));
        }
        if !header.name.eq_ignore_ascii_case("Content-Length") {
            continue;
        }
        let digits = std::str::from_utf8(header.value).unwrap_or("").trim();
        let valid = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let bytes = digits.parse().unwrap_or(usize::MAX);
        if !valid || length.is_some_and(|length| length != bytes) {
            return Err(Reply::refuse(Status::BadRequest, "Content-Length is not one number"));
        }
        length = Some(bytes);
    }
    let bytes = length.unwrap_or(0);
    if bytes > MAX_BODY_BYTES {
        let line = format!("a body has at most {MAX_BODY_BYTES} bytes");
        return Err(Reply::refuse(Status::BodyTooLarge, line));
    }
    Ok(bytes)
}

/// How many parts a query asks for; other parameters are nobody's.
fn cells(query: &str) -> Result<u32, String> {
    let mut values = query.split('&').filter_map(|pair| pair.strip_prefix("cells="));
    let Some(value) = values.next() else { return Ok(CELLS) };
    let number = value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse().ok());
    let number = number.flatten().filter(|number| (1..=MAX_CELLS).contains(number));
    number.ok_or_else(|| format!("cells is a number from 1 to {MAX_CELLS}"))
}

fn threshold(body: &[u8]) -> Result<Threshold, BadThreshold> {
    std::str::from_utf8(body).map_err(|_| BadThreshold)?.trim().parse()
}

fn limit(body: &[u8]) -> Result<Option<u64>, String> {
    let text = std::str::from_utf8(body).map_err(|_| "the limit is not text".to_owned())?.trim();
    if text == "none" {
        return Ok(None);
    }
    match size::parse(text) {
        Ok(bytes) if bytes < MIN_RESIDENT_LIMIT_BYTES => {
            Err(format!("the limit is at least {}", size::show(MIN_RESIDENT_LIMIT_BYTES)))
        }
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => Err(format!("{error}; or 'none'")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn refusal(request: &str) -> (u16, String) {
        match parse(request.as_bytes()) {
            Parsed::Refused(reply) => (reply.status().code(), reply.body().to_owned()),
            other => panic!("{request:?}: {other:?}"),
        }
    }

    #[test]
    fn commands_as_curl_sends_them() {
        let head = "HTTP/1.1\r\nHost: nowait\r\nUser-Agent: curl/8\r\nAccept: */*\r\n";
        for (first, rest, command) in [
            ("GET /metrics", "\r\n", Command::Metrics),
            ("GET /metrics?name[]=nowait_vcpus", "\r\n", Command::Metrics),
            ("POST /pause", "\r\n", Command::Pause),
            ("POST /evict", "\r\n", Command::Evict),
            ("POST /resume", "content-length: 2\r\n\r\n{}", Command::Resume),
            ("PUT /limit", "Content-Length: 3\r\n\r\n64M", Command::Limit(Some(64 << 20))),
            ("POST /limit", "Content-Length: 5\r\n\r\nnone\n", Command::Limit(None)),
            ("GET /pages", "\r\n", Command::Pages(CELLS)),
            ("GET /pages?x=y&cells=1024", "\r\n", Command::Pages(1024)),
            (
                "PUT /threshold",
                "Content-Length: 5\r\n\r\n500us",
                Command::Threshold(Threshold::Fixed(Duration::from_micros(500))),
            ),
            (
                "PUT /threshold",
                "Content-Length: 5\r\n\r\nauto\n",
                Command::Threshold(Threshold::Auto),
            ),
        ] {
            let request = format!("{first} {head}{rest}");
            assert_eq!(parse(request.as_bytes()), Parsed::Command(command), "{request}");
            // However it arrives.
            for end in 0..request.len() {
                assert_eq!(parse(&request.as_bytes()[..end]), Parsed::Partial, "{request} {end}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let many = "X: y\r\n".repeat(MAX_HEADERS + 1);
        let long = "x".repeat(MAX_HEAD_BYTES);
        for (request, code, words) in [
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), 404, "/metrics"),
            ("POST /metrics HTTP/1.1\r\n\r\n".to_owned(), 405, "takes GET"),
            ("GET /limit HTTP/1.1\r\n\r\n".to_owned(), 405, "PUT or POST"),
            ("POST /pages HTTP/1.1\r\n\r\n".to_owned(), 405, "takes GET"),
            ("GET /pages?cells=0 HTTP/1.1\r\n\r\n".to_owned(), 400, "1 to 1024"),
            ("GET /pages?cells=1025 HTTP/1.1\r\n\r\n".to_owned(), 400, "1 to 1024"),
            ("GET /pages?cells=+7 HTTP/1.1\r\n\r\n".to_owned(), 400, "1 to 1024"),
            ("GET /pages?cells= HTTP/1.1\r\n\r\n".to_owned(), 400, "1 to 1024"),
            ("GET /threshold HTTP/1.1\r\n\r\n".to_owned(), 405, "PUT or POST"),
            ("PUT /threshold HTTP/1.1\r\n\r\n".to_owned(), 400, "auto"),
            ("PUT /threshold HTTP/1.1\r\nContent-Length: 2\r\n\r\n5m".into(), 400, "50us"),
            ("hello\r\n\r\n".to_owned(), 400, "not HTTP"),
            ("\0\0\0\0".to_owned(), 400, "not HTTP"),
            (format!("GET /metrics HTTP/1.1\r\n{many}\r\n"), 431, "headers"),
            (format!("GET /{long} HTTP/1.1\r\n\r\n"), 431, "bytes"),
            (format!("GET /{long}"), 431, "bytes"),
            (
                "PUT /limit HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
                411,
                "Content-Length",
            ),
            ("PUT /limit HTTP/1.1\r\nContent-Length: 257\r\n\r\n".into(), 413, "256 bytes"),
            ("PUT /limit HTTP/1.1\r\nContent-Length: -1\r\n\r\n".into(), 400, "one number"),
            (
                "PUT /limit HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n".into(),
                400,
                "one number",
            ),
            (
                format!("PUT /limit HTTP/1.1\r\nContent-Length: {}9\r\n\r\n", u64::MAX),
                413,
                "256 bytes",
            ),
            ("PUT /limit HTTP/1.1\r\n\r\n".into(), 400, "'none'"),
            ("PUT /limit HTTP/1.1\r\nContent-Length: 1\r\n\r\n0".into(), 400, "4 MiB"),
            ("PUT /limit HTTP/1.1\r\nContent-Length: 4\r\n\r\nhalf".into(), 400, "'half'"),
        ] {
            let (found, line) = refusal(&request);
            assert_eq!(found, code, "{request}: {line}");
            assert!(line.contains(words), "'{words}' is not in: {line}");
            assert_eq!(line.lines().count(), 1, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let mut whole = b"PUT /limit HTTP/1.1\r\nContent-Length: 8\r\n\r\n".to_vec();
            whole.extend(&bytes);
            let _ = parse(&bytes);
            prop_assert_eq!(parse(&whole) == Parsed::Partial, bytes.len() < 8);
        }

        #[test]
        fn more_than_the_bounds_is_never_waited_for(
            line in "[A-Z]{1,20} /[a-z]{0,20} HTTP/1.1\r\n",
            filler in "[a-zA-Z0-9:\r\n -]{0,64}",
        ) {
            let mut bytes = line.into_bytes();
            while bytes.len() <= MAX_HEAD_BYTES + MAX_BODY_BYTES {
                bytes.extend(filler.as_bytes());
                bytes.push(b'x');
            }
            prop_assert_ne!(parse(&bytes), Parsed::Partial);
        }
    }
}
