//! Relays UDP. Each client of a port has a flow: a socket inside that is connected to the program's port. A flow ends
//! when no datagram has passed either way for a while.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    self, ControlMessage, ControlMessageOwned, MsgFlags, SockType, SockaddrIn, SockaddrIn6, SockaddrLike,
    SockaddrStorage, sockopt,
};

use super::budget::{Budget, Grant, PortBudget};
use super::clients::{Clients, EVICTION_ATTEMPTS};
use super::poller::Poller;
use super::{Destinations, Limits, ListenSocket, RelayedPort, Targets, is_connected_to_itself, new_socket};

/// How long a flow may be idle by default. RFC 4787, REQ-5, requires at least two minutes.
pub(super) const IDLE: Duration = Duration::from_secs(180);

/// How many flows a relay may have. Each port has a reserved share of them.
const FLOWS: usize = 4096;

/// The size of the buffer, in bytes: the largest datagram (RFC 768), and one byte more.
const BUFFER_SIZE: usize = 1 << 16;

/// How many bytes of unanswered datagrams a relay keeps to send them again. Beyond that, a datagram is sent once.
const RESEND_BYTES: usize = 4 << 20;

/// How many datagrams of one socket are relayed before the other sockets get their turn.
const DATAGRAMS_PER_TURN: usize = 256;

/// Makes a socket report to which address of the host each datagram was sent, so that the reply comes from there
/// (ip(7), ipv6(7)). A transparent socket reports to which address and port of another host.
pub(super) fn report_destinations(socket: &OwnedFd, address: SocketAddr, is_transparent: bool) -> nix::Result<()> {
    if is_transparent {
        match address {
            SocketAddr::V4(_) => socket::setsockopt(socket, sockopt::Ipv4OrigDstAddr, &true),
            SocketAddr::V6(_) => socket::setsockopt(socket, sockopt::Ipv6OrigDstAddr, &true),
        }
    } else if address.is_ipv6() {
        // This covers IPv4 datagrams on an IPv6 socket, too.
        socket::setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)
    } else {
        socket::setsockopt(socket, sockopt::Ipv4PacketInfo, &true)
    }
}

/// What identifies a flow: the token of the port, the client, and the address that the client sends to.
type Key = (u64, SocketAddr, Option<Destination>);

/// An address that a client sends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Destination {
    /// An IPv4 address of the host, in the form of the kernel's control messages.
    HostV4([u8; 4]),
    /// An IPv6 address of the host, and the number of an interface.
    HostV6([u8; 16], u32),
    /// An address of another host.
    Other(SocketAddr),
}

/// All UDP flows of a relay.
pub(super) struct UdpFlows {
    /// Holds the datagram that is being relayed.
    buffer: Box<[u8]>,
    flows: HashMap<Key, Flow>,
    by_token: HashMap<u64, Key>,
    /// Each port's shares of the descriptors and of the flows, by its token.
    ports: HashMap<u64, [PortBudget; 2]>,
    clients: Clients<Key>,
    flow_budget: Budget,
    idle_checked: Option<Instant>,
    limits: Limits,
    resend_budget: Budget,
}

struct Flow {
    _grants: [Grant; 2],
    /// The socket that is connected to the program.
    inside: OwnedFd,
    /// The socket from which the client of a transparent port gets replies; `None`: from the port's.
    replies: Option<OwnedFd>,
    token: u64,
    /// Addresses to try next if the program does not listen on this one; the next is last.
    remaining: Vec<SocketAddr>,
    /// The client's last datagram, until the program has replied once. `None` if the budget for these is used up.
    unanswered: Option<(Vec<u8>, Grant)>,
    used: Instant,
}

impl UdpFlows {
    pub(super) fn new(limits: Limits) -> Self {
        let buffer = vec![0; BUFFER_SIZE].into_boxed_slice();
        Self {
            buffer,
            flows: HashMap::new(),
            by_token: HashMap::new(),
            ports: HashMap::new(),
            clients: Clients::new(),
            flow_budget: Budget::new(FLOWS),
            idle_checked: None,
            limits,
            resend_budget: Budget::new(RESEND_BYTES),
        }
    }

