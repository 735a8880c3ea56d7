//! A client of the filter, and its own connection to the bus: what passes from one to the other, and what is answered
//! here.
//!
//! Each client has a connection of its own, so the bus gives it a name of its own and keeps order, limits and replies
//! as ever. The filter calls methods of the bus only once, after the client's `Hello` and before anything else of the
//! client is passed on. So its serial numbers cannot meet those of the client. What it says later are replies and
//! signals, which have no reply.
//!
//! Who owns a name is heard on the same connection (`NameOwnerChanged`): the bus says so before it passes on the
//! owner's first message.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::OwnedFd;

use super::authentication::{self, AuthReply, BusAuthentication, ClientAuthentication};
use super::buffered_socket::{BufferedSocket, PendingBody};
use super::message::{Header, Kind, Malformed, NO_AUTO_START, NO_REPLY, Parsed, Reader, Writer};
use super::names::{ClientId, Names, OwnerChange, reply};
use super::policy::{MethodCall, PROPERTIES, Policy, check_name};
use super::refusal::{BusRefusal, Counter};

/// The bus itself.
const BUS: &str = "org.freedesktop.DBus";
const PEER: &str = "org.freedesktop.DBus.RemotePeer";
const INTROSPECTABLE: &str = "org.freedesktop.DBus.Introspectable";
const BUS_PATH: &str = "/org/freedesktop/DBus";

/// Output for a client beyond which nothing more of it or for it is looked at. It has room for some ten thousand
/// replies, so that a client that sends many calls before it reads the first reply does not wait for ever.
const CLIENT_LIMIT: usize = 4 << 20;
/// The same for the bus.
const BUS_LIMIT: usize = 1 << 20;

/// How much of a body is looked at, for its first arguments. Names have 255 bytes and match rules 1024 at most.
const PREFIX: usize = 16 * 1024;
/// The longest list of names.
const MAX_LIST: usize = 8 << 20;
/// How many calls of `ListNames` may wait for their reply.
const MAX_LISTS: usize = 256;

/// The serial number of the filter's `ListNames`. Those of its other calls follow.
const FIRST_CALL: u32 = 0x7000_0000;
/// The serial number of all messages of the filter that have no reply: it has a meaning for replies alone.
const UNANSWERED: u32 = u32::MAX;

/// How far a connection has come.
#[derive(Debug)]
enum Phase {
    /// The bus is to let the filter in.
    Bus(BusAuthentication),
    /// The client is to say that it can begin.
    Client(BusAuthentication, ClientAuthentication, usize),
    /// The client's first message must be `Hello`.
    Hello,
    /// The bus is to reply to it: the call has this serial number.
    Greeted(u32),
    /// The filter asks who owns what. These calls are to be replied to.
    Asking(HashMap<u32, Query>),
    /// Messages pass.
    Open,
    /// The end.
    Over,
}

/// What the filter asks the bus.
#[derive(Debug)]
enum Query {
    /// Which names there are.
    Names,
    /// Which services can be started.
    Activatable,
    /// Who owns this name.
    Owner(String),
}

/// A peer on the bus.
#[derive(Debug, Default)]
struct RemotePeer {
    /// The names by which it may be called. It keeps them until it is gone: who has called a name may go on to call the
    /// number behind it.
    names: BTreeSet<String>,
}

/// What all clients share.
pub(super) struct Shared<'a> {
    pub(super) policy: &'a Policy,
    pub(super) names: Names,
    /// The clients by the names that the bus gave them.
    pub(super) inside: HashMap<String, ClientId>,
    /// The names that the bus gave to the clients.
    pub(super) unique: HashMap<ClientId, String>,
    counter: Counter,
    /// Is told of what is refused before the client is.
    report: &'a mut dyn FnMut(&BusRefusal, u64),
    /// Changes of owners that clients are to be told about, and by whose call.
    pub(super) changes: Vec<(ClientId, OwnerChange)>,
}

impl<'a> Shared<'a> {
    pub(super) fn new(policy: &'a Policy, report: &'a mut dyn FnMut(&BusRefusal, u64)) -> Self {
        Self {
            policy,
            names: Names::default(),
            inside: HashMap::new(),
            unique: HashMap::new(),
            counter: Counter::default(),
            report,
            changes: Vec::new(),
        }
    }

    /// Counts and reports a refusal.
    pub(super) fn refuse(&mut self, refusal: BusRefusal) {
        let (refusal, times) = self.counter.count(refusal);
        (self.report)(&refusal, times);
    }

    /// Forgets what the bus called a client that has left.
    pub(super) fn forget(&mut self, client: ClientId) {
        if let Some(unique) = self.unique.remove(&client) {
            self.inside.remove(&unique);
        }
    }

    /// The owner of a name that only those inside know, as the bus calls it.
    fn owner(&self, name: &str) -> Option<&str> {
        self.unique.get(&self.names.owner(name)?).map(String::as_str)
    }
}

/// What becomes of a message.
#[derive(Debug, PartialEq, Eq)]
enum Delivery {
    Pass,
    Drop,
    /// It goes to another connection than it says.
    To(String),
    /// This goes instead of it, body and all.
    Instead(Vec<u8>),
}

/// How much of a body it takes to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyNeeded {
    Nothing,
    Beginning,
    Everything,
}

#[derive(Debug)]
pub(super) struct Connection {
    token: ClientId,
    pub(super) client: BufferedSocket,
    pub(super) bus: BufferedSocket,
    phase: Phase,
    unique: String,
    /// The owners of the names that the client may know about.
    owners: HashMap<String, String>,
    peers: HashMap<String, RemotePeer>,
    /// The names outside that the client may not know about. It is told that they are refused, and of all others that
    /// there are none.
    hidden: HashSet<String>,
    /// The services that the bus can start.
    activatable: HashSet<String>,
    /// Names that the client owns for all to see.
    public: HashSet<String>,
    /// Whether it has asked to be told about owners of names.
    watches: bool,
    /// The calls of `ListNames` that wait for a reply.
    lists: HashSet<u32>,
}

