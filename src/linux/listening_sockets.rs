//! Who listens in the calling thread's network namespace (proc_pid_net(5)).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The states of sockets of TCP that listen, and of UDP that take from anybody (TCP_LISTEN and TCP_CLOSE of the kernel's
/// include/net/tcp_states.h).
const LISTEN: &str = "0A";
const UNCONNECTED: &str = "07";

/// The addresses at which somebody listens on a port of TCP. One that is unspecified stands for all.
pub fn tcp(port: u16) -> io::Result<Vec<IpAddr>> {
    all(["tcp", "tcp6"], LISTEN, port)
}

/// The addresses at which somebody takes datagrams of anybody on a port of UDP. One that is unspecified stands for all.
pub fn udp(port: u16) -> io::Result<Vec<IpAddr>> {
    all(["udp", "udp6"], UNCONNECTED, port)
}

fn all(tables: [&str; 2], state: &str, port: u16) -> io::Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    for table in tables {
        match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => found.extend(text.lines().skip(1).filter_map(|line| listener(line, state, port))),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The local address of a line, if its socket is in this state and on this port.
fn listener(line: &str, state: &str, port: u16) -> Option<IpAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, on) = fields.next()?.split_once(':')?;
    let is_so = fields.nth(1)? == state && u16::from_str_radix(on, 16).ok()? == port;
    is_so.then(|| parse(address)).flatten()
}

/// Reads an address, of which each 32 bits are printed as a number in the machine's own order of bytes.
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
    fn those_who_listen_are_found_and_nobody_else() -> io::Result<()> {
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into(), Ipv4Addr::UNSPECIFIED.into()] {
            let listener = match TcpListener::bind((address, 0)) {
                // A machine without IPv6.
                Err(_) if address.is_ipv6() => continue,
                other => other?,
            };
            let place = listener.local_addr()?;
            assert_eq!(tcp(place.port())?, [address]);
            let client = TcpStream::connect(place)?;
            assert!(!tcp(client.local_addr()?.port())?.contains(&address), "it is connected, and does not listen");

            let socket = UdpSocket::bind((address, 0))?;
            let port = socket.local_addr()?.port();
            assert_eq!(udp(port)?, [address]);
            socket.connect(socket.local_addr()?)?;
            assert_eq!(udp(port)?, [] as [IpAddr; 0], "it is connected, and takes from one only");
        }
        Ok(())
    }
}
