//! A name server that logs every question, and a client: as much of RFC 1035 and RFC 3596 as `A` and `AAAA` need, over UDP
//! and TCP.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::internet::Addresses;

/// The type of a record with an IPv4 address.
pub const A: u16 = 1;
/// The type of a record with an IPv6 address.
pub const AAAA: u16 = 28;

const CLASS_INTERNET: u16 = 1;
const HEADER: usize = 12;
/// In the flags of an answer: it is one, with authority, and recursion was wanted and is available.
const ANSWER: u16 = 0x8580;
const NO_SUCH_NAME: u16 = 3;
/// A pointer to the name of the question, right behind the header (RFC 1035 section 4.1.4).
const NAME_OF_QUESTION: u16 = 0xc000 | HEADER as u16;
/// How long an answer may be kept: not at all, so that a test which changes it is not misled.
const LIFETIME: u32 = 0;
/// How long somebody who has come may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);

/// What somebody asked a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Who asked.
    pub from: IpAddr,
    /// For which name, in lower case.
    pub name: String,
    /// For which type of record: [`A`], [`AAAA`] or another.
    pub kind: u16,
}

/// A name server on threads, until its world ends. It answers "no such name" for what it was not told.
#[derive(Debug)]
pub struct DnsServer {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    names: HashMap<String, Vec<IpAddr>>,
    questions: Vec<Question>,
}

impl DnsServer {
    /// Answers at port 53 of both addresses, which the namespace has.
    pub fn start(site: &NetworkNamespace, at: Addresses) -> Result<Self> {
        Self::start_at(site, &at.both(), &[53])
    }

    /// Answers at every address that the namespace has or will have, at these ports.
    pub fn start_everywhere(site: &NetworkNamespace, ports: &[u16]) -> Result<Self> {
        Self::start_at(site, &[Ipv6Addr::UNSPECIFIED.into()], ports)
    }

    fn start_at(site: &NetworkNamespace, addresses: &[IpAddr], ports: &[u16]) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        for address in addresses.iter().flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port))) {
            let (socket, listener) = site
                .run(|| Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?)))
                .with_context(|| format!("cannot answer for names at {address}"))?;
            let named = || std::thread::Builder::new().name("name server".into());
            let by_udp = Arc::clone(&state);
            named().spawn(move || serve(&socket, &by_udp))?;
            let by_tcp = Arc::clone(&state);
            named().spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&by_tcp);
                    // Whoever says nothing keeps nobody else waiting.
                    std::thread::spawn(move || serve_stream(stream, &state));
                }
            })?;
        }
        Ok(Self { state })
    }

    /// From now on, a name has these addresses, given in this order; with none, the name exists and has no address.
    pub fn set(&self, name: &str, addresses: &[IpAddr]) {
        self.lock().names.insert(name.to_owned(), addresses.to_vec());
    }

    /// From now on, there is no such name.
    pub fn forget(&self, name: &str) {
        self.lock().names.remove(name);
    }

    /// What was asked so far, in order.
    pub fn questions(&self) -> Vec<Question> {
        self.lock().questions.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serve(socket: &UdpSocket, state: &Mutex<State>) {
    let mut buffer = [0; 1500];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let Some(answer) = hear(&buffer[..length], from, state) else { continue };
        // Whoever asked may be gone by now.
        let _ = socket.send_to(&answer, from);
    }
}

/// Over TCP, each message has its length before it (RFC 1035 section 4.2.2).
fn serve_stream(mut stream: TcpStream, state: &Mutex<State>) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    let from = stream.peer_addr()?;
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut query = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut query)?;
        let Some(answer) = hear(&query, from, state) else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
    }
}

/// Writes a question down, and answers it.
fn hear(query: &[u8], from: SocketAddr, state: &Mutex<State>) -> Option<Vec<u8>> {
    let (name, kind) = question_of(query)?;
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.questions.push(Question { from: from.ip().to_canonical(), name: name.clone(), kind });
    Some(answer_to(query, kind, state.names.get(&name).map(Vec::as_slice)))
}

/// The name and the type that a query or an answer is about.
pub(crate) fn question_of(message: &[u8]) -> Option<(String, u16)> {
    if u16_at(message, 4)? != 1 {
        return None;
    }
    let (mut labels, mut at) = (Vec::new(), HEADER);
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        match length {
            0 => return Some((labels.join("."), u16_at(message, at)?)),
            1..=63 => {
                let label = message.get(at..at + length)?;
                labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
                at += length;
            }
            _ => return None,
        }
    }
}

fn answer_to(query: &[u8], kind: u16, addresses: Option<&[IpAddr]>) -> Vec<u8> {
    let fitting: Vec<&IpAddr> = addresses
        .unwrap_or_default()
        .iter()
        .filter(|address| kind == if address.is_ipv4() { A } else { AAAA })
        .collect();
    let flags = if addresses.is_some() { ANSWER } else { ANSWER | NO_SUCH_NAME };
    let question_end = HEADER + query[HEADER..].iter().position(|byte| *byte == 0).unwrap_or_default() + 5;
    let mut answer = query[..2].to_vec();
    for number in [flags, 1, fitting.len() as u16, 0, 0] {
        answer.extend(number.to_be_bytes());
    }
    answer.extend(&query[HEADER..question_end.min(query.len())]);
    for address in fitting {
        for number in [NAME_OF_QUESTION, kind, CLASS_INTERNET] {
            answer.extend(number.to_be_bytes());
        }
        answer.extend(LIFETIME.to_be_bytes());
        let bytes = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        answer.extend((bytes.len() as u16).to_be_bytes());
        answer.extend(bytes);
    }
    answer
}

/// Asks one server, from the calling thread's network namespace, for the addresses of a name.
///
/// # Errors
/// `NotFound` if the server knows no such name, and what the socket says, `WouldBlock` among it when there is no answer.
pub fn lookup(server: IpAddr, name: &str, kind: u16, timeout: Duration) -> io::Result<Vec<IpAddr>> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect((server, 53))?;
    let query = query(name, kind)?;
    socket.send(&query)?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    addresses_in(&buffer[..length], query.len()).unwrap_or_else(|| Err(io::ErrorKind::InvalidData.into()))
}

/// A question for a name, as it is sent over UDP.
pub fn query(name: &str, kind: u16) -> io::Result<Vec<u8>> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).map_err(io::Error::other)?);
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend(CLASS_INTERNET.to_be_bytes());
    Ok(query)
}

/// The addresses in an answer of [`answer_to`], which begin at `at`. `None` if it is cut off.
fn addresses_in(answer: &[u8], mut at: usize) -> Option<io::Result<Vec<IpAddr>>> {
    if u16_at(answer, 2)? & 0xf == NO_SUCH_NAME {
        return Some(Err(io::ErrorKind::NotFound.into()));
    }
    let mut found = Vec::new();
    for _ in 0..u16_at(answer, 6)? {
        let length = usize::from(u16_at(answer, at + 10)?);
        let data = answer.get(at + 12..at + 12 + length)?;
        if let Ok(octets) = <[u8; 4]>::try_from(data) {
            found.push(octets.into());
        } else if let Ok(octets) = <[u8; 16]>::try_from(data) {
            found.push(octets.into());
        }
        at += 12 + length;
    }
    Some(Ok(found))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes)
}
