//! The way out: from the TUN to the sockets. Segments are cut while they are copied to the place where they are sealed
//! and sent, so that nothing is copied twice.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

use super::allowed_ips::PeerIndex;
use super::data_path::{BATCH, MAX_ERRORS, Wire, broken};
use super::device::{Core, MAX_PACKET, PACKET_BUFFER};
use super::ip;
use super::levels::Levels;
use super::noise::DATA_HEADER;
use super::offload::{HEADER, Header, Segments};
use super::tun_io::TunIo;
use crate::linux::datagrams::{Ecn, Outbox};

/// The bytes that are sent together: a large packet as messages, and then as many as the processor's cache holds.
const OUTBOX: usize = 192 << 10;

/// The buffers of the way out.
pub(super) struct Outward {
    packet: Box<[u8]>,
    segment: Box<[u8]>,
    outbox: Outbox,
    /// The peer of what is in the outbox.
    peer: Option<PeerIndex>,
    /// The consecutive errors of the TUN.
    errors: usize,
}

impl Outward {
    pub(super) fn new(levels: Levels) -> Self {
        Self {
            packet: vec![0; HEADER + PACKET_BUFFER].into_boxed_slice(),
            segment: vec![0; PACKET_BUFFER].into_boxed_slice(),
            outbox: Outbox::new(OUTBOX, levels.send_segments, levels.send_many),
            peer: None,
            errors: 0,
        }
    }

    /// Reads packets from the TUN until it has none or the batch is full, and sends them.
    ///
    /// # Errors
    /// Fails after [`MAX_ERRORS`] consecutive errors of the TUN, and if it is gone: the kernel's drivers/net/tun.c
    /// returns `EBADFD` once the device is detached, and `EIO` once it is unregistered.
    pub(super) fn drain(&mut self, core: &mut Core, tun: &TunIo, now: Duration, wire: &mut Wire<'_>) -> io::Result<()> {
        let result = self.read_batch(core, tun, now, wire);
        self.flush(core, wire);
        result
    }

    fn read_batch(&mut self, core: &mut Core, tun: &TunIo, now: Duration, wire: &mut Wire<'_>) -> io::Result<()> {
        for _ in 0..BATCH {
            let length = HEADER + MAX_PACKET;
            match tun.read(&mut self.packet[..length]) {
                Ok((_, range)) if range.end == 0 => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the TUN was closed"));
                }
                Ok((header, range)) => {
                    self.errors = 0;
                    let mut buffer = std::mem::take(&mut self.packet);
                    self.send(&header, &mut buffer[range], core, now, wire);
                    self.packet = buffer;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                // A packet that the kernel cannot describe (EINVAL): it is lost, and the next one may be read.
                Err(errno) if errno != Errno::IO && errno != Errno::BADFD && self.errors < MAX_ERRORS => {
                    tracing::debug!(%errno, "the TUN reported an error");
                    self.errors += 1;
                    core.drop_malformed();
                }
                Err(errno) => return Err(broken("the TUN is gone", errno)),
            }
        }
        Ok(())
    }

    /// Seals a packet of the TUN, in segments, and puts it into the outbox.
    fn send(&mut self, header: &Header, packet: &mut [u8], core: &mut Core, now: Duration, wire: &mut Wire<'_>) {
        let Some(segments) = Segments::of(header, packet) else { return core.drop_malformed() };
        if segments.is_none() && !header.finish_checksum(packet) {
            return core.drop_malformed();
        }
        let (count, longest) = segments.as_ref().map_or((1, packet.len()), |all| (all.count(), all.longest()));
        let longest = core.message_length(longest);
        if !self.outbox.has_room(count, longest) {
            self.flush(core, wire);
        }
        let length_of = |number| segments.as_ref().map_or(packet.len(), |all| all.length(number));
        let bytes = (0..count).map(|number| core.message_length(length_of(number))).sum();
        let reserved = match self.outbox.has_room(count, longest) {
            true => core.reserve(packet, count, bytes, now, wire),
            // Tiny segments, whose messages are many times as long.
            false => None,
        };
        let Some((peer, reserved)) = reserved else {
            return self.send_singly(segments.as_ref(), packet, core, now, wire);
        };
        if self.peer != Some(peer) {
            self.flush(core, wire);
            self.peer = Some(peer);
        }
        // The whole path may mark congestion (RFC 6040 section 4.1).
        let ecn = ip::traffic_class(packet).map_or(Ecn::NOT_CAPABLE, Ecn::of);
        for (number, counter) in (0..count).zip(reserved.first..) {
            let (length, whole) = (length_of(number), core.message_length(length_of(number)));
            let Some(message) = self.outbox.room(whole) else { return };
            let (text, padding) = message[DATA_HEADER..].split_at_mut(length);
            match &segments {
                Some(segments) => segments.write(packet, number, text),
                None => text.copy_from_slice(packet),
            }
            // The tag comes at its end.
            padding.fill(0);
            if reserved.session.seal(counter, message) {
                self.outbox.push(reserved.endpoint, ecn, whole);
            }
        }
    }

    /// Passes the segments of a packet to the device one by one: there is no session yet, or no peer.
    fn send_singly(
        &mut self,
        segments: Option<&Segments>,
        packet: &[u8],
        core: &mut Core,
        now: Duration,
        wire: &mut Wire<'_>,
    ) {
        // What waits was read before.
        self.flush(core, wire);
        for number in 0..segments.map_or(1, Segments::count) {
            let length = segments.map_or(packet.len(), |all| all.length(number));
            match segments {
                Some(segments) => segments.write(packet, number, &mut self.segment[..length]),
                None => self.segment[..length].copy_from_slice(packet),
            }
            core.on_packet(&mut self.segment, length, now, wire);
        }
    }

    fn flush(&mut self, core: &mut Core, wire: &mut Wire<'_>) {
        let unsent = self.outbox.flush(|endpoint| wire.sockets.of(endpoint));
        *wire.unsent += unsent.datagrams;
        if let Some(peer) = self.peer {
            core.not_sent(peer, unsent.bytes);
        }
    }
}