/// Moves input to output until one of them is in the way.
enum Flow {
    /// Something was moved.
    Moved,
    /// More input is needed, or room for output.
    Stuck,
}

impl Connection {
    /// # Errors
    /// If the sockets cannot be made to not block.
    pub(super) fn new(token: ClientId, client: OwnedFd, bus: OwnedFd) -> std::io::Result<Self> {
        let mut bus = BufferedSocket::new(bus, BUS_LIMIT)?;
        bus.push(authentication::TO_BUS, Vec::new());
        Ok(Self {
            token,
            client: BufferedSocket::new(client, CLIENT_LIMIT)?,
            bus,
            phase: Phase::Bus(BusAuthentication::default()),
            unique: String::new(),
            owners: HashMap::new(),
            peers: HashMap::new(),
            hidden: HashSet::new(),
            activatable: HashSet::new(),
            public: HashSet::new(),
            watches: false,
            lists: HashSet::new(),
        })
    }

    /// Whether there is nothing more to do.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// Whether what is read now can be used.
    pub(super) fn is_blocked(&self) -> bool {
        self.client.is_full() || self.bus.is_full()
    }

    /// Reads from the sides from which there is something to be read, and goes on with it.
    pub(super) fn go_on(&mut self, shared: &mut Shared<'_>, from_client: bool, from_bus: bool) {
        if from_client && !self.is_blocked() && self.client.wants_input() {
            self.client.fill();
        }
        if from_bus && !self.is_blocked() && self.bus.wants_input() {
            self.bus.fill();
        }
        self.advance(shared);
    }

    /// Moves all that can be moved.
    pub(super) fn advance(&mut self, shared: &mut Shared<'_>) {
        loop {
            let mut moved = false;
            while !self.is_over() && matches!(self.take_from_bus(shared), Flow::Moved) {
                moved = true;
            }
            while !self.is_over() && matches!(self.take_from_client(shared), Flow::Moved) {
                moved = true;
            }
            moved |= self.client.flush();
            moved |= self.bus.flush();
            if !moved {
                break;
            }
        }
        // What a client said before it left is passed on, and what the bus said before it left.
        let client_left = self.client.ended && !self.bus.has_output() && !self.is_greeting();
        let bus_left = self.bus.ended && !self.client.has_output();
        if !self.is_blocked() && (client_left || bus_left) {
            self.phase = Phase::Over;
        }
    }

    /// Whether the client's messages wait for the bus.
    fn is_greeting(&self) -> bool {
        !self.client.unread().is_empty() && matches!(self.phase, Phase::Bus(_) | Phase::Greeted(_) | Phase::Asking(_))
    }

    fn end(&mut self, shared: &mut Shared<'_>, why: Malformed) {
        shared.refuse(BusRefusal::Malformed(why.0));
        self.phase = Phase::Over;
    }

    fn take_from_bus(&mut self, shared: &mut Shared<'_>) -> Flow {
        if self.is_blocked() {
            return Flow::Stuck;
        }
        if let Phase::Bus(said) = &mut self.phase {
            match authentication::first_line(self.bus.unread()) {
                Ok(Some((line, length))) => {
                    let outcome = said.line(line);
                    self.bus.consume(length);
                    match outcome {
                        Ok(false) => {}
                        Ok(true) => {
                            let said = std::mem::take(said);
                            self.phase = Phase::Client(said, ClientAuthentication::default(), 0);
                        }
                        Err(line) => {
                            shared.refuse(BusRefusal::NoBus(format!("it answers {line:?}")));
                            self.phase = Phase::Over;
                        }
                    }
                    return Flow::Moved;
                }
                Ok(None) if self.bus.unread().len() < authentication::MAX_AUTH_BYTES => {
                    self.bus.need = self.bus.unread().len() + 1;
                    if self.bus.ended {
                        shared.refuse(BusRefusal::NoBus("it closes the connection".to_owned()));
                        self.phase = Phase::Over;
                    }
                    return Flow::Stuck;
                }
                _ => {
                    shared.refuse(BusRefusal::NoBus("it answers with something else than lines".to_owned()));
                    self.phase = Phase::Over;
                    return Flow::Stuck;
                }
            }
        }
        pass_rest(&mut self.bus, &mut self.client).unwrap_or_else(|| {
            let look = |header: &Header| match (header.kind, header.sender.as_deref()) {
                (Kind::Return, Some(BUS)) if header.signature.starts_with("as") => BodyNeeded::Everything,
                (Kind::Return | Kind::Signal, Some(BUS)) => BodyNeeded::Beginning,
                _ => BodyNeeded::Nothing,
            };
            let (header, length, body) = match next(&mut self.bus, look) {
                Ok(Some(next)) => next,
                Ok(None) => return Flow::Stuck,
                Err(why) => {
                    self.end(shared, why);
                    return Flow::Stuck;
                }
            };
            match self.judge_from_bus(shared, &header, &body) {
                Ok(verdict) => match deliver(&mut self.bus, &mut self.client, header, length, verdict) {
                    Ok(()) => Flow::Moved,
                    Err(why) => {
                        self.end(shared, why);
                        Flow::Stuck
                    }
                },
                Err(why) => {
                    self.end(shared, why);
                    Flow::Stuck
                }
            }
        })
    }

