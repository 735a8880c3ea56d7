//! Lets one process decide about the connections of others to unix sockets (seccomp_unotify(2)).
//!
//! The filter holds connect(2), sendto(2) to an address and, in 32-bit programs, socketcall(2) until the supervisor has
//! answered. The kernel reads the address again when a call continues, so a hostile thread can replace it meanwhile:
//! the filter protects against accidents only. It does not hold sendmsg(2), whose address a filter cannot see. Holding
//! every sendmsg(2) would slow down all X11 and D-Bus programs.

use std::io::{self, IoSliceMut};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libc::sock_filter;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::architecture::{ARCHITECTURE, ARCHITECTURES, NUMBER, X32, argument};
use crate::linux::bpf::{self, Instruction};

/// The maximum length of an address in bytes (`struct sockaddr_un` of unix(7)).
const MAX_ADDRESS: usize = mem::size_of::<libc::sockaddr_un>();

/// The numbers of connect(2) and sendto(2) in socketcall(2) (linux/net.h).
const SOCKETCALL_CONNECT: u32 = 3;
const SOCKETCALL_SENDTO: u32 = 11;

/// io_uring_setup(2), which has the same number in all architectures. Filters do not see the connections of its rings.
const IO_URING_SETUP: u32 = 425;

/// The lengths of IPv4, IPv6 and netlink addresses. Datagrams to these are not held, which would slow down UDP.
const UNHELD_LENGTHS: [u32; 4] = [0, 12, 16, 28];

/// The ioctl(2) commands of a supervisor's descriptor (linux/seccomp.h).
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const NOTIF_ID_VALID: libc::c_ulong = 0x4008_2102;
const NOTIF_SET_FLAGS: libc::c_ulong = 0x4008_2104;
const SYNC_WAKE_UP: libc::c_ulong = 1;

/// The filter's labels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ConnectLabel {
    NextArchitecture(usize),
    Datagram,
    Length,
    Socketcall,
    Notify,
    Refuse,
    Allow,
}

fn program() -> Vec<sock_filter> {
    use Instruction::{IfEqual, Label, Load, Mask, Return, Unless};

    let mut program = vec![Load(ARCHITECTURE)];
    for (index, architecture) in ARCHITECTURES.iter().enumerate() {
        program.extend([
            Unless(architecture.audit, ConnectLabel::NextArchitecture(index)),
            Load(NUMBER),
            Mask(!X32),
            IfEqual(architecture.connect, ConnectLabel::Notify),
            IfEqual(architecture.sendto, ConnectLabel::Datagram),
            IfEqual(IO_URING_SETUP, ConnectLabel::Refuse),
        ]);
        program.extend(architecture.socketcall.map(|number| IfEqual(number, ConnectLabel::Socketcall)));
        program.extend([Return(libc::SECCOMP_RET_ALLOW), Label(ConnectLabel::NextArchitecture(index))]);
    }
    program.extend([
        Return(libc::SECCOMP_RET_ALLOW),
        Label(ConnectLabel::Socketcall),
        Load(argument(0)),
        IfEqual(SOCKETCALL_CONNECT, ConnectLabel::Notify),
        IfEqual(SOCKETCALL_SENDTO, ConnectLabel::Notify),
        Return(libc::SECCOMP_RET_ALLOW),
        Label(ConnectLabel::Datagram),
        Load(argument(4)),
        Unless(0, ConnectLabel::Length),
        Load(argument(4) + 4),
        IfEqual(0, ConnectLabel::Allow),
        Label(ConnectLabel::Length),
        Load(argument(5)),
    ]);
    program.extend(UNHELD_LENGTHS.map(|length| IfEqual(length, ConnectLabel::Allow)));
    program.extend([
        Label(ConnectLabel::Notify),
        Return(libc::SECCOMP_RET_USER_NOTIF),
        Label(ConnectLabel::Refuse),
        Return(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
        Label(ConnectLabel::Allow),
        Return(libc::SECCOMP_RET_ALLOW),
    ]);
    bpf::assemble(&program)
}

/// The supervisor's end of the filter, which receives the held calls.
#[derive(Debug)]
pub struct ConnectSupervisor(OwnedFd);

/// A held call.
#[derive(Clone, Copy, Debug)]
pub struct PendingConnect {
    id: u64,
    /// The ID of the calling thread in the supervisor's PID namespace.
    pub thread: i32,
    /// The place of the address in the thread's memory, and its length in bytes.
    address: u64,
    length: usize,
    /// The place of the arguments if the call is socketcall(2), and the index of the address among them.
    indirect: Option<(u64, u64)>,
}

/// The destination of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The path of a unix socket, as the caller gave it.
    Path(Vec<u8>),
    /// An address of another family, or an abstract or unnamed unix socket, which belongs to a network namespace.
    Other,
}

