//! The conversation before the first request, without the socket: bytes in, bytes out.
//!
//! ```text
//!   server: NBDMAGIC IHAVEOPT flags
//!   client: flags, NBD_OPT_GO(export, wants block sizes)
//!   server: any number of NBD_REP_INFO, then NBD_REP_ACK: requests may come
//! ```
//! Only the fixed newstyle with NBD_OPT_GO, without TLS and without structured replies.

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Handshake flags: the fixed newstyle, and no zeros after NBD_OPT_EXPORT_NAME.
const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
const REP_ERR_TLS_REQD: u32 = REP_ERROR | 5;
const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// The longest reply to an option that is read, in bytes.
const MAX_REPLY_BYTES: usize = 16 << 10;
/// The most replies before the server has to be ready.
const MAX_REPLIES: u32 = 64;
/// How much of a server's own words is shown.
const MAX_WORDS: usize = 200;

/// An export, as its server describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Its size in bytes.
    pub(super) size_bytes: u64,
    /// Its transmission flags.
    pub(super) flags: u16,
    /// The smallest request that the server takes, in bytes; 0 when it does not say.
    pub(super) min_block_bytes: u32,
}

impl Geometry {
    /// The export cannot be written.
    pub(super) fn is_read_only(self) -> bool {
        self.flags & (1 << 1) != 0
    }

    /// The server can be told that bytes may be forgotten.
    pub(super) fn trims(self) -> bool {
        self.flags & (1 << 5) != 0
    }
}

/// Why a server is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Something else listens there.
    #[error("no NBD server answers there; check host and port")]
    NoServer,
    /// A server of before 2011.
    #[error("the server speaks a protocol that is too old; it needs fixed newstyle and NBD_OPT_GO")]
    TooOld,
    /// Only with encryption.
    #[error("the server insists on TLS, which is not supported; allow plain connections to it")]
    TlsRequired,
    /// No such export.
    #[error("the server has no export \"{export}\"{}", said(.message))]
    UnknownExport {
        /// Which was asked for.
        export: String,
        /// The server's words.
        message: String,
    },
    /// Another refusal.
    #[error("the server refuses the export \"{export}\" (reply {code:#x}){}", said(.message))]
    Refused {
        /// Which was asked for.
        export: String,
        /// The protocol's number of the reply.
        code: u32,
        /// The server's words.
        message: String,
    },
    /// Not as the protocol says.
    #[error("the server does not keep to the protocol: {0}")]
    Malformed(&'static str),
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(", and says: {message}") }
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Progress {
    /// Feed more bytes.
    More,
    /// Send these, then feed more.
    Send(Vec<u8>),
    /// Requests may be sent.
    Done(Geometry),
}

/// The conversation so far.
#[derive(Debug)]
pub(super) struct Handshake {
    export: String,
    state: State,
    replies: u32,
    found: Option<Geometry>,
    min_block_bytes: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Hello,
    ReplyHeader,
    ReplyData { kind: u32, len: usize },
}

impl Handshake {
    /// Asks for an export.
    pub(super) fn new(export: &str) -> Self {
        Self {
            export: export.to_owned(),
            state: State::Hello,
            replies: 0,
            found: None,
            min_block_bytes: 0,
        }
    }

    /// How many bytes are to be fed next.
    pub(super) fn wants(&self) -> usize {
        match self.state {
            State::Hello => 18,
            State::ReplyHeader => 20,
            State::ReplyData { len, .. } => len,
        }
    }

    /// Takes exactly as many bytes as it [wants](Self::wants).
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Progress, HandshakeError> {
        assert_eq!(bytes.len(), self.wants(), "other bytes than were asked for");
        let mut bytes = Bytes(bytes);
        match self.state {
            State::Hello => self.hello(&mut bytes),
            State::ReplyHeader => self.reply_header(&mut bytes),
            State::ReplyData { kind, .. } => self.reply(kind, &mut bytes),
        }
    }