    fn take_from_client(&mut self, shared: &mut Shared<'_>) -> Flow {
        if self.is_blocked() {
            return Flow::Stuck;
        }
        match &mut self.phase {
            Phase::Client(bus, client, talk) => match authentication::client_line(self.client.unread(), *talk == 0) {
                Ok(Some((line, length))) => {
                    let answer = client.line(line, bus);
                    *talk += length;
                    let too_much = *talk > authentication::MAX_AUTH_BYTES;
                    self.client.consume(length);
                    match answer {
                        AuthReply::Say(_) if too_much => {
                            self.end(shared, Malformed("it says too much before the first one"))
                        }
                        AuthReply::Say(line) => self.client.push(format!("{line}\r\n").as_bytes(), Vec::new()),
                        AuthReply::Begin => self.phase = Phase::Hello,
                        AuthReply::End => self.phase = Phase::Over,
                    }
                    return Flow::Moved;
                }
                Ok(None) if self.client.unread().len() < authentication::MAX_AUTH_BYTES => {
                    self.client.need = self.client.unread().len() + 1;
                    return Flow::Stuck;
                }
                _ => {
                    self.end(shared, Malformed("it does not begin with lines of text"));
                    return Flow::Stuck;
                }
            },
            Phase::Hello | Phase::Open => {}
            // It waits.
            Phase::Bus(_) | Phase::Greeted(_) | Phase::Asking(_) | Phase::Over => {
                self.client.need = 1;
                return Flow::Stuck;
            }
        }
        pass_rest(&mut self.client, &mut self.bus).unwrap_or_else(|| {
            let look = |header: &Header| match (header.kind, header.destination.as_deref(), header.interface.as_deref())
            {
                (Kind::Call, Some(BUS), _) | (Kind::Call, _, Some(PROPERTIES)) => BodyNeeded::Beginning,
                _ => BodyNeeded::Nothing,
            };
            let (header, length, body) = match next(&mut self.client, look) {
                Ok(Some(next)) => next,
                Ok(None) => return Flow::Stuck,
                Err(why) => {
                    self.end(shared, why);
                    return Flow::Stuck;
                }
            };
            let verdict = self.judge_from_client(shared, &header, &body);
            if self.is_over() {
                return Flow::Stuck;
            }
            match deliver(&mut self.client, &mut self.bus, header, length, verdict) {
                Ok(()) => Flow::Moved,
                Err(why) => {
                    self.end(shared, why);
                    Flow::Stuck
                }
            }
        })
    }

    // What the client says.

    fn judge_from_client(&mut self, shared: &mut Shared<'_>, header: &Header, body: &[u8]) -> Delivery {
        if matches!(self.phase, Phase::Hello) {
            let is_hello = header.kind == Kind::Call
                && header.destination.as_deref() == Some(BUS)
                && header.member.as_deref() == Some("Hello")
                && header.interface.as_deref().is_none_or(|interface| interface == BUS);
            if !is_hello {
                self.end(shared, Malformed("it does not begin with Hello"));
                return Delivery::Drop;
            }
            self.phase = Phase::Greeted(header.serial);
            return Delivery::Pass;
        }
        match (header.kind, header.destination.as_deref()) {
            (Kind::Call, Some(BUS)) => self.judge_call_of_bus(shared, header, body),
            (Kind::Call, Some(destination)) => self.judge_call(shared, header, destination, body),
            // It would reach every process with a match rule for it.
            (Kind::Call, None) => {
                let member = header.member.clone().unwrap_or_default();
                self.refuse(shared, header, BusRefusal::Bus { member }, "org.freedesktop.DBus.Error.AccessDenied")
            }
            // The bus lets replies through to those alone that have called.
            (Kind::Return | Kind::Error, Some(destination)) => {
                if shared.inside.contains_key(destination) || self.peers.contains_key(destination) {
                    Delivery::Pass
                } else {
                    Delivery::Drop
                }
            }
            (Kind::Signal, None) => Delivery::Pass,
            (Kind::Signal, Some(destination)) => self.judge_signal(shared, header, destination),
            (Kind::Return | Kind::Error, None) | (Kind::Unknown(_), _) => Delivery::Drop,
        }
    }

    fn judge_call(&mut self, shared: &mut Shared<'_>, header: &Header, destination: &str, body: &[u8]) -> Delivery {
        let member = header.member.as_deref().unwrap_or_default();
        let interface = header.interface.as_deref();
        let of = (interface == Some(PROPERTIES) && header.signature.starts_with('s'))
            .then(|| Reader::new(body, header.endian).string().ok())
            .flatten();
        let asked = MethodCall { interface, member, of };
        if shared.inside.contains_key(destination) {
            return Delivery::Pass;
        }
        if let Some(owner) = shared.owner(destination) {
            return Delivery::To(owner.to_owned());
        }
        if self.owners.get(destination).is_some_and(|owner| shared.inside.contains_key(owner)) {
            return Delivery::Pass;
        }
        let names: Vec<&str> = match self.peers.get(destination) {
            Some(peer) => peer.names.iter().map(String::as_str).collect(),
            None => vec![destination],
        };
        if shared.policy.allows(names.iter().copied(), asked) {
            return Delivery::Pass;
        }
        if let Some(name) = names.into_iter().find(|name| shared.policy.talks_to(name)) {
            let refusal = BusRefusal::Method {
                name: name.to_owned(),
                interface: interface.map(ToOwned::to_owned),
                member: member.to_owned(),
            };
            return self.refuse(shared, header, refusal, "org.freedesktop.DBus.Error.AccessDenied");
        }
        let error = if destination.starts_with(':') || header.flags & NO_AUTO_START != 0 {
            "org.freedesktop.DBus.Error.NameHasNoOwner"
        } else {
            "org.freedesktop.DBus.Error.ServiceUnknown"
        };
        if !destination.starts_with(':') && !self.is_outside(destination) {
            return self.fail(header, error, &format!("no process owns the name {destination}"));
        }
        let refusal = BusRefusal::Name { name: destination.to_owned(), member: member.to_owned() };
        self.refuse(shared, header, refusal, error)
    }

    /// Whether a process outside has a name, or is started for it.
    fn is_outside(&self, name: &str) -> bool {
        self.hidden.contains(name) || self.activatable.contains(name) || self.owners.contains_key(name)
    }

    fn judge_signal(&self, shared: &Shared<'_>, header: &Header, destination: &str) -> Delivery {
        if let Some(owner) = shared.owner(destination) {
            return Delivery::To(owner.to_owned());
        }
        let asked = MethodCall {
            interface: header.interface.as_deref(),
            member: header.member.as_deref().unwrap_or_default(),
            of: None,
        };
        let allowed = match self.peers.get(destination) {
            // A peer that has called may be sent signals.
            Some(_) => true,
            None => shared.inside.contains_key(destination) || shared.policy.allows([destination], asked),
        };
        if allowed { Delivery::Pass } else { Delivery::Drop }
    }

