//! The thread of the data path: waits for packets, datagrams and commands, and passes them to the [`Core`].
//!
//! Packets are read in batches, so that many share a wake-up, and in turns, so that neither direction starves the
//! other. Offloads (several segments in one packet of the TUN, several datagrams in one system call) would change this
//! file and [`Wire`], but not the code behind [`Sink`].

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::clock;
use super::device::{Core, Dropped, MAX_PACKET, PACKET_BUFFER, Sink};
use super::sockets::{self, Sockets};
use crate::keys::PublicKey;
use crate::wireguard::{DeviceConfig, PeerStatus};

/// The maximum number of packets read from one descriptor before the next has its turn.
const BATCH: usize = 64;

/// The maximum number of consecutive errors of a socket without a datagram or a pause. Errors of single datagrams
/// (ICMP) are common, but a socket that only reports errors is broken, and would keep the thread busy.
const SOCKET_ERRORS: usize = 1_000;

/// The maximum number of sockets: one for each address family.
const MAX_SOCKETS: usize = 2;

// The sources of events. Sockets have their index.
const TUN: u64 = u64::MAX;
const COMMANDS: u64 = u64::MAX - 1;

/// A command of the device's owner to the data path.
pub(super) enum DataPathCommand {
    SetEndpoint(PublicKey, SocketAddr),
    InitiateHandshake(PublicKey),
    Reconfigure(Box<DeviceConfig>, mpsc::Sender<io::Result<()>>),
    Rebind(Sockets, mpsc::Sender<io::Result<()>>),
    Status(mpsc::Sender<(Vec<PeerStatus>, Dropped)>),
    Stop,
}

/// The state of the data path's thread.
pub(super) struct DataPath {
    pub(super) core: Core,
    pub(super) tun: OwnedFd,
    pub(super) sockets: Sockets,
    pub(super) commands: mpsc::Receiver<DataPathCommand>,
    /// An eventfd that is readable while there may be commands.
    pub(super) wake: Arc<OwnedFd>,
    /// An eventfd that is readable after a handshake was completed or not answered in time.
    pub(super) handshakes: Arc<OwnedFd>,
}

impl DataPath {
    /// Moves packets until a command stops it.
    ///
    /// # Errors
    /// Fails if the TUN is gone or a socket is broken.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let Self { core, tun, sockets, commands, wake, handshakes } = self;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let readable = epoll::EventFlags::IN;
        epoll::add(&epoll, &*tun, epoll::EventData::new_u64(TUN), readable)?;
        epoll::add(&epoll, &**wake, epoll::EventData::new_u64(COMMANDS), readable)?;
        watch(&epoll, sockets)?;

        let mut buffer = vec![0; PACKET_BUFFER].into_boxed_slice();
        let mut errors = [0; MAX_SOCKETS];
        let mut counts = Counts::default();
        let mut events = [epoll::Event { flags: readable, data: epoll::EventData::new_u64(0) }; 4];
        core.start(clock::now(), &mut Wire::new(tun, sockets, handshakes, &mut counts));
        loop {
            let timeout = core.next_tick().map(|at| at.saturating_sub(clock::now()));
            let ready = match epoll::wait(&epoll, &mut events, timeout.map(timespec).as_ref()) {
                Ok(ready) => ready,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let now = clock::now();
            for event in &events[..ready] {
                let mut wire = Wire::new(tun, sockets, handshakes, &mut counts);
                match event.data.u64() {
                    TUN => drain_tun(core, &mut buffer, now, &mut wire)?,
                    COMMANDS => {
                        clear(wake)?;
                        while let Ok(command) = commands.try_recv() {
                            match command {
                                // The loop itself replaces the sockets, which `wire` borrows elsewhere.
                                DataPathCommand::Rebind(new, reply) => {
                                    let watched = watch(&epoll, &new);
                                    if watched.is_ok() {
                                        // Closing the former sockets removes them from epoll.
                                        *sockets = new;
                                    }
                                    let _ = reply.send(watched);
                                }
                                DataPathCommand::Stop => return Ok(()),
                                other => {
                                    execute(other, core, now, &mut Wire::new(tun, sockets, handshakes, &mut counts))
                                }
                            }
                        }
                    }
                    number => {
                        let number = number as usize;
                        // The event may be of a socket that was replaced meanwhile.
                        let (Some(socket), Some(errors)) = (sockets.descriptors().nth(number), errors.get_mut(number))
                        else {
                            continue;
                        };
                        drain_socket(core, socket, &mut buffer[..MAX_PACKET], now, &mut wire, errors)?;
                    }
                }
            }
            core.tick(now, &mut Wire::new(tun, sockets, handshakes, &mut counts));
        }
    }
}

/// Adds the sockets to epoll.
fn watch(epoll: &OwnedFd, sockets: &Sockets) -> io::Result<()> {
    for (number, socket) in sockets.descriptors().enumerate() {
        epoll::add(epoll, socket, epoll::EventData::new_u64(number as u64), epoll::EventFlags::IN)?;
    }
    Ok(())
}

