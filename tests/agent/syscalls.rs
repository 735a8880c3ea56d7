//! System calls without a safe wrapper: sending by a packet socket and by io_uring, and requesting a key.
#![expect(
    unsafe_code,
    reason = "packet sockets' addresses, io_uring and request_key have no safe wrapper among the dependencies"
)]

use std::ffi::CStr;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{SockaddrLike, SockaddrStorage};

/// Broadcasts an IP packet on an interface by a packet socket of the type `SOCK_DGRAM` (packet(7)).
pub(crate) fn send_to_all_on(socket: &OwnedFd, interface: u32, packet: &[u8]) -> io::Result<()> {
    let is_ipv6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let protocol = if is_ipv6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP };
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::c_ushort,
        sll_protocol: (protocol as u16).to_be(),
        sll_ifindex: i32::try_from(interface).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff; 8],
    };
    // SAFETY: the kernel only reads the packet and the address, which outlive the call and have the given lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Requests a key of a type that does not exist (request_key(2)), with information for the program that would make it
/// or without, and returns the error.
pub(crate) fn request_unknown_key(callout: Option<&CStr>) -> io::Error {
    let (kind, description) = (c"no-such-type", c"unknown.example");
    // SAFETY: the kernel reads the three texts up to their terminating zeros, and they outlive the call.
    let key = unsafe {
        let callout = callout.map_or(ptr::null(), CStr::as_ptr);
        libc::syscall(libc::SYS_request_key, kind.as_ptr(), description.as_ptr(), callout, 0)
    };
    if key < 0 { io::Error::last_os_error() } else { io::ErrorKind::AlreadyExists.into() }
}

/// Opens a datagram socket and sends by it with io_uring, without socket(2) and sendto(2).
pub(crate) fn send_by_io_uring(to: SocketAddr, text: &[u8]) -> io::Result<()> {
    let mut ring = Ring::new()?;
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut open = Entry::of(OP_SOCKET);
    open.fd = family;
    open.offset = libc::SOCK_DGRAM as u64;
    let socket = ring.perform(open)?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };

    let address = SockaddrStorage::from(to);
    let mut payload = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // SAFETY: a zeroed msghdr is a valid message without address, payload and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut payload;
    message.msg_iovlen = 1;
    let mut send = Entry::of(OP_SENDMSG);
    send.fd = socket.as_raw_fd();
    send.address = (&raw const message) as u64;
    send.length = 1;
    ring.perform(send).map(drop)
}

const OP_SENDMSG: u8 = 9;
const OP_SOCKET: u8 = 45;
const ENTER_GETEVENTS: u32 = 1;
const FEATURE_SINGLE_MMAP: u32 = 1;
const OFFSET_RING: libc::off_t = 0;
const OFFSET_ENTRIES: libc::off_t = 0x1000_0000;

/// An operation (`struct io_uring_sqe` of linux/io_uring.h), as far as the two operations above need it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    operation: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    length: u32,
    operation_flags: u32,
    user_data: u64,
    rest: [u64; 3],
}

impl Entry {
    fn of(operation: u8) -> Self {
        let (flags, priority, fd, offset, address, length) = (0, 0, -1, 0, 0, 0);
        Self { operation, flags, priority, fd, offset, address, length, operation_flags: 0, user_data: 0, rest: [0; 3] }
    }
}

/// The result of an operation (`struct io_uring_cqe`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// The offsets of fields in the ring (`struct io_sqring_offsets`, `struct io_cqring_offsets`); the last ones differ in
/// meaning.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Offsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    fifth: u32,
    sixth: u32,
    seventh: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Parameters {
    entries: u32,
    completions: u32,
    flags: u32,
    thread_cpu: u32,
    thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    submission: Offsets,
    completion: Offsets,
}

/// A ring for one operation at a time.
struct Ring {
    fd: OwnedFd,
    parameters: Parameters,
    ring: Mapping,
    entries: Mapping,
}

struct Mapping {
    address: *mut u8,
    length: usize,
}

impl Mapping {
    fn of(fd: RawFd, length: usize, offset: libc::off_t) -> io::Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps no memory in use.
        let address = unsafe { libc::mmap(ptr::null_mut(), length, access, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.cast(), length })
    }

    /// Returns a number in the mapping that the kernel accesses, too.
    fn number(&self, offset: u32) -> &AtomicU32 {
        assert!(offset as usize + 4 <= self.length && offset.is_multiple_of(4));
        // SAFETY: the number is aligned, lies in the mapping and lives as long; both sides access it atomically.
        unsafe { AtomicU32::from_ptr(self.address.add(offset as usize).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and no borrow of it is left.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

impl Ring {
    fn new() -> io::Result<Self> {
        let mut parameters = Parameters::default();
        // SAFETY: the kernel writes the parameters, which have the type that it expects.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, &raw mut parameters) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
        if parameters.features & FEATURE_SINGLE_MMAP == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let array_end = parameters.submission.seventh as usize + parameters.entries as usize * 4;
        let completions = parameters.completions as usize * size_of::<Completion>();
        let length = array_end.max(parameters.completion.sixth as usize + completions);
        let ring = Mapping::of(fd.as_raw_fd(), length, OFFSET_RING)?;
        let entries = parameters.entries as usize * size_of::<Entry>();
        let entries = Mapping::of(fd.as_raw_fd(), entries, OFFSET_ENTRIES)?;
        Ok(Self { fd, parameters, ring, entries })
    }

    /// Performs one operation, and waits for its result.
    fn perform(&mut self, entry: Entry) -> io::Result<i32> {
        let Parameters { submission, completion, .. } = self.parameters;
        let tail = self.ring.number(submission.tail);
        let at = tail.load(Ordering::Acquire) & self.ring.number(submission.mask).load(Ordering::Relaxed);
        // SAFETY: the place is within the mapping, as `at` is below the number of entries, and the kernel does not look
        // at it before the tail has moved.
        unsafe { self.entries.address.cast::<Entry>().add(at as usize).write(entry) };
        self.ring.number(submission.seventh + at * 4).store(at, Ordering::Release);
        tail.fetch_add(1, Ordering::Release);
        // SAFETY: the data that the entry points to outlives this call, which returns when the operation has ended.
        let entered = unsafe {
            let fd = self.fd.as_raw_fd();
            libc::syscall(libc::SYS_io_uring_enter, fd, 1_u32, 1_u32, ENTER_GETEVENTS, ptr::null::<u8>(), 0_usize)
        };
        if entered < 0 {
            return Err(io::Error::last_os_error());
        }
        let head = self.ring.number(completion.head);
        let at = head.load(Ordering::Acquire);
        if at == self.ring.number(completion.tail).load(Ordering::Acquire) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let at = at & self.ring.number(completion.mask).load(Ordering::Relaxed);
        // SAFETY: the place is within the mapping, and the kernel has written it, as its tail says.
        let done = unsafe {
            let first = self.ring.address.add(completion.sixth as usize).cast::<Completion>();
            first.add(at as usize).read()
        };
        head.fetch_add(1, Ordering::Release);
        if done.result < 0 { Err(io::Error::from_raw_os_error(-done.result)) } else { Ok(done.result) }
    }
}
