//! The data-path thread: waits for packets from the TUN, datagrams from the sockets and commands, and passes them to
//! the [`Core`].
//!
//! It reads in batches, so that many packets share a wake-up, and in turns, so that neither direction starves the
//! other. Offloads (packets of several segments on the TUN, several datagrams per system call on the sockets) would
//! only change this file.

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

/// How many packets are read from one descriptor before the next gets its turn.
const BATCH: usize = 64;

/// How many errors in a row a socket may report. Errors about single datagrams (ICMP) are ordinary; a socket that
/// reports nothing else is broken, and would keep the thread spinning.
const MAX_SOCKET_ERRORS: usize = 1_000;

/// The largest number of sockets: one for each family.
const MAX_SOCKETS: usize = 2;

// The tokens of events. Sockets have their number as token.
const TUN: u64 = u64::MAX;
const COMMANDS: u64 = u64::MAX - 1;

/// A command from the device's owner to the data-path thread.
pub(super) enum DeviceCommand {
    SetEndpoint(PublicKey, SocketAddr),
    InitiateHandshake(PublicKey),
    Reconfigure(Box<DeviceConfig>, mpsc::Sender<io::Result<()>>),
    Rebind(Sockets, mpsc::Sender<io::Result<()>>),
    Status(mpsc::Sender<(Vec<PeerStatus>, Dropped)>),
    Stop,
}

/// The state of the data-path thread.
pub(super) struct DataPath {
    pub(super) core: Core,
    pub(super) tun: OwnedFd,
    pub(super) sockets: Sockets,
    pub(super) commands: mpsc::Receiver<DeviceCommand>,
    /// An eventfd that is readable while there may be commands.
    pub(super) wake: Arc<OwnedFd>,
    /// An eventfd that becomes readable when a handshake is completed, or is not answered in time.
    pub(super) handshakes: Arc<OwnedFd>,
}

impl DataPath {
    /// Moves packets until a command stops it, or until the TUN is gone, which is an error.
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
                                // Handled here, as the other commands borrow the sockets.
                                DeviceCommand::Rebind(new, reply) => {
                                    let watched = watch(&epoll, &new);
                                    if watched.is_ok() {
                                        // epoll forgets the former sockets when they are closed.
                                        *sockets = new;
                                    }
                                    let _ = reply.send(watched);
                                }
                                DeviceCommand::Stop => return Ok(()),
                                other => {
                                    execute(other, core, now, &mut Wire::new(tun, sockets, handshakes, &mut counts))
                                }
                            }
                        }
                    }
                    number => {
                        let number = number as usize;
                        // The event may be that of a socket that was just replaced.
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

/// Adds the sockets to an epoll instance.
fn watch(epoll: &OwnedFd, sockets: &Sockets) -> io::Result<()> {
    for (number, socket) in sockets.descriptors().enumerate() {
        epoll::add(epoll, socket, epoll::EventData::new_u64(number as u64), epoll::EventFlags::IN)?;
    }
    Ok(())
}

/// Executes a command about peers. The owner may have stopped waiting for the reply.
fn execute(command: DeviceCommand, core: &mut Core, now: Duration, wire: &mut Wire<'_>) {
    match command {
        DeviceCommand::SetEndpoint(peer, endpoint) => {
            if let Some(peer) = core.index_of(&peer) {
                core.set_endpoint(peer, endpoint, now, wire);
            }
        }
        DeviceCommand::InitiateHandshake(peer) => {
            if let Some(peer) = core.index_of(&peer) {
                core.initiate_handshake(peer, now, wire);
            }
        }
        DeviceCommand::Reconfigure(config, reply) => {
            let changed = core.reconfigure(&config, now).map(|new| {
                for peer in new {
                    core.start_peer(peer, now, wire);
                }
            });
            let _ = reply.send(changed);
        }
        DeviceCommand::Status(reply) => {
            let dropped =
                Dropped { not_sent: wire.counts.not_sent, not_delivered: wire.counts.not_delivered, ..core.dropped() };
            let _ = reply.send((core.status(now), dropped));
        }
        DeviceCommand::Rebind(..) | DeviceCommand::Stop => {}
    }
}

/// Reads packets from the TUN until there are no more or the batch is full. Any error other than `EAGAIN` means that
/// the TUN is gone: tun.c returns `EBADFD` once the device is detached and `EIO` once it is unregistered.
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

/// Reads datagrams from a socket until there are no more or the batch is full.
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
                if *errors > MAX_SOCKET_ERRORS {
                    return Err(broken("a socket is broken", errno));
                }
            }
        }
    }
    Ok(())
}

/// The packets that the sockets or the TUN did not accept.
#[derive(Default)]
struct Counts {
    not_sent: u64,
    not_delivered: u64,
}

/// The TUN and the sockets. The thread never waits for either: as in a network, a packet is dropped if there is no
/// room.
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
            // No route, permission or room: all of these may be temporary.
            tracing::trace!(%endpoint, %errno, "a datagram was not sent");
            self.counts.not_sent += 1;
        }
        result.is_ok()
    }

    fn deliver(&mut self, packet: &[u8]) {
        if let Err(errno) = rustix::io::write(self.tun, packet) {
            // A TUN that is down returns EIO. One that is gone is noticed by the next read.
            tracing::trace!(%errno, "a packet was not delivered");
            self.counts.not_delivered += 1;
        }
    }

    fn handshake_completed(&mut self) {
        notify(self.handshakes);
    }

    fn handshake_unanswered(&mut self) {
        // The owner reads the status after either event.
        notify(self.handshakes);
    }
}

fn broken(what: &str, errno: Errno) -> io::Error {
    io::Error::new(errno.kind(), format!("{what}: {errno}"))
}

/// Makes an eventfd readable.
pub(super) fn notify(eventfd: BorrowedFd<'_>) {
    // The only error is that the counter is full. Then the eventfd is readable already.
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