/// Executes a command that concerns peers. The owner may have stopped waiting for the reply.
fn execute(command: DataPathCommand, core: &mut Core, now: Duration, wire: &mut Wire<'_>) {
    match command {
        DataPathCommand::SetEndpoint(peer, endpoint) => {
            if let Some(peer) = core.index_of(&peer) {
                core.set_endpoint(peer, endpoint, now, wire);
            }
        }
        DataPathCommand::InitiateHandshake(peer) => {
            if let Some(peer) = core.index_of(&peer) {
                core.initiate_handshake(peer, now, wire);
            }
        }
        DataPathCommand::Reconfigure(config, reply) => {
            let changed = core.reconfigure(&config, now).map(|new| {
                for peer in new {
                    core.start_peer(peer, now, wire);
                }
            });
            let _ = reply.send(changed);
        }
        DataPathCommand::Status(reply) => {
            let dropped =
                Dropped { not_sent: wire.counts.unsent, not_delivered: wire.counts.refused, ..core.dropped() };
            let _ = reply.send((core.status(now), dropped));
        }
        DataPathCommand::Rebind(..) | DataPathCommand::Stop => {}
    }
}

/// Reads packets from the TUN until it has none or the batch is full.
///
/// # Errors
/// Fails if the TUN is gone: the kernel's drivers/net/tun.c returns `EBADFD` once the device is detached, and `EIO`
/// once it is unregistered.
fn drain_tun(core: &mut Core, buffer: &mut [u8], now: Duration, wire: &mut Wire<'_>) -> io::Result<()> {
    for _ in 0..BATCH {
        match rustix::io::read(wire.tun, &mut buffer[..MAX_PACKET]) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the TUN was closed")),
            Ok(length) => core.on_packet(buffer, length, now, wire),
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(broken("the TUN is gone", errno)),
        }
    }
    Ok(())
}

/// Reads datagrams from a socket until it has none or the batch is full.
///
/// # Errors
/// Fails after [`SOCKET_ERRORS`] consecutive errors of the socket.
fn drain_socket(
    core: &mut Core,
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    now: Duration,
    wire: &mut Wire<'_>,
    errors: &mut usize,
) -> io::Result<()> {
    for _ in 0..BATCH {
        match sockets::receive(socket, buffer) {
            Ok((length, from)) => {
                *errors = 0;
                core.on_datagram(&mut buffer[..length], from, now, wire);
            }
            Err(Errno::AGAIN) => {
                *errors = 0;
                break;
            }
            Err(Errno::INTR) => {}
            Err(errno) => {
                tracing::debug!(%errno, "a socket reported an error");
                *errors += 1;
                if *errors > SOCKET_ERRORS {
                    return Err(broken("a socket is broken", errno));
                }
            }
        }
    }
    Ok(())
}

/// The number of packets that could not be written.
#[derive(Default)]
struct Counts {
    unsent: u64,
    refused: u64,
}

/// The real TUN and the real sockets. Writing to them never waits: a packet without room is dropped, as in a network.
struct Wire<'a> {
    tun: BorrowedFd<'a>,
    sockets: &'a Sockets,
    handshakes: BorrowedFd<'a>,
    counts: &'a mut Counts,
}

impl<'a> Wire<'a> {
    fn new(tun: &'a OwnedFd, sockets: &'a Sockets, handshakes: &'a OwnedFd, counts: &'a mut Counts) -> Self {
        Self { tun: tun.as_fd(), sockets, handshakes: handshakes.as_fd(), counts }
    }
}

impl Sink for Wire<'_> {
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool {
        let result = self.sockets.send(endpoint, datagram);
        if let Err(errno) = result {
            // No route, no permission or no room: all of them may be temporary.
            tracing::trace!(%endpoint, %errno, "cannot send a datagram");
            self.counts.unsent += 1;
        }
        result.is_ok()
    }

    fn deliver(&mut self, packet: &[u8]) {
        if let Err(errno) = rustix::io::write(self.tun, packet) {
            // A TUN that is down returns EIO. If the TUN is gone, the next read fails.
            tracing::trace!(%errno, "cannot deliver a packet");
            self.counts.refused += 1;
        }
    }

    fn handshake_completed(&mut self) {
        notify(self.handshakes);
    }

    fn handshake_unanswered(&mut self) {
        // The owner treats both events alike.
        notify(self.handshakes);
    }
}

fn broken(what: &str, errno: Errno) -> io::Error {
    io::Error::new(errno.kind(), format!("{what}: {errno}"))
}

/// Makes an eventfd readable.
pub(super) fn notify(eventfd: BorrowedFd<'_>) {
    // The only error is a full counter, which is readable already.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable.
fn clear(eventfd: &OwnedFd) -> io::Result<()> {
    match rustix::io::read(eventfd, &mut [0; 8]) {
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}