    fn judge_call_of_bus(&mut self, shared: &mut Shared<'_>, header: &Header, body: &[u8]) -> Delivery {
        let member = header.member.as_deref().unwrap_or_default();
        let mut arguments = Reader::new(body, header.endian);
        let first = header.signature.starts_with('s').then(|| arguments.string().ok()).flatten();
        // Without an interface, the bus looks for the method in all of its own.
        match (header.interface.as_deref(), member) {
            (None | Some(BUS), "AddMatch") => self.add_match(shared, header, first),
            (None | Some(BUS), "RequestName") => {
                let flags = (header.signature == "su").then(|| arguments.u32().ok()).flatten();
                match (first, flags) {
                    (Some(name), Some(flags)) => self.request_name(shared, header, name, flags),
                    _ => self.invalid(header, "RequestName needs a name and flags"),
                }
            }
            (
                None | Some(BUS),
                "ReleaseName"
                | "GetNameOwner"
                | "NameHasOwner"
                | "ListQueuedOwners"
                | "StartServiceByName"
                | "GetConnectionUnixUser"
                | "GetConnectionUnixProcessID"
                | "GetConnectionCredentials"
                | "GetAdtAuditSessionData"
                | "GetConnectionSELinuxSecurityContext",
            ) => match first {
                Some(name) => self.judge_question(shared, header, member, name),
                None => self.invalid(header, "the call needs a name"),
            },
            (None | Some(BUS), "ListNames") => {
                if self.lists.len() < MAX_LISTS {
                    self.lists.insert(header.serial);
                }
                Delivery::Pass
            }
            (None | Some(BUS), "Hello" | "RemoveMatch" | "ListActivatableNames" | "GetId")
            | (None | Some(PEER), "Ping" | "GetMachineId")
            | (None | Some(INTROSPECTABLE), "Introspect")
            | (None | Some(PROPERTIES), "Get" | "GetAll") => Delivery::Pass,
            _ => {
                let refusal = BusRefusal::Bus { member: member.to_owned() };
                self.refuse(shared, header, refusal, "org.freedesktop.DBus.Error.AccessDenied")
            }
        }
    }

    fn add_match(&mut self, shared: &mut Shared<'_>, header: &Header, rule: Option<&str>) -> Delivery {
        let Some(rule) = rule else { return self.invalid(header, "AddMatch needs a rule") };
        // However it is quoted; a rule that has the word as a value is not worth the risk.
        if rule.contains("eavesdrop") {
            return self.refuse(shared, header, BusRefusal::Eavesdropping, "org.freedesktop.DBus.Error.AccessDenied");
        }
        self.watches |= !rule.contains("member") || rule.contains("NameOwnerChanged");
        Delivery::Pass
    }

    fn request_name(&mut self, shared: &mut Shared<'_>, header: &Header, name: &str, flags: u32) -> Delivery {
        if let Err(why) = check_name(name) {
            return self.invalid(header, &format!("cannot request {name:?}: {why}"));
        }
        if name == BUS {
            return self.invalid(header, "cannot request the name of the bus itself");
        }
        if shared.policy.may_own(name) {
            return Delivery::Pass;
        }
        // A name that may be called has one owner for the client, outside or inside.
        if shared.names.owner(name).is_none() && self.owners.contains_key(name) {
            return self.reply_number(header, reply::EXISTS);
        }
        match shared.names.request(name, self.token, flags) {
            None => self.fail(header, "org.freedesktop.DBus.Error.LimitsExceeded", "cannot own more names"),
            Some((answer, change)) => {
                if change.is_some() {
                    self.signal_name("NameAcquired", name);
                }
                shared.changes.extend(change.map(|change| (self.token, change)));
                self.reply_number(header, answer)
            }
        }
    }

    /// Judges a call whose argument is a name.
    fn judge_question(&mut self, shared: &mut Shared<'_>, header: &Header, member: &str, name: &str) -> Delivery {
        let owner = shared.owner(name).map(ToOwned::to_owned);
        let is_real = name == BUS
            || shared.policy.shows(name)
            || name.starts_with(':') && (self.peers.contains_key(name) || shared.inside.contains_key(name));
        match (member, owner) {
            ("ReleaseName", _) if shared.policy.may_own(name) => Delivery::Pass,
            ("ReleaseName", _) => {
                let (answer, change) = shared.names.release(name, self.token);
                if change.is_some() {
                    self.signal_name("NameLost", name);
                }
                shared.changes.extend(change.map(|change| (self.token, change)));
                self.reply_number(header, answer)
            }
            ("GetNameOwner", Some(owner)) => self.reply_string(header, &owner),
            ("NameHasOwner", Some(_)) => self.reply_boolean(header, true),
            ("StartServiceByName", Some(_)) => self.reply_number(header, 2),
            ("ListQueuedOwners", Some(_)) => {
                let queue: Vec<ClientId> = shared.names.queue(name).into_iter().flatten().collect();
                let owners = queue.iter().filter_map(|client| shared.unique.get(client)).map(String::as_str);
                let mut body = Writer::new(header.endian);
                body.strings(owners);
                self.reply(header, "as", body)
            }
            // The bus knows the owner by the name that it gave to it.
            (_, Some(owner)) => {
                let mut body = Writer::new(header.endian);
                body.string(&owner);
                Delivery::Instead(header.clone().with_body("s", &body.into_bytes()))
            }
            ("StartServiceByName", None) if name == BUS || shared.policy.talks_to(name) => Delivery::Pass,
            ("StartServiceByName", None) if !self.is_outside(name) => {
                let text = format!("no service has the name {:?}", display(name));
                self.fail(header, "org.freedesktop.DBus.Error.ServiceUnknown", &text)
            }
            ("StartServiceByName", None) => {
                let refusal = BusRefusal::Activation { name: display(name) };
                self.refuse(shared, header, refusal, "org.freedesktop.DBus.Error.ServiceUnknown")
            }
            _ if is_real => Delivery::Pass,
            ("NameHasOwner", None) => self.reply_boolean(header, false),
            _ => {
                let text = format!("cannot get the owner of name {:?}: no such name", display(name));
                self.fail(header, "org.freedesktop.DBus.Error.NameHasNoOwner", &text)
            }
        }
    }