    fn hello(&mut self, bytes: &mut Bytes<'_>) -> Result<Progress, HandshakeError> {
        if bytes.u64()? != NBD_MAGIC {
            return Err(HandshakeError::NoServer);
        }
        match bytes.u64()? {
            OPTION_MAGIC => {}
            OLD_STYLE_MAGIC => return Err(HandshakeError::TooOld),
            _ => return Err(HandshakeError::NoServer),
        }
        let flags = bytes.u16()?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(HandshakeError::TooOld);
        }
        let name = self.export.as_bytes();
        let mut send = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes().to_vec();
        send.extend(OPTION_MAGIC.to_be_bytes());
        send.extend(OPT_GO.to_be_bytes());
        send.extend((name.len() as u32 + 8).to_be_bytes());
        send.extend((name.len() as u32).to_be_bytes());
        send.extend(name);
        send.extend(1_u16.to_be_bytes());
        send.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.state = State::ReplyHeader;
        Ok(Progress::Send(send))
    }

    fn reply_header(&mut self, bytes: &mut Bytes<'_>) -> Result<Progress, HandshakeError> {
        if bytes.u64()? != REPLY_MAGIC || bytes.u32()? != OPT_GO {
            return Err(HandshakeError::Malformed("it answers something else"));
        }
        let (kind, len) = (bytes.u32()?, bytes.u32()? as usize);
        self.replies += 1;
        if len > MAX_REPLY_BYTES || self.replies > MAX_REPLIES {
            return Err(HandshakeError::Malformed("its answer is too long"));
        }
        match len {
            0 => self.reply(kind, &mut Bytes(&[])),
            len => {
                self.state = State::ReplyData { kind, len };
                Ok(Progress::More)
            }
        }
    }

    fn reply(&mut self, kind: u32, bytes: &mut Bytes<'_>) -> Result<Progress, HandshakeError> {
        self.state = State::ReplyHeader;
        match kind {
            REP_ACK => {
                let found = self.found.ok_or(HandshakeError::Malformed("the size is missing"))?;
                Ok(Progress::Done(Geometry { min_block_bytes: self.min_block_bytes, ..found }))
            }
            REP_INFO => {
                match bytes.u16()? {
                    INFO_EXPORT => {
                        let (size_bytes, flags) = (bytes.u64()?, bytes.u16()?);
                        self.found = Some(Geometry { size_bytes, flags, min_block_bytes: 0 });
                    }
                    INFO_BLOCK_SIZE => self.min_block_bytes = bytes.u32()?,
                    // The server may send what was not asked for.
                    _ => {}
                }
                Ok(Progress::More)
            }
            kind => Err(self.refusal(kind, bytes.0)),
        }
    }

    fn refusal(&self, code: u32, message: &[u8]) -> HandshakeError {
        let export = self.export.clone();
        let plain = |c: &char| !c.is_control();
        let message: String =
            String::from_utf8_lossy(message).chars().filter(plain).take(MAX_WORDS).collect();
        match code {
            REP_ERR_UNSUP => HandshakeError::TooOld,
            REP_ERR_TLS_REQD => HandshakeError::TlsRequired,
            REP_ERR_UNKNOWN => HandshakeError::UnknownExport { export, message },
            code if code & REP_ERROR != 0 => HandshakeError::Refused { export, code, message },
            _ => HandshakeError::Malformed("a reply of an unknown kind"),
        }
    }
}

