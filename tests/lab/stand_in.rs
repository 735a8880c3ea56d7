//! Somebody who listens where a resolver of the host does, writes down all that he is told, and answers in the resolver's tongue.

use std::fs;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

/// How long somebody may take for the next thing that he says.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is spoken at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tongue {
    /// None: whoever comes is heard once, and sent away.
    None,
    /// Anything, without an answer.
    Any,
    /// systemd-resolved's, by varlink (<https://varlink.org/>): JSON and a zero.
    Varlink,
    /// D-Bus (<https://dbus.freedesktop.org/doc/dbus-specification.html>).
    Dbus,
    /// avahi-daemon's simple protocol: a line, answered by a line.
    Avahi,
}

/// A listener on threads, until its world ends.
#[derive(Debug)]
pub struct StandIn(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    callers: usize,
    heard: Vec<u8>,
}

impl StandIn {
    /// Listens at a path, where everybody may come.
    pub fn listen(path: &str, tongue: Tongue) -> Result<Self> {
        fs::create_dir_all(Path::new(path).parent().context("a folder")?)?;
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {path}"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
        Ok(Self::serve(listener, tongue))
    }

    /// Listens at an abstract name (unix(7)), in the calling thread's network namespace.
    pub fn listen_abstract(name: &str, tongue: Tongue) -> Result<Self> {
        Ok(Self::serve(UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?, tongue))
    }

    fn serve(listener: UnixListener, tongue: Tongue) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let written = Arc::clone(&log);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                lock(&written).callers += 1;
                let log = Arc::clone(&written);
                // Whoever is rude is no concern of the others.
                std::thread::spawn(move || converse(stream, tongue, &log));
            }
        });
        Self(log)
    }

    /// How many have come.
    pub fn callers(&self) -> usize {
        lock(&self.0).callers
    }

    /// All that was said, by all of them.
    pub fn heard(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0).heard).into_owned()
    }
}

fn lock(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

fn converse(mut stream: UnixStream, tongue: Tongue, log: &Mutex<Log>) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        lock(log).heard.extend(&buffer[..length]);
        if tongue == Tongue::None {
            return Ok(());
        }
        said.extend(&buffer[..length]);
        while let Some((length, answer)) = answer(tongue, &said) {
            said.drain(..length);
            stream.write_all(&answer)?;
        }
    }
}

/// How long the first thing said is, once it is complete, and what is answered to it.
fn answer(tongue: Tongue, said: &[u8]) -> Option<(usize, Vec<u8>)> {
    let until = |end: &[u8]| said.windows(end.len()).position(|part| part == end).map(|at| at + end.len());
    match tongue {
        Tongue::None | Tongue::Any => None,
        Tongue::Varlink => {
            let address =
                r#"{"parameters":{"addresses":[{"family":2,"address":[203,0,113,2]}],"name":"it.example","flags":1}}"#;
            Some((until(b"\0")?, [address.as_bytes(), b"\0"].concat()))
        }
        Tongue::Avahi => Some((until(b"\n")?, b"+ 2 0 it.example 203.0.113.2\n".to_vec())),
        Tongue::Dbus => {
            if let Some(length) = until(b"\r\n").filter(|_| said[0] != b'l') {
                let line = String::from_utf8_lossy(&said[..length]);
                let line = match line.trim_matches(['\0', '\r', '\n']).split(' ').next() {
                    Some("AUTH") => "OK 0123456789abcdef0123456789abcdef\r\n",
                    Some("NEGOTIATE_UNIX_FD") => "AGREE_UNIX_FD\r\n",
                    Some("BEGIN") => "",
                    _ => "ERROR\r\n",
                };
                return Some((length, line.into()));
            }
            dbus_answer(said)
        }
    }
}

/// Answers any method call, of little end first, with a text.
fn dbus_answer(said: &[u8]) -> Option<(usize, Vec<u8>)> {
    let number = |at: usize| said.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let length = 16 + (number(12)? as usize).next_multiple_of(8) + number(4)? as usize;
    let serial = number(8)?;
    if said.len() < length {
        return None;
    }
    let body = b"\x04\0\0\0:1.1\0";
    let mut answer = vec![b'l', 2, 1, 1];
    answer.extend((body.len() as u32).to_le_bytes());
    answer.extend(1_u32.to_le_bytes());
    // REPLY_SERIAL, and the body's SIGNATURE.
    let fields = [&[5, 1, b'u', 0][..], &serial.to_le_bytes(), &[8, 1, b'g', 0, 1, b's', 0]].concat();
    answer.extend((fields.len() as u32).to_le_bytes());
    answer.extend(&fields);
    answer.resize(answer.len().next_multiple_of(8), 0);
    answer.extend(body);
    Some((length, answer))
}
