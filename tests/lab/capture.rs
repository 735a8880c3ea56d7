//! What goes over the host's interfaces, from the first packet on: the judge of leaks.

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

/// How long the capture may lag behind the interfaces' own counters.
const LAG: Duration = Duration::from_secs(20);

/// What is asked for as the socket's buffer, in bytes; the kernel may give less, and then says so by its counters.
const BUFFER: usize = 16 << 20;

/// `sll_pkttype` of what the host itself sent (packet(7)).
const PACKET_OUTGOING: u8 = libc::PACKET_OUTGOING;

/// A capture (packet(7)) of everything that the host sends and receives on any interface, which goes on until its world
/// ends. It knows when it missed something, and then says so instead of judging.
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
    /// How many packets at the beginning were there before the last [`Capture::forget`].
    forgotten: usize,
    /// How many there are of each interface: whoever waits asks often, and is not to hold up the one who collects.
    counts: BTreeMap<u32, u64>,
    /// The number of the last mark.
    mark: u32,
}

impl Seen {
    fn add(&mut self, packet: Packet) {
        *self.counts.entry(packet.interface).or_default() += 1;
        self.mark = mark_in(&packet).map_or(self.mark, |mark| mark.max(self.mark));
        self.packets.push(packet);
    }
}

/// The number of the mark that a packet is, if it is one.
fn mark_in(packet: &Packet) -> Option<u32> {
    let payload = packet.flow.as_ref()?.payload.strip_prefix(MARK.as_bytes())?;
    std::str::from_utf8(payload).ok()?.parse().ok()
}

/// Where a packet was captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `eth0`.
    Uplink,
    /// `lan0`.
    Lan,
    /// The host's own `lo`.
    Loopback,
    /// Any other of the host's interfaces: the host's end of a tunnel's veth.
    Tunnel,
}

/// How many packets a socket has dropped since it was asked last (packet(7)).
#[derive(Clone, Copy, Debug)]
struct Statistics;
nix::getsockopt_impl!(
    Statistics,
    libc::SOL_PACKET,
    libc::PACKET_STATISTICS,
    libc::tpacket_stats,
    nix::sys::socket::sockopt::GetStruct<libc::tpacket_stats>
);

/// How a packet begins that is sent to see whether the capture is up to date.
const MARK: &str = "the capture is here: ";

impl Capture {
    /// Starts in the calling thread's namespace; the two interfaces have not been up before.
    pub(crate) fn start(uplink: u32, lan: u32) -> Result<Self> {
        // Without link-layer headers, and not bound to an interface: so it sees all of them, and those to come.
        let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (socket, writer) = (Arc::new(socket), Arc::clone(&seen));
        let reader = Arc::clone(&socket);
        std::thread::Builder::new().name("capture".into()).spawn(move || collect(&reader, &writer))?;
        Ok(Self { host: NetworkNamespace::current()?, uplink, lan, socket, seen })
    }

    /// What went over the uplink, `eth0`, or the local network's interface, `lan0`, and should not have if all that was done was to
    /// run programs in the tunnel: see [`Packet::is_expected_on_uplink`].
    ///
    /// # Errors
    /// If an interface counted more packets than were captured: then nothing can be said.
    pub fn leaks(&self) -> Result<Vec<Packet>> {
        let mut packets = self.uplink()?;
        packets.append(&mut self.lan()?);
        packets.retain(|packet| !packet.is_expected_on_uplink());
        Ok(packets)
    }

    /// All that went over the uplink, `eth0`.
    pub fn uplink(&self) -> Result<Vec<Packet>> {
        self.on(self.uplink)
    }

    /// All that went over the interface of the local network, `lan0`.
    pub fn lan(&self) -> Result<Vec<Packet>> {
        self.on(self.lan)
    }

    /// All that went over an interface since the last [`Self::forget`].
    pub fn on(&self, interface: u32) -> Result<Vec<Packet>> {
        self.catch_up(interface)?;
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(seen.packets[seen.forgotten..].iter().filter(|packet| packet.interface == interface).cloned().collect())
    }

    /// All that went over any interface of the host, also over one that is gone by now, since the last [`Self::forget`].
    ///
    /// # Errors
    /// If a packet was missed: then nothing can be said.
    pub fn everything(&self) -> Result<Vec<Packet>> {
        self.catch_up(self.uplink)?;
        self.catch_up(self.lan)?;
        self.mark_and_meet()?;
        let dropped = getsockopt(&self.socket, Statistics)?.tp_drops;
        ensure!(dropped == 0, "the capture has missed {dropped} packets, so it cannot tell what leaked");
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(seen.packets[seen.forgotten..].iter().filter(|packet| mark_in(packet).is_none()).cloned().collect())
    }

    /// Where a packet was captured.
    pub fn side(&self, packet: &Packet) -> Side {
        match packet.interface {
            interface if interface == self.uplink => Side::Uplink,
            interface if interface == self.lan => Side::Lan,
            // `lo` is the first interface of every network namespace.
            1 => Side::Loopback,
            _ => Side::Tunnel,
        }
    }

    /// Sends a packet over `lo`, and waits until it is captured: what came before is captured then, too.
    fn mark_and_meet(&self) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let mark = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket = self.host.run(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))?;
        // To itself, so that nobody is disturbed.
        socket.send_to(format!("{MARK}{mark}").as_bytes(), socket.local_addr()?)?;
        let deadline = Instant::now() + patience(LAG);
        loop {
            if self.seen.lock().unwrap_or_else(PoisonError::into_inner).mark >= mark {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the capture lags behind, so it cannot tell what leaked");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets the judgement begin anew: what came until now counts no longer.
    pub fn forget(&self) -> Result<()> {
        self.catch_up(self.uplink)?;
        self.catch_up(self.lan)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.forgotten = seen.packets.len();
        Ok(())
    }

    /// Waits until as many packets are captured as the interface has counted by now.
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
                bail!("the capture has {captured} of {counted} packets, so it cannot tell what leaked");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn collect(socket: &OwnedFd, seen: &Mutex<Seen>) {
    let mut buffer = [0; KEPT];
    loop {
        // What does not fit into the buffer is cut off, as it should.
        let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, Some(from))) => (length, from),
            // The interface went down; the capture goes on.
            Ok((_, None)) | Err(nix::Error::ENETDOWN | nix::Error::EINTR | nix::Error::ENOBUFS) => continue,
            Err(error) => {
                // Whoever asks next finds packets missing.
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