    /// Adds a port, and reserves shares of the descriptors and of the flows for it.
    pub(super) fn add_port(&mut self, token: u64) {
        self.ports.insert(token, [self.limits.descriptors.add_port(), self.flow_budget.add_port()]);
    }

    /// Returns how often to look for idle flows: every ten seconds by default.
    pub(super) fn idle_check_interval(&self) -> Duration {
        self.limits.idle / 18
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Relays datagrams that clients have sent to a port.
    pub(super) fn receive(
        &mut self,
        token: u64,
        socket: &ListenSocket,
        targets: &Targets,
        poller: &mut Poller,
    ) -> nix::Result<()> {
        for _ in 0..DATAGRAMS_PER_TURN {
            let (length, client, local) = match receive_from(&socket.socket, &mut self.buffer) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => return Ok(()),
                // The network reports an error about a reply to some client.
                Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EINTR) => continue,
                Err(error) => return Err(error),
            };
            let RelayedPort { target_port, .. } = socket.port;
            if !socket.port.allows(&client) {
                continue;
            }
            let key = (token, client, local);
            if !self.flows.contains_key(&key) {
                match self.begin(&key, socket, targets, poller) {
                    Ok(flow) => self.insert(key, flow),
                    Err(error) => {
                        tracing::debug!("dropped a datagram to port {target_port}: {error}");
                        continue;
                    }
                }
            }
            if let Some(flow) = self.flows.get_mut(&key) {
                flow.send(&self.buffer[..length], &self.resend_budget);
            }
        }
        Ok(())
    }

    /// Begins a flow.
    fn begin(
        &mut self,
        key: &Key,
        socket: &ListenSocket,
        targets: &Targets,
        poller: &mut Poller,
    ) -> std::io::Result<Flow> {
        let (mut remaining, replies) = match (targets, key.2) {
            (Targets::Addresses(targets), _) => {
                let targets = socket.port.sort_targets(targets).into_iter().rev();
                (targets.map(|target| SocketAddr::new(target, socket.port.target_port)).collect(), None)
            }
            (Targets::Original(destinations), Some(Destination::Other(to))) if destinations.allow(&to) => {
                (vec![to], Some((destinations, to)))
            }
            (Targets::Original(_), _) => return Err(Errno::EACCES.into()),
        };
        let descriptors = 1 + usize::from(replies.is_some());
        let grants = self.take_or_evict(key, descriptors).ok_or(Errno::EMFILE)?;
        let replies = replies.map(|(destinations, to)| destinations.reply_from(to)).transpose()?;
        let (inside, token) = connect(&mut remaining, poller)?;
        Ok(Flow { _grants: grants, inside, replies, token, remaining, unanswered: None, used: Instant::now() })
    }

    /// Takes what one more flow needs out of the budgets. If nothing is left, evicts the longest-idle flow of the
    /// client that holds most; not one of a port that uses no more than its reserved share.
    fn take_or_evict(&mut self, (token, client, _): &Key, descriptors: usize) -> Option<[Grant; 2]> {
        for _ in 0..EVICTION_ATTEMPTS {
            let own = self.ports.get(token)?;
            let [of_descriptors, of_flows] = own;
            let missing = match [of_descriptors.take(descriptors), of_flows.take(1)] {
                [Some(descriptor), Some(flow)] => return Some([descriptor, flow]),
                [None, _] => 0,
                _ => 1,
            };
            let may_evict =
                |port| port == *token || self.ports.get(&port).is_some_and(|budgets| budgets[missing].exceeds_share());
            let last_use = |key: &Key| self.flows.get(key).map(|flow| flow.used);
            let (key, _) = self.clients.choose_to_evict((*client).into(), may_evict, last_use)?;
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

    /// Removes a port, and ends all its flows.
    pub(super) fn end_all_from(&mut self, port: u64) {
        self.ports.remove(&port);
        let of_port = self.flows.keys().filter(|(token, ..)| *token == port).copied();
        for key in of_port.collect::<Vec<_>>() {
            self.remove(&key);
        }
    }

    /// Ends the flows to destinations that are not allowed.
    pub(super) fn end_unless_allowed(&mut self, destinations: &Destinations) {
        let is_allowed = |key: &Key| matches!(&key.2, Some(Destination::Other(to)) if destinations.allow(to));
        for key in self.flows.keys().filter(|key| !is_allowed(key)).copied().collect::<Vec<_>>() {
            self.remove(&key);
        }
    }

    /// Relays the program's replies in the flow of a token.
    pub(super) fn relay_replies(&mut self, token: u64, sockets: &HashMap<u64, ListenSocket>, poller: &mut Poller) {
        let Some(key) = self.by_token.get(&token).copied() else { return };
        let (Some(flow), Some(socket)) = (self.flows.get_mut(&key), sockets.get(&key.0)) else { return };
        for _ in 0..DATAGRAMS_PER_TURN {
            match socket::recv(flow.inside.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    (flow.used, flow.unanswered) = (Instant::now(), None);
                    flow.remaining.clear();
                    let from = flow.replies.as_ref().unwrap_or(&socket.socket);
                    if let Err(error) = send_to(from, &self.buffer[..length], key.1, key.2) {
                        tracing::trace!("dropped a reply to {}: {error}", key.1);
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::ECONNREFUSED) if !flow.remaining.is_empty() => {
                    // The program does not listen on this address: the datagram is sent to the next.
                    let Ok((inside, new_token)) = connect(&mut flow.remaining, poller) else { return };
                    (flow.inside, flow.token) = (inside, new_token);
                    if let Some((datagram, grant)) = flow.unanswered.take() {
                        drop(grant);
                        flow.send(&datagram, &self.resend_budget);
                    }
                    self.by_token.remove(&token);
                    self.by_token.insert(new_token, key);
                    return;
                }
                Err(Errno::ECONNREFUSED) => {
                    // The program may listen later, on any address: the next datagram begins a new flow.
                    self.remove(&key);
                    return;
                }
                Err(_) => {}
            }
        }
    }

    /// Ends flows that have been idle for too long. Does nothing if that was checked recently.
    pub(super) fn end_idle(&mut self) {
        let now = Instant::now();
        if self.flows.is_empty() || self.idle_checked.is_some_and(|at| now < at + self.idle_check_interval()) {
            return;
        }
        self.idle_checked = Some(now);
        let idle: Vec<Key> =
            self.flows.iter().filter(|(_, flow)| now > flow.used + self.limits.idle).map(|(key, _)| *key).collect();
        for key in idle {
            self.remove(&key);
        }
    }
}

/// Connects to the last address that can be used, and removes it and those after it from the list. Returns the socket
/// and its token.
fn connect(addresses: &mut Vec<SocketAddr>, poller: &mut Poller) -> std::io::Result<(OwnedFd, u64)> {
    let mut last_error = Errno::ECONNREFUSED;
    while let Some(address) = addresses.pop() {
        let connected = new_socket(address, SockType::Datagram).and_then(|inside| {
            socket::connect(inside.as_raw_fd(), &SockaddrStorage::from(address))?;
            if is_connected_to_itself(&inside) { Err(Errno::ECONNREFUSED) } else { Ok(inside) }
        });
        match connected {
            Ok(inside) => {
                let token = poller.add_reader(inside.as_fd())?;
                return Ok((inside, token));
            }
            Err(error) => last_error = error,
        }
    }
    Err(last_error.into())
}

impl Flow {
    fn send(&mut self, datagram: &[u8], resend_budget: &Budget) {
        self.used = Instant::now();
        self.unanswered = None;
        if !self.remaining.is_empty() {
            self.unanswered = resend_budget.take(datagram.len()).map(|grant| (datagram.to_vec(), grant));
        }
        // As on any network, a datagram is dropped if the buffer is full. A refusal is reported by a later event.
        let _ = socket::send(self.inside.as_raw_fd(), datagram, MsgFlags::MSG_NOSIGNAL);
    }
}

fn receive_from(socket: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(usize, SocketAddr, Option<Destination>)> {
    let mut space = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo, libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let received =
        socket::recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let local = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Destination::HostV4(info.ipi_spec_dst.s_addr.to_ne_bytes())),
        // The interface only matters for link-local addresses.
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            let address = info.ipi6_addr.s6_addr;
            let is_link_local = address[0] == 0xfe && address[1] & 0xc0 == 0x80;
            Some(Destination::HostV6(address, if is_link_local { info.ipi6_ifindex } else { 0 }))
        }
        ControlMessageOwned::Ipv4OrigDstAddr(address) => {
            Some(Destination::Other(SocketAddr::V4(SockaddrIn::from(address).into())))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(address) => {
            Some(Destination::Other(SocketAddr::V6(SockaddrIn6::from(address).into())))
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

fn send_to(socket: &OwnedFd, datagram: &[u8], client: SocketAddr, local: Option<Destination>) -> nix::Result<()> {
    let parts = [IoSlice::new(datagram)];
    let to = SockaddrStorage::from(client);
    let send = |messages: &[ControlMessage<'_>]| {
        socket::sendmsg(socket.as_raw_fd(), &parts, messages, MsgFlags::MSG_NOSIGNAL, Some(&to)).map(drop)
    };
    match local {
        Some(Destination::HostV4(address)) => {
            let from = libc::in_addr { s_addr: u32::from_ne_bytes(address) };
            let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: from, ipi_addr: libc::in_addr { s_addr: 0 } };
            send(&[ControlMessage::Ipv4PacketInfo(&info)])
        }
        Some(Destination::HostV6(address, interface)) => {
            let from = libc::in6_addr { s6_addr: address };
            send(&[ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo { ipi6_addr: from, ipi6_ifindex: interface })])
        }
        // A socket that has this address.
        Some(Destination::Other(_)) | None => send(&[]),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, UdpSocket};
    use std::os::fd::BorrowedFd;

    use super::*;
    use crate::config::Protocol;
    use crate::linux::poll::wait_for;
    use crate::relay::bind;

    /// With no budget to keep datagrams, only a datagram to an address where the program does not listen is lost.
    #[test]
    fn no_more_is_kept_than_the_budget_allows_and_the_program_is_found_all_the_same() {
        let targets = [Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2)];
        let program = UdpSocket::bind((targets[1], 0)).expect("a socket");
        program.set_nonblocking(true).expect("a socket");
        let relayed = RelayedPort {
            address: Some(targets[0].into()),
            allowed_client: None,
            port: 0,
            protocol: Protocol::Udp,
            target_port: program.local_addr().expect("an address").port(),
            proxy_protocol: None,
            is_transparent: false,
        };
        let wait = |fd: BorrowedFd<'_>| {
            let ready = wait_for(&[fd], Some(Duration::from_secs(60))).expect("it can be waited for");
            assert!(ready[0], "nothing arrives");
        };
        let addresses = Targets::Addresses(targets.map(IpAddr::from).into());
        for (budget, is_kept) in [(0, false), (7, false), (8, true)] {
            let socket = bind(std::slice::from_ref(&relayed)).expect("a port").remove(0);
            let address: SocketAddr =
                rustix::net::getsockname(&socket.socket).expect("a name").try_into().expect("an address");
            let mut flows = UdpFlows::new(Limits::new(Budget::new(100)));
            flows.resend_budget = Budget::new(budget);
            flows.add_port(0);
            let mut poller = Poller::new().expect("a poller");
            let client = UdpSocket::bind((targets[0], 0)).expect("a socket");
            let sockets = HashMap::from([(0, socket)]);
            for is_first in [true, false] {
                client.send_to(b"8 bytes.", address).expect("room");
                wait(sockets[&0].socket.as_fd());
                flows.receive(0, &sockets[&0], &addresses, &mut poller).expect("it is received");
                if is_first {
                    // The first address refuses the datagram.
                    wait(poller.epoll.as_fd());
                    let token = *flows.by_token.keys().next().expect("a flow");
                    flows.relay_replies(token, &sockets, &mut poller);
                }
                if is_kept || !is_first {
                    wait(program.as_fd());
                    program.recv(&mut [0; 16]).expect("a datagram");
                }
            }
            let more = program.recv(&mut [0; 16]);
            assert!(
                more.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
                "with a budget of {budget} bytes"
            );
        }
    }
}
