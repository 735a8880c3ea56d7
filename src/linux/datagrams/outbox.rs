//! Datagrams to send.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

#[cfg(test)]
use super::forced;
use super::name::Name;
use super::{CONTROL, CONTROL_MESSAGE, Control, Ecn, last_error};

/// The most messages that one call sends.
const MAX_TRAINS: usize = 64;

/// The most datagrams of a train: `UDP_MAX_SEGMENTS` before Linux 6.9.
const MAX_IN_TRAIN: usize = 64;

/// The most bytes of a train: the longest IP packet, without the headers of IPv6 and UDP.
const MAX_TRAIN_BYTES: usize = 65_535 - 48;

/// Datagrams of one size for one endpoint. The last may be shorter.
#[derive(Clone, Copy, Debug)]
struct Train {
    endpoint: SocketAddr,
    ecn: Ecn,
    start: usize,
    end: usize,
    size: usize,
}

impl Train {
    fn count(&self) -> usize {
        (self.end - self.start).div_ceil(self.size)
    }
}

/// The number of datagrams that go singly after a train of them was refused. Then a train is tried again, because the
/// route may have changed.
pub(super) const SINGLE_AFTER_REFUSAL: usize = 4_096;

/// The most endpoints whose refusals are remembered.
const MAX_REFUSALS: usize = 8;

/// A refusal of trains that is due to the path to an endpoint.
#[derive(Clone, Copy, Debug)]
struct Refusal {
    endpoint: SocketAddr,
    /// The least size of a datagram whose trains were refused.
    size: usize,
    /// The number of datagrams until the next try.
    left: usize,
}

/// Datagrams that wait to be sent together.
#[derive(Debug)]
pub struct Outbox {
    buffer: Box<[u8]>,
    used: usize,
    trains: Vec<Train>,
    /// Whether several datagrams may go in one message. The kernel or an interface can refuse it at any time.
    segments: bool,
    /// Whether several messages may go in one call. Without it, each takes one.
    many: bool,
    refusals: Vec<Refusal>,
}

/// What became of the datagrams of an [`Outbox`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsent {
    /// The datagrams that were not sent.
    pub datagrams: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Outbox {
    /// Creates an outbox for a number of bytes. `segments` says whether to use `UDP_SEGMENT`, and `many` whether to use
    /// sendmmsg(2).
    pub fn new(capacity: usize, segments: bool, many: bool) -> Self {
        let buffer = vec![0; capacity].into_boxed_slice();
        Self { buffer, used: 0, trains: Vec::with_capacity(MAX_TRAINS), segments, many, refusals: Vec::new() }
    }

    /// Returns whether there is room for a number of datagrams of a length.
    pub fn has_room(&self, count: usize, length: usize) -> bool {
        // Each may begin a train in the worst case, without `UDP_SEGMENT`.
        let trains = if self.segments && self.refusals.is_empty() { count.div_ceil(MAX_IN_TRAIN) + 1 } else { count };
        self.is_empty() && count * length <= self.buffer.len()
            || self.trains.len() + trains <= MAX_TRAINS && self.used + count * length <= self.buffer.len()
    }

    /// Returns whether `UDP_SEGMENT` and sendmmsg(2) are still used.
    #[cfg(test)]
    pub(super) fn levels(&self) -> (bool, bool) {
        (self.segments, self.many)
    }

    /// Returns whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Returns the room for the next datagram, of a length, or None if there is not enough.
    pub fn room(&mut self, length: usize) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.used..self.used + length)
    }

    /// Takes the datagram that was written to [`Self::room`].
    pub fn push(&mut self, endpoint: SocketAddr, ecn: Ecn, length: usize) {
        let (start, end) = (self.used, (self.used + length).min(self.buffer.len()));
        self.used = end;
        let is_refused = self.is_refused(endpoint, length);
        if let Some(last) = self.trains.last_mut()
            && self.segments
            && !is_refused
            && last.endpoint == endpoint
            && last.ecn == ecn
            && (last.end - last.start) % last.size == 0
            && length <= last.size
            && last.count() < MAX_IN_TRAIN
            && end - last.start <= MAX_TRAIN_BYTES
        {
            last.end = end;
            return;
        }
        self.trains.push(Train { endpoint, ecn, start, end, size: length.max(1) });
    }

    /// Returns whether trains of such a datagram were refused a short time ago, and counts the datagram.
    fn is_refused(&mut self, endpoint: SocketAddr, length: usize) -> bool {
        let is_meant = |refusal: &Refusal| refusal.endpoint == endpoint && length >= refusal.size;
        let Some(index) = self.refusals.iter().position(is_meant) else { return false };
        let refusal = &mut self.refusals[index];
        refusal.left -= 1;
        if refusal.left == 0 {
            self.refusals.swap_remove(index);
        }
        true
    }

    /// Notes that trains of a size were refused.
    fn refuse(&mut self, Train { endpoint, size, .. }: Train) {
        let former = self.refusals.iter().position(|refusal| refusal.endpoint == endpoint);
        let size = former.map_or(size, |index| self.refusals.remove(index).size.min(size));
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.remove(0);
        }
        self.refusals.push(Refusal { endpoint, size, left: SINGLE_AFTER_REFUSAL });
    }

    /// Sends everything, by the socket of each endpoint's address family, and returns what was not sent. A message of
    /// several datagrams that is refused is sent as single ones. No more such messages are made if the interface cannot
    /// send them, and for some time none to an endpoint whose path does not take them.
    pub fn flush<'a>(&mut self, socket_of: impl Fn(&SocketAddr) -> Option<BorrowedFd<'a>>) -> Unsent {
        let (mut unsent, mut done) = (Unsent::default(), 0);
        while done < self.trains.len() {
            let first = self.trains[done];
            let is_ipv4 = first.endpoint.is_ipv4();
            let of_family = |train: &&Train| train.endpoint.is_ipv4() == is_ipv4;
            let run = self.trains[done..].iter().take(MAX_TRAINS).take_while(of_family).count();
            let sent = match socket_of(&first.endpoint) {
                Some(socket) => send_trains(socket, &self.buffer, &self.trains[done..done + run], self.many),
                None => Err(Errno::AFNOSUPPORT),
            };
            match sent {
                Ok(sent) => done += sent.max(1),
                Err(Errno::INTR) => {}
                // A kernel of a sandbox may lack the call.
                Err(Errno::NOSYS) if self.many => self.many = false,
                Err(errno) => {
                    self.resend(&first, errno, &socket_of, &mut unsent);
                    done += 1;
                }
            }
        }
        self.trains.clear();
        self.used = 0;
        unsent
    }

    /// Sends the datagrams of a refused message as messages of their own, if that may help.
    fn resend<'a>(
        &mut self,
        train: &Train,
        errno: Errno,
        socket_of: &impl Fn(&SocketAddr) -> Option<BorrowedFd<'a>>,
        unsent: &mut Unsent,
    ) {
        tracing::trace!(%errno, endpoint = %train.endpoint, "datagrams were refused");
        // EIO: the interface cannot checksum. EINVAL: the path's MTU is less than the size, or the kernel does not know
        // the option. EMSGSIZE: too long as a whole, or as EINVAL since Linux 6.13.
        let is_too_much = train.count() > 1 && matches!(errno, Errno::IO | Errno::INVAL | Errno::MSGSIZE);
        if train.count() > 1 && errno == Errno::IO {
            self.segments = false;
        } else if is_too_much {
            self.refuse(*train);
        }
        let socket = socket_of(&train.endpoint).filter(|_| is_too_much);
        let single = |start: usize| Train { start, end: (start + train.size).min(train.end), ..*train };
        let mut singles = [*train; MAX_IN_TRAIN];
        let starts = (train.start..train.end).step_by(train.size);
        let count = starts.clone().count().min(MAX_IN_TRAIN);
        singles.iter_mut().zip(starts).for_each(|(slot, start)| *slot = single(start));
        let mut rest = &singles[..count];
        while let Some(first) = rest.first() {
            let sent = socket.map_or(Err(errno), |socket| send_trains(socket, &self.buffer, rest, self.many));
            match sent {
                Ok(sent) => rest = &rest[sent.clamp(1, rest.len())..],
                Err(Errno::INTR) => {}
                Err(_) => {
                    unsent.datagrams += 1;
                    unsent.bytes += (first.end - first.start) as u64;
                    rest = &rest[1..];
                }
            }
        }
    }
}

