//! What a client is answered, and its bytes. No sockets here.

use prometheus::TEXT_FORMAT;

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    BadRequest,
    NotFound,
    Conflict,
    /// The methods that there are.
    WrongMethod(&'static [&'static str]),
    TimedOut,
    LengthRequired,
    BodyTooLarge,
    HeadTooLarge,
    Busy,
}

impl Status {
    /// Its number.
    #[cfg(test)]
    pub(super) fn code(self) -> u16 {
        self.line().0
    }

    fn line(self) -> (u16, &'static str) {
        match self {
            Self::Ok => (200, "OK"),
            Self::BadRequest => (400, "Bad Request"),
            Self::NotFound => (404, "Not Found"),
            Self::WrongMethod(_) => (405, "Method Not Allowed"),
            Self::Conflict => (409, "Conflict"),
            Self::TimedOut => (408, "Request Timeout"),
            Self::LengthRequired => (411, "Length Required"),
            Self::BodyTooLarge => (413, "Content Too Large"),
            Self::HeadTooLarge => (431, "Request Header Fields Too Large"),
            Self::Busy => (503, "Service Unavailable"),
        }
    }
}

/// An answer: a status and a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    status: Status,
    kind: &'static str,
    body: String,
}

/// The content type of JSON.
const JSON: &str = "application/json";

impl Reply {
    /// What was asked for; whole lines.
    pub(super) fn text(body: impl Into<String>) -> Self {
        Self { status: Status::Ok, kind: TEXT_FORMAT, body: body.into() }
    }

    /// What was asked for, as JSON on one line.
    pub(super) fn json(value: &impl serde::Serialize) -> Self {
        // Numbers and names of ours always have a form in JSON.
        let body = serde_json::to_string(value).unwrap_or_default() + "\n";
        Self { status: Status::Ok, kind: JSON, body }
    }

    /// Why not, in one line.
    pub(super) fn refuse(status: Status, line: impl Into<String>) -> Self {
        Self { status, kind: TEXT_FORMAT, body: line.into() + "\n" }
    }

    /// How it went.
    #[cfg(test)]
    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// The text.
    #[cfg(test)]
    pub(super) fn body(&self) -> &str {
        &self.body
    }

    /// As it goes over the wire. It is the last one of its connection.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        let (code, reason) = self.status.line();
        let allow = match self.status {
            Status::WrongMethod(methods) => format!("Allow: {}\r\n", methods.join(", ")),
            _ => String::new(),
        };
        let (length, kind, body) = (self.body.len(), self.kind, self.body);
        format!(
            "HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}; charset=utf-8\r\n\
             Content-Length: {length}\r\nConnection: close\r\n{allow}\r\n{body}"
        )
        .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_what_an_http_parser_reads() {
        let bytes = Reply::refuse(Status::WrongMethod(&["PUT", "POST"]), "no").into_bytes();
        let mut headers = [httparse::EMPTY_HEADER; 8];
        let mut response = httparse::Response::new(&mut headers);
        let head = response.parse(&bytes).unwrap().unwrap();
        assert_eq!((response.code, response.reason), (Some(405), Some("Method Not Allowed")));
        let header = |name: &str| {
            response.headers.iter().find(|header| header.name == name).map(|header| header.value)
        };
        assert_eq!(header("Allow"), Some(&b"PUT, POST"[..]));
        assert_eq!(header("Content-Length"), Some(&b"3"[..]));
        assert_eq!(header("Content-Type"), Some(&b"text/plain; version=0.0.4; charset=utf-8"[..]));
        assert_eq!(&bytes[head..], b"no\n");
    }
}
