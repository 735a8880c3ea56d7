//! A name server that logs every question, and a client, over UDP and TCP (RFC 1035, RFC 3596). The messages are
//! hickory-proto's, so that the lab does not depend on vpn-exec's idea of them.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use hickory_proto::op::{Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use vpn_exec::linux::namespace::NetworkNamespace;

pub use hickory_proto::rr::RecordType;

use crate::shared::addresses::Addresses;

/// The time for which a resolver may cache an answer, in seconds: none, so that a test can change the answer.
const LIFETIME: u32 = 0;

/// The time that a TCP client may take for its next question.
const PATIENCE: Duration = Duration::from_secs(5);

/// A question that a server received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The address of the client.
    pub from: IpAddr,
    /// The host name in lower case.
    pub name: String,
    /// The type of record.
    pub kind: RecordType,
}

/// A name server on threads, which runs until its world ends. It answers "no such name" to questions for unknown names.
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
    /// Serves port 53 of two addresses of a namespace.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(site: &NetworkNamespace, at: Addresses) -> Result<Self> {
        Self::start_at(site, &at.both(), &[53])
    }

    /// Serves ports of all present and future addresses of a namespace.
    ///
    /// # Errors
    /// If a port is taken.
    pub fn start_everywhere(site: &NetworkNamespace, ports: &[u16]) -> Result<Self> {
        Self::start_at(site, &[Ipv6Addr::UNSPECIFIED.into()], ports)
    }

    fn start_at(site: &NetworkNamespace, addresses: &[IpAddr], ports: &[u16]) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        for address in addresses.iter().flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port))) {
            let (socket, listener) = site
                .run(|| Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?)))
                .with_context(|| format!("cannot serve names at {address}"))?;
            let named = || std::thread::Builder::new().name("name server".into());
            let by_udp = Arc::clone(&state);
            named().spawn(move || serve(&socket, &by_udp))?;
            let by_tcp = Arc::clone(&state);
            named().spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&by_tcp);
                    // On a thread, so that a silent client does not delay the others.
                    std::thread::spawn(move || serve_stream(stream, &state));
                }
            })?;
        }
        Ok(Self { state })
    }

    /// Sets the addresses of a name, which are served in this order. Without any, the name exists but has no address.
    pub fn set(&self, name: &str, addresses: &[IpAddr]) {
        self.lock().names.insert(name.to_owned(), addresses.to_vec());
    }

    /// Removes a name.
    pub fn forget(&self, name: &str) {
        self.lock().names.remove(name);
    }

    /// Returns the questions so far, in order.
    pub fn questions(&self) -> Vec<Question> {
        self.lock().questions.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serve(socket: &UdpSocket, state: &Mutex<State>) {
    let mut buffer = [0; 1500];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let Some(answer) = answer(&buffer[..length], from, state) else { continue };
        // The client may be gone by now.
        let _ = socket.send_to(&answer, from);
    }
}

/// Serves a TCP connection, on which the length precedes each message (RFC 1035 section 4.2.2).
fn serve_stream(mut stream: TcpStream, state: &Mutex<State>) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::patience(PATIENCE)))?;
    let from = stream.peer_addr()?;
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut query = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut query)?;
        let Some(answer) = answer(&query, from, state) else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
    }
}

/// Logs a question and returns the answer. `None` if the message is not one question.
fn answer(message: &[u8], from: SocketAddr, state: &Mutex<State>) -> Option<Vec<u8>> {
    let (header, question) = question_in(message)?;
    let name = host_name(question.name());
    let kind = question.query_type();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.questions.push(Question { from: from.ip().to_canonical(), name: name.clone(), kind });

    let mut answer = Message::new(header.metadata.id, MessageType::Response, OpCode::Query);
    answer.metadata.authoritative = true;
    answer.metadata.recursion_desired = true;
    answer.metadata.recursion_available = true;
    match state.names.get(&name) {
        Some(addresses) => {
            let of_kind = |address: &&IpAddr| kind == if address.is_ipv4() { RecordType::A } else { RecordType::AAAA };
            let record = |address: &IpAddr| Record::from_rdata(question.name().clone(), LIFETIME, (*address).into());
            answer.add_answers(addresses.iter().filter(of_kind).map(record).collect::<Vec<Record>>());
        }
        None => answer.metadata.response_code = ResponseCode::NXDomain,
    }
    answer.add_query(question);
    answer.to_vec().ok()
}

/// Returns the header and the only question of a message, which may be cut off behind that.
fn question_in(message: &[u8]) -> Option<(Header, Query)> {
    let mut decoder = BinDecoder::new(message);
    let header = Header::read(&mut decoder).ok()?;
    let mut questions = Message::read_queries(&mut decoder, header.counts.queries.into()).ok()?;
    (questions.len() == 1).then_some((header, questions.pop()?))
}

/// Returns the host name that a query or an answer is about, in lower case.
pub(crate) fn name_in(message: &[u8]) -> Option<String> {
    Some(host_name(question_in(message)?.1.name()))
}

fn host_name(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// Asks one server for the addresses of a host name, from the calling thread's network namespace.
///
/// # Errors
/// `NotFound` if the server knows no such name, `WouldBlock` without an answer, and those of the socket.
pub fn lookup(server: IpAddr, name: &str, kind: RecordType, timeout: Duration) -> io::Result<Vec<IpAddr>> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect((server, 53))?;
    // The socket is connected and used once, so any ID identifies the answer.
    let mut query = Message::new(1, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).map_err(io::Error::other)?, kind));
    socket.send(&query.to_vec().map_err(io::Error::other)?)?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    let answer = Message::from_vec(&buffer[..length]).map_err(io::Error::other)?;
    if answer.metadata.response_code == ResponseCode::NXDomain {
        return Err(io::ErrorKind::NotFound.into());
    }
    let address = |record: &Record| match record.data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    };
    Ok(answer.answers.iter().filter_map(address).collect())
}
