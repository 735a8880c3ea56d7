//! The capture of all packets on the host's interfaces, by which leaks are judged.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, getsockopt, recvfrom, setsockopt, socket, sockopt,
};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::internet::packets_of;
use crate::packet::{Flow, KEPT, Packet};
use crate::patience;

/// The time by which the capture may lag behind the counters of the interfaces.
const LAG: Duration = Duration::from_secs(20);

/// The socket's buffer size to request, in bytes. The kernel may grant less, and counts the packets that do not fit.
const BUFFER: usize = 16 << 20;

/// The `sll_pkttype` of packets that the host sent (packet(7)).
const PACKET_OUTGOING: u8 = libc::PACKET_OUTGOING;

/// A capture (packet(7)) of all packets that the host sends and receives on any interface until its world ends. It
/// detects missed packets, and returns an error then.
#[derive(Debug)]
pub struct Capture {
    host: NetworkNamespace,
    uplink: u32,
    lan: u32,
    socket: Arc<OwnedFd>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    packets: Vec<Packet>,
    /// The number of packets before the last [`Capture::forget`].
    forgotten: usize,
    /// The number of packets of each interface, so that a thread that waits need not count them under the lock.
    counts: BTreeMap<u32, u64>,
    /// The number of the last marker.
    mark: u32,
}

impl Seen {
    fn add(&mut self, packet: Packet) {
        *self.counts.entry(packet.interface).or_default() += 1;
        self.mark = mark_in(&packet).map_or(self.mark, |mark| mark.max(self.mark));
        self.packets.push(packet);
    }
}

/// Returns the number of a marker, if the packet is one.
fn mark_in(packet: &Packet) -> Option<u32> {
    let payload = packet.flow.as_ref()?.payload.strip_prefix(MARKER.as_bytes())?;
    std::str::from_utf8(payload).ok()?.parse().ok()
}

/// The place of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `eth0`.
    Uplink,
    /// `lan0`.
    Lan,
    /// The host's own `lo`.
    Loopback,
    /// Another interface of the host: the host's end of a tunnel's veth.
    Tunnel,
}

/// The number of packets that a socket has dropped since the last query (packet(7)).
#[derive(Clone, Copy, Debug)]
struct Statistics;
nix::getsockopt_impl!(
    Statistics,
    libc::SOL_PACKET,
    libc::PACKET_STATISTICS,
    libc::tpacket_stats,
    nix::sys::socket::sockopt::GetStruct<libc::tpacket_stats>
);

/// The beginning of a marker's payload. A marker that was captured proves that the packets before it were, too.
const MARKER: &str = "marker of the capture: ";

impl Capture {
    /// Starts in the calling thread's network namespace, before the two interfaces come up.
    pub(crate) fn start(uplink: u32, lan: u32) -> Result<Self> {
        // Without link-layer headers, and not bound to an interface, so that it sees future interfaces, too.
        let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (socket, writer) = (Arc::new(socket), Arc::clone(&seen));
        let reader = Arc::clone(&socket);
        std::thread::Builder::new().name("capture".into()).spawn(move || collect(&reader, &writer))?;
        Ok(Self { host: NetworkNamespace::current()?, uplink, lan, socket, seen })
    }

    /// Returns the packets on `eth0` and `lan0` that a host must not send or receive whose programs are all in the
    /// tunnel: see [`Packet::is_expected_on_uplink`].
    ///
    /// # Errors
    /// If an interface counted more packets than were captured.
    pub fn leaks(&self) -> Result<Vec<Packet>> {
        let mut packets = self.uplink()?;
        packets.append(&mut self.lan()?);
        packets.retain(|packet| !packet.is_expected_on_uplink());
        Ok(packets)
    }

    /// Returns the packets on the uplink, `eth0`.
    ///
    /// # Errors
    /// As [`Self::leaks`].
    pub fn uplink(&self) -> Result<Vec<Packet>> {
        self.on(self.uplink)
    }

    /// Returns the packets on the interface of the local network, `lan0`.
    ///
    /// # Errors
    /// As [`Self::leaks`].
    pub fn lan(&self) -> Result<Vec<Packet>> {
        self.on(self.lan)
    }

    /// Returns the packets on an interface since the last [`Self::forget`].
    ///
    /// # Errors
    /// As [`Self::leaks`].
    pub fn on(&self, interface: u32) -> Result<Vec<Packet>> {
        self.catch_up(interface)?;
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(seen.packets[seen.forgotten..].iter().filter(|packet| packet.interface == interface).cloned().collect())
    }

    /// Returns the packets on all interfaces of the host since the last [`Self::forget`], including removed interfaces.
    ///
    /// # Errors
    /// If a packet was missed.
    pub fn everything(&self) -> Result<Vec<Packet>> {
        self.catch_up(self.uplink)?;
        self.catch_up(self.lan)?;
        self.wait_for_marker()?;
        let dropped = getsockopt(&self.socket, Statistics)?.tp_drops;
        ensure!(dropped == 0, "the capture missed {dropped} packets and cannot judge leaks");
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(seen.packets[seen.forgotten..].iter().filter(|packet| mark_in(packet).is_none()).cloned().collect())
    }

    /// Returns the place of a packet.
    pub fn side(&self, packet: &Packet) -> Side {
        match packet.interface {
            interface if interface == self.uplink => Side::Uplink,
            interface if interface == self.lan => Side::Lan,
            // `lo` is the first interface of every network namespace.
            1 => Side::Loopback,
            _ => Side::Tunnel,
        }
    }

    /// Sends a marker over `lo`, and waits until it is captured.
    fn wait_for_marker(&self) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let mark = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket = self.host.run(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))?;
        // To itself, so that no other socket receives it.
        socket.send_to(format!("{MARKER}{mark}").as_bytes(), socket.local_addr()?)?;
        let deadline = Instant::now() + patience(LAG);
        loop {
            if self.seen.lock().unwrap_or_else(PoisonError::into_inner).mark >= mark {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the capture lags behind and cannot judge leaks");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Excludes the packets so far from later results.
    ///
    /// # Errors
    /// As [`Self::leaks`].
    pub fn forget(&self) -> Result<()> {
        self.catch_up(self.uplink)?;
        self.catch_up(self.lan)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.forgotten = seen.packets.len();
        Ok(())
    }

    /// Waits until the capture has as many packets as the interface has counted by now.
    fn catch_up(&self, interface: u32) -> Result<()> {
        let counted = self.host.run(|| packets_of(interface).map_err(io::Error::other))?;
        let deadline = Instant::now() + patience(LAG);
        loop {
            let captured = {
                let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.counts.get(&interface).copied().unwrap_or_default()
            };
            if captured >= counted {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the capture has {captured} of {counted} packets and cannot judge leaks");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn collect(socket: &OwnedFd, seen: &Mutex<Seen>) {
    let mut buffer = [0; KEPT];
    loop {
        // The buffer truncates packets on purpose.
        let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, Some(from))) => (length, from),
            // An interface went down.
            Ok((_, None)) | Err(nix::Error::ENETDOWN | nix::Error::EINTR | nix::Error::ENOBUFS) => continue,
            Err(error) => {
                // The next query finds packets missing.
                eprintln!("the capture ended: {error}");
                return;
            }
        };
        let packet = Packet {
            interface: u32::try_from(from.ifindex()).unwrap_or_default(),
            outgoing: from.pkttype() == PACKET_OUTGOING,
            ethertype: u16::from_be(from.protocol()),
            flow: Flow::parse(&buffer[..length]),
        };
        seen.lock().unwrap_or_else(PoisonError::into_inner).add(packet);
    }
}