/// Installs the filter in the calling thread and its future threads and children.
///
/// # Errors
/// Fails with `EACCES` unless the thread has CAP_SYS_ADMIN or `no_new_privs`, with `EBUSY` if it has such a filter
/// already, and with `EINVAL` on a kernel before 5.0.
pub fn install() -> io::Result<ConnectSupervisor> {
    let program = program();
    // SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, since Linux 5.19: only fatal signals interrupt a call that the supervisor
    // has received.
    let killable = 1 << 5;
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let installed = match super::install(&program, flags | killable) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => super::install(&program, flags),
        other => other,
    };
    let descriptor = i32::try_from(installed?).map_err(io::Error::other)?;
    // Since Linux 6.6: caller and supervisor wake each other on the same CPU, which is faster.
    // SAFETY: the call takes numbers only. Older kernels refuse it.
    unsafe { libc::ioctl(descriptor, NOTIF_SET_FLAGS as _, SYNC_WAKE_UP) };
    // SAFETY: the kernel has just created this descriptor for the caller.
    Ok(ConnectSupervisor(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

impl From<OwnedFd> for ConnectSupervisor {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl AsFd for ConnectSupervisor {
    /// Readable when a call is held. Hung up when the last process with the filter has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The result of [`ConnectSupervisor::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// A call is held.
    Call,
    /// The last process with the filter has ended.
    Over,
    /// The time is up.
    TimeUp,
}

impl ConnectSupervisor {
    /// Waits until a call is held, the last process with the filter has ended, or the time is up.
    ///
    /// # Errors
    /// Fails as poll(2) does.
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

    /// Receives a held call. Returns none if its caller has ended or was interrupted meanwhile.
    ///
    /// # Errors
    /// Fails as `SECCOMP_IOCTL_NOTIF_RECV` does.
    pub fn receive(&self) -> io::Result<Option<PendingConnect>> {
        // The kernel requires that all fields are zero.
        let data = libc::seccomp_data { nr: 0, arch: 0, instruction_pointer: 0, args: [0; 6] };
        let mut received = libc::seccomp_notif { id: 0, pid: 0, flags: 0, data };
        // SAFETY: the kernel writes a structure of this size, which lives until the call returns.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_RECV as _, &raw mut received) } != 0 {
            return match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
                error => Err(error),
            };
        }
        let data = received.data;
        let number = data.nr.cast_unsigned() & !X32;
        let architecture = ARCHITECTURES.iter().find(|architecture| architecture.audit == data.arch);
        let (address, length, indirect) = match architecture {
            Some(it) if it.socketcall == Some(number) => {
                let at = if data.args[0] == u64::from(SOCKETCALL_SENDTO) { 4 } else { 1 };
                (0, 0, Some((data.args[1], at)))
            }
            Some(it) if it.sendto == number => (data.args[4], data.args[5], None),
            _ => (data.args[1], data.args[2], None),
        };
        // The kernel takes the lower 32 bits of the argument as the length.
        let length = length as u32 as usize;
        Ok(Some(PendingConnect { id: received.id, thread: received.pid.cast_signed(), address, length, indirect }))
    }

    /// Returns whether a call is still held. If so, its thread ID has not been reused.
    pub fn is_waiting(&self, call: &PendingConnect) -> bool {
        // SAFETY: the kernel reads a number, which lives until the call returns.
        unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_ID_VALID as _, &raw const call.id) == 0 }
    }

    /// Lets a call continue, or makes it fail with an error number. Does nothing if the caller has ended.
    ///
    /// # Errors
    /// Fails as `SECCOMP_IOCTL_NOTIF_SEND` does.
    pub fn answer(&self, call: &PendingConnect, errno: Option<i32>) -> io::Result<()> {
        /// `SECCOMP_USER_NOTIF_FLAG_CONTINUE` of linux/seccomp.h.
        const CONTINUE: u32 = 1;

        let response = libc::seccomp_notif_resp {
            id: call.id,
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
    /// Reads the destination from the caller's memory.
    ///
    /// # Errors
    /// Fails with `EPERM` if the caller's memory cannot be read, and with `EFAULT` if the address is invalid, with
    /// which the call itself will fail, too.
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
        let mut bytes = [0; MAX_ADDRESS];
        let bytes = &mut bytes[..length.min(MAX_ADDRESS)];
        let read = read_memory(self.thread, address, bytes)?;
        Ok(parse(&bytes[..read]))
    }

    /// Returns whether the address has the length of an IPv4 or IPv6 address. Where the caller's memory cannot be read,
    /// nothing more is known.
    pub fn has_length_of_internet_address(&self) -> bool {
        self.indirect.is_none() && matches!(self.length, 16 | 28)
    }
}

