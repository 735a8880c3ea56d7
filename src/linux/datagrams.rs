//! Many datagrams in one system call: `sendmmsg(2)` and `recvmmsg(2)`, with segmentation offload (`UDP_SEGMENT`,
//! `UDP_GRO`: udp(7)), where one message carries up to 64 datagrams of the same size.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// The most messages that one call sends.
const MAX_TRAINS: usize = 64;

/// The most datagrams of a train: `UDP_MAX_SEGMENTS` before Linux 6.9.
const MAX_IN_TRAIN: usize = 64;

/// The most bytes of a train: the longest IP packet, without the headers of IPv6 and UDP.
const MAX_TRAIN_BYTES: usize = 65_535 - 48;

/// The most bytes of a received message.
const MAX_MESSAGE: usize = 65_535;

/// The distance of received messages in memory. It is no multiple of a page, so that they do not compete for the same
/// lines of the processor's cache.
const STRIDE: usize = 65_536 + 1_600;

/// Room for two control messages with a number each.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// The room that a control message with a number of type int takes: its header and the number, aligned.
const CONTROL_MESSAGE: usize = 24;

const CONTROL: usize = 2 * CONTROL_MESSAGE;

/// The congestion bits of a datagram's IP header (RFC 3168 section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ecn(u8);

impl Ecn {
    /// The transport does not know congestion bits.
    pub const NOT_CAPABLE: Self = Self(0);
    /// A router met congestion.
    pub const CONGESTION: Self = Self(3);

    /// Takes the bits of a header's byte, which has DSCP as well.
    pub fn of(traffic_class: u8) -> Self {
        Self(traffic_class & 3)
    }

    /// Returns the two bits.
    pub fn bits(self) -> u8 {
        self.0
    }
}

/// Datagrams of one size for one endpoint. The last may be shorter.
#[derive(Clone, Copy, Debug)]
struct Train {
    endpoint: SocketAddr,
    ecn: Ecn,
    start: usize,
    end: usize,
    size: usize,
}

impl Train {
    fn count(&self) -> usize {
        (self.end - self.start).div_ceil(self.size)
    }
}

/// Datagrams that wait to be sent together.
#[derive(Debug)]
pub struct Outbox {
    buffer: Box<[u8]>,
    used: usize,
    trains: Vec<Train>,
    /// Whether several datagrams may go in one message. The kernel or an interface can refuse it at any time.
    segments: bool,
}

