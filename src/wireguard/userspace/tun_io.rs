//! Reads packets of a TUN and writes them, with the header that a TUN with offloads has before each (`IFF_VNET_HDR`).

use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::levels::Levels;
use super::offload::{HEADER, Header, PieceWriter, Segments};
use crate::linux::tun::{self, Offloads};

/// A TUN, or another descriptor that reads and writes whole packets.
pub(super) struct TunIo {
    descriptor: OwnedFd,
    has_header: bool,
    /// The large packets that the kernel takes. It can refuse them at any time.
    offloads: Offloads,
    /// The number of packets that were refused, because the TUN is down or has no room.
    refused: u64,
}

impl TunIo {
    /// Takes a descriptor of [`tun::create`] or [`tun::attach`], and sets its offloads. Others have no header.
    pub(super) fn new(descriptor: OwnedFd, levels: Levels) -> Self {
        match tun::set_offloads(&descriptor, Offloads { tcp: levels.tun_tcp, udp: levels.tun_udp }) {
            Some(offloads) => Self::with_header(descriptor, offloads, levels),
            None => Self { descriptor, has_header: false, offloads: Offloads::default(), refused: 0 },
        }
    }

    /// Takes a descriptor whose packets have the header.
    pub(super) fn with_header(descriptor: OwnedFd, given: Offloads, levels: Levels) -> Self {
        let offloads = if levels.coalesce { given } else { Offloads::default() };
        Self { descriptor, has_header: true, offloads, refused: 0 }
    }

    /// Returns the large packets that may be written now.
    pub(super) fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Returns the number of packets that were refused.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Reads a packet, and returns what is known of it and where it is in the buffer. An empty range is no packet.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<(Header, Range<usize>), Errno> {
        let length = rustix::io::read(&self.descriptor, &mut *buffer)?;
        if !self.has_header {
            return Ok((Header::default(), 0..length));
        }
        match buffer[..length].first_chunk() {
            Some(header) => Ok((Header::parse(header), HEADER..length)),
            None => Ok((Header::default(), 0..0)),
        }
    }

    /// Writes a large packet that the kernel has refused as its segments, and makes no more of its kind.
    fn write_apart(&mut self, pieces: &[IoSlice<'_>]) -> bool {
        let whole: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        let Some((header, packet)) = whole.split_first_chunk() else { return false };
        let header = Header::parse(header);
        let Some(Some(segments)) = Segments::of(&header, packet) else { return false };
        match segments.is_tcp() {
            true => self.offloads.tcp = false,
            false => self.offloads.udp = false,
        }
        let mut segment = vec![0; HEADER + segments.longest()];
        for number in 0..segments.count() {
            let end = HEADER + segments.length(number);
            segments.write(packet, number, &mut segment[HEADER..end]);
            if write_pieces(&self.descriptor, &[IoSlice::new(&segment[..end])]).is_err() {
                self.refused += 1;
            }
        }
        true
    }
}

fn write_pieces(descriptor: &OwnedFd, pieces: &[IoSlice<'_>]) -> Result<usize, Errno> {
    #[cfg(test)]
    {
        use crate::linux::datagrams::forced::{self, Call};
        // A large packet has its header, its headers and several contents.
        forced::check(if pieces.len() > 3 { Call::WriteLarge } else { Call::WriteSmall })?;
    }
    rustix::io::writev(descriptor, pieces)
}

impl PieceWriter for TunIo {
    fn write(&mut self, pieces: &[IoSlice<'_>]) {
        // Before the contents of a large packet are two headers.
        let packets = pieces.len().saturating_sub(2).max(1) as u64;
        let pieces = if self.has_header { pieces } else { &pieces[1..] };
        let Err(errno) = write_pieces(&self.descriptor, pieces) else { return };
        // A TUN that is down returns EIO. If the TUN is gone, the next read fails.
        tracing::trace!(%errno, "cannot deliver a packet");
        if errno != Errno::INVAL || !self.has_header || !self.write_apart(pieces) {
            self.refused += packets;
        }
    }
}

impl AsFd for TunIo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