/// Parses an address (`struct sockaddr_un` of unix(7)). A path ends at the first NUL or with the address.
fn parse(bytes: &[u8]) -> Destination {
    let is_unix = bytes.first_chunk().is_some_and(|family| u16::from_ne_bytes(*family) == libc::AF_UNIX as u16);
    match bytes.get(2..).unwrap_or_default().split(|byte| *byte == 0).next() {
        Some(path) if is_unix && !path.is_empty() => Destination::Path(path.to_vec()),
        _ => Destination::Other,
    }
}

/// Reads memory of another process, and returns the number of bytes read (process_vm_readv(2)).
fn read_memory(thread: i32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let remote = RemoteIoVec { base: address as usize, len: buffer.len() };
    Ok(process_vm_readv(Pid::from_raw(thread), &mut [IoSliceMut::new(buffer)], &[remote])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::seccomp::architecture::{self, Architecture};

    #[test]
    fn connections_are_held_in_programs_of_all_architectures() {
        const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
        const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
        let program = program();
        let verdict = |architecture, number, arguments| architecture::run(&program, architecture, number, arguments);
        for Architecture { audit, connect, sendto, socketcall, .. } in ARCHITECTURES {
            for bit in [0, X32] {
                assert_eq!(verdict(audit, connect | bit, [3, 0x7fff_0000, 110, 0, 0, 0]), NOTIFY);
                let to = |address, length| verdict(audit, sendto | bit, [3, 1, 2, 0, address, length]);
                assert_eq!(to(0, 0), ALLOW, "a connected socket");
                assert_eq!(to(0x7f00_0000_0000, 110), NOTIFY);
                assert_eq!(to(0x1000, 21), NOTIFY);
                assert_eq!([to(0x1000, 16), to(0x1000, 28)], [ALLOW; 2], "UDP");
                assert_eq!(
                    verdict(audit, IO_URING_SETUP | bit, [0; 6]),
                    libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()
                );
            }
            for other in [connect - 1, connect + 1, sendto + 1, 0] {
                assert_eq!(verdict(audit, other, [1; 6]), ALLOW);
            }
            if let Some(socketcall) = socketcall {
                let calls = |call| verdict(audit, socketcall, [call, 0x1000, 0, 0, 0, 0]);
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
