//! D-Bus addresses, as in `DBUS_SESSION_BUS_ADDRESS` (D-Bus specification, "Server Addresses").

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Serialize;

/// The maximum time for a bus to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An address of a bus on this machine: a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BusAddress {
    /// A socket file.
    Path(PathBuf),
    /// An abstract socket name, without the leading NUL. It belongs to the network namespace of the bus.
    Abstract(OsString),
}

impl fmt::Display for BusAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "unix:path={}", escape(path.as_os_str().as_bytes())),
            Self::Abstract(name) => write!(f, "unix:abstract={}", escape(name.as_bytes())),
        }
    }
}

/// A reason why a text cannot be used as an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The syntax is invalid.
    #[error("{0:?} is not a valid D-Bus address: {1}")]
    Invalid(String, &'static str),
    /// No entry is a unix socket.
    #[error("the D-Bus address {0:?} contains no unix socket with a path or an abstract name")]
    NoSocket(String),
}

/// Parses a list of addresses into the unix sockets to try, in order. Entries with other transports, such as `tcp:`,
/// are left out.
///
/// # Errors
/// Returns an error if the text is not a list of addresses, or contains no unix socket.
pub fn parse(text: &str) -> Result<Vec<BusAddress>, AddressError> {
    let mut found = Vec::new();
    for entry in text.split(';').filter(|entry| !entry.is_empty()) {
        let invalid = |why| AddressError::Invalid(entry.to_owned(), why);
        let (transport, pairs) = entry.split_once(':').ok_or_else(|| invalid("no transport such as unix:"))?;
        let mut sockets = Vec::new();
        for pair in pairs.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| invalid("a key has no value"))?;
            let value = unescape(value).ok_or_else(|| invalid("a % without two hexadecimal digits"))?;
            if value.contains(&0) {
                return Err(invalid("it contains a NUL"));
            }
            let value = OsString::from_vec(value);
            match (transport, key) {
                ("unix", "path") => sockets.push(BusAddress::Path(value.into())),
                ("unix", "abstract") => sockets.push(BusAddress::Abstract(value)),
                // `guid=`, and the keys for servers alone (`dir=`, `tmpdir=`, `runtime=`).
                _ => {}
            }
        }
        match <[BusAddress; 1]>::try_from(sockets) {
            Ok(socket) => found.extend(socket),
            Err(several) if several.is_empty() => {}
            Err(_) => return Err(invalid("both path= and abstract=, or one of them twice")),
        }
    }
    if found.is_empty() { Err(AddressError::NoSocket(text.to_owned())) } else { Ok(found) }
}

/// Returns the address of the session bus in a user's runtime directory, where systemd creates its socket.
pub fn in_runtime_directory(directory: &Path) -> BusAddress {
    BusAddress::Path(directory.join("bus"))
}

/// Connects to the first of these addresses at which a process listens.
///
/// # Errors
/// Returns the error of connect(2) for the last address; `WouldBlock` if the bus has not accepted the connection within
/// five seconds.
pub fn connect(addresses: &[BusAddress]) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match connect_to(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_to(address: &BusAddress) -> io::Result<OwnedFd> {
    let name = match address {
        BusAddress::Path(path) => SocketAddrUnix::new(path),
        BusAddress::Abstract(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
    }?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIMEOUT))?;
    loop {
        match rustix::net::connect(&socket, &name) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_/.\\*".contains(&byte)
}

fn escape(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|&byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02x}") })
        .collect()
}

/// Decodes `%xx`. Unlike libdbus, accepts every character that should have been escaped.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut value = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        value.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let number = digit()? * 16 + digit()?;
                u8::try_from(number).ok()?
            }
            plain => plain,
        });
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};

    use super::*;

    #[test]
    fn addresses_are_parsed() {
        let path = |path: &str| BusAddress::Path(path.into());
        assert_eq!(parse("unix:path=/run/user/1000/bus"), Ok(vec![path("/run/user/1000/bus")]));
        let guid = "unix:abstract=/tmp/dbus-x%2c%C3%A9,guid=aa00;tcp:host=localhost,port=4;unix:guid=00,path=/b";
        assert_eq!(parse(guid), Ok(vec![BusAddress::Abstract("/tmp/dbus-x,é".into()), path("/b")]));
        assert_eq!(parse(";unix:path=/a;"), Ok(vec![path("/a")]));
        for nothing in ["", "autolaunch:", "unix:", "unix:tmpdir=/tmp", "unixexec:path=ssh"] {
            assert_eq!(parse(nothing), Err(AddressError::NoSocket(nothing.into())));
        }
        let entries =
            ["/run/bus", "unix:path", "unix:path=%4", "unix:path=%zz", "unix:path=%00", "unix:path=/a,abstract=b"];
        for invalid in entries {
            assert!(matches!(parse(invalid), Err(AddressError::Invalid(..))), "{invalid}");
        }
        for address in [path("/a b/;%"), BusAddress::Abstract("é".into())] {
            assert_eq!(parse(&address.to_string()), Ok(vec![address]));
        }
        assert_eq!(in_runtime_directory(Path::new("/run/user/7")), path("/run/user/7/bus"));
    }

    #[test]
    fn connects_to_the_first_address_with_a_listener() {
        let directory = tempfile::tempdir().expect("a directory");
        let (missing, path) = (directory.path().join("missing"), directory.path().join("bus"));
        assert_eq!(connect(&[BusAddress::Path(missing.clone())]).expect_err("missing").kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).expect("a listener");
        connect(&[BusAddress::Path(missing), BusAddress::Path(path)]).expect("connected");
        listener.accept().expect("accepted");
        let name = format!("vpn-exec-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let _listener = UnixListener::bind_addr(&address).expect("a listener");
        connect(&[BusAddress::Abstract(name.into())]).expect("connected");
        assert!(connect(&[BusAddress::Path("x".repeat(200).into())]).is_err());
    }
}
