//! A netlink socket of any protocol (netlink(7)): sends requests in batches and receives their answers.

use std::io;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// The length of a netlink message's header in bytes (`struct nlmsghdr`). An error repeats the header of its request.
pub(in crate::linux) const HEADER_LENGTH: usize = 16;

/// The message types that end an answer (netlink(7)).
pub(in crate::linux) const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
pub(in crate::linux) const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;

/// The attribute of an error that holds the kernel's explanation (`enum nlmsgerr_attrs` of linux/netlink.h).
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The size of a send buffer that every socket has, in bytes: less than half of the default `net.core.wmem_default`
/// (socket(7)).
const SEND_BUFFER: usize = 64 << 10;

/// The initial size of the receive buffer in bytes, as in libnl and iproute2. The kernel splits lists into datagrams no
/// larger than the buffers that it has seen.
const RECEIVE_BUFFER: usize = 32 << 10;

/// A netlink socket in the network namespace in which it was opened.
pub(in crate::linux) struct Channel {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// An error, and the kernel's explanation of it if there is one.
pub(in crate::linux) type Refusal = (io::Error, Option<String>);

impl Channel {
    /// Opens a socket in the network namespace of the calling thread.
    pub(in crate::linux) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Both options only improve error messages. Kernels before 4.12 lack them.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BUFFER] })
    }

    /// Returns the sequence number of the next appended message.
    pub(in crate::linux) fn next_sequence(&self) -> u32 {
        self.sequence.wrapping_add(1)
    }

    /// Appends a message to a batch and returns its sequence number.
    pub(in crate::linux) fn append<M: NetlinkSerializable>(
        &mut self,
        batch: &mut Vec<u8>,
        message: M,
        flags: u16,
    ) -> u32 {
        self.sequence = self.next_sequence();
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = batch.len();
        batch.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut batch[start..]);
        self.sequence
    }

    /// Sends a batch of messages in one system call.
    pub(in crate::linux) fn send(&self, batch: &[u8]) -> io::Result<()> {
        if batch.len() > SEND_BUFFER {
            // This may exceed the machine's limit. If the kernel refuses, sending fails with EMSGSIZE.
            let _ = setsockopt(&self.socket, sockopt::SndBufForce, &(2 * batch.len()));
        }
        self.socket.send(batch, 0).map(drop)
    }

    /// Sends a question and returns all answers, except those that the library cannot parse.
    pub(in crate::linux) fn ask<M: NetlinkSerializable + NetlinkDeserializable + Clone>(
        &mut self,
        message: M,
        flags: u16,
    ) -> io::Result<Vec<M>> {
        loop {
            if let Some(answers) = self.ask_once(message.clone(), flags)? {
                return Ok(answers);
            }
        }
    }

    /// Does the work of [`Self::ask`]. Returns none if the receive buffer was too small, after enlarging it.
    fn ask_once<M: NetlinkSerializable + NetlinkDeserializable>(
        &mut self,
        message: M,
        flags: u16,
    ) -> io::Result<Option<Vec<M>>> {
        let mut batch = Vec::new();
        let sequence = self.append(&mut batch, message, flags);
        self.send(&batch)?;
        let mut answers = Vec::new();
        loop {
            let Some(datagram) = self.receive()? else {
                // The kernel refuses to start a list before the previous one was read to its end.
                self.discard()?;
                return Ok(None);
            };
            for bytes in Messages(datagram) {
                let header = AnswerHeader::of(bytes);
                if header.sequence != sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(Some(answers)),
                    NLMSG_ERROR => {
                        return match refusal(bytes) {
                            Some((error, _)) => Err(error),
                            None => Ok(Some(answers)),
                        };
                    }
                    _ => match NetlinkMessage::<M>::deserialize(bytes) {
                        Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) => {
                            answers.push(message);
                        }
                        Ok(_) => {}
                        Err(error) => tracing::debug!(%error, "skipping a netlink message that cannot be parsed"),
                    },
                }
            }
        }
    }

    /// Waits for the acknowledgements of `count` messages, the first of which has the sequence number `first`.
    pub(in crate::linux) fn collect_acks(&mut self, first: u32, count: usize) -> io::Result<Vec<Option<Refusal>>> {
        let mut acks = Vec::with_capacity(count);
        while acks.len() < count {
            for bytes in Messages(self.receive()?.ok_or_else(truncated)?) {
                let header = AnswerHeader::of(bytes);
                // The kernel answers in order. Any other answer belongs to a request that was given up.
                if header.kind == NLMSG_ERROR && header.sequence == first.wrapping_add(acks.len() as u32) {
                    acks.push(refusal(bytes));
                }
            }
        }
        Ok(acks)
    }

    /// Waits for the acknowledgements of a transaction's messages.
    ///
    /// # Errors
    /// Fails with the first refusal, in which case the kernel has changed nothing. A transaction that is refused as a
    /// whole has a single answer.
    pub(in crate::linux) fn collect_first_error(&mut self, first: u32, count: usize) -> io::Result<()> {
        loop {
            for bytes in Messages(self.receive()?.ok_or_else(truncated)?) {
                let header = AnswerHeader::of(bytes);
                // The message that opens the transaction has the sequence number before `first`.
                let place = header.sequence.wrapping_sub(first).wrapping_add(1);
                if header.kind != NLMSG_ERROR || place as usize > count {
                    continue;
                }
                match refusal(bytes) {
                    Some((error, None)) => return Err(error),
                    Some((error, Some(explanation))) => {
                        tracing::debug!("the kernel says: {explanation}");
                        return Err(error);
                    }
                    None if place as usize == count => return Ok(()),
                    None => {}
                }
            }
        }
    }

    /// Receives a datagram. Returns none if it did not fit, after enlarging the buffer: the datagram is lost then.
    fn receive(&mut self) -> io::Result<Option<&[u8]>> {
        let (_, length) =
            rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC))?;
        if length > self.buffer.len() {
            self.buffer = vec![0; length.next_power_of_two()];
            return Ok(None);
        }
        Ok(Some(&self.buffer[..length]))
    }

    /// Discards all answers. The kernel produces the parts of a list as they are received, so none arrives later.
    fn discard(&mut self) -> io::Result<()> {
        loop {
            match rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// An acknowledgement is at most a header, a code, the header of the request, and a line of text.
fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an acknowledgement of the kernel was truncated")
}

/// Returns the error and the explanation of an `NLMSG_ERROR` message, or none if it reports success.
pub(in crate::linux) fn refusal(message: &[u8]) -> Option<Refusal> {
    let code = message.get(HEADER_LENGTH..HEADER_LENGTH + 4).and_then(|bytes| bytes.try_into().ok());
    let code = code.map_or(-libc::EPROTO, i32::from_ne_bytes);
    if code == 0 {
        return None;
    }
    // The header of the request follows. With NETLINK_CAP_ACK, the attributes follow at once.
    let mut rest = message.get(HEADER_LENGTH + 4 + HEADER_LENGTH..).unwrap_or_default();
    let mut explanation = None;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let Some(value) = rest.get(4..length) else { break };
        if kind == NLMSGERR_ATTR_MSG {
            explanation = Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((io::Error::from_raw_os_error(code.wrapping_neg()), explanation))
}

/// The type and the sequence number of a netlink message.
pub(in crate::linux) struct AnswerHeader {
    pub(in crate::linux) kind: u16,
    sequence: u32,
}

impl AnswerHeader {
    /// Reads the header of a message of [`Messages`].
    pub(in crate::linux) fn of(message: &[u8]) -> Self {
        Self {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
        }
    }
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

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    use netlink_sys::protocols::NETLINK_ROUTE;

    use super::*;

    fn names(answers: Vec<RouteNetlinkMessage>) -> Vec<String> {
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        let name = |link: LinkMessage| {
            link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
        };
        links.filter_map(name).collect()
    }

    #[test]
    fn a_receive_buffer_that_is_too_small_grows_and_loses_no_answer() {
        let mut channel = Channel::open(NETLINK_ROUTE).expect("a socket");
        let list = || RouteNetlinkMessage::GetLink(LinkMessage::default());
        let all = names(channel.ask(list(), NLM_F_REQUEST | NLM_F_DUMP).expect("a list"));
        assert!(all.iter().any(|name| name == "lo"), "{all:?}");
        for size in [1, 64, 500, 1000] {
            channel.buffer = vec![0; size];
            assert_eq!(names(channel.ask(list(), NLM_F_REQUEST | NLM_F_DUMP).expect("a list")), all);
            assert!(channel.buffer.len() > size);
            channel.buffer = vec![0; size];
            let mut one = LinkMessage::default();
            one.attributes.push(LinkAttribute::IfName("lo".into()));
            let question = RouteNetlinkMessage::GetLink(one);
            assert_eq!(names(channel.ask(question, NLM_F_REQUEST | NLM_F_ACK).expect("an answer")), ["lo"]);
        }
    }
}
