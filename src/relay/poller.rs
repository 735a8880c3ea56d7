//! Waiting for events on many descriptors (epoll(7)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

use super::ListenSocket;
use crate::config::Protocol;

/// How many events one call returns at most.
const EVENTS: usize = 256;

/// The token of the eventfd(2) that announces a command. All other tokens are given out by [`Poller`].
pub(super) const WAKEUP: u64 = 0;

/// An event on a descriptor.
pub(super) struct Event {
    /// The descriptor's token.
    pub(super) token: u64,
    /// Whether the socket has urgent data (tcp(7)).
    pub(super) is_urgent: bool,
}

/// An epoll instance, and the tokens that identify its descriptors.
pub(super) struct Poller {
    pub(super) epoll: OwnedFd,
    next: u64,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, next: WAKEUP + 1 })
    }

    /// Waits for events; forever if there is no timeout. Returns none if a signal interrupted the wait.
    pub(super) fn wait(&self, timeout: Option<&Timespec>) -> io::Result<Vec<Event>> {
        let mut buffer = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let event = |event: &epoll::Event| {
            let flags = event.flags;
            Event { token: event.data.u64(), is_urgent: flags.contains(epoll::EventFlags::PRI) }
        };
        match epoll::wait(&self.epoll, &mut buffer, timeout) {
            Ok((events, _)) => Ok(events.iter().map(event).collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Watches a socket that listens, and returns its token.
    pub(super) fn add_listen_socket(&mut self, socket: &ListenSocket) -> io::Result<u64> {
        let token = self.next_token();
        self.add_listen_socket_as(socket, token)?;
        Ok(token)
    }

    /// Watches a socket that listens, under a given token. A TCP socket is edge-triggered, as all waiting connections
    /// are accepted each time.
    pub(super) fn add_listen_socket_as(&self, socket: &ListenSocket, token: u64) -> io::Result<()> {
        let edge = match socket.port.protocol {
            Protocol::Tcp => epoll::EventFlags::ET,
            Protocol::Udp => epoll::EventFlags::empty(),
        };
        self.add_as(socket.socket.as_fd(), token, epoll::EventFlags::IN | edge)
    }

    /// Watches a descriptor for all events, edge-triggered, until it is closed. Returns its token.
    pub(super) fn add(&mut self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        let all = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::PRI;
        self.add_next(fd, epoll::EventFlags::ET | all)
    }

    /// Watches a descriptor for input, level-triggered, until it is closed. Returns its token.
    pub(super) fn add_reader(&mut self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        self.add_next(fd, epoll::EventFlags::IN)
    }

    /// Watches the eventfd(2) that announces commands.
    pub(super) fn add_wakeup(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.add_as(fd, WAKEUP, epoll::EventFlags::IN)
    }

    /// Stops watching a descriptor.
    pub(super) fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    fn add_next(&mut self, fd: BorrowedFd<'_>, flags: epoll::EventFlags) -> io::Result<u64> {
        let token = self.next_token();
        self.add_as(fd, token, flags)?;
        Ok(token)
    }

    fn next_token(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn add_as(&self, fd: BorrowedFd<'_>, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags | epoll::EventFlags::RDHUP)?)
    }
}
