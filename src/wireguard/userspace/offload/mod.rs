//! Packets of several segments, as the TUN gives and takes them where it can (`IFF_VNET_HDR`, linux/virtio_net.h). One
//! system call moves up to 64 KiB, and the kernel's TCP handles them as one packet.
//!
//! - `checksum`: the Internet checksum. `layout`: the headers of a packet that can be segmented.
//! - `header`: what the TUN says of a packet.
//! - `segment`: cuts a large packet of the TUN into segments, which are sealed one by one.
//! - `coalesce`: joins received segments to large packets.

mod checksum;
mod coalesce;
mod header;
mod layout;
mod segment;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;

pub(super) use coalesce::{Coalescer, PieceWriter};
pub(super) use header::{HEADER, Header};
pub(super) use segment::Segments;
