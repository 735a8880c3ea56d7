//! Lets one process decide about the connections that others make to unix sockets (seccomp_unotify(2)).
//!
//! The filter stops connect(2), sendto(2) to an address and, in 32-bit programs, socketcall(2) until the supervisor has answered.
//! An answer that lets the call go on has the kernel read the address again, so a hostile thread can exchange it in between:
//! this serves against accidents. Messages that sendmsg(2) sends to an address of its own are not stopped, since a filter cannot see
//! whether there is one, and stopping all of them would slow down every X11 and D-Bus program.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use seccompiler::sock_filter;

/// The longest address that is read, in bytes (`struct sockaddr_un` of unix(7)).
const LONGEST: usize = mem::size_of::<libc::sockaddr_un>();

/// The bit by which calls of the x32 ABI differ from others of their architecture (`__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;

/// What socketcall(2) calls connect(2) and sendto(2) (linux/net.h).
const SOCKETCALL_CONNECT: u32 = 3;
const SOCKETCALL_SENDTO: u32 = 11;

/// io_uring_setup(2), which has the same number in all architectures. Its rings would make connections that no filter sees.
const IO_URING_SETUP: u32 = 425;

/// The lengths of addresses of IPv4, IPv6 and netlink sockets. Datagrams to these are not stopped: that would slow down UDP.
const UNSTOPPED_LENGTHS: [u32; 4] = [0, 12, 16, 28];

/// The calls of one architecture whose programs a kernel may execute (`AUDIT_ARCH_*` of linux/audit.h).
struct Architecture {
    number: u32,
    connect: u32,
    sendto: u32,
    socketcall: Option<u32>,
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { number: 0xc000_003e, connect: 42, sendto: 44, socketcall: None },
    Architecture { number: 0x4000_0003, connect: 362, sendto: 369, socketcall: Some(102) },
];
#[cfg(not(target_arch = "x86_64"))]
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { number: 0xc000_00b7, connect: 203, sendto: 206, socketcall: None },
    Architecture { number: 0x4000_0028, connect: 283, sendto: 290, socketcall: None },
];

/// The ioctl(2) commands of a listener (linux/seccomp.h).
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const NOTIF_ID_VALID: libc::c_ulong = 0x4008_2102;
const NOTIF_SET_FLAGS: libc::c_ulong = 0x4008_2104;
const SYNC_WAKE_UP: libc::c_ulong = 1;

/// Where a filter finds what it looks at (`struct seccomp_data` of linux/seccomp.h): the low half of each argument is first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// The places in the program that its jumps lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    NextArchitecture(usize),
    Datagram,
    Length,
    Socketcall,
    Notify,
    Refuse,
    Allow,
}

/// An instruction whose jumps have names. A jump that is not taken goes on with the next instruction.
enum Step {
    Load(u32),
    Mask(u32),
    IfEqual(u32, Label),
    Unless(u32, Label),
    Return(u32),
    Place(Label),
}

fn steps() -> Vec<Step> {
    use Step::{IfEqual, Load, Mask, Place, Return, Unless};

    let mut steps = vec![];
    for (index, architecture) in ARCHITECTURES.iter().enumerate() {
        steps.extend([
            Load(ARCHITECTURE),
            Unless(architecture.number, Label::NextArchitecture(index)),
            Load(NUMBER),
            Mask(!X32),
            IfEqual(architecture.connect, Label::Notify),
            IfEqual(architecture.sendto, Label::Datagram),
            IfEqual(IO_URING_SETUP, Label::Refuse),
        ]);
        steps.extend(architecture.socketcall.map(|number| IfEqual(number, Label::Socketcall)));
        steps.extend([Return(libc::SECCOMP_RET_ALLOW), Place(Label::NextArchitecture(index))]);
    }
    steps.extend([
        Return(libc::SECCOMP_RET_ALLOW),
        Place(Label::Socketcall),
        Load(argument(0)),
        IfEqual(SOCKETCALL_CONNECT, Label::Notify),
        IfEqual(SOCKETCALL_SENDTO, Label::Notify),
        Return(libc::SECCOMP_RET_ALLOW),
        Place(Label::Datagram),
        Load(argument(4)),
        Unless(0, Label::Length),
        Load(argument(4) + 4),
        IfEqual(0, Label::Allow),
        Place(Label::Length),
        Load(argument(5)),
    ]);
    steps.extend(UNSTOPPED_LENGTHS.map(|length| IfEqual(length, Label::Allow)));
    steps.extend([
        Place(Label::Notify),
        Return(libc::SECCOMP_RET_USER_NOTIF),
        Place(Label::Refuse),
        Return(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
        Place(Label::Allow),
        Return(libc::SECCOMP_RET_ALLOW),
    ]);
    steps
}

fn program() -> Vec<sock_filter> {
    let steps = steps();
    let is_code = |step: &&Step| !matches!(step, Step::Place(_));
    let place = |label: Label| {
        let at =
            steps.iter().position(|step| matches!(step, Step::Place(other) if *other == label)).unwrap_or_default();
        steps[..at].iter().filter(is_code).count()
    };
    let mut program: Vec<sock_filter> = Vec::new();
    for step in steps.iter().filter(is_code) {
        // The program has a few dozen instructions, so that every distance fits.
        let distance = |label: Label| (place(label) - program.len() - 1) as u8;
        let (code, jt, jf, k) = match *step {
            Step::Load(offset) => (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset),
            Step::Mask(mask) => (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, mask),
            Step::IfEqual(value, label) => (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, distance(label), 0, value),
            Step::Unless(value, label) => (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, distance(label), value),
            Step::Return(action) => (libc::BPF_RET | libc::BPF_K, 0, 0, action),
            Step::Place(_) => continue,
        };
        program.push(sock_filter { code: code as u16, jt, jf, k });
    }
    program
}

/// The supervisor's end of the filter: it receives the calls that wait for an answer.
#[derive(Debug)]
pub struct ConnectSupervisor(OwnedFd);

/// A call that waits for an answer.
#[derive(Clone, Copy, Debug)]
pub struct PendingConnect {
    id: u64,
    /// The thread that makes the call, as the supervisor's PID namespace numbers it.
    pub thread: i32,
    /// Where the address is in that thread's memory, and its length in bytes.
    address: u64,
    length: usize,
    /// Where the arguments are if the call is socketcall(2), and which of them is the address.
    indirect: Option<(u64, u64)>,
}

/// The address that a call names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A unix socket's path, as the caller has given it.
    Path(Vec<u8>),
    /// Anything else: another family, or an abstract or unnamed unix socket, which belongs to a network namespace.
    Other,
}

