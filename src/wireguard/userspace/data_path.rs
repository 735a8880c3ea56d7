//! The thread of the data path: waits for packets, datagrams and commands, and passes them to the [`Core`].
//!
//! Packets are moved in batches, so that many share a wake-up and a system call, and in turns, so that neither
//! direction starves the other.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::clock;
use super::device::{Core, Dropped, Sink};
use super::inward::Inward;
use super::levels::Levels;
use super::outward::Outward;
use super::sockets::Sockets;
use super::tun_io::TunIo;
use crate::keys::PublicKey;
use crate::wireguard::{DeviceConfig, PeerStatus};

/// The maximum number of packets of one descriptor before the next has its turn.
pub(super) const BATCH: usize = 64;

/// The maximum number of consecutive errors of a descriptor without a packet or a pause. Errors of single datagrams
/// (ICMP) are common, but a socket that only reports errors is broken, and would keep the thread busy.
pub(super) const MAX_ERRORS: usize = 1_000;

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
    pub(super) tun: TunIo,
    pub(super) sockets: Sockets,
    pub(super) levels: Levels,
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
        let Self { core, tun, sockets, levels, commands, wake, handshakes } = self;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let readable = epoll::EventFlags::IN;
        epoll::add(&epoll, &*tun, epoll::EventData::new_u64(TUN), readable)?;
        epoll::add(&epoll, &**wake, epoll::EventData::new_u64(COMMANDS), readable)?;
        watch(&epoll, sockets)?;

        let (mut outward, mut inward) = (Outward::new(*levels), Inward::new(tun.offloads(), *levels));
        let mut errors = [0; MAX_SOCKETS];
        let mut unsent = 0;
        let mut events = [epoll::Event { flags: readable, data: epoll::EventData::new_u64(0) }; 4];
        core.start(clock::now(), &mut Wire::new(sockets, handshakes, &mut unsent));
        loop {
            let timeout = core.next_tick().map(|at| at.saturating_sub(clock::now()));
            let ready = match epoll::wait(&epoll, &mut events, timeout.map(timespec).as_ref()) {
                Ok(ready) => ready,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let now = clock::now();
            for event in &events[..ready] {
                let mut wire = Wire::new(sockets, handshakes, &mut unsent);
                match event.data.u64() {
                    TUN => outward.drain(core, tun, now, &mut wire)?,
                    COMMANDS => {
                        clear(wake)?;
                        while let Ok(command) = commands.try_recv() {
                            match command {
                                // The loop itself replaces the sockets, which `wire` borrows elsewhere.
                                DataPathCommand::Rebind(new, reply) => {
                                    let watched = watch(&epoll, &new);
                                    if watched.is_ok() {
                                        // Closing the former ones would not do: the new ones can be duplicates.
                                        for former in sockets.descriptors() {
                                            epoll::delete(&epoll, former)?;
                                        }
                                        *sockets = new;
                                    }
                                    let _ = reply.send(watched);
                                }
                                DataPathCommand::Stop => return Ok(()),
                                other => {
                                    execute(other, core, tun, now, &mut Wire::new(sockets, handshakes, &mut unsent))
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
                        inward.drain(core, tun, socket, now, &mut wire, errors)?;
                    }
                }
            }
            core.tick(now, &mut Wire::new(sockets, handshakes, &mut unsent));
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
fn execute(command: DataPathCommand, core: &mut Core, tun: &TunIo, now: Duration, wire: &mut Wire<'_>) {
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
            let dropped = Dropped { not_sent: *wire.unsent, not_delivered: tun.refused(), ..core.dropped() };
            let _ = reply.send((core.status(now), dropped));
        }
        DataPathCommand::Rebind(..) | DataPathCommand::Stop => {}
    }
}

/// The real sockets. Writing to them never waits: a packet without room is dropped, as in a network.
pub(super) struct Wire<'a> {
    pub(super) sockets: &'a Sockets,
    handshakes: BorrowedFd<'a>,
    /// The number of datagrams that were not sent.
    pub(super) unsent: &'a mut u64,
}

impl<'a> Wire<'a> {
    fn new(sockets: &'a Sockets, handshakes: &'a OwnedFd, unsent: &'a mut u64) -> Self {
        Self { sockets, handshakes: handshakes.as_fd(), unsent }
    }
}

impl Sink for Wire<'_> {
    fn send(&mut self, endpoint: SocketAddr, datagram: &[u8]) -> bool {
        let result = self.sockets.send(endpoint, datagram);
        if let Err(errno) = result {
            // No route, no permission or no room: all of them may be temporary.
            tracing::trace!(%endpoint, %errno, "cannot send a datagram");
            *self.unsent += 1;
        }
        result.is_ok()
    }

    fn handshake_completed(&mut self) {
        notify(self.handshakes);
    }

    fn handshake_unanswered(&mut self) {
        // The owner treats both events alike.
        notify(self.handshakes);
    }
}

pub(super) fn broken(what: &str, errno: Errno) -> io::Error {
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
