//! What goes over the wire, as pure functions over bytes: requests, simple replies, error numbers.
//! (NBD protocol, doc/proto.md of the NBD project; all numbers big-endian.)

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The length of a request without its data, in bytes.
pub(super) const REQUEST_BYTES: usize = 28;
/// The length of a simple reply without its data, in bytes.
pub(super) const REPLY_BYTES: usize = 16;

/// What the server is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Send bytes.
    Read = 0,
    /// Keep the bytes that follow.
    Write = 1,
    /// Go away.
    Disconnect = 2,
    /// Bytes may be forgotten.
    Trim = 4,
}

/// Names a request in its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cookie(pub(super) u64);

/// Adds a request, without its data, to what is to be sent.
pub(super) fn push_request(
    buffer: &mut Vec<u8>,
    command: Command,
    cookie: Cookie,
    offset: u64,
    len: u32,
) {
    buffer.extend(REQUEST_MAGIC.to_be_bytes());
    buffer.extend(0_u16.to_be_bytes());
    buffer.extend((command as u16).to_be_bytes());
    buffer.extend(cookie.0.to_be_bytes());
    buffer.extend(offset.to_be_bytes());
    buffer.extend(len.to_be_bytes());
}

/// A reply; a read's bytes come after it if there is no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    /// Which request it is for.
    pub(super) cookie: Cookie,
    /// Zero, or what went wrong.
    pub(super) error: u32,
}

/// These bytes are no simple reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoReply;

/// Reads a simple reply.
pub(super) fn parse_reply(bytes: &[u8; REPLY_BYTES]) -> Result<Reply, NoReply> {
    let [a, b, c, d, e, f, g, h, cookie @ ..] = *bytes;
    if u32::from_be_bytes([a, b, c, d]) != SIMPLE_REPLY_MAGIC {
        return Err(NoReply);
    }
    let error = u32::from_be_bytes([e, f, g, h]);
    Ok(Reply { cookie: Cookie(u64::from_be_bytes(cookie)), error })
}

/// The system's number of an error on the wire. Unknown ones count as EINVAL, as the protocol says.
pub(super) fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::ENOTSUP,
        108 => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_as_the_protocol_says() {
        let mut buffer = Vec::new();
        push_request(&mut buffer, Command::Trim, Cookie(0x0102), 0x3000, 0x1000);
        let expected =
            b"\x25\x60\x95\x13\0\0\0\x04\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x30\0\0\0\x10\0";
        assert_eq!(buffer, expected);
        assert_eq!(buffer.len(), REQUEST_BYTES);
    }

    proptest! {
        #[test]
        fn only_simple_replies_are_replies(mut bytes: [u8; REPLY_BYTES], magic: bool) {
            if magic {
                bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
            }
            let expected = (bytes[..4] == SIMPLE_REPLY_MAGIC.to_be_bytes()).then(|| Reply {
                cookie: Cookie(u64::from_be_bytes(*bytes.last_chunk().unwrap())),
                error: u32::from_be_bytes(bytes[4..8].try_into().unwrap()),
            });
            prop_assert_eq!(parse_reply(&bytes).ok(), expected);
        }
    }
}