/// Applies the filter to the calling thread, and to all that it starts from now on.
///
/// # Errors
/// `EACCES` unless the thread has CAP_SYS_ADMIN or `no_new_privs`; `EBUSY` if it has such a filter already; `EINVAL` on a kernel before
/// 5.0.
pub fn install() -> io::Result<ConnectSupervisor> {
    let program = program();
    // Since Linux 5.19: a signal that does not kill does not interrupt a call that the supervisor has received.
    let killable = 1 << 5;
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let installed = match super::install(&program, flags | killable) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => super::install(&program, flags),
        other => other,
    };
    let descriptor = i32::try_from(installed?).map_err(io::Error::other)?;
    // Since Linux 6.6: the supervisor is woken up on the caller's processor, and the other way round, which is faster.
    // SAFETY: the call takes numbers only; older kernels refuse it.
    unsafe { libc::ioctl(descriptor, NOTIF_SET_FLAGS as _, SYNC_WAKE_UP) };
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(ConnectSupervisor(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

impl From<OwnedFd> for ConnectSupervisor {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl AsFd for ConnectSupervisor {
    /// Readable when a call waits; hung up when no process with the filter is left.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What became of waiting for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// A call waits.
    Call,
    /// No process with the filter is left.
    Over,
    /// The time is up.
    TimeUp,
}

impl ConnectSupervisor {
    /// Waits until a call waits for an answer, no process with the filter is left, or the time is up.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Waited> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut entries = [PollFd::new(&self.0, PollFlags::IN)];
        match rustix::event::poll(&mut entries, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(Waited::TimeUp),
            Ok(_) if entries[0].revents().contains(PollFlags::IN) => Ok(Waited::Call),
            Ok(_) => Ok(Waited::Over),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives a call. None if its caller has ended or was interrupted meanwhile.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn receive(&self) -> io::Result<Option<PendingConnect>> {
        // SAFETY: the structure holds numbers only, for which all zeros are valid; the kernel asks for them.
        let mut received: libc::seccomp_notif = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes a structure of this size, which lives until the call returns.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_RECV as _, &raw mut received) } != 0 {
            return match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
                error => Err(error),
            };
        }
        let data = received.data;
        let number = data.nr.cast_unsigned() & !X32;
        let architecture = ARCHITECTURES.iter().find(|architecture| architecture.number == data.arch);
        let (address, length, indirect) = match architecture {
            Some(it) if it.socketcall == Some(number) => {
                let at = if data.args[0] == u64::from(SOCKETCALL_SENDTO) { 4 } else { 1 };
                (0, 0, Some((data.args[1], at)))
            }
            Some(it) if it.sendto == number => (data.args[4], data.args[5], None),
            _ => (data.args[1], data.args[2], None),
        };
        // A length is a 32-bit number; what stands above it is not part of it.
        let length = length as u32 as usize;
        Ok(Some(PendingConnect { id: received.id, thread: received.pid.cast_signed(), address, length, indirect }))
    }

    /// Whether the call still waits: its caller's number is its own then.
    pub fn is_waiting(&self, attempt: &PendingConnect) -> bool {
        // SAFETY: the kernel reads a number, which lives until the call returns.
        unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_ID_VALID as _, &raw const attempt.id) == 0 }
    }

    /// Lets a call go on, or has it fail with an error number. That its caller has ended is no error.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn answer(&self, attempt: &PendingConnect, errno: Option<i32>) -> io::Result<()> {
        const CONTINUE: u32 = 1;
        let response = libc::seccomp_notif_resp {
            id: attempt.id,
            val: 0,
            error: errno.map_or(0, |errno| -errno),
            flags: if errno.is_none() { CONTINUE } else { 0 },
        };
        // SAFETY: the kernel reads a structure of this size, which lives until the call returns.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_SEND as _, &raw const response) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(()),
            error => Err(error),
        }
    }
}

