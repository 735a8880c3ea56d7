//! UDP: each client of a port has a flow, a socket inside that is connected to the program's port, until nothing has gone either way for
//! a while.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    self, ControlMessage, ControlMessageOwned, MsgFlags, SockType, SockaddrLike, SockaddrStorage, sockopt,
};

use super::clients::{ATTEMPTS, Clients};
use super::descriptors::{Allowance, Port, Share};
use super::{Bound, Limits, Poller, is_own_peer, new_socket};

/// How long a flow may be idle. RFC 4787, REQ-5, asks for two minutes at least.
pub(super) const IDLE: Duration = Duration::from_secs(180);

/// How many flows there may be, with a reserved share for each port.
const FLOWS: usize = 4096;

/// The largest datagram (RFC 768), and one byte more.
const LARGEST: usize = 1 << 16;

/// How much is kept of all that nobody has answered yet, in bytes. What is more is sent once, as anything is on the way.
const KEPT: usize = 4 << 20;

/// How many datagrams of one socket are moved before the others have their turn.
const TURNS: usize = 256;

/// Has a socket that listens tell to which address of the host a datagram came, so that the answer comes from there (ip(7), ipv6(7)).
pub(super) fn tell_destinations(socket: &OwnedFd, address: SocketAddr) -> nix::Result<()> {
    if address.is_ipv6() {
        // For IPv4 by way of a socket of IPv6, too.
        socket::setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)
    } else {
        socket::setsockopt(socket, sockopt::Ipv4PacketInfo, &true)
    }
}

/// Who speaks to whom: the token of the port, the client, and the host's address that it uses.
type Key = (u64, SocketAddr, Option<Local>);

/// An address of the host's, as the kernel tells and takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Local {
    V4([u8; 4]),
    V6([u8; 16], u32),
}

/// All flows.
pub(super) struct Datagrams {
    /// Where each datagram is for the time that it is moved.
    buffer: Box<[u8]>,
    flows: HashMap<Key, Flow>,
    by_token: HashMap<u64, Key>,
    /// The ports' shares of the descriptors and of the flows, by the tokens of their entrances.
    ports: HashMap<u64, [Port; 2]>,
    /// Whose the flows are.
    clients: Clients<Key>,
    /// How many flows there may be.
    room: Allowance,
    swept: Option<Instant>,
    limits: Limits,
    /// How many bytes may be kept.
    kept: Allowance,
}

struct Flow {
    _shares: [Share; 2],
    inside: OwnedFd,
    token: u64,
    /// Where else to try, should nobody listen.
    left: Vec<SocketAddr>,
    /// The last datagram of the client's, until the program has answered once; none where too much is kept.
    unanswered: Option<(Vec<u8>, Share)>,
    used: Instant,
}

impl Datagrams {
    pub(super) fn new(limits: Limits) -> Self {
        let buffer = vec![0; LARGEST].into_boxed_slice();
        let kept = Allowance::of(KEPT);
        Self {
            buffer,
            flows: HashMap::new(),
            by_token: HashMap::new(),
            ports: HashMap::new(),
            clients: Clients::new(),
            room: Allowance::of(FLOWS),
            swept: None,
            limits,
            kept,
        }
    }

    /// Reserves a share of the descriptors, and of the flows, for what comes by an entrance.
    pub(super) fn begin_at(&mut self, token: u64) {
        self.ports.insert(token, [self.limits.descriptors.port(), self.room.port()]);
    }

