//! An HTTP client: as much of HTTP/1.1 (RFC 9112) as the lab's own server needs.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Requests a page from the calling thread's network namespace and returns it. Looks the host name up as the system
/// does, and tries each of its addresses for as long as `timeout`.
///
/// # Errors
/// That of the last address.
pub fn get(url: &str, timeout: Duration) -> io::Result<String> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{url:?} is not a valid http URL"));
    let (authority, path) = url.strip_prefix("http://").ok_or_else(invalid)?.split_once('/').ok_or_else(invalid)?;
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in authority.to_socket_addrs()? {
        match get_from(address, &authority, path, timeout) {
            Ok(body) => return Ok(body),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn get_from(address: SocketAddr, authority: &str, path: &str, timeout: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.to_owned()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{authority} answered {answer:?}"))),
    }
}

/// Returns the length and a checksum (FNV-1a, 64 bits) of a text.
pub fn digest(text: &str) -> String {
    let sum = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{} bytes, {sum:016x}", text.len())
}