impl PendingConnect {
    /// Reads the address from the caller's memory.
    ///
    /// # Errors
    /// `EPERM` if the caller's memory may not be read. `EFAULT` if there is nothing at the address, which the call itself says, too.
    pub fn read_address(&self) -> io::Result<Destination> {
        let (address, length) = match self.indirect {
            None => (self.address, self.length),
            Some((arguments, at)) => {
                let mut two = [0_u8; 8];
                read_memory(self.thread, arguments + 4 * at, &mut two)?;
                let word = |at: usize| u32::from_ne_bytes([two[at], two[at + 1], two[at + 2], two[at + 3]]);
                (word(0).into(), word(4) as usize)
            }
        };
        let mut bytes = [0; LONGEST];
        let bytes = &mut bytes[..length.min(LONGEST)];
        let read = read_memory(self.thread, address, bytes)?;
        Ok(parse(&bytes[..read]))
    }

    /// Whether the address has the length of an Internet address. Nothing more is known of it where memory cannot be read.
    pub fn has_length_of_internet_address(&self) -> bool {
        self.indirect.is_none() && matches!(self.length, 16 | 28)
    }
}

/// Reads an address (`struct sockaddr_un` of unix(7)), whose path ends at the first NUL or with the address.
fn parse(bytes: &[u8]) -> Destination {
    let is_unix = bytes.first_chunk().is_some_and(|family| u16::from_ne_bytes(*family) == libc::AF_UNIX as u16);
    match bytes.get(2..).unwrap_or_default().split(|byte| *byte == 0).next() {
        Some(path) if is_unix && !path.is_empty() => Destination::Path(path.to_vec()),
        _ => Destination::Other,
    }
}

/// Reads memory of another process, and returns how much of it there was (process_vm_readv(2)).
fn read_memory(thread: i32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as usize as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the kernel writes into the buffer at most, which lives until the call returns; the remote address is a number to it.
    match unsafe { libc::process_vm_readv(thread, &raw const local, 1, &raw const remote, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        length => Ok(length.unsigned_abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the filter's verdict on a call, as the kernel computes it.
    fn verdict(architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let program = program();
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match u32::from(code) & 0x07 {
                libc::BPF_LD => {
                    loaded = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        _ => {
                            let whole = arguments[((k - 16) / 8) as usize];
                            if k % 8 == 0 { whole as u32 } else { (whole >> 32) as u32 }
                        }
                    }
                }
                libc::BPF_ALU => loaded &= k,
                libc::BPF_JMP => at += usize::from(if loaded == k { jt } else { jf }),
                _ => return k,
            }
        }
    }

    #[test]
    fn connections_wait_in_programs_of_all_architectures() {
        const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
        const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
        for Architecture { number: architecture, connect, sendto, socketcall } in ARCHITECTURES {
            for bit in [0, X32] {
                assert_eq!(verdict(architecture, connect | bit, [3, 0x7fff_0000, 110, 0, 0, 0]), NOTIFY);
                let to = |address, length| verdict(architecture, sendto | bit, [3, 1, 2, 0, address, length]);
                assert_eq!(to(0, 0), ALLOW, "a connected socket");
                assert_eq!(to(0x7f00_0000_0000, 110), NOTIFY);
                assert_eq!(to(0x1000, 21), NOTIFY);
                assert_eq!([to(0x1000, 16), to(0x1000, 28)], [ALLOW; 2], "UDP");
                assert_eq!(
                    verdict(architecture, IO_URING_SETUP | bit, [0; 6]),
                    libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()
                );
            }
            for other in [connect - 1, connect + 1, sendto + 1, 0] {
                assert_eq!(verdict(architecture, other, [1; 6]), ALLOW);
            }
            if let Some(socketcall) = socketcall {
                let calls = |call| verdict(architecture, socketcall, [call, 0x1000, 0, 0, 0, 0]);
                assert_eq!([calls(1), calls(3), calls(11), calls(16)], [ALLOW, NOTIFY, NOTIFY, ALLOW]);
            }
        }
        assert_eq!(verdict(0, ARCHITECTURES[0].connect, [1; 6]), ALLOW);
    }

    #[test]
    fn paths_are_told_from_other_addresses() {
        let unix = |rest: &[u8]| [&(libc::AF_UNIX as u16).to_ne_bytes(), rest].concat();
        assert_eq!(parse(&unix(b"/tmp/x\0rubbish")), Destination::Path(b"/tmp/x".to_vec()));
        assert_eq!(parse(&unix(b"x")), Destination::Path(b"x".to_vec()));
        for other in [unix(b"\0abstract"), unix(b""), vec![], vec![1], [2, 0, 0, 80, 127, 0, 0, 1].to_vec()] {
            assert_eq!(parse(&other), Destination::Other, "{other:?}");
        }
    }
}
