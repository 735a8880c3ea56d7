//! A route netlink socket (rtnetlink(7)): requests with their acknowledgements, in batches, and dumps; and the `Channel` beneath,
//! which other netlink protocols have in common with it.
//!
//! Synchronous on purpose: a set-up is a short list of requests in a fixed order, and a whole list goes to the kernel in
//! one system call. A socket belongs for ever to the network namespace in which it was opened, so one thread can hold one
//! socket for each namespace that it configures.

pub mod link;
pub mod monitor;
pub mod route;

use std::fmt;
use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};

/// The length of the header of a netlink message, which an error echoes before its attributes.
const HEADER_LENGTH: usize = 16;

/// The kinds of messages that end an answer (netlink(7)).
const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;

/// The attribute of an error message that holds its text (`enum nlmsgerr_attrs`).
const NLMSGERR_ATTR_MSG: u16 = 1;

/// How many requests go into one datagram at most. The socket's receive buffer must hold all their answers.
const BATCH: usize = 64;

/// How much any socket has room for, in bytes: less than half of what is usual (`net.core.wmem_default` in socket(7)).
const ROOM: usize = 64 << 10;

/// A route netlink socket in the network namespace in which it was opened.
pub struct Netlink {
    channel: Channel,
}

/// A netlink socket of any protocol, in the network namespace in which it was opened.
pub(in crate::linux) struct Channel {
    socket: Socket,
    sequence: u32,
}

/// One change that the kernel is asked to make.
#[derive(Debug)]
pub struct NetlinkRequest {
    /// What it does, for the error message: "add address 10.0.0.1/32 to wg0".
    pub(in crate::linux) what: String,
    pub(in crate::linux) message: RouteNetlinkMessage,
    pub(in crate::linux) flags: u16,
    /// An error that means success, such as `EEXIST` where it is enough that the thing exists.
    pub(in crate::linux) tolerated: Option<i32>,
}

impl NetlinkRequest {
    /// The same, but it is enough that the thing exists.
    pub fn or_exists(self) -> Self {
        Self { tolerated: Some(libc::EEXIST), ..self }
    }
}

/// A change that the kernel refused.
#[derive(Debug)]
pub struct NetlinkError {
    what: String,
    error: io::Error,
    detail: Option<String>,
}

