//! WireGuard without the kernel's module. It only needs an open TUN: no capability, no configuration interface, no
//! other file.
//!
//! - `noise`: the protocol's messages, handshake and sessions, whose cryptography other crates do.
//! - `device`: finds the peer of a packet or a datagram. Does no input or output itself.
//! - `peer`: one peer: its handshakes and timers. `sessions`: its sessions.
//! - `allowed_ips`: longest-prefix routing in both directions. `ip`: the fields of packets that this needs.
//! - `sockets`: the UDP sockets, which stay in the host's network namespace.
//! - `data_path`: the thread that moves packets. `outward`, `inward`: the two ways. `tun_io`: the TUN.
//! - `offload`: packets of several segments. `levels`: the offloads, each of which can be missing.
//!
//! # Threads
//!
//! [`UserspaceDevice::start`] starts a thread. A process must fork, and enter user namespaces, before that. All signals
//! are blocked in the thread, so other threads receive them.
//!
//! # Differences from the kernel's WireGuard
//!
//! A packet for an address of no peer is dropped and counted. The kernel also answers it with an ICMP error, so that a
//! program sees "no route to host" instead of a timeout. The host's routes choose the local address of answers.
//!
//! # Keys in memory
//!
//! All private, preshared, ephemeral and session keys are wiped when they are no longer needed: `x25519-dalek` and
//! [`crate::keys`] do so themselves, the memory of `snow`'s handshakes and of `ring`'s keys is overwritten after them.
//! Not wiped are the arrays on the stack from which `snow` derives session keys, and the copies that moves leave
//! behind.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{EventfdFlags, eventfd};

use self::data_path::{DataPath, DataPathCommand};
use self::device::Core;
use self::tun_io::TunIo;
use super::{Backend, Device, DeviceConfig, PeerStatus};
use crate::keys::PublicKey;
use crate::linux::tun::{self, Offloads};

mod allowed_ips;
mod clock;
mod data_path;
mod device;
mod inward;
mod ip;
mod levels;
mod noise;
mod offload;
mod outward;
mod peer;
mod sessions;
mod sockets;
mod tun_io;
mod wiped;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;

pub use self::device::Dropped;
pub use self::levels::Levels;
pub use self::sockets::Sockets;

/// The name of the data path's thread, which `ps -L` and `top -H` show.
const THREAD_NAME: &str = "wireguard";

/// A WireGuard device in this process. Dropping it stops its thread, and closes the TUN and the sockets.
pub struct UserspaceDevice {
    peers: Vec<PublicKey>,
    /// The same TUN as the thread's.
    tun: OwnedFd,
    port: u16,
    /// The same sockets as the thread's, until it is stopped.
    bound: Option<Sockets>,
    commands: mpsc::Sender<DataPathCommand>,
    wake: Arc<OwnedFd>,
    handshakes: Arc<OwnedFd>,
    ended: Arc<Ended>,
    thread: Option<JoinHandle<()>>,
}

impl UserspaceDevice {
    /// Starts moving packets between `tun` and `sockets`. `tun` is a descriptor of [`tun::create`] or [`tun::attach`],
    /// or any other descriptor that reads and writes whole IP packets. The interface may still be down.
    ///
    /// `on_thread_start` runs first in the new thread, to drop capabilities that the thread does not need. The process
    /// must not fork afterwards. `config.listen_port` and `config.fwmark` are ignored: [`Sockets::bind`] has applied
    /// them.
    ///
    /// # Errors
    /// Fails if a peer is invalid, if the thread cannot be started, and as `on_thread_start` does.
    pub fn start(
        config: &DeviceConfig,
        tun: OwnedFd,
        sockets: Sockets,
        on_thread_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_with(Levels::ALL, config, tun, sockets, on_thread_start)
    }

    /// Starts a device as [`Self::start`] does, with some of the offloads only.
    ///
    /// # Errors
    /// Fails as [`Self::start`] does.
    pub fn start_with(
        levels: Levels,
        config: &DeviceConfig,
        tun: OwnedFd,
        sockets: Sockets,
        on_thread_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let same_tun = tun.try_clone()?;
        let tun = TunIo::new(tun, levels);
        Self::start_on((tun, same_tun), levels, config, sockets, on_thread_start)
    }

    /// Starts a device on a TUN, of which the second descriptor is for the device itself.
    fn start_on(
        (tun, same_tun): (TunIo, OwnedFd),
        levels: Levels,
        config: &DeviceConfig,
        sockets: Sockets,
        on_thread_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let core = Core::new(config, clock::now())?;
        rustix::io::ioctl_fionbio(&same_tun, true)?;
        if !levels.receive_joined {
            sockets.set_joined_receive(false)?;
        }
        let (commands, receiver) = mpsc::channel();
        let wake = Arc::new(new_eventfd()?);
        let handshakes = Arc::new(new_eventfd()?);
        let ended = Arc::new(Ended { signal: new_eventfd()?, cause: OnceLock::new() });
        let (port, bound) = (sockets.port(), Some(sockets.try_clone()?));
        let mut data_path = DataPath {
            core,
            tun,
            sockets,
            levels,
            commands: receiver,
            wake: Arc::clone(&wake),
            handshakes: Arc::clone(&handshakes),
        };

        let (started, has_started) = mpsc::sync_channel(1);
        let guard = EndGuard(Some(Arc::clone(&ended)));
        let body = move || {
            let ready = on_thread_start();
            let go_on = ready.is_ok();
            if started.send(ready).is_err() || !go_on {
                return guard.expected();
            }
            match data_path.run() {
                Ok(()) => guard.expected(),
                Err(error) => guard.failed(&error),
            }
        };
        let thread = without_signals(|| std::thread::Builder::new().name(THREAD_NAME.into()).spawn(body))?;
        let device = Self {
            peers: config.peers.iter().map(|peer| peer.public_key).collect(),
            tun: same_tun,
            port,
            bound,
            commands,
            wake,
            handshakes,
            ended,
            thread: Some(thread),
        };
        has_started.recv().map_err(|_| device.ended.error())??;
        Ok(device)
    }

