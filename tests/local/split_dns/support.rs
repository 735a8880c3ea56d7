//! A tunnel with a local resolver, questions from inside, and resolvers that answer as a test says.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, Record};
use lab::agent::Agent;
use lab::dns::{DnsServer, Question, RecordType};
use lab::{Lab, PRIVATE_LAN, WEB, local_networks};
use vpn_exec::linux::namespace::NetworkNamespace;

use super::super::{WORKS, file, inside};

/// The domain of the local network.
pub(super) const DOMAIN: &str = "home.example";

/// The options of a tunnel whose local network has a resolver for [`DOMAIN`].
pub(super) fn options() -> Vec<String> {
    let mut options: Vec<String> = local_networks().iter().map(|word| (*word).to_owned()).collect();
    options.extend(["--dns-for".to_owned(), format!("{DOMAIN}={}", PRIVATE_LAN.ipv4)]);
    options
}

/// Starts the agent in a tunnel with these options.
pub(super) fn agent_with(lab: &Lab, options: &[String]) -> Result<Agent> {
    inside(lab, &options.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Starts the resolver of the local network.
pub(super) fn neighbours(lab: &Lab) -> Result<DnsServer> {
    lab.join_private_lan()?;
    let server = DnsServer::start(&lab.lan, PRIVATE_LAN)?;
    server.set(&format!("nas.{DOMAIN}"), &PRIVATE_LAN.both());
    // It could answer everything, as a recursive resolver does.
    server.set("web.example", &WEB.both());
    Ok(server)
}

pub(super) fn names(questions: &[Question]) -> BTreeSet<String> {
    questions.iter().map(|question| question.name.clone()).collect()
}

pub(super) fn is_in_domain(name: &str) -> bool {
    name == DOMAIN || name.ends_with(&format!(".{DOMAIN}"))
}

/// Checks that each resolver has seen names of its own side alone, and the host's resolver has seen none.
pub(super) fn assert_sides(lab: &Lab, local: &DnsServer) -> Result<()> {
    let (inside, outside) = (names(&local.questions()), names(&lab.tunnel_resolver.questions()));
    ensure!(inside.iter().all(|name| is_in_domain(name)), "asked in the local network: {inside:?}");
    ensure!(!outside.iter().any(|name| is_in_domain(name)), "asked in the tunnel: {outside:?}");
    ensure!(lab.resolver.questions().is_empty(), "{:?}", lab.resolver.questions());
    Ok(())
}

/// Opens the namespace of a tunnel.
pub(super) fn namespace_of(name: &str) -> Result<NetworkNamespace> {
    lab::tunnel::namespace(name)
}

/// The namespace of the agent's tunnel.
pub(super) struct Inside(pub(super) NetworkNamespace);

impl Inside {
    pub(super) fn of(lab: &Lab) -> Result<Self> {
        Ok(Self(namespace_of(&name_of_tunnel(lab)?)?))
    }

    /// Asks the forwarder about the IPv4 addresses of a name.
    pub(super) fn ask_udp(&self, name: &str) -> Result<Message> {
        let question = question(name).to_vec()?;
        let answer = self.0.run(|| {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.set_read_timeout(Some(WORKS))?;
            socket.connect("127.0.0.1:53")?;
            socket.send(&question)?;
            let mut buffer = vec![0; 65_535];
            let length = socket.recv(&mut buffer)?;
            buffer.truncate(length);
            Ok(buffer)
        });
        let answer = Message::from_vec(&answer.with_context(|| name.to_owned())?)?;
        ensure!(answer.metadata.id == ID && answer.queries.len() == 1, "{answer}");
        Ok(answer)
    }

    /// Asks the forwarder about several names over one connection.
    pub(super) fn ask_tcp(&self, names: &[&str]) -> Result<Vec<Message>> {
        let mut stream = self.0.run(|| TcpStream::connect("127.0.0.1:53"))?;
        stream.set_read_timeout(Some(WORKS))?;
        let mut questions = Vec::new();
        for name in names {
            questions.extend(framed(&question(name).to_vec()?));
        }
        stream.write_all(&questions)?;
        names.iter().map(|_| Ok(Message::from_vec(&read_framed(&mut stream)?)?)).collect()
    }
}

/// The ID of the tests' questions.
pub(super) const ID: u16 = 4711;

pub(super) fn question(name: &str) -> Message {
    let mut message = Message::new(ID, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let name = Name::from_ascii(format!("{name}.")).expect("a name");
    message.add_query(Query::query(name, RecordType::A));
    message
}

pub(super) fn reply_to(question: &Message) -> Message {
    let mut answer = Message::new(question.metadata.id, MessageType::Response, OpCode::Query);
    // The C library ignores an answer without records and without this flag.
    answer.metadata.recursion_available = true;
    answer.add_query(question.queries[0].clone());
    answer
}

pub(super) fn record(question: &Message, data: RData) -> Record {
    Record::from_rdata(question.queries[0].name().clone(), 0, data)
}

pub(super) fn name_of(question: &Message) -> String {
    question.queries[0].name().to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// Returns a message as it is sent over TCP.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a short message");
    [&length.to_be_bytes()[..], message].concat()
}

pub(super) fn read_framed(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// A resolver that answers each question as a function says, with any number of messages.
pub(super) struct Scripted(Arc<Mutex<BTreeSet<String>>>);

impl Scripted {
    /// Serves port 53 of an address. The function's second argument says whether the question came over TCP.
    pub(super) fn start(
        site: &NetworkNamespace,
        address: IpAddr,
        answer: impl Fn(&Message, bool) -> Vec<Vec<u8>> + Send + Sync + 'static,
    ) -> Result<Self> {
        let at = SocketAddr::new(address, 53);
        let (socket, listener) = site.run(|| Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?)))?;
        let (seen, answer) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(answer));
        let log = |seen: &Mutex<BTreeSet<String>>, question: &Message| {
            seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name_of(question));
        };
        // It answers first, from another port. Its answers are right but for that, and for the address in them.
        let stranger = site.run(|| UdpSocket::bind((address, 0)))?;
        let (by_udp, answer_udp) = (Arc::clone(&seen), Arc::clone(&answer));
        std::thread::spawn(move || {
            let mut buffer = [0; 65_535];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let Ok(question) = Message::from_vec(&buffer[..length]) else { continue };
                log(&by_udp, &question);
                let mut forged = reply_to(&question);
                forged.add_answer(record(&question, RData::A(Ipv4Addr::new(203, 0, 113, 66).into())));
                let _ = stranger.send_to(&forged.to_vec().expect("a message"), from);
                for message in answer_udp(&question, false) {
                    let _ = socket.send_to(&message, from);
                }
            }
        });
        let by_tcp = Arc::clone(&seen);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (seen, answer) = (Arc::clone(&by_tcp), Arc::clone(&answer));
                std::thread::spawn(move || {
                    while let Ok(bytes) = read_framed(&mut stream) {
                        let Ok(question) = Message::from_vec(&bytes) else { return };
                        log(&seen, &question);
                        for message in answer(&question, true) {
                            let _ = stream.write_all(&framed(&message));
                        }
                    }
                });
            }
        });
        Ok(Self(seen))
    }

    /// Returns the names that were asked.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Returns the name of the tunnel that [`inside`] makes.
pub(super) fn name_of_tunnel(lab: &Lab) -> Result<String> {
    let path = std::path::PathBuf::from(file(lab)?);
    Ok(path.file_stem().context("a name")?.to_string_lossy().into_owned())
}
