//! The rate at which a program sends over TCP to a server behind the provider.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use lab::{Lab, Result, WEB};
use vpn_exec::linux::namespace::NetworkNamespace;

use super::measure::{milliseconds, now};

/// The time for which a program sends.
pub(crate) const TURN: Duration = Duration::from_secs(3);

/// The server's port.
const PORT: u16 = 5001;

/// The time in which a connection begins.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts the server, which tells each client how many bytes have arrived.
pub(crate) fn start_server(lab: &Lab) -> Result<()> {
    let listener = lab.web_site.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(std::io::Result::ok) {
            std::thread::spawn(move || count(connection));
        }
    });
    Ok(())
}

/// Returns the rate at which a program in a namespace sends, in Mbit/s, by the bytes that the server received.
pub(crate) fn rate_from(namespace: &NetworkNamespace) -> Result<f64> {
    let to = SocketAddr::from((WEB.ipv4, PORT));
    let connect = || namespace.run(|| TcpStream::connect_timeout(&to, PATIENCE));
    // The handshake and the path MTU come before the measurement.
    drop(connect()?);
    let mut stream = connect()?;
    let buffer = vec![0; 1 << 16];
    let begin = now();
    while now() - begin < TURN {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived)?;
    Ok(u64::from_le_bytes(arrived) as f64 * 8.0 / 1e3 / milliseconds(now() - begin))
}

/// Reads all bytes, and answers with their number.
fn count(mut connection: TcpStream) {
    let mut buffer = vec![0; 1 << 18];
    let mut arrived = 0_u64;
    while let Ok(length @ 1..) = connection.read(&mut buffer) {
        arrived += length as u64;
    }
    // The warm-up's connection may be closed already.
    let _ = connection.write_all(&arrived.to_le_bytes());
}