    // What the client is told by the filter, in the bus's place.

    fn bus_header(&self, kind: Kind) -> Header {
        Header {
            flags: NO_REPLY,
            sender: Some(BUS.to_owned()),
            destination: Some(self.unique.clone()),
            ..Header::new(kind, UNANSWERED)
        }
    }

    fn reply(&mut self, call: &Header, signature: &str, body: Writer) -> Delivery {
        if call.wants_reply() {
            let header =
                Header { endian: call.endian, reply_serial: Some(call.serial), ..self.bus_header(Kind::Return) };
            self.client.push(&header.with_body(signature, &body.into_bytes()), Vec::new());
        }
        Delivery::Drop
    }

    fn reply_number(&mut self, call: &Header, number: u32) -> Delivery {
        let mut body = Writer::new(call.endian);
        body.u32(number);
        self.reply(call, "u", body)
    }

    fn reply_boolean(&mut self, call: &Header, value: bool) -> Delivery {
        let mut body = Writer::new(call.endian);
        body.u32(value.into());
        self.reply(call, "b", body)
    }

    fn reply_string(&mut self, call: &Header, text: &str) -> Delivery {
        let mut body = Writer::new(call.endian);
        body.string(text);
        self.reply(call, "s", body)
    }

    fn fail(&mut self, call: &Header, error: &str, text: &str) -> Delivery {
        if call.wants_reply() {
            let header = Header {
                error: Some(error.to_owned()),
                reply_serial: Some(call.serial),
                ..self.bus_header(Kind::Error)
            };
            self.client.push(&with_text(header, text), Vec::new());
        }
        Delivery::Drop
    }

    fn invalid(&mut self, call: &Header, text: &str) -> Delivery {
        self.fail(call, "org.freedesktop.DBus.Error.InvalidArgs", text)
    }

    fn refuse(&mut self, shared: &mut Shared<'_>, call: &Header, refusal: BusRefusal, error: &str) -> Delivery {
        let text = format!("vpn-exec: {refusal}");
        shared.refuse(refusal);
        self.fail(call, error, &text)
    }

    fn signal_name(&mut self, member: &str, name: &str) {
        let mut body = Writer::new(super::message::Endian::Little);
        body.string(name);
        self.signal(member, "s", body);
    }

    fn signal(&mut self, member: &str, signature: &str, body: Writer) {
        let header = Header {
            path: Some(BUS_PATH.to_owned()),
            interface: Some(BUS.to_owned()),
            member: Some(member.to_owned()),
            ..self.bus_header(Kind::Signal)
        };
        self.client.push(&header.with_body(signature, &body.into_bytes()), Vec::new());
    }

    /// Tells the client that another one has taken or lost a name that only those inside know.
    pub(super) fn tell(&mut self, shared: &Shared<'_>, change: &OwnerChange, by: ClientId) {
        if !matches!(self.phase, Phase::Open) || self.client.is_full() {
            return;
        }
        // The one by whose call it changed has been told, in the order in which the bus does.
        if by != self.token {
            if change.old == Some(self.token) {
                self.signal_name("NameLost", &change.name);
            }
            if change.new == Some(self.token) {
                self.signal_name("NameAcquired", &change.name);
            }
        }
        if self.watches {
            let unique = |client: Option<ClientId>| {
                client.and_then(|client| shared.unique.get(&client)).map_or("", String::as_str)
            };
            let mut body = Writer::new(super::message::Endian::Little);
            body.string(&change.name);
            body.string(unique(change.old));
            body.string(unique(change.new));
            self.signal("NameOwnerChanged", "sss", body);
        }
    }

    // What the bus says.

    fn judge_from_bus(&mut self, shared: &mut Shared<'_>, header: &Header, body: &[u8]) -> Result<Delivery, Malformed> {
        let Some(sender) = header.sender.as_deref() else { return Ok(Delivery::Drop) };
        let destination = header.destination.as_deref();
        // A message between other connections, which only eavesdropping brings.
        if destination.is_some_and(|to| to.starts_with(':') && to != self.unique) && !self.unique.is_empty() {
            return Ok(Delivery::Drop);
        }
        if sender == BUS {
            return self.judge_from_bus_itself(shared, header, body);
        }
        let is_known =
            shared.inside.contains_key(sender) || self.peers.get(sender).is_some_and(|peer| !peer.names.is_empty());
        let verdict = match header.kind {
            Kind::Return | Kind::Error => Delivery::Pass,
            Kind::Call => {
                let is_public = !self.public.is_empty() || destination.is_some_and(|to| !to.starts_with(':'));
                if is_known || is_public { Delivery::Pass } else { self.refuse_incoming(shared, header, sender) }
            }
            Kind::Signal if is_known || destination.is_some() && self.peers.contains_key(sender) => Delivery::Pass,
            Kind::Signal | Kind::Unknown(_) => Delivery::Drop,
        };
        // A peer that replies was called, and is known already if it is outside.
        let is_reply = matches!(header.kind, Kind::Return | Kind::Error);
        if verdict == Delivery::Pass && (!is_reply || shared.inside.contains_key(sender)) {
            // The client may learn when it is gone, and reply to it.
            self.peers.entry(sender.to_owned()).or_default();
        }
        Ok(verdict)
    }

    /// A caller outside gets an error at once and does not wait.
    fn refuse_incoming(&mut self, shared: &mut Shared<'_>, header: &Header, sender: &str) -> Delivery {
        let refusal = BusRefusal::Incoming { member: header.member.clone().unwrap_or_default() };
        if header.wants_reply() {
            let error = Header {
                flags: NO_REPLY,
                error: Some("org.freedesktop.DBus.Error.AccessDenied".to_owned()),
                reply_serial: Some(header.serial),
                destination: Some(sender.to_owned()),
                ..Header::new(Kind::Error, UNANSWERED)
            };
            self.bus.push(&with_text(error, &format!("vpn-exec: {refusal}")), Vec::new());
        }
        shared.refuse(refusal);
        Delivery::Drop
    }

