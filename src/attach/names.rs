//! Looks up the names of endpoints. The container's own resolvers answer, over sockets with a mark that the packet
//! rules let pass to exactly these resolvers. The C library's resolver cannot be used: it asks the tunnel's.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::resolv_conf;
use crate::config::{Config, Endpoint};
use crate::endpoints::LookUp;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::plan::DNS_PORT;
use crate::plan::shared_namespace::MARK;

/// How long a resolver may take to answer a question.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How often all resolvers are asked.
const ROUNDS: usize = 2;

/// The largest message over UDP (RFC 1035 section 2.3.4) with room for resolvers that send more.
const UDP_MESSAGE: usize = 4096;

/// The types of addresses.
const TYPES: [RecordType; 2] = [RecordType::A, RecordType::AAAA];

/// The resolvers of the container before a tunnel was attached to it.
#[derive(Clone, Debug)]
pub(super) struct EndpointResolver {
    engine: Vec<IpAddr>,
    is_needed: bool,
}

impl EndpointResolver {
    /// Creates a resolver that asks the `recorded` nameservers, or else those of the container's file.
    pub(super) fn new(config: &Config, recorded: Option<Vec<IpAddr>>) -> Self {
        // Without a readable file at the first start, an empty list was recorded.
        let recorded = recorded.filter(|servers| !servers.is_empty());
        Self { engine: recorded.unwrap_or_else(resolv_conf::engine_nameservers), is_needed: has_names(config) }
    }

    /// Returns the resolvers that the packet rules have to let pass: none if no endpoint is a name.
    pub(super) fn servers(&self) -> &[IpAddr] {
        if self.is_needed { &self.engine } else { &[] }
    }

    /// Returns the resolvers that the container engine has configured.
    pub(super) fn engine(&self) -> &[IpAddr] {
        &self.engine
    }

    /// Returns a function that looks up an endpoint. It drops all capabilities of the calling thread once its sockets
    /// are open, so it needs a thread of its own.
    pub(super) fn look_up(&self) -> LookUp {
        let servers = self.engine.clone();
        Arc::new(move |endpoint| look_up(endpoint, &servers))
    }

    /// Looks up all endpoints of a configuration. Endpoints that do not resolve are left out, and looked up again
    /// later.
    pub(super) fn look_up_all(&self, config: &Config) -> Vec<SocketAddr> {
        let endpoints = config.wireguard.peers.iter().filter_map(|peer| peer.endpoint.clone());
        let look_ups = endpoints.map(|endpoint| {
            let look_up = self.look_up();
            let thread = std::thread::Builder::new().name("resolver".into());
            let name = endpoint.to_string();
            (name, thread.spawn(move || look_up(&endpoint)))
        });
        let mut found = Vec::new();
        for (name, look_up) in look_ups.collect::<Vec<_>>() {
            let ended = |_| Err(io::Error::other("the thread that looks it up has ended"));
            match look_up.and_then(|thread| thread.join().unwrap_or_else(ended)) {
                Ok(addresses) => found.extend(addresses),
                Err(error) => tracing::warn!("cannot resolve the endpoint {name}: {error}"),
            }
        }
        found
    }
}

/// Returns whether an endpoint is a name.
pub(super) fn has_names(config: &Config) -> bool {
    config.wireguard.peers.iter().any(|peer| matches!(peer.endpoint, Some(Endpoint::Name { .. })))
}

fn look_up(endpoint: &Endpoint, servers: &[IpAddr]) -> io::Result<Vec<SocketAddr>> {
    let (host, port) = match endpoint {
        Endpoint::Name { host, port } => (host, *port),
        address => return crate::endpoints::look_up(address),
    };
    let with_port = |addresses: Vec<IpAddr>| addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let listed = in_hosts(&hosts, host);
    if !listed.is_empty() {
        return Ok(with_port(listed));
    }
    let resolvers = servers.iter().map(|server| Resolver::open(*server)).collect::<io::Result<Vec<_>>>()?;
    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty())?;
    ask_all(resolvers, host).map(with_port)
}

/// Returns the addresses of a name in the text of `/etc/hosts` (hosts(5)).
fn in_hosts(text: &str, host: &str) -> Vec<IpAddr> {
    let host = host.trim_end_matches('.');
    let line = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(host)).then_some(address)
    };
    text.lines().filter_map(line).collect()
}