    /// Returns the UDP port of the encrypted packets.
    pub fn listen_port(&self) -> u16 {
        self.port
    }

    /// Returns an eventfd that becomes readable when a handshake with any peer completes, and when a peer does not
    /// answer a handshake in time. Reading it does not block.
    pub fn handshakes(&self) -> BorrowedFd<'_> {
        self.handshakes.as_fd()
    }

    /// Returns an eventfd that becomes readable for good when the data path has ended by itself, because the TUN is
    /// gone. From then on, every call fails with the reason.
    pub fn failed(&self) -> BorrowedFd<'_> {
        self.ended.signal.as_fd()
    }

    /// Returns the number of packets that were dropped so far, by reason.
    ///
    /// # Errors
    /// Fails if the data path has ended.
    pub fn dropped(&self) -> io::Result<Dropped> {
        self.ask().map(|(_, dropped)| dropped)
    }

    fn ask(&self) -> io::Result<(Vec<PeerStatus>, Dropped)> {
        let (reply, answer) = mpsc::channel();
        self.command(DataPathCommand::Status(reply))?;
        answer.recv().map_err(|_| self.ended.error())
    }

    fn command(&self, command: DataPathCommand) -> io::Result<()> {
        self.commands.send(command).map_err(|_| self.ended.error())?;
        data_path::notify(self.wake.as_fd());
        Ok(())
    }

    /// Sends a command to the thread and waits for its result.
    fn command_and_wait(
        &self,
        command: impl FnOnce(mpsc::Sender<io::Result<()>>) -> DataPathCommand,
    ) -> io::Result<()> {
        let (reply, answer) = mpsc::channel();
        self.command(command(reply))?;
        answer.recv().map_err(|_| self.ended.error())?
    }

    fn known(&self, peer: &PublicKey) -> io::Result<PublicKey> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("the device has no peer {peer}"));
        self.peers.iter().find(|key| *key == peer).copied().ok_or_else(missing)
    }
}

impl Device for UserspaceDevice {
    fn backend(&self) -> Backend {
        Backend::Userspace
    }

    fn set_endpoint(&self, peer: &PublicKey, endpoint: SocketAddr) -> io::Result<()> {
        self.command(DataPathCommand::SetEndpoint(self.known(peer)?, endpoint))
    }

    fn initiate_handshake(&self, peer: &PublicKey) -> io::Result<()> {
        self.command(DataPathCommand::InitiateHandshake(self.known(peer)?))
    }

    fn peers(&self) -> io::Result<Vec<PeerStatus>> {
        let (mut statuses, _) = self.ask()?;
        let place = |status: &PeerStatus| self.peers.iter().position(|key| *key == status.public_key);
        statuses.sort_by_key(place);
        Ok(statuses)
    }

    fn reconfigure(&mut self, config: &DeviceConfig) -> io::Result<()> {
        let changed = Box::new(config.clone());
        self.command_and_wait(|reply| DataPathCommand::Reconfigure(changed, reply))?;
        self.peers = config.peers.iter().map(|peer| peer.public_key).collect();
        Ok(())
    }

    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> io::Result<()> {
        // The device's own port cannot be bound a second time.
        let sockets = if listen_port == self.port || listen_port == 0 {
            self.bound.as_ref().ok_or_else(|| self.ended.error())?.try_clone()?
        } else {
            Sockets::bind(listen_port, fwmark)?
        };
        sockets.set_mark(fwmark)?;
        let (bound, port) = (sockets.try_clone()?, sockets.port());
        self.command_and_wait(|reply| DataPathCommand::Rebind(sockets, reply))?;
        (self.bound, self.port) = (Some(bound), port);
        Ok(())
    }

    fn stop(&mut self) {
        // An error means that the thread has ended already.
        let _ = self.command(DataPathCommand::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened, and `failed` reports it.
            let _ = thread.join();
        }
        self.bound = None;
    }

    fn remove_interface_on_drop(&self) -> io::Result<bool> {
        tun::set_persistent(&self.tun, false).map(|()| true)
    }
}

impl Drop for UserspaceDevice {
    fn drop(&mut self) {
        self.stop();
        // An older vpn-exec, to which the TUN may be handed over, reads packets without a header.
        let _ = tun::set_offloads(&self.tun, Offloads::default());
    }
}

/// The end of the data path.
struct Ended {
    signal: OwnedFd,
    cause: OnceLock<String>,
}

impl Ended {
    fn error(&self) -> io::Error {
        let cause = self.cause.get().map_or("it panicked", String::as_str);
        io::Error::new(io::ErrorKind::BrokenPipe, format!("WireGuard's data path has ended: {cause}"))
    }
}

/// Signals the end of the data path, even if its thread panics.
struct EndGuard(Option<Arc<Ended>>);

impl EndGuard {
    fn expected(mut self) {
        self.0 = None;
    }

    fn failed(self, error: &io::Error) {
        if let Some(ended) = &self.0 {
            // Only this thread sets it, and only once.
            let _ = ended.cause.set(error.to_string());
        }
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if let Some(ended) = &self.0 {
            data_path::notify(ended.signal.as_fd());
        }
    }
}

fn new_eventfd() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Runs `action` with all signals blocked in the calling thread. Threads that it starts inherit the mask.
fn without_signals<T>(action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let result = action();
    before.thread_set_mask()?;
    result
}
