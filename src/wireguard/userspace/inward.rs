//! The way in: from the sockets to the TUN. Packets are opened in the place where they were received, and joined there.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::io::Errno;

use super::data_path::{BATCH, MAX_ERRORS, Wire, broken};
use super::device::Core;
use super::ip;
use super::levels::Levels;
use super::offload::Coalescer;
use super::tun_io::TunIo;
use crate::linux::datagrams::Inbox;
use crate::linux::tun::Offloads;

/// The number of messages that are received together. Each has up to 64 KiB, which stay in memory once they were used.
const MESSAGES: usize = 8;

/// The buffers of the way in.
pub(super) struct Inward {
    inbox: Inbox,
    coalescer: Coalescer,
}

impl Inward {
    pub(super) fn new(offloads: Offloads, levels: Levels) -> Self {
        Self { inbox: Inbox::new(MESSAGES, levels.receive_many), coalescer: Coalescer::new(offloads.tcp, offloads.udp) }
    }

    /// Reads datagrams from a socket until it has none or the batch is full, and delivers their packets.
    ///
    /// # Errors
    /// Fails after [`MAX_ERRORS`] consecutive errors of the socket.
    pub(super) fn drain(
        &mut self,
        core: &mut Core,
        tun: &mut TunIo,
        socket: BorrowedFd<'_>,
        now: Duration,
        wire: &mut Wire<'_>,
        errors: &mut usize,
    ) -> io::Result<()> {
        let mut taken = 0;
        while taken < BATCH {
            match self.inbox.receive(socket) {
                Ok(count) => {
                    *errors = 0;
                    // A message may have no datagram, and costs time all the same.
                    taken += self.deliver(count, core, tun, now, wire).max(count);
                    if count < self.inbox.most() {
                        // That was all; epoll reports what has come since.
                        break;
                    }
                }
                Err(Errno::AGAIN) => {
                    *errors = 0;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::debug!(%errno, "a socket reported an error");
                    *errors += 1;
                    if *errors > MAX_ERRORS {
                        return Err(broken("a socket is broken", errno));
                    }
                }
            }
        }
        Ok(())
    }

    /// Processes received messages, and returns the number of their datagrams.
    fn deliver(&mut self, count: usize, core: &mut Core, tun: &mut TunIo, now: Duration, wire: &mut Wire<'_>) -> usize {
        let mut datagrams = 0;
        for message in 0..count {
            let Some(message) = self.inbox.message(message).cloned() else { continue };
            for range in message.datagrams() {
                datagrams += 1;
                let datagram = &mut self.inbox.buffer()[range.clone()];
                if let Some(packet) = core.on_datagram(datagram, message.from, now, wire) {
                    let packet = range.start + packet.start..range.start + packet.end;
                    let bytes = &mut self.inbox.buffer()[packet.clone()];
                    if !ip::combine_congestion(bytes, message.ecn.bits()) {
                        core.drop_congested();
                        continue;
                    }
                    self.coalescer.push(self.inbox.buffer(), packet, tun);
                }
            }
        }
        self.coalescer.flush(self.inbox.buffer(), tun);
        let Offloads { tcp, udp } = tun.offloads();
        self.coalescer.limit(tcp, udp);
        datagrams
    }
}