/// What is left to be read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], HandshakeError> {
        let short = HandshakeError::Malformed("a reply is too short");
        let (taken, rest) = self.0.split_first_chunk().ok_or(short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, HandshakeError> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, HandshakeError> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, HandshakeError> {
        self.take().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(flags: u16) -> Vec<u8> {
        [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(OPT_GO.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn info(size: u64, flags: u16) -> Vec<u8> {
        reply(REP_INFO, &[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())
    }

    /// Everything that the server says, to the end.
    fn talk(bytes: &[u8]) -> Option<Result<Geometry, HandshakeError>> {
        let (mut handshake, mut rest) = (Handshake::new("disk"), bytes);
        loop {
            let (now, later) = rest.split_at_checked(handshake.wants())?;
            rest = later;
            match handshake.feed(now) {
                Ok(Progress::Done(geometry)) => return Some(Ok(geometry)),
                Ok(Progress::More | Progress::Send(_)) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }

    #[test]
    fn an_export_is_found() {
        let mut handshake = Handshake::new("ab");
        let sent = handshake.feed(&hello(3)).unwrap();
        let expected = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x02ab\0\x01\0\x03".to_vec();
        assert_eq!(sent, Progress::Send(expected));
        let blocks = reply(REP_INFO, b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0");
        let name = reply(REP_INFO, b"\0\x01disk");
        let all = [hello(1), name, info(1 << 20, 0x25), blocks, reply(REP_ACK, b"")].concat();
        let geometry = Geometry { size_bytes: 1 << 20, flags: 0x25, min_block_bytes: 512 };
        assert_eq!(talk(&all), Some(Ok(geometry)));
        assert!(geometry.trims() && !geometry.is_read_only());
    }

    #[test]
    fn refusals_have_their_names() {
        use HandshakeError::{Malformed, NoServer, Refused, TlsRequired, TooOld, UnknownExport};
        let refusal = |bytes: &[u8]| talk(bytes).unwrap().unwrap_err();
        let after_hello = |reply: Vec<u8>| refusal(&[hello(3), reply].concat());
        assert_eq!(refusal(b"SSH-2.0-OpenSSH_9.2p1 "[..18].as_ref()), NoServer);
        assert_eq!(refusal(&hello(0)), TooOld);
        assert_eq!(refusal(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"), TooOld);
        assert_eq!(after_hello(reply(REP_ERR_UNSUP, b"")), TooOld);
        assert_eq!(after_hello(reply(REP_ERR_TLS_REQD, b"no")), TlsRequired);
        let (export, message) = ("disk".to_owned(), "sorry".to_owned());
        let unknown = after_hello(reply(REP_ERR_UNKNOWN, b"sor\x1bry\n"));
        assert_eq!(unknown, UnknownExport { export: export.clone(), message: message.clone() });
        let refused = after_hello(reply(REP_ERROR | 2, b"sorry"));
        assert_eq!(refused, Refused { export, code: REP_ERROR | 2, message });
        assert!(matches!(after_hello(reply(REP_ACK, b"")), Malformed(_)));
        assert!(matches!(after_hello(reply(REP_INFO, b"\0\0\0")), Malformed(_)));
        assert!(matches!(after_hello(reply(77, b"")), Malformed(_)));
        let long = reply(REP_INFO, &[9; MAX_REPLY_BYTES + 1]);
        assert!(matches!(after_hello(long), Malformed(_)));
        let chatter = reply(REP_INFO, b"\0\x09").repeat(MAX_REPLIES as usize + 1);
        assert!(matches!(after_hello(chatter), Malformed(_)));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_verdict(bytes in prop::collection::vec(any::<u8>(), 0..300), replies in 0..3_usize) {
            let start = [hello(3), info(4096, 1).repeat(replies)].concat();
            let _ = talk(&[start, bytes].concat());
        }

        #[test]
        fn any_reply_gives_a_verdict(kind in (0..5_u32, any::<bool>()), data in prop::collection::vec(any::<u8>(), 0..20)) {
            let kind = kind.0 | if kind.1 { REP_ERROR } else { 0 };
            let found = talk(&[hello(3), reply(kind, &data), info(4096, 1), reply(REP_ACK, b"")].concat());
            let expected = Geometry { size_bytes: 4096, flags: 1, min_block_bytes: 0 };
            if let Some(Ok(geometry)) = found {
                prop_assert_eq!(Geometry { min_block_bytes: 0, ..geometry }, expected);
            }
        }
    }
}