/// What became of the datagrams of an [`Outbox`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsent {
    /// The datagrams that were not sent.
    pub datagrams: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Outbox {
    /// Creates an outbox for a number of bytes. `segments` says whether to use `UDP_SEGMENT`.
    pub fn new(capacity: usize, segments: bool) -> Self {
        let buffer = vec![0; capacity].into_boxed_slice();
        Self { buffer, used: 0, trains: Vec::with_capacity(MAX_TRAINS), segments }
    }

    /// Returns whether there is room for a number of datagrams of a length.
    pub fn has_room(&self, count: usize, length: usize) -> bool {
        // Each may begin a train in the worst case, without `UDP_SEGMENT`.
        let trains = if self.segments { count.div_ceil(MAX_IN_TRAIN) + 1 } else { count };
        self.is_empty() && count * length <= self.buffer.len()
            || self.trains.len() + trains <= MAX_TRAINS && self.used + count * length <= self.buffer.len()
    }

    /// Returns whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Returns the room for the next datagram, of a length, or None if there is not enough.
    pub fn room(&mut self, length: usize) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.used..self.used + length)
    }

    /// Takes the datagram that was written to [`Self::room`].
    pub fn push(&mut self, endpoint: SocketAddr, ecn: Ecn, length: usize) {
        let (start, end) = (self.used, (self.used + length).min(self.buffer.len()));
        self.used = end;
        if let Some(last) = self.trains.last_mut()
            && self.segments
            && last.endpoint == endpoint
            && last.ecn == ecn
            && (last.end - last.start) % last.size == 0
            && length <= last.size
            && last.count() < MAX_IN_TRAIN
            && end - last.start <= MAX_TRAIN_BYTES
        {
            last.end = end;
            return;
        }
        self.trains.push(Train { endpoint, ecn, start, end, size: length.max(1) });
    }

    /// Sends everything, by the socket of each endpoint's address family, and returns what was not sent. A message of
    /// several datagrams that is refused is sent as single ones, and no more such messages are made if the kernel does
    /// not know them.
    pub fn flush<'a>(&mut self, socket_of: impl Fn(&SocketAddr) -> Option<BorrowedFd<'a>>) -> Unsent {
        let (mut unsent, mut done) = (Unsent::default(), 0);
        while done < self.trains.len() {
            let first = self.trains[done];
            let is_ipv4 = first.endpoint.is_ipv4();
            let of_family = |train: &&Train| train.endpoint.is_ipv4() == is_ipv4;
            let run = self.trains[done..].iter().take(MAX_TRAINS).take_while(of_family).count();
            let sent = match socket_of(&first.endpoint) {
                Some(socket) => send_trains(socket, &self.buffer, &self.trains[done..done + run]),
                None => Err(Errno::AFNOSUPPORT),
            };
            match sent {
                Ok(sent) => done += sent.max(1),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    self.resend(&first, errno, &socket_of, &mut unsent);
                    done += 1;
                }
            }
        }
        self.trains.clear();
        self.used = 0;
        unsent
    }

    /// Sends the datagrams of a refused message one by one, if that may help.
    fn resend<'a>(
        &mut self,
        train: &Train,
        errno: Errno,
        socket_of: &impl Fn(&SocketAddr) -> Option<BorrowedFd<'a>>,
        unsent: &mut Unsent,
    ) {
        // EIO: the interface cannot checksum. EINVAL: the path's MTU is less than the size, or the kernel does not know
        // the option. EMSGSIZE: too long as a whole.
        let is_too_much = train.count() > 1 && matches!(errno, Errno::IO | Errno::INVAL | Errno::MSGSIZE);
        if errno == Errno::IO {
            self.segments = false;
        }
        tracing::trace!(%errno, endpoint = %train.endpoint, "datagrams were refused");
        for datagram in self.buffer[train.start..train.end].chunks(train.size) {
            let is_sent = is_too_much
                && socket_of(&train.endpoint).is_some_and(|socket| {
                    rustix::net::sendto(socket, datagram, rustix::net::SendFlags::empty(), &train.endpoint).is_ok()
                });
            if !is_sent {
                unsent.datagrams += 1;
                unsent.bytes += datagram.len() as u64;
            }
        }
    }
}

/// A name of either family, as the kernel takes it.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    ipv4: libc::sockaddr_in,
    ipv6: libc::sockaddr_in6,
}

