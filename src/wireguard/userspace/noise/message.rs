//! The messages on the wire (WireGuard paper, section 5.4).

/// The length of a handshake initiation.
pub(in crate::wireguard::userspace) const INITIATION: usize = 148;

/// The length of a handshake response.
pub(in crate::wireguard::userspace) const RESPONSE: usize = 92;

/// The length of a cookie reply.
pub(in crate::wireguard::userspace) const COOKIE_REPLY: usize = 64;

/// The length of a data message's header: its type, the receiver's session index, and the counter.
pub(in crate::wireguard::userspace) const DATA_HEADER: usize = 16;

/// The length of a data message without content, which is a keepalive.
pub(in crate::wireguard::userspace) const DATA_OVERHEAD: usize = DATA_HEADER + super::session::TAG;

/// The types of messages. Three reserved bytes follow them, which are zero.
pub(in crate::wireguard::userspace) mod kind {
    pub(in crate::wireguard::userspace) const INITIATION: u32 = 1;
    pub(in crate::wireguard::userspace) const RESPONSE: u32 = 2;
    pub(in crate::wireguard::userspace) const COOKIE_REPLY: u32 = 3;
    pub(in crate::wireguard::userspace) const DATA: u32 = 4;
}

/// A message of a valid type and length. Nothing else of it has been checked.
#[derive(Clone, Copy, Debug)]
pub(in crate::wireguard::userspace) enum Message<'a> {
    Initiation(&'a [u8; INITIATION]),
    Response(&'a [u8; RESPONSE]),
    CookieReply(&'a [u8; COOKIE_REPLY]),
    Data { receiver: u32, counter: u64 },
}

impl<'a> Message<'a> {
    /// Returns None for what is not a message.
    pub(in crate::wireguard::userspace) fn parse(datagram: &'a [u8]) -> Option<Self> {
        match read_u32(datagram, 0)? {
            kind::INITIATION => datagram.try_into().ok().map(Self::Initiation),
            kind::RESPONSE => datagram.try_into().ok().map(Self::Response),
            kind::COOKIE_REPLY => datagram.try_into().ok().map(Self::CookieReply),
            kind::DATA if datagram.len() >= DATA_OVERHEAD => {
                let counter = datagram.get(8..16)?.try_into().ok().map(u64::from_le_bytes)?;
                Some(Self::Data { receiver: read_u32(datagram, 4)?, counter })
            }
            _ => None,
        }
    }
}

/// Reads a number of a message.
pub(super) fn read_u32(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// Begins a message: writes its type and the sender's session index.
pub(super) fn begin(message: &mut [u8], kind: u32, sender: u32) {
    message[..4].copy_from_slice(&kind.to_le_bytes());
    message[4..8].copy_from_slice(&sender.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_a_known_type_and_the_length_of_its_type() {
        for (number, length) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 1500)] {
            let mut datagram = vec![0xaa; length];
            datagram[..4].copy_from_slice(&[number, 0, 0, 0]);
            assert!(Message::parse(&datagram).is_some(), "{number}");
            for reserved in 1..4 {
                datagram[reserved] = 1;
                assert!(Message::parse(&datagram).is_none(), "a reserved byte");
                datagram[reserved] = 0;
            }
            assert!(Message::parse(&datagram[..31]).is_none(), "too short");
            if number != 4 {
                datagram.push(0);
                assert!(Message::parse(&datagram).is_none(), "too long");
            }
        }
        for number in [0, 5, 0xff] {
            assert!(Message::parse(&[&[number, 0, 0, 0][..], &[0; 144]].concat()).is_none(), "{number}");
        }
        assert!(Message::parse(&[4, 0, 0]).is_none());
    }
}