/// Writes a control message (`struct cmsghdr`, cmsg(3)), and returns the room that it takes.
fn put_control(room: &mut [u8], level: libc::c_int, kind: libc::c_int, value: &[u8]) -> usize {
    let header = size_of::<libc::cmsghdr>();
    let length = header + value.len();
    room[..size_of::<usize>()].copy_from_slice(&length.to_ne_bytes());
    room[size_of::<usize>()..][..4].copy_from_slice(&level.to_ne_bytes());
    room[size_of::<usize>() + 4..][..4].copy_from_slice(&kind.to_ne_bytes());
    room[header..length].copy_from_slice(value);
    CONTROL_MESSAGE
}

/// Sends messages, and returns how many were sent.
fn send_trains(socket: BorrowedFd<'_>, buffer: &[u8], trains: &[Train], many: bool) -> Result<usize, Errno> {
    let count = trains.len().min(if many { MAX_TRAINS } else { 1 });
    #[cfg(test)]
    forced::of_messages(many, trains.first().is_some_and(|train| train.count() > 1))?;
    // SAFETY: all zeros is valid for these, which are plain data.
    let (mut messages, mut pieces): ([libc::mmsghdr; MAX_TRAINS], [libc::iovec; MAX_TRAINS]) =
        unsafe { MaybeUninit::zeroed().assume_init() };
    let (mut names, mut controls) = ([Name::zeroed(); MAX_TRAINS], [Control([0; CONTROL]); MAX_TRAINS]);
    for (index, train) in trains[..count].iter().enumerate() {
        let bytes = &buffer[train.start..train.end];
        pieces[index] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let (name, length) = Name::of(&train.endpoint);
        names[index] = name;
        let header = &mut messages[index].msg_hdr;
        (header.msg_iov, header.msg_iovlen) = (&raw mut pieces[index], 1);
        (header.msg_name, header.msg_namelen) = ((&raw mut names[index]).cast(), length);
        let control = &mut controls[index].0;
        let mut used = 0;
        if train.count() > 1 {
            used +=
                put_control(&mut control[used..], libc::SOL_UDP, libc::UDP_SEGMENT, &(train.size as u16).to_ne_bytes());
        }
        if train.ecn != Ecn::NOT_CAPABLE {
            let (level, kind) = match train.endpoint {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            used += put_control(&mut control[used..], level, kind, &i32::from(train.ecn.bits()).to_ne_bytes());
        }
        if used > 0 {
            (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), used as _);
        }
    }
    // SAFETY: everything that the messages point to lives until the call returns. The kernel does not write to the
    // buffer of a message that it sends.
    let sent = unsafe {
        match many {
            true => libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), count as libc::c_uint, 0) as isize,
            false => libc::sendmsg(socket.as_raw_fd(), &raw const messages[0].msg_hdr, 0).min(1),
        }
    };
    usize::try_from(sent).map_err(|_| last_error())
}