/// Asks resolvers one after another for both kinds of addresses, until one has answered.
fn ask_all(mut resolvers: Vec<Resolver>, host: &str) -> io::Result<Vec<IpAddr>> {
    let name = Name::from_ascii(format!("{}.", host.trim_end_matches('.'))).map_err(io::Error::other)?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the container has no resolver in /etc/resolv.conf");
    for _ in 0..ROUNDS {
        for resolver in &mut resolvers {
            match resolver.ask(&name) {
                Ok(addresses) => return Ok(addresses),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                Err(error) => {
                    last = io::Error::new(error.kind(), format!("{}: {error}", resolver.address.ip()));
                }
            }
        }
    }
    Err(last)
}

/// Sockets for the queries to one resolver.
struct Resolver {
    address: SocketAddr,
    udp: UdpSocket,
    /// For an answer that does not fit into a datagram.
    tcp: Option<OwnedFd>,
}

impl Resolver {
    /// Opens the sockets, which carry the mark. This needs CAP_NET_ADMIN.
    fn open(address: IpAddr) -> io::Result<Self> {
        let udp = UdpSocket::from(marked(address, SocketType::DGRAM)?);
        let tcp = TcpStream::from(marked(address, SocketType::STREAM)?);
        // Also the time for connecting (socket(7)).
        tcp.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self { address: SocketAddr::new(address, DNS_PORT), udp, tcp: Some(tcp.into()) })
    }

    /// Returns the addresses of a name: IPv4 addresses first.
    ///
    /// # Errors
    /// `NotFound` if the resolver says that there are none.
    fn ask(&mut self, name: &Name) -> io::Result<Vec<IpAddr>> {
        self.udp.connect(self.address)?;
        let mut addresses = Vec::new();
        for kind in TYPES {
            addresses.extend(self.ask_for(name, kind)?);
        }
        match addresses.is_empty() {
            true => Err(io::Error::new(io::ErrorKind::NotFound, "the name does not exist or has no address")),
            false => Ok(addresses),
        }
    }

    fn ask_for(&mut self, name: &Name, kind: RecordType) -> io::Result<Vec<IpAddr>> {
        let query = Query::query(name.clone(), kind);
        let mut id = [0; 2];
        rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty())?;
        let mut message = Message::new(u16::from_ne_bytes(id), MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(query.clone());
        let question = message.to_vec().map_err(io::Error::other)?;
        self.udp.send(&question)?;
        let mut buffer = vec![0; UDP_MESSAGE];
        // Datagrams that are not the answer do not prolong the wait.
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.udp.set_read_timeout(Some(time_until(deadline)?))?;
            let length = self.udp.recv(&mut buffer).map_err(in_words)?;
            let Some(answer) = answer_to(&buffer[..length], &message) else { continue };
            if answer.metadata.truncation {
                return addresses(&self.ask_over_tcp(&question, &message)?);
            }
            return addresses(&answer);
        }
    }

    /// Asks over TCP, where a length precedes each message (RFC 1035 section 4.2.2).
    fn ask_over_tcp(&mut self, question: &[u8], message: &Message) -> io::Result<Message> {
        let truncated = || io::Error::other("the answer does not fit into a datagram");
        let socket = self.tcp.take().ok_or_else(truncated)?;
        rustix::net::connect(&socket, &self.address)?;
        let mut stream = TcpStream::from(socket);
        let deadline = Instant::now() + TIMEOUT;
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), question].concat())?;
        let mut length = [0; 2];
        read_until(deadline, &mut stream, &mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        read_until(deadline, &mut stream, &mut answer)?;
        answer_to(&answer, message).ok_or_else(|| io::Error::other("the answer is not one to the question"))
    }
}

/// Returns the time until a deadline.
///
/// # Errors
/// `TimedOut` if it has passed.
fn time_until(deadline: Instant) -> io::Result<Duration> {
    let rest = deadline.saturating_duration_since(Instant::now());
    if rest.is_zero() { Err(no_answer()) } else { Ok(rest) }
}

/// Fills a buffer with what a resolver sends.
fn read_until(deadline: Instant, stream: &mut TcpStream, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(time_until(deadline)?))?;
        match stream.read(buffer).map_err(in_words)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => buffer = &mut buffer[length..],
        }
    }
    Ok(())
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", TIMEOUT.as_secs()))
}

/// Replaces the error of a read that has timed out, EAGAIN.
fn in_words(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { no_answer() } else { error }
}