    /// How often idle flows are looked for: every ten seconds, as a rule.
    pub(super) fn sweep(&self) -> Duration {
        self.limits.idle / 18
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Moves what has come to a port of the host.
    pub(super) fn receive(
        &mut self,
        token: u64,
        port: &Bound,
        targets: &[IpAddr],
        poller: &mut Poller,
    ) -> nix::Result<()> {
        for _ in 0..TURNS {
            let (length, client, local) = match receive_from(&port.socket, &mut self.buffer) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => return Ok(()),
                // An error that the network has told of an answer to somebody.
                Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EINTR) => continue,
                Err(error) => return Err(error),
            };
            if !port.entrance.admits(&client) {
                continue;
            }
            let key = (token, client, local);
            if !self.flows.contains_key(&key) {
                let to = port.entrance.order(targets);
                let to = to.into_iter().rev().map(|target| SocketAddr::new(target, port.entrance.to)).collect();
                let begun = self.make_room(&key).ok_or_else(|| Errno::EMFILE.into());
                match begun.and_then(|shares| begin(to, shares, poller)) {
                    Ok(flow) => self.insert(key, flow),
                    Err(error) => {
                        tracing::debug!("a datagram to port {} is dropped: {error}", port.entrance.to);
                        continue;
                    }
                }
            }
            if let Some(flow) = self.flows.get_mut(&key) {
                flow.send(&self.buffer[..length], &self.kept);
            }
        }
        Ok(())
    }

    /// Makes room for one more. If need be, the longest-idle flow of the client that holds most gives way, unless it came by a port that
    /// has no more than its reserved share.
    fn make_room(&mut self, (token, client, _): &Key) -> Option<[Share; 2]> {
        for _ in 0..ATTEMPTS {
            let own = self.ports.get(token)?;
            let missing = match own.each_ref().map(|port| port.take(1)) {
                [Some(descriptor), Some(flow)] => return Some([descriptor, flow]),
                [None, _] => 0,
                _ => 1,
            };
            let may_give_way = |by| by == *token || self.ports.get(&by).is_some_and(|ports| ports[missing].is_over());
            let last_use = |key: &Key| self.flows.get(key).map(|flow| flow.used);
            let (key, _) = self.clients.giving_way((*client).into(), may_give_way, last_use)?;
            self.remove(&key);
        }
        None
    }

    fn insert(&mut self, key: Key, flow: Flow) {
        self.by_token.insert(flow.token, key);
        self.clients.add(key, key.1.into(), key.0, flow.used);
        self.flows.insert(key, flow);
    }

    fn remove(&mut self, key: &Key) {
        if let Some(flow) = self.flows.remove(key) {
            self.by_token.remove(&flow.token);
            self.clients.remove(key);
        }
    }

    /// Ends all flows that came by an entrance, by which no more will come.
    pub(super) fn end(&mut self, by: u64) {
        self.ports.remove(&by);
        let came = self.flows.keys().filter(|(token, ..)| *token == by).copied();
        for key in came.collect::<Vec<_>>() {
            self.remove(&key);
        }
    }

    /// Moves what the program has answered in the flow that a token belongs to.
    pub(super) fn work(&mut self, token: u64, ports: &HashMap<u64, Bound>, poller: &mut Poller) {
        let Some(key) = self.by_token.get(&token).copied() else { return };
        let (Some(flow), Some(port)) = (self.flows.get_mut(&key), ports.get(&key.0)) else { return };
        for _ in 0..TURNS {
            match socket::recv(flow.inside.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    (flow.used, flow.unanswered) = (Instant::now(), None);
                    flow.left.clear();
                    if let Err(error) = send_to(&port.socket, &self.buffer[..length], key.1, key.2) {
                        tracing::trace!("an answer to {} is dropped: {error}", key.1);
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::ECONNREFUSED) if !flow.left.is_empty() => {
                    // Nobody listens at this address. What was sent is sent to the next.
                    let Ok((inside, other)) = connect(&mut flow.left, poller) else { return };
                    (flow.inside, flow.token) = (inside, other);
                    if let Some((text, share)) = flow.unanswered.take() {
                        drop(share);
                        flow.send(&text, &self.kept);
                    }
                    self.by_token.remove(&token);
                    self.by_token.insert(other, key);
                    return;
                }
                Err(Errno::ECONNREFUSED) => {
                    // The program may listen later, and somewhere else: the next datagram begins anew.
                    self.remove(&key);
                    return;
                }
                Err(_) => {}
            }
        }
    }

    /// Ends the flows that were idle for too long.
    pub(super) fn forget_idle(&mut self) {
        let now = Instant::now();
        if self.flows.is_empty() || self.swept.is_some_and(|at| now < at + self.sweep()) {
            return;
        }
        self.swept = Some(now);
        let idle: Vec<Key> =
            self.flows.iter().filter(|(_, flow)| now > flow.used + self.limits.idle).map(|(key, _)| *key).collect();
        for key in idle {
            self.remove(&key);
        }
    }
}

fn begin(mut left: Vec<SocketAddr>, shares: [Share; 2], poller: &mut Poller) -> std::io::Result<Flow> {
    let (inside, token) = connect(&mut left, poller)?;
    Ok(Flow { _shares: shares, inside, token, left, unanswered: None, used: Instant::now() })
}

