//! WireGuard without the kernel's module: the protocol's state machine and cryptography are `boringtun`'s, the device around
//! them is ours. It needs an open TUN and nothing else: no capability, no configuration interface, no other file.
//!
//! - `device`: finds the peer that a packet or a datagram belongs to. Does no input or output itself.
//! - `peer`: one peer: `boringtun`'s `Tunn`, and when to do what with it.
//! - `allowed_ips`: longest-prefix routing in both directions.
//! - `sockets`: the UDP sockets, born in the host's network namespace.
//! - `data_path`: the one thread that moves packets.
//!
//! # Threads
//!
//! [`UserspaceDevice::start`] starts a thread, so it belongs into a process that will not fork afterwards, and that has
//! done whatever must be done by a process without threads (such as entering a user namespace). All signals are blocked in
//! the thread, so they reach the others.
//!
//! # What it does not do
//!
//! A packet that belongs to no peer is dropped and counted; the kernel's WireGuard also answers with an ICMP error, which a
//! program would see as "no route to host" and here sees as a timeout. The bits for congestion (ECN) are not carried over
//! between inner and outer header, and answers leave by whatever local address the host's routes choose.
//!
//! # Keys in memory
//!
//! Our copies of the private key, `x25519-dalek`'s static, ephemeral and shared secrets are wiped when dropped, and the
//! memory of each `Tunn`, with the preshared key and `ring`'s session keys in it, is overwritten when the device ends. What
//! nobody wipes: the arrays on the stack from which `boringtun` derives session keys, the copies that moving a value leaves
//! behind, and the keys of a session that is replaced or expires while the device lives on, whose bytes stay in the `Tunn`
//! until a later session overwrites them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{EventfdFlags, eventfd};

use self::data_path::{Command, DataPath};
use self::device::Core;
use super::{Backend, Device, DeviceConfig, PeerStatus};
use crate::keys::PublicKey;
use crate::linux::tun;

mod allowed_ips;
mod clock;
mod data_path;
mod device;
mod peer;
mod sockets;
mod wiped;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;

pub use self::device::Dropped;
pub use self::sockets::Sockets;

/// The data-path thread's name, which `ps -L` and `top -H` show.
const THREAD_NAME: &str = "wireguard";

/// A WireGuard device in this process. Dropping it stops its thread and closes the TUN and the sockets.
pub struct UserspaceDevice {
    peers: Vec<PublicKey>,
    /// The same TUN as the thread's.
    tun: OwnedFd,
    port: u16,
    /// The same sockets as the thread's.
    bound: Sockets,
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    handshakes: Arc<OwnedFd>,
    ended: Arc<Ended>,
    thread: Option<JoinHandle<()>>,
}

impl UserspaceDevice {
    /// Starts moving packets between `tun`, a descriptor of `IFF_TUN | IFF_NO_PI` or anything that reads and writes whole IP
    /// packets, and `sockets`. The device takes over both; that the interface is down still does not matter.
    ///
    /// `on_thread_start` runs first in the new thread: the place to drop the capabilities that the thread inherits and does
    /// not need. If it fails, so does this, and no packet has been moved. See the module for what to mind about forks.
    ///
    /// `config.listen_port` and `config.fwmark` are the affair of [`Sockets::bind`], and not looked at here.
    pub fn start(
        config: &DeviceConfig,
        tun: OwnedFd,
        sockets: Sockets,
        on_thread_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let core = Core::new(config, clock::now())?;
        rustix::io::ioctl_fionbio(&tun, true)?;
        let (commands, receiver) = mpsc::channel();
        let wake = Arc::new(new_eventfd()?);
        let handshakes = Arc::new(new_eventfd()?);
        let ended = Arc::new(Ended { signal: new_eventfd()?, cause: OnceLock::new() });
        let (port, bound) = (sockets.port(), sockets.try_clone()?);
        let same_tun = tun.try_clone()?;
        let mut data_path = DataPath {
            core,
            tun,
            sockets,
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

    /// The UDP port of the encrypted packets.
    pub fn listen_port(&self) -> u16 {
        self.port
    }

    /// An eventfd that becomes readable whenever a handshake has been completed, with any peer, and whenever one that was begun is
    /// not answered in its time. Reading it does not block.
    pub fn handshakes(&self) -> BorrowedFd<'_> {
        self.handshakes.as_fd()
    }

    /// An eventfd that becomes, and stays, readable when the data path has ended by itself: the TUN is gone. From then on
    /// every call returns why.
    pub fn failed(&self) -> BorrowedFd<'_> {
        self.ended.signal.as_fd()
    }

    /// How many packets were dropped so far, and why.
    pub fn dropped(&self) -> io::Result<Dropped> {
        self.ask().map(|(_, dropped)| dropped)
    }

    fn ask(&self) -> io::Result<(Vec<PeerStatus>, Dropped)> {
        let (reply, answer) = mpsc::channel();
        self.command(Command::Status(reply))?;
        answer.recv().map_err(|_| self.ended.error())
    }

    fn command(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(|_| self.ended.error())?;
        data_path::notify(self.wake.as_fd());
        Ok(())
    }

    /// Has the thread do something, and waits for how that went.
    fn have_done(&self, command: impl FnOnce(mpsc::Sender<io::Result<()>>) -> Command) -> io::Result<()> {
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
        self.command(Command::SetEndpoint(self.known(peer)?, endpoint))
    }

    fn initiate_handshake(&self, peer: &PublicKey) -> io::Result<()> {
        self.command(Command::InitiateHandshake(self.known(peer)?))
    }

    fn peers(&self) -> io::Result<Vec<PeerStatus>> {
        let (mut statuses, _) = self.ask()?;
        let place = |status: &PeerStatus| self.peers.iter().position(|key| *key == status.public_key);
        statuses.sort_by_key(place);
        Ok(statuses)
    }

    fn reconfigure(&mut self, config: &DeviceConfig) -> io::Result<()> {
        let changed = Box::new(config.clone());
        self.have_done(|reply| Command::Reconfigure(changed, reply))?;
        self.peers = config.peers.iter().map(|peer| peer.public_key).collect();
        Ok(())
    }

    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> io::Result<()> {
        // The port in use cannot be bound a second time, and need not be.
        let sockets = if listen_port == self.port || listen_port == 0 {
            self.bound.try_clone()?
        } else {
            Sockets::bind(listen_port, fwmark)?
        };
        sockets.set_mark(fwmark)?;
        let (bound, port) = (sockets.try_clone()?, sockets.port());
        self.have_done(|reply| Command::Rebind(sockets, reply))?;
        (self.bound, self.port) = (bound, port);
        Ok(())
    }

    fn take_interface_along(&self) -> io::Result<bool> {
        tun::set_persistent(&self.tun, false).map(|()| true)
    }
}

impl Drop for UserspaceDevice {
    fn drop(&mut self) {
        // An error means that the thread has ended already.
        let _ = self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported when it happened, and `failed` says so.
            let _ = thread.join();
        }
    }
}

/// How the data path says that it is no more.
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

/// Says so even if the thread panics.
struct EndGuard(Option<Arc<Ended>>);

impl EndGuard {
    fn expected(mut self) {
        self.0 = None;
    }

    fn failed(self, error: &io::Error) {
        if let Some(ended) = &self.0 {
            // Set by this thread alone, and once.
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

/// Runs `action` with all signals blocked in the calling thread: a thread that it starts inherits that.
fn without_signals<T>(action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let result = action();
    before.thread_set_mask()?;
    result
}
