//! What goes over the host's interfaces, from the first packet on: the judge of leaks.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::internet::packets_of;
use crate::packet::{Flow, KEPT, Packet};

/// How long the capture may lag behind the interfaces' own counters.
const LAG: Duration = Duration::from_secs(2);

/// What is asked for as the socket's buffer, in bytes; the kernel may give less, and then says so by its counters.
const BUFFER: usize = 4 << 20;

/// `sll_pkttype` of what the host itself sent (packet(7)).
const PACKET_OUTGOING: u8 = libc::PACKET_OUTGOING;

/// A capture (packet(7)) of everything that the host sends and receives on any interface, which goes on until its world
/// ends. It knows when it missed something, and then says so instead of judging.
#[derive(Debug)]
pub struct Capture {
    host: NetworkNamespace,
    uplink: u32,
    lan: u32,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    packets: Vec<Packet>,
    /// How many packets at the beginning were there before the last [`Capture::forget`].
    forgotten: usize,
}

impl Capture {
    /// Starts in the calling thread's namespace; the two interfaces have not been up before.
    pub(crate) fn start(uplink: u32, lan: u32) -> Result<Self> {
        // Without link-layer headers, and not bound to an interface: so it sees all of them, and those to come.
        let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let writer = Arc::clone(&seen);
        std::thread::Builder::new().name("capture".into()).spawn(move || collect(&socket, &writer))?;
        Ok(Self { host: NetworkNamespace::current()?, uplink, lan, seen })
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
        let deadline = Instant::now() + LAG;
        loop {
            let captured = {
                let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.packets.iter().filter(|packet| packet.interface == interface).count() as u64
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
        seen.lock().unwrap_or_else(PoisonError::into_inner).packets.push(packet);
    }
}
