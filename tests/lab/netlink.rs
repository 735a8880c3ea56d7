//! Netlink without vpn-exec's wrappers, so that the judge does not depend on the code that it judges.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn append<M: NetlinkSerializable>(buffer: &mut Vec<u8>, message: M, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut buffer[start..]);
}

/// Returns all objects of a kind in the calling thread's network namespace.
pub(crate) fn dump<M: NetlinkSerializable + NetlinkDeserializable>(protocol: isize, request: M) -> io::Result<Vec<M>> {
    let socket = open(protocol)?;
    let mut buffer = Vec::new();
    append(&mut buffer, request, NLM_F_REQUEST | NLM_F_DUMP, 1);
    socket.send(&buffer, 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
            let length = message.header.length as usize;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(message) => found.push(message),
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

/// Sends messages with their flags as one transaction (a batch of nfnetlink), and waits for the acknowledgements that
/// they request.
pub(crate) fn transact<M: NetlinkSerializable + NetlinkDeserializable>(
    protocol: isize,
    messages: Vec<(M, u16)>,
) -> io::Result<()> {
    let socket = open(protocol)?;
    let mut buffer = Vec::new();
    let mut expected = 0;
    for (sequence, (message, flags)) in (1..).zip(messages) {
        append(&mut buffer, message, flags | NLM_F_REQUEST, sequence);
        expected += usize::from(flags & NLM_F_ACK != 0);
    }
    socket.send(&buffer, 0)?;
    while expected > 0 {
        let (datagram, _) = socket.recv_from_full()?;
        let message = NetlinkMessage::<M>::deserialize(&datagram).map_err(io::Error::other)?;
        if let NetlinkPayload::Error(error) = message.payload {
            if error.code.is_some() {
                return Err(error.to_io());
            }
            expected -= 1;
        }
    }
    Ok(())
}