    fn judge_from_bus_itself(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        body: &[u8],
    ) -> Result<Delivery, Malformed> {
        let mut arguments = Reader::new(body, header.endian);
        match (header.kind, header.member.as_deref()) {
            (Kind::Return | Kind::Error, _) => self.judge_reply_of_bus(shared, header, body),
            (Kind::Signal, Some("NameAcquired")) => {
                let name = arguments.string()?;
                if !name.starts_with(':') {
                    self.public.insert(name.to_owned());
                }
                Ok(Delivery::Pass)
            }
            (Kind::Signal, Some("NameLost")) => {
                self.public.remove(arguments.string()?);
                Ok(Delivery::Pass)
            }
            (Kind::Signal, Some("NameOwnerChanged")) => {
                let (name, _, new) = (arguments.string()?, arguments.string()?, arguments.string()?);
                Ok(self.owner_changed(shared, name, new))
            }
            (Kind::Signal, _) => Ok(Delivery::Pass),
            (Kind::Call | Kind::Unknown(_), _) => Ok(Delivery::Drop),
        }
    }

    fn owner_changed(&mut self, shared: &Shared<'_>, name: &str, new: &str) -> Delivery {
        let shown = if name.starts_with(':') {
            let known = self.peers.contains_key(name) || shared.inside.contains_key(name) || name == self.unique;
            if new.is_empty() {
                self.peers.remove(name);
            }
            known
        } else if shared.policy.shows(name) {
            self.set_owner(shared, name, new);
            // A client has taken it inside.
            shared.names.owner(name).is_none()
        } else {
            if new.is_empty() {
                self.hidden.remove(name);
            } else {
                self.hidden.insert(name.to_owned());
            }
            false
        };
        if shown && self.watches { Delivery::Pass } else { Delivery::Drop }
    }

    fn set_owner(&mut self, shared: &Shared<'_>, name: &str, owner: &str) {
        if owner.is_empty() {
            self.owners.remove(name);
            return;
        }
        self.owners.insert(name.to_owned(), owner.to_owned());
        if shared.policy.talks_to(name) {
            self.peers.entry(owner.to_owned()).or_default().names.insert(name.to_owned());
        }
    }

    fn judge_reply_of_bus(
        &mut self,
        shared: &mut Shared<'_>,
        header: &Header,
        body: &[u8],
    ) -> Result<Delivery, Malformed> {
        let mut arguments = Reader::new(body, header.endian);
        let serial = header.reply_serial.unwrap_or_default();
        match &mut self.phase {
            Phase::Greeted(hello) if *hello == serial => {
                if header.kind == Kind::Return {
                    self.unique = arguments.string()?.to_owned();
                    shared.inside.insert(self.unique.clone(), self.token);
                    shared.unique.insert(self.token, self.unique.clone());
                    self.ask();
                } else {
                    self.phase = Phase::Hello;
                }
                return Ok(Delivery::Pass);
            }
            Phase::Asking(calls) => {
                let Some(asked) = calls.remove(&serial) else { return Ok(Delivery::Drop) };
                match asked {
                    Query::Activatable if header.kind == Kind::Return => {
                        self.activatable = arguments.strings()?.into_iter().map(ToOwned::to_owned).collect();
                    }
                    Query::Names if header.kind == Kind::Return => {
                        let names = arguments.strings()?.into_iter().filter(|name| !name.starts_with(':'));
                        let (shown, hidden): (Vec<_>, Vec<_>) =
                            names.map(ToOwned::to_owned).partition(|name| shared.policy.shows(name));
                        self.hidden.extend(hidden);
                        for (serial, name) in (FIRST_CALL + 2..).zip(shown) {
                            let mut body = Writer::new(super::message::Endian::Little);
                            body.string(&name);
                            self.bus.push(&call_of_bus(serial, "GetNameOwner", body, 0), Vec::new());
                            calls.insert(serial, Query::Owner(name));
                        }
                    }
                    Query::Owner(name) if header.kind == Kind::Return => {
                        let owner = arguments.string()?.to_owned();
                        self.set_owner(shared, &name, &owner);
                    }
                    // It has no owner any more.
                    _ => {}
                }
                if matches!(&self.phase, Phase::Asking(calls) if calls.is_empty()) {
                    self.phase = Phase::Open;
                }
                return Ok(Delivery::Drop);
            }
            _ => {}
        }
        let is_list = self.lists.remove(&serial);
        if header.kind != Kind::Return || !header.signature.starts_with("as") {
            return Ok(Delivery::Pass);
        }
        // Whatever was asked for, a list from the bus is one of names.
        let shown = |name: &str| {
            name == BUS
                || name == self.unique
                || shared.policy.shows(name)
                || self.peers.contains_key(name)
                || shared.inside.contains_key(name)
        };
        let mut names: BTreeSet<&str> = arguments.strings()?.into_iter().filter(|name| shown(name)).collect();
        if is_list {
            names.extend(shared.names.all());
        }
        let mut body = Writer::new(header.endian);
        body.strings(names);
        Ok(Delivery::Instead(header.clone().with_body("as", &body.into_bytes())))
    }

    /// Asks the bus who owns what, and to be told when that changes.
    fn ask(&mut self) {
        let mut rule = Writer::new(super::message::Endian::Little);
        rule.string(&format!(
            "type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',path='{BUS_PATH}'"
        ));
        self.bus.push(&call_of_bus(FIRST_CALL - 1, "AddMatch", rule, NO_REPLY), Vec::new());
        let questions = [("ListNames", Query::Names), ("ListActivatableNames", Query::Activatable)];
        let mut calls = HashMap::new();
        for (serial, (member, question)) in (FIRST_CALL..).zip(questions) {
            let nothing = Writer::new(super::message::Endian::Little);
            self.bus.push(&call_of_bus(serial, member, nothing, 0), Vec::new());
            calls.insert(serial, question);
        }
        self.phase = Phase::Asking(calls);
    }

