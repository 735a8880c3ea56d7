//! WireGuard in user space: the protocol and its cryptography are `boringtun`'s, the device around them is ours.
//!
//! It only needs an open TUN: no capability, no configuration interface, no other file.
//!
//! - `device`: finds the peer that a packet or datagram belongs to; without any input or output.
//! - `peer`: a peer: `boringtun`'s `Tunn`, and the timers around it.
//! - `allowed_ips`: longest-prefix routing in both directions.
//! - `sockets`: the UDP sockets, created in the host's network namespace.
//! - `data_path`: the thread that moves packets.
//!
//! # Threads
//!
//! [`UserspaceDevice::start`] starts a thread. So it must be called in a process that will not fork afterwards, and
//! that has already done what needs a process without threads, such as entering a user namespace. The thread blocks all
//! signals, so other threads receive them.
//!
//! # Differences from the kernel
//!
//! A packet that belongs to no peer is dropped and counted. The kernel's WireGuard also replies with an ICMP error,
//! which a program sees as "no route to host"; here it sees a timeout. Congestion bits (ECN) are not copied between
//! inner and outer header, and replies leave by the local address that the host's routes choose.
//!
//! # Keys in memory
//!
//! Our copies of the private key and `x25519-dalek`'s static, ephemeral and shared secrets are wiped when dropped. The
//! memory of each `Tunn`, which contains the preshared key and `ring`'s session keys, is overwritten when the device
//! ends. Not wiped are the arrays on the stack from which `boringtun` derives session keys, copies that remain when a
//! value is moved, and the keys of a session that is replaced or expires while the device runs: these stay in the
//! `Tunn` until a later session overwrites them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{EventfdFlags, eventfd};

use self::data_path::{DataPath, DeviceCommand};
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

/// The name of the data-path thread, which `ps -L` and `top -H` show.
const THREAD_NAME: &str = "wireguard";

/// A WireGuard device in this process. Dropping it stops its thread and closes the TUN and the sockets.
pub struct UserspaceDevice {
    peers: Vec<PublicKey>,
    /// Another handle to the thread's TUN.
    tun: OwnedFd,
    port: u16,
    /// Another handle to the thread's sockets.
    sockets: Sockets,
    commands: mpsc::Sender<DeviceCommand>,
    wake: Arc<OwnedFd>,
    handshakes: Arc<OwnedFd>,
    ended: Arc<DataPathEnd>,
    thread: Option<JoinHandle<()>>,
}

impl UserspaceDevice {
    /// Starts a device that moves packets between `tun` and `sockets`. `tun` is a descriptor of an `IFF_TUN |
    /// IFF_NO_PI` interface, which may be down still, or any other that reads and writes whole IP packets.
    ///
    /// The new thread first calls `on_thread_start`, which can drop inherited capabilities. See the module about forks.
    /// `config.listen_port` and `config.fwmark` are ignored: [`Sockets::bind`] has used them.
    ///
    /// # Errors
    ///
    /// Returns an error if the configuration is not valid, if the thread cannot be started, or if `on_thread_start`
    /// fails. No packet has been moved then.
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
        let ended = Arc::new(DataPathEnd { signal: new_eventfd()?, cause: OnceLock::new() });
        let (port, own_sockets, own_tun) = (sockets.port(), sockets.try_clone()?, tun.try_clone()?);
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
            let is_ready = ready.is_ok();
            if started.send(ready).is_err() || !is_ready {
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
            tun: own_tun,
            port,
            sockets: own_sockets,
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

    /// Returns an eventfd that becomes readable when a handshake with any peer is completed, or is not answered in
    /// time. Reading it does not block.
    pub fn handshakes(&self) -> BorrowedFd<'_> {
        self.handshakes.as_fd()
    }

    /// Returns an eventfd that becomes and stays readable when the data path has failed, for example because the TUN is
    /// gone. After that, every call returns the reason.
    pub fn failed(&self) -> BorrowedFd<'_> {
        self.ended.signal.as_fd()
    }

    /// Returns how many packets were dropped so far, by reason.
    ///
    /// # Errors
    ///
    /// Returns an error if the data path has ended.
    pub fn dropped(&self) -> io::Result<Dropped> {
        self.query().map(|(_, dropped)| dropped)
    }

    fn query(&self) -> io::Result<(Vec<PeerStatus>, Dropped)> {
        let (reply, answer) = mpsc::channel();
        self.command(DeviceCommand::Status(reply))?;
        answer.recv().map_err(|_| self.ended.error())
    }

    fn command(&self, command: DeviceCommand) -> io::Result<()> {
        self.commands.send(command).map_err(|_| self.ended.error())?;
        data_path::notify(self.wake.as_fd());
        Ok(())
    }

    /// Sends a command to the thread, and waits for its result.
    fn execute(&self, command: impl FnOnce(mpsc::Sender<io::Result<()>>) -> DeviceCommand) -> io::Result<()> {
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
        self.command(DeviceCommand::SetEndpoint(self.known(peer)?, endpoint))
    }

    fn initiate_handshake(&self, peer: &PublicKey) -> io::Result<()> {
        self.command(DeviceCommand::InitiateHandshake(self.known(peer)?))
    }

    fn peers(&self) -> io::Result<Vec<PeerStatus>> {
        let (mut statuses, _) = self.query()?;
        let place = |status: &PeerStatus| self.peers.iter().position(|key| *key == status.public_key);
        statuses.sort_by_key(place);
        Ok(statuses)
    }

    fn reconfigure(&mut self, config: &DeviceConfig) -> io::Result<()> {
        let changed = Box::new(config.clone());
        self.execute(|reply| DeviceCommand::Reconfigure(changed, reply))?;
        self.peers = config.peers.iter().map(|peer| peer.public_key).collect();
        Ok(())
    }

    fn rebind(&mut self, listen_port: u16, fwmark: u32) -> io::Result<()> {
        // The current port cannot be bound a second time, and need not be.
        let sockets = if listen_port == self.port || listen_port == 0 {
            self.sockets.try_clone()?
        } else {
            Sockets::bind(listen_port, fwmark)?
        };
        sockets.set_mark(fwmark)?;
        let (own, port) = (sockets.try_clone()?, sockets.port());
        self.execute(|reply| DeviceCommand::Rebind(sockets, reply))?;
        (self.sockets, self.port) = (own, port);
        Ok(())
    }

    fn take_interface_along(&self) -> io::Result<bool> {
        tun::set_persistent(&self.tun, false).map(|()| true)
    }
}

impl Drop for UserspaceDevice {
    fn drop(&mut self) {
        // An error means that the thread has ended already.
        let _ = self.command(DeviceCommand::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened, and by `failed`.
            let _ = thread.join();
        }
    }
}

/// Why the data path has ended, and the eventfd that announces it.
struct DataPathEnd {
    signal: OwnedFd,
    cause: OnceLock<String>,
}

impl DataPathEnd {
    fn error(&self) -> io::Error {
        let cause = self.cause.get().map_or("it panicked", String::as_str);
        io::Error::new(io::ErrorKind::BrokenPipe, format!("WireGuard's data path has ended: {cause}"))
    }
}

/// Announces the end of the data path even if its thread panics.
struct EndGuard(Option<Arc<DataPathEnd>>);

impl EndGuard {
    /// The end was requested, and is not announced.
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

/// Runs `action` with all signals blocked in the calling thread, which a thread that it starts inherits.
fn without_signals<T>(action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let result = action();
    before.thread_set_mask()?;
    result
}
