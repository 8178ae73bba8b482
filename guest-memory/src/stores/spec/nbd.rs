//! `nbd://…` and `nbd+unix://…`: the NBD project's own form of addresses.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::parse::StoreSpecError;
use super::text::{self, SizeOption};

/// The port of NBD servers when none is named.
pub(super) const DEFAULT_PORT: u16 = 10809;
/// The longest name of an export, in bytes (NBD protocol).
pub(super) const MAX_EXPORT_BYTES: usize = 4096;
/// The longest path of a Unix socket, in bytes (`sun_path` without its closing zero).
pub(super) const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A network block device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdSpec {
    /// Where its server listens.
    pub server: ServerAddress,
    /// Which of the server's exports; empty: the default one.
    pub export: String,
    /// How much of it may be used, in bytes; `None`: all.
    pub size_bytes: Option<u64>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    /// TCP.
    Tcp {
        /// Name or address; an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl NbdSpec {
    /// The whole layer, from its scheme on.
    pub(super) fn parse(given: &str) -> Result<Self, StoreSpecError> {
        let (uri, size_bytes) = super::parse::with_size(given, "nbd")?;
        let error = |reason| StoreSpecError::Uri { given: uri.to_owned(), reason };
        let parsed = match uri.split_once("://") {
            Some(("nbd", rest)) => tcp(rest),
            Some(("nbd+unix", rest)) => unix(rest),
            _ => Err("it must begin with nbd:// or nbd+unix:///"),
        };
        let (server, export) = parsed.map_err(error)?;
        let export = text::unescape(export).and_then(|export| export.into_string().ok());
        let export = export.ok_or_else(|| error("the export's name must be UTF-8, with %XX"))?;
        if export.len() > MAX_EXPORT_BYTES {
            return Err(error("the export's name may have at most 4096 bytes"));
        }
        Ok(Self { server, export, size_bytes })
    }
}

type Parsed<'a> = Result<(ServerAddress, &'a str), &'static str>;

fn tcp(rest: &str) -> Parsed<'_> {
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    if export.contains(['?', '#']) {
        return Err("there are no parameters for TCP");
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => v6.split_once(']').ok_or("the address's ] is missing")?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if host.is_empty() || !host.chars().all(plain) {
        return Err("it needs a host: a name or an address, IPv6 in [brackets]");
    }
    let port = match port.strip_prefix(':') {
        Some(port) => text::number(port).and_then(|port| u16::try_from(port).ok()),
        None if port.is_empty() => Some(DEFAULT_PORT),
        None => None,
    };
    let port = port.filter(|port| *port != 0).ok_or("the port must be 1 to 65535")?;
    Ok((ServerAddress::Tcp { host: host.to_owned(), port }, export))
}

fn unix(rest: &str) -> Parsed<'_> {
    let rest = rest.strip_prefix('/').ok_or("a Unix socket has no host: nbd+unix:///")?;
    let (export, query) = rest.split_once('?').unwrap_or((rest, ""));
    let socket = query.strip_prefix("socket=").filter(|path| !path.contains(['&', '#', '?']));
    let path: OsString = socket
        .and_then(text::unescape)
        .filter(|path| !path.is_empty())
        .ok_or("it needs the socket's path and no other parameters: ?socket=/run/nbd.sock")?;
    if path.len() > MAX_SOCKET_PATH_BYTES {
        return Err("the socket's path may have at most 107 bytes");
    }
    Ok((ServerAddress::Unix(PathBuf::from(path)), export))
}

impl fmt::Display for NbdSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = text::escape_uri(self.export.as_bytes());
        match &self.server {
            ServerAddress::Tcp { host, port } => {
                f.write_str("nbd://")?;
                match (host.contains(':'), *port) {
                    (true, DEFAULT_PORT) => write!(f, "[{host}]")?,
                    (true, port) => write!(f, "[{host}]:{port}")?,
                    (false, DEFAULT_PORT) => f.write_str(host)?,
                    (false, port) => write!(f, "{host}:{port}")?,
                }
                if !export.is_empty() {
                    write!(f, "/{export}")?;
                }
            }
            ServerAddress::Unix(path) => {
                let path = text::escape_uri(path.as_os_str().as_bytes());
                write!(f, "nbd+unix:///{export}?socket={path}")?;
            }
        }
        SizeOption(self.size_bytes).fmt(f)
    }
}
