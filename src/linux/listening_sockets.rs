//! The listening sockets of the calling thread's network namespace (proc_pid_net(5)).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The states of listening TCP sockets and of unconnected UDP sockets (`TCP_LISTEN` and `TCP_CLOSE` of the kernel's
/// include/net/tcp_states.h).
const LISTEN: &str = "0A";
const UNCONNECTED: &str = "07";

/// Returns the addresses at which TCP sockets listen on a port. An unspecified address stands for all of its family.
///
/// # Errors
/// Fails if the kernel's table cannot be read.
pub fn tcp(port: u16) -> io::Result<Vec<IpAddr>> {
    all(["tcp", "tcp6"], LISTEN, port)
}

/// Returns the addresses at which UDP sockets receive from all senders on a port. An unspecified address stands for all
/// of its family.
///
/// # Errors
/// Fails if the kernel's table cannot be read.
pub fn udp(port: u16) -> io::Result<Vec<IpAddr>> {
    all(["udp", "udp6"], UNCONNECTED, port)
}

fn all(tables: [&str; 2], state: &str, port: u16) -> io::Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    for table in tables {
        match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => found.extend(text.lines().skip(1).filter_map(|line| local_address(line, state, port))),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Returns the local address of a line if its socket has this state and this port.
fn local_address(line: &str, state: &str, port: u16) -> Option<IpAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, local_port) = fields.next()?.split_once(':')?;
    let matches = fields.nth(1)? == state && u16::from_str_radix(local_port, 16).ok()? == port;
    matches.then(|| parse(address)).flatten()
}

/// Parses an address, which the kernel prints as 32-bit numbers in the machine's byte order.
fn parse(text: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    match text.len() {
        8 => word(0).map(|bytes| Ipv4Addr::from(bytes).into()),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn listening_sockets_are_found_and_connected_ones_are_not() -> io::Result<()> {
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into(), Ipv4Addr::UNSPECIFIED.into()] {
            let listener = match TcpListener::bind((address, 0)) {
                // A machine without IPv6.
                Err(_) if address.is_ipv6() => continue,
                other => other?,
            };
            let place = listener.local_addr()?;
            assert_eq!(tcp(place.port())?, [address]);
            let client = TcpStream::connect(place)?;
            assert!(!tcp(client.local_addr()?.port())?.contains(&address), "a connected socket does not listen");

            let socket = UdpSocket::bind((address, 0))?;
            let port = socket.local_addr()?.port();
            assert_eq!(udp(port)?, [address]);
            socket.connect(socket.local_addr()?)?;
            assert_eq!(udp(port)?, [] as [IpAddr; 0], "a connected socket receives from one sender only");
        }
        Ok(())
    }
}