    pub(super) fn token(&self) -> ClientId {
        self.token
    }
}

/// A name that comes as an argument, as it is shown to users.
fn display(name: &str) -> String {
    name.chars().take(super::message::MAX_NAME).flat_map(char::escape_default).collect()
}

fn with_text(header: Header, text: &str) -> Vec<u8> {
    let mut body = Writer::new(header.endian);
    body.string(text);
    header.with_body("s", &body.into_bytes())
}

fn call_of_bus(serial: u32, member: &str, body: Writer, flags: u8) -> Vec<u8> {
    let header = Header {
        flags,
        path: Some(BUS_PATH.to_owned()),
        interface: Some(BUS.to_owned()),
        member: Some(member.to_owned()),
        destination: Some(BUS.to_owned()),
        ..Header::new(Kind::Call, serial)
    };
    let body = body.into_bytes();
    header.with_body(if body.is_empty() { "" } else { "s" }, &body)
}

/// Moves what has come of a body whose header was decided on. None if there is no such body.
fn pass_rest(from: &mut BufferedSocket, to: &mut BufferedSocket) -> Option<Flow> {
    let rest = from.rest?;
    let count = rest.left.min(from.unread().len());
    if count == 0 {
        from.need = 1;
        return Some(Flow::Stuck);
    }
    if rest.pass {
        to.push(&from.unread()[..count], Vec::new());
    }
    from.consume(count);
    from.rest = (rest.left > count).then_some(PendingBody { left: rest.left - count, ..rest });
    Some(Flow::Moved)
}

/// Returns the next message's header, the header's length, and as much of the body as is to be looked at. None if that
/// has not come yet.
fn next(
    from: &mut BufferedSocket,
    look: impl Fn(&Header) -> BodyNeeded,
) -> Result<Option<(Header, usize, Vec<u8>)>, Malformed> {
    let (header, length) = match Header::parse(from.unread())? {
        Parsed::Incomplete(need) => {
            from.need = need;
            return Ok(None);
        }
        Parsed::Complete(header, length) => (header, length),
    };
    let looked_at = match look(&header) {
        BodyNeeded::Nothing => 0,
        BodyNeeded::Beginning => header.body.min(PREFIX),
        BodyNeeded::Everything if header.body > MAX_LIST => return Err(Malformed("a list of names is too long")),
        BodyNeeded::Everything => header.body,
    };
    let Some(body) = from.unread().get(length..length + looked_at) else {
        from.need = length + looked_at;
        return Ok(None);
    };
    let body = body.to_vec();
    from.need = 1;
    Ok(Some((header, length, body)))
}

