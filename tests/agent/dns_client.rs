//! A DNS client: as much of RFC 1035 as questions for addresses need.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::shared::sending::unspecified;

/// The type of a record with an IPv4 address.
const A: u16 = 1;
const CLASS_INTERNET: u16 = 1;
const NO_SUCH_NAME: u16 = 3;

/// Returns the question for a name's IPv4 addresses, as it is sent over UDP.
pub(crate) fn query(name: &str) -> io::Result<Vec<u8>> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).map_err(io::Error::other)?);
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(A.to_be_bytes());
    query.extend(CLASS_INTERNET.to_be_bytes());
    Ok(query)
}

/// Asks one server for the IPv4 addresses of a name. Fails with `NotFound` if the server knows no such name.
pub(crate) fn lookup(server: IpAddr, name: &str, timeout: Duration) -> io::Result<Vec<IpAddr>> {
    let server = SocketAddr::new(server, 53);
    let socket = UdpSocket::bind((unspecified(server), 0))?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect(server)?;
    let query = query(name)?;
    socket.send(&query)?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    addresses_in(&buffer[..length], query.len()).unwrap_or_else(|| Err(io::ErrorKind::InvalidData.into()))
}

/// Returns the addresses in an answer whose records begin at `at`, each with a compressed name (RFC 1035 section
/// 4.1.4). `None` if it is cut off.
fn addresses_in(answer: &[u8], mut at: usize) -> Option<io::Result<Vec<IpAddr>>> {
    let number = |at: usize| Some(u16::from_be_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    if number(2)? & 0xf == NO_SUCH_NAME {
        return Some(Err(io::ErrorKind::NotFound.into()));
    }
    let mut found = Vec::new();
    for _ in 0..number(6)? {
        let length = usize::from(number(at + 10)?);
        if let Ok(octets) = <[u8; 4]>::try_from(answer.get(at + 12..at + 12 + length)?) {
            found.push(octets.into());
        }
        at += 12 + length;
    }
    Some(Ok(found))
}
