//! Room for datagrams that are received.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

#[cfg(test)]
use super::forced;
use super::name::Name;
use super::{CONTROL, Control, Ecn, last_error};

/// The most bytes of a received message.
const MAX_MESSAGE: usize = 65_535;

/// The distance of received messages in memory. It is no multiple of a page, so that they do not compete for the same
/// lines of the processor's cache.
const STRIDE: usize = 65_536 + 1_600;

/// Room for datagrams that are received together.
pub struct Inbox {
    buffer: Box<[u8]>,
    count: usize,
    /// Whether several messages may come in one call. Without it, each takes one.
    many: bool,
    /// The messages of the last call. None for one that is empty, or from an unknown address family.
    received: Vec<Option<ReceivedMessage>>,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("received", &self.received).finish_non_exhaustive()
    }
}

/// The most messages that one call receives.
const MAX_RECEIVED: usize = 16;

/// A received message: its datagrams, which are one after the other in the buffer, and their sender.
#[derive(Clone, Debug)]
pub struct ReceivedMessage {
    /// Where it is in the buffer.
    pub range: Range<usize>,
    /// The sender.
    pub from: SocketAddr,
    /// The length of a datagram. The last one may be shorter.
    pub size: usize,
    /// The congestion bits of all datagrams, if the socket reports them ([`super::set_received_ecn`]).
    pub ecn: Ecn,
}

impl ReceivedMessage {
    /// Returns where each of its datagrams is in the buffer.
    pub fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (range, size) = (self.range.clone(), self.size);
        range.clone().step_by(size).map(move |start| start..(start + size).min(range.end))
    }
}

impl Inbox {
    /// Creates room for a number of messages, of which there are at least one and at most 16. `many` says whether to
    /// use recvmmsg(2).
    pub fn new(count: usize, many: bool) -> Self {
        let count = count.clamp(1, MAX_RECEIVED);
        let buffer = vec![0; STRIDE * count].into_boxed_slice();
        Self { buffer, count, many, received: Vec::with_capacity(count) }
    }

    /// Returns the most messages that a call of [`Self::receive`] returns.
    pub fn most(&self) -> usize {
        if self.many { self.count } else { 1 }
    }

    /// Receives the messages that are there, without waiting, and returns their number.
    ///
    /// # Errors
    /// Fails as recvmmsg(2) does: with `EAGAIN` if there is none.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        match self.receive_messages(socket) {
            // A kernel of a sandbox may lack the call.
            Err(Errno::NOSYS) if self.many => {
                self.many = false;
                self.receive_messages(socket)
            }
            received => received,
        }
    }

    fn receive_messages(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.received.clear();
        #[cfg(test)]
        forced::of_receiving(self.many)?;
        // SAFETY: all zeros is valid for these, which are plain data.
        let (mut messages, mut pieces): ([libc::mmsghdr; MAX_RECEIVED], [libc::iovec; MAX_RECEIVED]) =
            unsafe { MaybeUninit::zeroed().assume_init() };
        let (mut names, mut controls) = ([Name::zeroed(); MAX_RECEIVED], [Control([0; CONTROL]); MAX_RECEIVED]);
        for (index, room) in self.buffer.chunks_exact_mut(STRIDE).take(self.count).enumerate() {
            pieces[index] = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: MAX_MESSAGE };
            let header = &mut messages[index].msg_hdr;
            (header.msg_iov, header.msg_iovlen) = (&raw mut pieces[index], 1);
            let length = size_of::<Name>() as libc::socklen_t;
            (header.msg_name, header.msg_namelen) = ((&raw mut names[index]).cast(), length);
            header.msg_control = (&raw mut controls[index]).cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: everything that the messages point to is writable and lives until the call returns.
        let got = unsafe {
            match self.many {
                true => {
                    let (messages, count) = (messages.as_mut_ptr(), self.count as libc::c_uint);
                    let flags = libc::MSG_DONTWAIT as _;
                    libc::recvmmsg(socket.as_raw_fd(), messages, count, flags, std::ptr::null_mut()) as isize
                }
                false => {
                    let message = &mut messages[0];
                    let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message.msg_hdr, libc::MSG_DONTWAIT);
                    message.msg_len = u32::try_from(length).unwrap_or(0);
                    if length < 0 { length } else { 1 }
                }
            }
        };
        let got = usize::try_from(got).map_err(|_| last_error())?;
        for (index, (message, name)) in messages[..got].iter().zip(&names).enumerate() {
            let length = (message.msg_len as usize).min(MAX_MESSAGE);
            // musl has another type for it.
            let told = message.msg_hdr.msg_controllen as u64 as usize;
            let (size, ecn) = read_controls(&controls[index].0[..told.min(CONTROL)]);
            let range = index * STRIDE..index * STRIDE + length;
            let size = size.filter(|size| *size > 0).unwrap_or(length);
            let from = name.endpoint().filter(|_| length > 0);
            self.received.push(from.map(|from| ReceivedMessage { range, from, size, ecn }));
        }
        Ok(got)
    }

    /// Returns a message of the last call. None if it is empty, or from an unknown address family.
    pub fn message(&self, index: usize) -> Option<&ReceivedMessage> {
        self.received.get(index)?.as_ref()
    }

    /// Returns the memory that messages are in.
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

/// Reads the control messages of a received message: the size of its datagrams, if the kernel has joined several, and
/// the congestion bits.
fn read_controls(mut controls: &[u8]) -> (Option<usize>, Ecn) {
    let (mut size, mut ecn) = (None, Ecn::NOT_CAPABLE);
    let header = size_of::<libc::cmsghdr>();
    let number = |at: usize, controls: &[u8]| {
        controls.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes)
    };
    while let Some(bytes) = controls.first_chunk().copied() {
        let length = usize::from_ne_bytes(bytes);
        if length < header || length > controls.len() {
            break;
        }
        let at = size_of::<usize>();
        match (number(at, controls), number(at + 4, controls)) {
            (Some(libc::SOL_UDP), Some(libc::UDP_GRO)) => {
                size = number(header, controls).and_then(|size| usize::try_from(size).ok());
            }
            // One byte for IPv4, and a number for IPv6, whose low bits come first or last.
            (Some(libc::IPPROTO_IP), Some(libc::IP_TOS)) => {
                ecn = controls.get(header).copied().map_or(ecn, Ecn::of);
            }
            (Some(libc::IPPROTO_IPV6), Some(libc::IPV6_TCLASS)) => {
                ecn = number(header, controls).map_or(ecn, |class| Ecn::of(class as u8));
            }
            _ => {}
        }
        controls = controls.get(length.next_multiple_of(size_of::<usize>())..).unwrap_or_default();
    }
    (size, ecn)
}