/// Sends a message on as was decided, or what there is of it by now.
fn deliver(
    from: &mut BufferedSocket,
    to: &mut BufferedSocket,
    mut header: Header,
    length: usize,
    verdict: Delivery,
) -> Result<(), Malformed> {
    let few = Malformed("it has fewer descriptors than it says");
    let descriptors = from.take_descriptors(header.descriptors).ok_or(few)?;
    let pass = match verdict {
        Delivery::Pass => {
            to.push(&from.unread()[..length], descriptors);
            true
        }
        Delivery::To(destination) => {
            header.destination = Some(destination);
            to.push(&header.encode(), descriptors);
            true
        }
        Delivery::Instead(message) => {
            to.push(&message, descriptors);
            false
        }
        Delivery::Drop => false,
    };
    from.consume(length);
    from.rest = (header.body > 0).then_some(PendingBody { left: header.body, pass });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::super::message::Endian;
    use super::*;

    /// A connection whose both ends are the test's, past the greetings. The bus knows a peer, `:1.9`, that has the
    /// notifications.
    struct Ends {
        connection: Connection,
        client: UnixStream,
        bus: UnixStream,
    }

    fn read(stream: &mut UnixStream) -> Vec<u8> {
        stream.set_nonblocking(true).expect("a socket");
        let mut bytes = Vec::new();
        // It ends with WouldBlock.
        let _ = stream.read_to_end(&mut bytes);
        bytes
    }

    fn messages(mut bytes: &[u8]) -> Vec<(Header, Vec<u8>)> {
        let mut found = Vec::new();
        while let Ok(Parsed::Complete(header, length)) = Header::parse(bytes) {
            let Some(body) = bytes.get(length..length + header.body) else { break };
            found.push((header.clone(), body.to_vec()));
            bytes = &bytes[length + header.body..];
        }
        found
    }

    fn of_bus(reply_serial: u32, signature: &str, body: Writer) -> Vec<u8> {
        let header = Header {
            sender: Some(BUS.to_owned()),
            destination: Some(":1.7".to_owned()),
            reply_serial: Some(reply_serial),
            ..Header::new(Kind::Return, 1)
        };
        header.with_body(signature, &body.into_bytes())
    }

    fn text(text: &str) -> Writer {
        let mut body = Writer::new(Endian::Little);
        body.string(text);
        body
    }

    fn open(shared: &mut Shared<'_>) -> Ends {
        let ((client, one), (bus, other)) = (UnixStream::pair().expect("a pair"), UnixStream::pair().expect("a pair"));
        let connection = Connection::new(7, one.into(), other.into()).expect("a connection");
        let mut ends = Ends { connection, client, bus };
        ends.client.write_all(b"\0AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").expect("sent");
        ends.client.write_all(&call_of_bus(1, "Hello", Writer::new(Endian::Little), 0)).expect("sent");
        let mut names = Writer::new(Endian::Little);
        names.strings([BUS, ":1.9", "org.freedesktop.Notifications", "org.freedesktop.systemd1"]);
        let mut services = Writer::new(Endian::Little);
        services.strings([BUS, "org.freedesktop.systemd1"]);
        for (said, answer) in [
            (&b"AUTH"[..], b"DATA\r\nOK ab\r\nAGREE_UNIX_FD\r\n".to_vec()),
            (b"Hello", of_bus(1, "s", text(":1.7"))),
            (
                b"ListActivatableNames",
                [of_bus(FIRST_CALL, "as", names), of_bus(FIRST_CALL + 1, "as", services)].concat(),
            ),
            (b"GetNameOwner", of_bus(FIRST_CALL + 2, "s", text(":1.9"))),
        ] {
            ends.connection.go_on(shared, true, true);
            let heard = read(&mut ends.bus);
            assert!(heard.windows(said.len()).any(|part| part == said), "{said:?} is not said");
            ends.bus.write_all(&answer).expect("sent");
        }
        ends.connection.go_on(shared, true, true);
        assert!(matches!(ends.connection.phase, Phase::Open));
        assert!(read(&mut ends.bus).is_empty());
        read(&mut ends.client);
        ends
    }

    const NAMES: [&str; 8] = [
        BUS,
        "org.freedesktop.Notifications",
        "org.freedesktop.systemd1",
        "net.example.Own",
        "org.mpris.MediaPlayer2.x",
        ":1.7",
        ":1.9",
        ":1.5",
    ];
    const INTERFACES: [&str; 6] =
        [BUS, "org.freedesktop.Notifications", "org.freedesktop.systemd1.Manager", PROPERTIES, PEER, "a.b"];
    const MEMBERS: [&str; 12] = [
        "Hello",
        "AddMatch",
        "RequestName",
        "ReleaseName",
        "GetNameOwner",
        "ListNames",
        "StartServiceByName",
        "UpdateActivationEnvironment",
        "BecomeMonitor",
        "NameOwnerChanged",
        "Notify",
        "Ping",
    ];
    const TEXTS: [&str; 5] =
        ["net.example.Own", "org.freedesktop.systemd1", ":1.9", "eavesdrop=true", "org.freedesktop.Notifications"];

    fn message() -> impl Strategy<Value = Vec<u8>> {
        let pick = |from: &'static [&'static str]| proptest::option::of(proptest::sample::select(from));
        let kind = prop_oneof![
            4 => Just(Kind::Call),
            1 => Just(Kind::Return),
            1 => Just(Kind::Error),
            1 => Just(Kind::Signal),
        ];
        let endian = prop_oneof![Just(Endian::Little), Just(Endian::Big)];
        let names =
            (pick(&NAMES), pick(&NAMES), pick(&INTERFACES), proptest::sample::select(&MEMBERS[..]), pick(&TEXTS));
        (kind, endian, names, 1..5_u32, any::<u8>()).prop_map(|(kind, endian, names, serial, flags)| {
            let (destination, sender, interface, member, argument) = names;
            let owned = |text: Option<&str>| text.map(ToOwned::to_owned);
            let header = Header {
                endian,
                flags,
                path: Some("/a".to_owned()),
                destination: owned(destination),
                sender: owned(sender),
                interface: if kind == Kind::Signal { owned(interface.or(Some("a.b"))) } else { owned(interface) },
                member: Some(member.to_owned()),
                error: Some("a.b.C".to_owned()),
                reply_serial: Some(serial),
                ..Header::new(kind, serial)
            };
            let mut body = Writer::new(endian);
            let signature = argument.map_or("", |argument| {
                body.string(argument);
                body.u32(0);
                "su"
            });
            header.with_body(signature, &body.into_bytes())
        })
    }

    /// Messages, some of them with a byte that is another.
    fn stream() -> impl Strategy<Value = Vec<(bool, Vec<u8>)>> {
        let damage = proptest::option::weighted(0.1, (any::<prop::sample::Index>(), any::<u8>()));
        let one = (any::<bool>(), message(), damage).prop_map(|(from_client, mut bytes, damage)| {
            if let Some((at, byte)) = damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            (from_client, bytes)
        });
        proptest::collection::vec(one, 0..24)
    }

    proptest! {
        #[test]
        fn nothing_that_is_closed_reaches_the_bus(stream in stream()) {
            let policy = Policy::default_desktop();
            let mut report = |refusal: &BusRefusal, _: u64| drop(refusal.to_string());
            let mut shared = Shared::new(&policy, &mut report);
            let mut ends = open(&mut shared);
            let (mut to_bus, mut to_client) = (Vec::new(), Vec::new());
            for (from_client, bytes) in stream {
                let end = if from_client { &mut ends.client } else { &mut ends.bus };
                end.set_nonblocking(false).expect("a socket");
                end.write_all(&bytes).expect("sent");
                ends.connection.go_on(&mut shared, true, true);
                to_bus.extend(read(&mut ends.bus));
                to_client.extend(read(&mut ends.client));
                if ends.connection.is_over() {
                    break;
                }
            }
            for (header, body) in messages(&to_bus) {
                let destination = header.destination.as_deref().unwrap_or_default();
                let argument = Reader::new(&body, header.endian).string().unwrap_or_default().to_owned();
                let member = header.member.as_deref().unwrap_or_default();
                if header.kind == Kind::Call {
                    let closed = ["", ":1.5", "org.freedesktop.systemd1", "net.example.Own"];
                    prop_assert!(!closed.contains(&destination), "{header:?}");
                    let of_systemd = header.interface.as_deref() == Some("org.freedesktop.systemd1.Manager");
                    prop_assert!(!of_systemd || destination == ":1.7", "{header:?}");
                    if destination == BUS {
                        let closed = ["UpdateActivationEnvironment", "BecomeMonitor", "NameOwnerChanged"];
                        prop_assert!(!closed.contains(&member), "{header:?}");
                        prop_assert!(member != "AddMatch" || !argument.contains("eavesdrop"), "{header:?}");
                        prop_assert!(member != "StartServiceByName" || argument == "org.freedesktop.Notifications");
                        prop_assert!(member != "RequestName" || argument.starts_with("org.mpris."), "{argument}");
                    }
                }
            }
            for (header, _) in messages(&to_client) {
                // No message between other connections.
                if header.kind == Kind::Call {
                    prop_assert!(header.destination.as_deref() != Some(":1.5"), "{header:?}");
                }
            }
        }
    }
}