/// Opens a socket with the mark, which the kernel's own routes of the container carry.
fn marked(address: IpAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    setsockopt(&socket, sockopt::Mark, &MARK)?;
    Ok(socket)
}

/// Returns a message if it is the answer to a question.
fn answer_to(bytes: &[u8], question: &Message) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let is_answer = answer.metadata.message_type == MessageType::Response && answer.metadata.id == question.metadata.id;
    (is_answer && answer.queries == question.queries).then_some(answer)
}

/// Returns the addresses in an answer. A resolver includes those of an alias.
fn addresses(answer: &Message) -> io::Result<Vec<IpAddr>> {
    match answer.metadata.response_code {
        ResponseCode::NoError => {}
        ResponseCode::NXDomain => return Ok(Vec::new()),
        code => return Err(io::Error::other(format!("the resolver cannot answer: {code}"))),
    }
    let address = |data: &RData| match data {
        RData::A(address) => Some(IpAddr::from(Ipv4Addr::from(*address))),
        RData::AAAA(address) => Some(IpAddr::from(Ipv6Addr::from(*address))),
        _ => None,
    };
    Ok(answer.answers.iter().filter_map(|record| address(&record.data)).collect())
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, CNAME};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).expect("a name")
    }

    fn question() -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name("vpn.example."), RecordType::A));
        message
    }

    #[test]
    fn hosts_come_before_resolvers() {
        let text = "127.0.0.1 localhost\n192.0.2.1 other VPN.example # vpn.example2\n# 192.0.2.9 vpn.example\n\
                    2001:db8::1\tvpn.example\n";
        let found = ["192.0.2.1", "2001:db8::1"].map(|address| address.parse::<IpAddr>().expect("an address"));
        assert_eq!(in_hosts(text, "vpn.example"), found);
        assert_eq!(in_hosts(text, "vpn.example."), found);
        assert!(in_hosts(text, "vpn.example2").is_empty());
    }

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let mut answer = question();
        answer.metadata.message_type = MessageType::Response;
        let address = RData::A(A::new(192, 0, 2, 1));
        answer.add_answer(Record::from_rdata(name("vpn.example."), 60, RData::CNAME(CNAME(name("a.example.")))));
        answer.add_answer(Record::from_rdata(name("a.example."), 60, address));
        let bytes = answer.to_vec().expect("a message");
        let read = answer_to(&bytes, &question()).expect("an answer");
        assert_eq!(addresses(&read).expect("addresses"), [IpAddr::from([192, 0, 2, 1])]);
        let mut other = bytes.clone();
        other[1] ^= 1;
        assert!(answer_to(&other, &question()).is_none(), "another ID");
        assert!(answer_to(&question().to_vec().expect("a message"), &question()).is_none(), "a question");
        let mut wrong = question();
        wrong.queries.clear();
        assert!(answer_to(&bytes, &wrong).is_none(), "another question");
        assert!(answer_to(&bytes[..bytes.len() - 3], &question()).is_none(), "cut off");
    }

    #[test]
    fn other_datagrams_do_not_prolong_the_wait() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let address = server.local_addr().expect("an address");
        let sender = std::thread::spawn(move || {
            let (_, client) = server.recv_from(&mut [0; 512]).expect("a question");
            // Much longer than the resolver may take, with less between two datagrams.
            for _ in 0..60 * 4 {
                std::thread::sleep(Duration::from_millis(250));
                if server.send_to(b"not an answer", client).is_err() {
                    return;
                }
            }
        });
        let mut resolver = Resolver { address, udp, tcp: None };
        let error = resolver.ask(&name("vpn.example.")).expect_err("no answer");
        assert_eq!(error.to_string(), "no answer within 2 s");
        assert!(!sender.is_finished(), "it waited until no more datagrams came");
    }

    #[test]
    fn an_answer_over_tcp_has_a_time_as_well() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
        let mut stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        let sender = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a client");
            for _ in 0..60 * 4 {
                std::thread::sleep(Duration::from_millis(250));
                if client.write_all(b"x").is_err() {
                    return;
                }
            }
        });
        let error = read_until(Instant::now() + TIMEOUT, &mut stream, &mut [0; 4096]).expect_err("too slow");
        assert_eq!(error.to_string(), "no answer within 2 s");
        assert!(!sender.is_finished(), "it waited until no more bytes came");
    }
}