impl Name {
    fn zeroed() -> Self {
        // SAFETY: all zeros is valid for both, which are plain data.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }

    /// Returns the name of an endpoint, and its length.
    fn of(endpoint: &SocketAddr) -> (Self, libc::socklen_t) {
        let mut name = Self::zeroed();
        match endpoint {
            SocketAddr::V4(endpoint) => {
                name.ipv4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: endpoint.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(endpoint.ip().octets()) },
                    sin_zero: [0; 8],
                };
                (name, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(endpoint) => {
                name.ipv6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: endpoint.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: endpoint.ip().octets() },
                    sin6_scope_id: endpoint.scope_id(),
                };
                (name, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// Returns the endpoint, if the family is known.
    fn endpoint(&self) -> Option<SocketAddr> {
        // SAFETY: the family is at the same place in both, and all bytes are initialized.
        let family = libc::c_int::from(unsafe { self.ipv4.sin_family });
        match family {
            libc::AF_INET => {
                // SAFETY: the family says so, and all bytes are initialized.
                let name = unsafe { self.ipv4 };
                let address = Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddr::from((address, u16::from_be(name.sin_port))))
            }
            libc::AF_INET6 => {
                // SAFETY: the family says so, and all bytes are initialized.
                let name = unsafe { self.ipv6 };
                let (address, port) = (Ipv6Addr::from(name.sin6_addr.s6_addr), u16::from_be(name.sin6_port));
                Some(SocketAddrV6::new(address, port, 0, name.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

/// Writes a control message (`struct cmsghdr`, cmsg(3)), and returns the room that it takes.
fn put_control(room: &mut [u8], level: libc::c_int, kind: libc::c_int, value: &[u8]) -> usize {
    let header = size_of::<libc::cmsghdr>();
    let length = header + value.len();
    room[..size_of::<usize>()].copy_from_slice(&length.to_ne_bytes());
    room[size_of::<usize>()..][..4].copy_from_slice(&level.to_ne_bytes());
    room[size_of::<usize>() + 4..][..4].copy_from_slice(&kind.to_ne_bytes());
    room[header..length].copy_from_slice(value);
    CONTROL_MESSAGE
}

/// Sends messages, and returns how many were sent.
fn send_trains(socket: BorrowedFd<'_>, buffer: &[u8], trains: &[Train]) -> Result<usize, Errno> {
    let count = trains.len().min(MAX_TRAINS);
    // SAFETY: all zeros is valid for these, which are plain data.
    let (mut messages, mut pieces): ([libc::mmsghdr; MAX_TRAINS], [libc::iovec; MAX_TRAINS]) =
        unsafe { MaybeUninit::zeroed().assume_init() };
    let (mut names, mut controls) = ([Name::zeroed(); MAX_TRAINS], [Control([0; CONTROL]); MAX_TRAINS]);
    for (index, train) in trains[..count].iter().enumerate() {
        let bytes = &buffer[train.start..train.end];
        pieces[index] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let (name, length) = Name::of(&train.endpoint);
        names[index] = name;
        let header = &mut messages[index].msg_hdr;
        (header.msg_iov, header.msg_iovlen) = (&raw mut pieces[index], 1);
        (header.msg_name, header.msg_namelen) = ((&raw mut names[index]).cast(), length);
        let control = &mut controls[index].0;
        let mut used = 0;
        if train.count() > 1 {
            used +=
                put_control(&mut control[used..], libc::SOL_UDP, libc::UDP_SEGMENT, &(train.size as u16).to_ne_bytes());
        }
        if train.ecn != Ecn::NOT_CAPABLE {
            let (level, kind) = match train.endpoint {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            used += put_control(&mut control[used..], level, kind, &i32::from(train.ecn.bits()).to_ne_bytes());
        }
        if used > 0 {
            (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), used as _);
        }
    }
    // SAFETY: everything that the messages point to lives until the call returns. The kernel does not write to the
    // buffer of a message that it sends.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), count as libc::c_uint, 0) };
    usize::try_from(sent).map_err(|_| last_error())
}

/// Room for datagrams that are received together.
pub struct Inbox {
    buffer: Box<[u8]>,
    count: usize,
    /// The messages of the last call. None for one that is empty, or from an unknown address family.
    received: Vec<Option<ReceivedMessage>>,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("received", &self.received).finish_non_exhaustive()
    }
}

/// The most messages that one call receives.
const MAX_RECEIVED: usize = 16;

/// A received message: its datagrams, which are one after the other in the buffer, and their sender.
#[derive(Clone, Debug)]
pub struct ReceivedMessage {
    /// Where it is in the buffer.
    pub range: Range<usize>,
    /// The sender.
    pub from: SocketAddr,
    /// The length of a datagram. The last one may be shorter.
    pub size: usize,
    /// The congestion bits of all datagrams, if the socket reports them ([`set_received_ecn`]).
    pub ecn: Ecn,
}

impl ReceivedMessage {
    /// Returns where each of its datagrams is in the buffer.
    pub fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (range, size) = (self.range.clone(), self.size);
        range.clone().step_by(size).map(move |start| start..(start + size).min(range.end))
    }
}

impl Inbox {
    /// Creates room for a number of messages, of which there are at least one and at most 16.
    pub fn new(count: usize) -> Self {
        let count = count.clamp(1, MAX_RECEIVED);
        Self { buffer: vec![0; STRIDE * count].into_boxed_slice(), count, received: Vec::with_capacity(count) }
    }

    /// Receives the messages that are there, without waiting, and returns their number.
    ///
    /// # Errors
    /// Fails as recvmmsg(2) does: with `EAGAIN` if there is none.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.received.clear();
        // SAFETY: all zeros is valid for these, which are plain data.
        let (mut messages, mut pieces): ([libc::mmsghdr; MAX_RECEIVED], [libc::iovec; MAX_RECEIVED]) =
            unsafe { MaybeUninit::zeroed().assume_init() };
        let (mut names, mut controls) = ([Name::zeroed(); MAX_RECEIVED], [Control([0; CONTROL]); MAX_RECEIVED]);
        for (index, room) in self.buffer.chunks_exact_mut(STRIDE).take(self.count).enumerate() {
            pieces[index] = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: MAX_MESSAGE };
            let header = &mut messages[index].msg_hdr;
            (header.msg_iov, header.msg_iovlen) = (&raw mut pieces[index], 1);
            let length = size_of::<Name>() as libc::socklen_t;
            (header.msg_name, header.msg_namelen) = ((&raw mut names[index]).cast(), length);
            header.msg_control = (&raw mut controls[index]).cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: everything that the messages point to is writable and lives until the call returns.
        let got = unsafe {
            let (messages, count) = (messages.as_mut_ptr(), self.count as libc::c_uint);
            libc::recvmmsg(socket.as_raw_fd(), messages, count, libc::MSG_DONTWAIT as _, std::ptr::null_mut())
        };
        let got = usize::try_from(got).map_err(|_| last_error())?;
        for (index, (message, name)) in messages[..got].iter().zip(&names).enumerate() {
            let length = (message.msg_len as usize).min(MAX_MESSAGE);
            let told = message.msg_hdr.msg_controllen as usize;
            let (size, ecn) = read_controls(&controls[index].0[..told.min(CONTROL)]);
            let range = index * STRIDE..index * STRIDE + length;
            let size = size.filter(|size| *size > 0).unwrap_or(length);
            let from = name.endpoint().filter(|_| length > 0);
            self.received.push(from.map(|from| ReceivedMessage { range, from, size, ecn }));
        }
        Ok(got)
    }

    /// Returns a message of the last call. None if it is empty, or from an unknown address family.
    pub fn message(&self, index: usize) -> Option<&ReceivedMessage> {
        self.received.get(index)?.as_ref()
    }

    /// Returns the memory that messages are in.
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

/// Reads the control messages of a received message: the size of its datagrams, if the kernel has joined several, and
/// the congestion bits.
fn read_controls(mut controls: &[u8]) -> (Option<usize>, Ecn) {
    let (mut size, mut ecn) = (None, Ecn::NOT_CAPABLE);
    let header = size_of::<libc::cmsghdr>();
    let number = |at: usize, controls: &[u8]| {
        controls.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes)
    };
    while let Some(bytes) = controls.first_chunk().copied() {
        let length = usize::from_ne_bytes(bytes);
        if length < header || length > controls.len() {
            break;
        }
        let at = size_of::<usize>();
        match (number(at, controls), number(at + 4, controls)) {
            (Some(libc::SOL_UDP), Some(libc::UDP_GRO)) => {
                size = number(header, controls).and_then(|size| usize::try_from(size).ok());
            }
            // One byte for IPv4, and a number for IPv6, whose low bits come first or last.
            (Some(libc::IPPROTO_IP), Some(libc::IP_TOS)) => {
                ecn = controls.get(header).copied().map_or(ecn, Ecn::of);
            }
            (Some(libc::IPPROTO_IPV6), Some(libc::IPV6_TCLASS)) => {
                ecn = number(header, controls).map_or(ecn, |class| Ecn::of(class as u8));
            }
            _ => {}
        }
        controls = controls.get(length.next_multiple_of(size_of::<usize>())..).unwrap_or_default();
    }
    (size, ecn)
}

/// Has the kernel join datagrams of a flow that arrive together.
///
/// # Errors
/// Fails with `ENOPROTOOPT` before Linux 5.0.
pub fn set_joined_receive(socket: impl AsFd) -> io::Result<()> {
    switch_on(socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO)
}

/// Has the kernel report the congestion bits of received datagrams (`IP_RECVTOS` of ip(7), `IPV6_RECVTCLASS` of
/// RFC 3542 section 6.5).
///
/// # Errors
/// Fails as setsockopt(2) does.
pub fn set_received_ecn(socket: impl AsFd, is_ipv6: bool) -> io::Result<()> {
    let (level, option) = match is_ipv6 {
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
        false => (libc::IPPROTO_IP, libc::IP_RECVTOS),
    };
    switch_on(socket.as_fd(), level, option)
}

fn switch_on(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option is a number, which lives until the call returns.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn sockets(address: &str) -> Option<(UdpSocket, UdpSocket)> {
        let socket = || UdpSocket::bind(address).ok();
        socket().zip(socket())
    }

    fn received(inbox: &mut Inbox, socket: &UdpSocket, wanted: usize) -> Vec<(SocketAddr, Ecn, Vec<u8>)> {
        let mut all = Vec::new();
        while all.len() < wanted {
            crate::linux::poll::wait_for(&[socket.as_fd()], Some(std::time::Duration::from_secs(20))).expect("a wait");
            let count = inbox.receive(socket.as_fd()).expect("messages");
            for index in 0..count {
                let message = inbox.message(index).expect("a message").clone();
                for range in message.datagrams() {
                    all.push((message.from, message.ecn, inbox.buffer()[range].to_vec()));
                }
            }
        }
        assert_eq!(inbox.receive(socket.as_fd()), Err(Errno::AGAIN), "no more than was sent");
        all
    }

    /// Over loopback, whose datagrams stay joined from end to end.
    #[test]
    fn datagrams_arrive_as_they_were_sent_at_every_level() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // The machine may have no IPv6.
            let Some((from, to)) = sockets(address) else { continue };
            let endpoint = to.local_addr().expect("an address");
            set_received_ecn(&to, endpoint.is_ipv6()).expect("the option");
            for (segments, joins) in [(false, false), (true, false), (false, true), (true, true)] {
                if joins {
                    set_joined_receive(&to).expect("the option");
                }
                let lengths = [1_400, 1_400, 1_400, 90, 1_400, 1_400, 1, 32, 32, 32];
                let (mut outbox, mut inbox) = (Outbox::new(64 << 10, segments), Inbox::new(4));
                for (number, length) in lengths.into_iter().enumerate() {
                    assert!(outbox.has_room(1, length));
                    outbox.room(length).expect("room").fill(number as u8);
                    outbox.push(endpoint, Ecn::of(number as u8 / 4), length);
                }
                assert_eq!(outbox.flush(|_| Some(from.as_fd())), Unsent::default());
                assert!(outbox.is_empty());
                let source = from.local_addr().expect("an address");
                let datagram = |(number, length)| (source, Ecn::of(number as u8 / 4), vec![number as u8; length]);
                let expected: Vec<_> = lengths.into_iter().enumerate().map(datagram).collect();
                assert_eq!(received(&mut inbox, &to, lengths.len()), expected, "{segments} {joins}");
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_is_counted() {
        let mut outbox = Outbox::new(1_000, true);
        for _ in 0..3 {
            outbox.room(100).expect("room").fill(0);
            outbox.push("127.0.0.1:9".parse().expect("an endpoint"), Ecn::NOT_CAPABLE, 100);
        }
        assert!(outbox.has_room(7, 100) && !outbox.has_room(8, 100) && outbox.room(701).is_none());
        assert_eq!(outbox.flush(|_| None), Unsent { datagrams: 3, bytes: 300 });
        assert_eq!(outbox.flush(|_| None), Unsent::default());
    }
}