/// Connects to the last of some addresses, or of those left if one cannot be used.
fn connect(left: &mut Vec<SocketAddr>, poller: &mut Poller) -> std::io::Result<(OwnedFd, u64)> {
    let mut last = Errno::ECONNREFUSED;
    while let Some(address) = left.pop() {
        let connected = new_socket(address, SockType::Datagram).and_then(|inside| {
            socket::connect(inside.as_raw_fd(), &SockaddrStorage::from(address))?;
            if is_own_peer(&inside) { Err(Errno::ECONNREFUSED) } else { Ok(inside) }
        });
        match connected {
            Ok(inside) => {
                let token = poller.add_reader(inside.as_fd())?;
                return Ok((inside, token));
            }
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

impl Flow {
    fn send(&mut self, text: &[u8], kept: &Allowance) {
        self.used = Instant::now();
        self.unanswered = None;
        if !self.left.is_empty() {
            self.unanswered = kept.take(text.len()).map(|share| (text.to_vec(), share));
        }
        // What does not fit is dropped, as anywhere on the way. That nobody listens comes as an event.
        let _ = socket::send(self.inside.as_raw_fd(), text, MsgFlags::MSG_NOSIGNAL);
    }
}

fn receive_from(socket: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(usize, SocketAddr, Option<Local>)> {
    let mut space = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let received =
        socket::recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let local = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Local::V4(info.ipi_spec_dst.s_addr.to_ne_bytes())),
        // The interface matters for link-local addresses alone.
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            let address = info.ipi6_addr.s6_addr;
            let is_link_local = address[0] == 0xfe && address[1] & 0xc0 == 0x80;
            Some(Local::V6(address, if is_link_local { info.ipi6_ifindex } else { 0 }))
        }
        _ => None,
    });
    let client = received.address.as_ref().and_then(to_address).ok_or(Errno::EAFNOSUPPORT)?;
    Ok((received.bytes, client, local))
}

fn to_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let ipv4 = address.as_sockaddr_in().map(|address| SocketAddr::V4(SocketAddrV4::from(*address)));
    ipv4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::V6(SocketAddrV6::from(*address))))
        .filter(|_| address.len() > 0)
}

fn send_to(socket: &OwnedFd, text: &[u8], client: SocketAddr, local: Option<Local>) -> nix::Result<()> {
    let parts = [IoSlice::new(text)];
    let to = SockaddrStorage::from(client);
    let send = |messages: &[ControlMessage<'_>]| {
        socket::sendmsg(socket.as_raw_fd(), &parts, messages, MsgFlags::MSG_NOSIGNAL, Some(&to)).map(drop)
    };
    match local {
        Some(Local::V4(address)) => {
            let from = libc::in_addr { s_addr: u32::from_ne_bytes(address) };
            let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: from, ipi_addr: libc::in_addr { s_addr: 0 } };
            send(&[ControlMessage::Ipv4PacketInfo(&info)])
        }
        Some(Local::V6(address, interface)) => {
            let from = libc::in6_addr { s6_addr: address };
            send(&[ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo { ipi6_addr: from, ipi6_ifindex: interface })])
        }
        None => send(&[]),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::os::fd::BorrowedFd;

    use super::*;
    use crate::config::Protocol;
    use crate::linux::poll::wait_for;
    use crate::relay::{Entrance, bind};

    /// Where too much is kept, what was sent to an address at which nobody listens is lost, and no more than that.
    #[test]
    fn no_more_is_kept_than_there_is_room_for_and_the_program_is_found_all_the_same() {
        let targets = [Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2)];
        let program = UdpSocket::bind((targets[1], 0)).expect("a socket");
        program.set_nonblocking(true).expect("a socket");
        let to = program.local_addr().expect("an address").port();
        let address = Some(targets[0].into());
        let entrance = Entrance { address, only: None, port: 0, protocol: Protocol::Udp, to, proxy_protocol: None };
        let wait = |on: BorrowedFd<'_>| {
            let ready = wait_for(&[on], Some(Duration::from_secs(60))).expect("it can be waited for");
            assert!(ready[0], "nothing comes");
        };
        for (room, is_kept) in [(0, false), (7, false), (8, true)] {
            let port = bind(std::slice::from_ref(&entrance)).expect("a port").remove(0);
            let place: SocketAddr =
                rustix::net::getsockname(&port.socket).expect("a name").try_into().expect("an address");
            let mut datagrams = Datagrams::new(Limits::new(Allowance::of(100)));
            datagrams.kept = Allowance::of(room);
            datagrams.begin_at(0);
            let mut poller = Poller::new().expect("a poller");
            let client = UdpSocket::bind((targets[0], 0)).expect("a socket");
            let ports = HashMap::from([(0, port)]);
            for is_first in [true, false] {
                client.send_to(b"a letter", place).expect("room");
                wait(ports[&0].socket.as_fd());
                datagrams.receive(0, &ports[&0], &targets.map(IpAddr::from), &mut poller).expect("it is taken");
                if is_first {
                    // It is refused at the first address.
                    wait(poller.epoll.as_fd());
                    let token = *datagrams.by_token.keys().next().expect("a flow");
                    datagrams.work(token, &ports, &mut poller);
                }
                if is_kept || !is_first {
                    wait(program.as_fd());
                    program.recv(&mut [0; 16]).expect("a letter");
                }
            }
            let more = program.recv(&mut [0; 16]);
            assert!(
                more.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
                "with room for {room} bytes"
            );
        }
    }
}
