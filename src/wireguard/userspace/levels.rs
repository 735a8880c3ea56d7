//! The offloads of the data path, each of which the device can do without.

/// The offloads that a device uses where the kernel has them. Tests switch some off, to show that the device does
/// without; nothing else does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levels {
    /// The TUN gives packets of several TCP segments (TSO).
    pub tun_tcp: bool,
    /// The TUN gives packets of several UDP datagrams (USO).
    pub tun_udp: bool,
    /// Received segments are joined for the TUN, of the kinds that it gives.
    pub coalesce: bool,
    /// A message that is sent has several datagrams (`UDP_SEGMENT`).
    pub send_segments: bool,
    /// A call sends several messages (sendmmsg(2)).
    pub send_many: bool,
    /// A message that is received has several datagrams (`UDP_GRO`).
    pub receive_joined: bool,
    /// A call receives several messages (recvmmsg(2)).
    pub receive_many: bool,
}

impl Levels {
    /// All offloads.
    pub const ALL: Self = Self {
        tun_tcp: true,
        tun_udp: true,
        coalesce: true,
        send_segments: true,
        send_many: true,
        receive_joined: true,
        receive_many: true,
    };

    /// No offloads: each packet and each datagram takes a call of its own.
    pub const NONE: Self = Self {
        tun_tcp: false,
        tun_udp: false,
        coalesce: false,
        send_segments: false,
        send_many: false,
        receive_joined: false,
        receive_many: false,
    };

    /// Returns all offloads, all but one, for each of them, and none, with names for messages.
    pub fn cases() -> [(&'static str, Self); 9] {
        let all = Self::ALL;
        [
            ("all", all),
            ("without TSO", Self { tun_tcp: false, ..all }),
            ("without USO", Self { tun_udp: false, ..all }),
            ("without coalescing", Self { coalesce: false, ..all }),
            ("without UDP_SEGMENT", Self { send_segments: false, ..all }),
            ("without sendmmsg", Self { send_many: false, ..all }),
            ("without UDP_GRO", Self { receive_joined: false, ..all }),
            ("without recvmmsg", Self { receive_many: false, ..all }),
            ("none", Self::NONE),
        ]
    }
}
