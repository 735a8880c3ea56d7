//! A server that listens in a host resolver's place, logs what it receives, and answers in the resolver's protocol.

use std::fs;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

/// The time after which an idle connection is closed.
const PATIENCE: Duration = Duration::from_secs(5);

/// The protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// None: the server reads once and closes the connection.
    None,
    /// Any: the server does not answer.
    Any,
    /// systemd-resolved's varlink interface (<https://varlink.org/>): JSON that ends with a zero byte.
    Varlink,
    /// D-Bus (<https://dbus.freedesktop.org/doc/dbus-specification.html>).
    Dbus,
    /// avahi-daemon's simple protocol: each line is answered by a line.
    Avahi,
}

/// A server on threads, which runs until its world ends.
#[derive(Debug)]
pub struct StandIn(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    clients: usize,
    received: Vec<u8>,
}

impl StandIn {
    /// Listens at a path, for all users.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn listen(path: &str, protocol: Protocol) -> Result<Self> {
        fs::create_dir_all(Path::new(path).parent().context("a path in a directory")?)?;
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {path}"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
        Ok(Self::serve(listener, protocol))
    }

    /// Listens at an abstract address (unix(7)) of the calling thread's network namespace.
    ///
    /// # Errors
    /// If the address is taken.
    pub fn listen_abstract(name: &str, protocol: Protocol) -> Result<Self> {
        Ok(Self::serve(UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?, protocol))
    }

    fn serve(listener: UnixListener, protocol: Protocol) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let written = Arc::clone(&log);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                lock(&written).clients += 1;
                let log = Arc::clone(&written);
                std::thread::spawn(move || serve_client(stream, protocol, &log));
            }
        });
        Self(log)
    }

    /// Returns the number of clients so far.
    pub fn clients(&self) -> usize {
        lock(&self.0).clients
    }

    /// Returns all that was received, from all clients.
    pub fn received(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0).received).into_owned()
    }
}

fn lock(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve_client(mut stream: UnixStream, protocol: Protocol, log: &Mutex<Log>) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    let (mut received, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        lock(log).received.extend(&buffer[..length]);
        if protocol == Protocol::None {
            return Ok(());
        }
        received.extend(&buffer[..length]);
        while let Some((length, answer)) = answer(protocol, &received) {
            received.drain(..length);
            stream.write_all(&answer)?;
        }
    }
}

/// Returns the length of the first message, once it is complete, and the answer to it.
fn answer(protocol: Protocol, received: &[u8]) -> Option<(usize, Vec<u8>)> {
    let until = |end: &[u8]| received.windows(end.len()).position(|part| part == end).map(|at| at + end.len());
    match protocol {
        Protocol::None | Protocol::Any => None,
        Protocol::Varlink => {
            let address =
                r#"{"parameters":{"addresses":[{"family":2,"address":[203,0,113,2]}],"name":"it.example","flags":1}}"#;
            Some((until(b"\0")?, [address.as_bytes(), b"\0"].concat()))
        }
        Protocol::Avahi => Some((until(b"\n")?, b"+ 2 0 it.example 203.0.113.2\n".to_vec())),
        Protocol::Dbus => {
            if let Some(length) = until(b"\r\n").filter(|_| received[0] != b'l') {
                let line = String::from_utf8_lossy(&received[..length]);
                let line = match line.trim_matches(['\0', '\r', '\n']).split(' ').next() {
                    Some("AUTH") => "OK 0123456789abcdef0123456789abcdef\r\n",
                    Some("NEGOTIATE_UNIX_FD") => "AGREE_UNIX_FD\r\n",
                    Some("BEGIN") => "",
                    _ => "ERROR\r\n",
                };
                return Some((length, line.into()));
            }
            dbus_answer(received)
        }
    }
}

/// Answers any little-endian method call with a string.
fn dbus_answer(received: &[u8]) -> Option<(usize, Vec<u8>)> {
    let number = |at: usize| received.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let length = 16 + (number(12)? as usize).next_multiple_of(8) + number(4)? as usize;
    let serial = number(8)?;
    if received.len() < length {
        return None;
    }
    let body = b"\x04\0\0\0:1.1\0";
    let mut answer = vec![b'l', 2, 1, 1];
    answer.extend((body.len() as u32).to_le_bytes());
    answer.extend(1_u32.to_le_bytes());
    // The header fields REPLY_SERIAL and SIGNATURE.
    let fields = [&[5, 1, b'u', 0][..], &serial.to_le_bytes(), &[8, 1, b'g', 0, 1, b's', 0]].concat();
    answer.extend((fields.len() as u32).to_le_bytes());
    answer.extend(&fields);
    answer.resize(answer.len().next_multiple_of(8), 0);
    answer.extend(body);
    Some((length, answer))
}
