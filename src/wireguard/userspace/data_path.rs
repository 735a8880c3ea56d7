//! The data-path thread: waits for the TUN, the sockets and commands, and moves what they have through the [`Core`].
//!
//! Reads are drained in batches, so that a wake-up is shared by many packets, and in turns, so that neither direction starves
//! the other. Later offloads (packets of several segments on the TUN, several datagrams a system call on the sockets) change
//! this file and [`Wire`], not what is behind [`Sink`].

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

/// How many packets are taken from one descriptor before the next has its turn.
const BATCH: usize = 64;

/// How many errors in a row a socket may report without a datagram or a pause between. Errors of single datagrams (ICMP) are
/// ordinary; a socket that does nothing else is broken, and would keep the thread spinning.
const SOCKET_ERRORS: usize = 1_000;

/// How many sockets there are at most: one for each family.
const MAX_SOCKETS: usize = 2;

// What an event is about: sockets have their number.
const TUN: u64 = u64::MAX;
const COMMANDS: u64 = u64::MAX - 1;

/// What the device's owner asks of the data path.
pub(super) enum Command {
    SetEndpoint(PublicKey, SocketAddr),
    InitiateHandshake(PublicKey),
    Reconfigure(Box<DeviceConfig>, mpsc::Sender<io::Result<()>>),
    Rebind(Sockets, mpsc::Sender<io::Result<()>>),
    Status(mpsc::Sender<(Vec<PeerStatus>, Dropped)>),
    Stop,
}

/// All that the data-path thread owns.
pub(super) struct DataPath {
    pub(super) core: Core,
    pub(super) tun: OwnedFd,
    pub(super) sockets: Sockets,
    pub(super) commands: mpsc::Receiver<Command>,
    /// An eventfd, readable while there may be commands.
    pub(super) wake: Arc<OwnedFd>,
    /// An eventfd, readable after a handshake was completed, or is not answered.
    pub(super) handshakes: Arc<OwnedFd>,
}

impl DataPath {
    /// Moves packets until told to stop, which is `Ok`, or until the TUN is gone.
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
                                // Sockets go here, as what is sent by them does below.
                                Command::Rebind(new, reply) => {
                                    let watched = watch(&epoll, &new);
                                    if watched.is_ok() {
                                        // Closing them takes the former ones away.
                                        *sockets = new;
                                    }
                                    let _ = reply.send(watched);
                                }
                                Command::Stop => return Ok(()),
                                other => obey(other, core, now, &mut Wire::new(tun, sockets, handshakes, &mut counts)),
                            }
                        }
                    }
                    number => {
                        let number = number as usize;
                        // Those that were closed meanwhile are gone.
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

/// Has the sockets waited for.
fn watch(epoll: &OwnedFd, sockets: &Sockets) -> io::Result<()> {
    for (number, socket) in sockets.descriptors().enumerate() {
        epoll::add(epoll, socket, epoll::EventData::new_u64(number as u64), epoll::EventFlags::IN)?;
    }
    Ok(())
}

/// Does what the device's owner asks of its peers. Who asked may have stopped waiting for the answer.
fn obey(command: Command, core: &mut Core, now: Duration, wire: &mut Wire<'_>) {
    match command {
        Command::SetEndpoint(peer, endpoint) => {
            if let Some(peer) = core.index_of(&peer) {
                core.set_endpoint(peer, endpoint, now, wire);
            }
        }
        Command::InitiateHandshake(peer) => {
            if let Some(peer) = core.index_of(&peer) {
                core.initiate_handshake(peer, now, wire);
            }
        }
        Command::Reconfigure(config, reply) => {
            let changed = core.reconfigure(&config, now).map(|new| {
                for peer in new {
                    core.start_peer(peer, now, wire);
                }
            });
            let _ = reply.send(changed);
        }
        Command::Status(reply) => {
            let dropped =
                Dropped { not_sent: wire.counts.unsent, not_delivered: wire.counts.refused, ..core.dropped() };
            let _ = reply.send((core.status(now), dropped));
        }
        Command::Rebind(..) | Command::Stop => {}
    }
}

/// Takes packets from the TUN until it has none or others should have their turn. Any error but "none" means that the TUN is
/// gone: tun.c answers `EBADFD` once the device is detached and `EIO` once it is unregistered.
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

/// Takes datagrams from a socket until it has none or others should have their turn.
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
                core.on_datagram(&buffer[..length], from, now, wire);
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

/// What was dropped on the way out.
#[derive(Default)]
struct Counts {
    unsent: u64,
    refused: u64,
}

/// The real TUN and the real sockets. Neither is ever waited for: a packet for which there is no room now is dropped, as a
/// network does.
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
            // No route, no permission, no room: all may pass, and none is a reason to stop.
            tracing::trace!(%endpoint, %errno, "a datagram was not sent");
            self.counts.unsent += 1;
        }
        result.is_ok()
    }

    fn deliver(&mut self, packet: &[u8]) {
        if let Err(errno) = rustix::io::write(self.tun, packet) {
            // A TUN that is down answers EIO; one that is gone is noticed by the next read.
            tracing::trace!(%errno, "a packet was not delivered");
            self.counts.refused += 1;
        }
    }

    fn handshake_completed(&mut self) {
        notify(self.handshakes);
    }

    fn handshake_unanswered(&mut self) {
        // The owner looks at both in the same way.
        notify(self.handshakes);
    }
}

fn broken(what: &str, errno: Errno) -> io::Error {
    io::Error::new(errno.kind(), format!("{what}: {errno}"))
}

/// Makes an eventfd readable.
pub(super) fn notify(eventfd: BorrowedFd<'_>) {
    // The only error is a full counter, and that is readable already.
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