impl NetlinkError {
    /// The system's error number.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.error.raw_os_error()
    }
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.error)?;
        match &self.detail {
            Some(detail) => write!(f, " (the kernel says: {detail})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for NetlinkError {}

impl From<NetlinkError> for io::Error {
    fn from(error: NetlinkError) -> io::Error {
        io::Error::new(error.error.kind(), error)
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        Ok(Self { channel: Channel::open(NETLINK_ROUTE)? })
    }

    /// Makes changes in order, in as few system calls as possible.
    ///
    /// # Errors
    /// The first change that was refused. The kernel has tried those after it too: undo is the caller's.
    pub fn execute(&mut self, requests: Vec<NetlinkRequest>) -> Result<(), NetlinkError> {
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            self.execute_batch(requests.by_ref().take(BATCH).collect())?;
        }
        Ok(())
    }

    fn execute_batch(&mut self, requests: Vec<NetlinkRequest>) -> Result<(), NetlinkError> {
        let first = self.channel.next_sequence();
        let mut names = Vec::with_capacity(requests.len());
        let mut buffer = Vec::new();
        for request in requests {
            let NetlinkRequest { what, message, flags, tolerated } = request;
            self.channel.append(&mut buffer, message, flags | NLM_F_REQUEST | NLM_F_ACK);
            names.push((what, tolerated));
        }
        let acks = match self.channel.send(&buffer).and_then(|()| self.channel.collect_acks(first, names.len())) {
            Ok(acks) => acks,
            Err(error) => {
                let what = names.into_iter().next().map_or_else(String::new, |(what, _)| what);
                return Err(NetlinkError { what, error, detail: None });
            }
        };
        for ((what, tolerated), ack) in names.into_iter().zip(acks) {
            match ack {
                Some((error, detail)) if error.raw_os_error() != tolerated => {
                    return Err(NetlinkError { what, error, detail });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes one change.
    pub fn execute_one(&mut self, request: NetlinkRequest) -> Result<(), NetlinkError> {
        self.execute(vec![request])
    }

    /// Asks a question that has one answer.
    pub(in crate::linux) fn query(&mut self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let mut answers = self.channel.ask(message, NLM_F_REQUEST | NLM_F_ACK)?;
        answers.pop().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    /// Asks for a list. Entries that this library cannot read are left out.
    pub(in crate::linux) fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.channel.ask(message, NLM_F_REQUEST | NLM_F_DUMP)
    }
}

impl Channel {
    /// Opens a socket in the network namespace of the calling thread.
    pub(in crate::linux) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Both only make errors better; kernels before 4.12 have neither.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 0 })
    }

    /// The sequence number of the message that is appended next.
    pub(in crate::linux) fn next_sequence(&self) -> u32 {
        self.sequence.wrapping_add(1)
    }

    /// Sends messages.
    pub(in crate::linux) fn send(&self, messages: &[u8]) -> io::Result<()> {
        if messages.len() > ROOM {
            // Even beyond the machine's limit. Where that is refused, the kernel says that the messages are too long.
            let _ = setsockopt(&self.socket, sockopt::SndBufForce, &(2 * messages.len()));
        }
        self.socket.send(messages, 0).map(drop)
    }

    /// Asks a question, and returns all answers. Those that the library cannot read are left out.
    pub(in crate::linux) fn ask<M: NetlinkSerializable + NetlinkDeserializable>(
        &mut self,
        message: M,
        flags: u16,
    ) -> io::Result<Vec<M>> {
        let mut buffer = Vec::new();
        let sequence = self.append(&mut buffer, message, flags);
        self.send(&buffer)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for bytes in Messages(&datagram) {
                let header = Header::of(bytes);
                if header.sequence != sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => {
                        return match ack_of(bytes) {
                            Some((error, _)) => Err(error),
                            None => Ok(answers),
                        };
                    }
                    _ => match NetlinkMessage::<M>::deserialize(bytes) {
                        Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) => {
                            answers.push(message);
                        }
                        Ok(_) => {}
                        Err(error) => tracing::debug!(%error, "a netlink message that cannot be read is left out"),
                    },
                }
            }
        }
    }

    /// Appends a message to those that are about to be sent, and returns its sequence number.
    pub(in crate::linux) fn append<M: NetlinkSerializable>(
        &mut self,
        buffer: &mut Vec<u8>,
        message: M,
        flags: u16,
    ) -> u32 {
        self.sequence = self.next_sequence();
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = buffer.len();
        buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut buffer[start..]);
        self.sequence
    }

    /// Waits for the acknowledgements of `count` messages, the first of which has the number `first`.
    pub(in crate::linux) fn collect_acks(&mut self, first: u32, count: usize) -> io::Result<Vec<Option<Ack>>> {
        let mut acks = Vec::with_capacity(count);
        while acks.len() < count {
            let (datagram, _) = self.socket.recv_from_full()?;
            for bytes in Messages(&datagram) {
                let header = Header::of(bytes);
                // Answers come in the order of the requests. Anything else is a stray answer to an abandoned one.
                if header.kind == NLMSG_ERROR && header.sequence == first.wrapping_add(acks.len() as u32) {
                    acks.push(ack_of(bytes));
                }
            }
        }
        Ok(acks)
    }

    /// Waits for the acknowledgements of a transaction's messages.
    ///
    /// # Errors
    /// The first. Then nothing of the transaction was done; a transaction that is refused as a whole has a single answer.
    pub(in crate::linux) fn collect_first_error(&mut self, first: u32, count: usize) -> io::Result<()> {
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for bytes in Messages(&datagram) {
                let header = Header::of(bytes);
                // The beginning of the transaction has the number before the first.
                let place = header.sequence.wrapping_sub(first).wrapping_add(1);
                if header.kind != NLMSG_ERROR || place as usize > count {
                    continue;
                }
                match ack_of(bytes) {
                    Some((error, None)) => return Err(error),
                    Some((error, Some(detail))) => {
                        tracing::debug!("the kernel says: {detail}");
                        return Err(error);
                    }
                    None if place as usize == count => return Ok(()),
                    None => {}
                }
            }
        }
    }
}

/// An error, and what the kernel says about it.
pub(in crate::linux) type Ack = (io::Error, Option<String>);

/// The error and the text in an `NLMSG_ERROR`; none if it says success.
pub(in crate::linux) fn ack_of(message: &[u8]) -> Option<Ack> {
    let code = read_i32(message, HEADER_LENGTH);
    if code == 0 {
        return None;
    }
    // After the code comes the header of the request, and, as NETLINK_CAP_ACK is on, at once the attributes.
    let mut rest = message.get(HEADER_LENGTH + 4 + HEADER_LENGTH..).unwrap_or_default();
    let mut detail = None;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let Some(value) = rest.get(4..length) else { break };
        if kind == NLMSGERR_ATTR_MSG {
            detail = Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((io::Error::from_raw_os_error(code.wrapping_neg()), detail))
}

pub(in crate::linux) struct Header {
    kind: u16,
    sequence: u32,
}

impl Header {
    pub(in crate::linux) fn of(message: &[u8]) -> Self {
        Self {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
        }
    }
}

fn read_i32(bytes: &[u8], at: usize) -> i32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(-libc::EPROTO, i32::from_ne_bytes)
}

/// The messages of a datagram, each at least a header long.
pub(in crate::linux) struct Messages<'a>(pub(in crate::linux) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let length = u32::from_ne_bytes(self.0.get(..4)?.try_into().ok()?) as usize;
        if length < HEADER_LENGTH {
            return None;
        }
        let message = self.0.get(..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}
