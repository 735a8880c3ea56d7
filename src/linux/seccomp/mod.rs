//! Limits which system calls a thread may make (seccomp(2)).

pub mod connect;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

/// What a call that is not allowed fails with. Whoever makes it may go on without: libraries try what an older kernel would refuse.
const REFUSAL: i32 = libc::EPERM;

/// Where a filter finds the number of a call, the architecture that it is of, and the second and the third argument, least significant
/// half first (`struct seccomp_data` of linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const SECOND_ARGUMENT: u32 = 24;
const THIRD_ARGUMENT: u32 = 32;

/// The bit by which calls of the x32 ABI differ from others of their architecture (`__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;

/// The numbers of the restricted system calls in one of the architectures whose programs a kernel may execute.
struct Architecture {
    /// `AUDIT_ARCH_*` of linux/audit.h.
    audit: u32,
    request_key: u32,
    /// ioctl(2), by each of its numbers.
    ioctl: &'static [u32],
}

/// x32 has a number of its own for ioctl(2), 514, and shares the architecture of x86-64.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { audit: 0xc000_003e, request_key: libc::SYS_request_key as u32, ioctl: &[16, 514] },
    Architecture { audit: 0x4000_0003, request_key: 287, ioctl: &[54] },
];
#[cfg(not(target_arch = "x86_64"))]
const ARCHITECTURES: [Architecture; 2] = [
    Architecture { audit: 0xc000_00b7, request_key: libc::SYS_request_key as u32, ioctl: &[29] },
    Architecture { audit: 0x4000_0028, request_key: 310, ioctl: &[54] },
];

/// The commands of ioctl(2) that put input into a terminal as if it had been typed (ioctl_tty(2), ioctl_console(2)): TIOCSTI, and
/// TIOCLINUX, which pastes what is selected on a console. They are the same numbers in all of the architectures.
const TYPING: [u32; 2] = [0x5412, 0x541c];

/// The instructions that are used (linux/bpf_common.h).
const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Which system calls are allowed; all others fail with EPERM.
pub struct SyscallFilter(BpfProgram);

/// What the kernel takes a filter as (`struct sock_fprog` of linux/filter.h).
#[repr(C)]
struct SockFprog {
    length: libc::c_ushort,
    filter: *const sock_filter,
}

impl std::fmt::Debug for SyscallFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SyscallFilter({} instructions)", self.0.len())
    }
}

impl SyscallFilter {
    /// Makes a filter that allows `calls`, and socket(2) and socketpair(2) for address families of `families` alone.
    ///
    /// # Errors
    /// `Unsupported` on an architecture for which no filter can be made.
    pub fn allow_only(calls: &[libc::c_long], families: &[libc::c_int]) -> io::Result<Self> {
        let other = |error: seccompiler::BackendError| io::Error::other(error);
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.iter().map(|call| (*call, Vec::new())).collect();
        let family = |family: &libc::c_int| {
            let is = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family.unsigned_abs().into())?;
            SeccompRule::new(vec![is])
        };
        let sockets = families.iter().map(family).collect::<Result<Vec<_>, _>>().map_err(other)?;
        // Without a condition a call is allowed whatever its arguments are.
        if !sockets.is_empty() {
            rules.insert(libc::SYS_socket, sockets.clone());
            rules.insert(libc::SYS_socketpair, sockets);
        }
        let architecture = TargetArch::try_from(std::env::consts::ARCH)
            .map_err(|error| io::Error::new(io::ErrorKind::Unsupported, error.to_string()))?;
        let refuse = SeccompAction::Errno(REFUSAL.unsigned_abs());
        let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, architecture).map_err(other)?;
        Ok(Self(filter.try_into().map_err(other)?))
    }

    /// Makes a filter for programs inside, which allows all but two things, also in programs of 32 bits:
    ///
    /// - To have the kernel make a key that is not there yet (request_key(2) with something to call out). The kernel runs a program of the
    ///   host's for that, outside of all namespaces of the caller's, and for some kinds of keys it looks names up (key.dns_resolver(8)).
    ///   Keys that are there are found as before.
    /// - To type on a terminal by ioctl(2). The terminal may be root's shell's, which executes what is typed when the program has ended. The
    ///   kernel ignores the upper half of the command, so the lower half alone is compared.
    pub fn for_programs() -> Self {
        // Behind the blocks of the architectures; each distance is from the instruction after the jump.
        let blocks: usize = ARCHITECTURES.iter().map(|architecture| 5 + architecture.ioctl.len()).sum();
        let typing = 1 + blocks + 1;
        let key = typing + 1 + TYPING.len() + 1;
        let refuse = key + 5;
        let distance = |here: usize, to: usize| (to - here - 1) as u8;
        let mut program = vec![instruction(LOAD, ARCHITECTURE)];
        for Architecture { audit, request_key, ioctl } in &ARCHITECTURES {
            program.extend([
                jump(*audit, 0, 4 + ioctl.len() as u8),
                instruction(LOAD, NUMBER),
                instruction(AND, !X32),
                jump(*request_key, distance(program.len() + 3, key), 0),
            ]);
            for number in *ioctl {
                program.push(jump(*number, distance(program.len(), typing), 0));
            }
            program.push(instruction(RETURN, libc::SECCOMP_RET_ALLOW));
        }
        program.push(instruction(RETURN, libc::SECCOMP_RET_ALLOW));
        program.push(instruction(LOAD, SECOND_ARGUMENT));
        for command in TYPING {
            program.push(jump(command, distance(program.len(), refuse), 0));
        }
        program.push(instruction(RETURN, libc::SECCOMP_RET_ALLOW));
        program.extend([
            instruction(LOAD, THIRD_ARGUMENT),
            jump(0, 0, distance(key + 1, refuse)),
            instruction(LOAD, THIRD_ARGUMENT + 4),
            jump(0, 0, distance(key + 3, refuse)),
            instruction(RETURN, libc::SECCOMP_RET_ALLOW),
            instruction(RETURN, libc::SECCOMP_RET_ERRNO | REFUSAL.unsigned_abs()),
        ]);
        Self(program)
    }

    /// Applies it to the calling thread, and to those that it starts from now on, without what older kernels did besides: they had a thread
    /// with any filter compute more slowly, as if the filter confined code that reads its own process's secrets (the kernel's
    /// Documentation/userspace-api/spec_ctrl.rst).
    ///
    /// # Errors
    /// As for [`Self::install`].
    pub fn install_without_speculation_limits(&self) -> io::Result<()> {
        self.install_with(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW)
    }

    /// Applies it to the calling thread, and to those that it starts from now on. It cannot be taken back.
    ///
    /// # Errors
    /// `EACCES` unless the thread has CAP_SYS_ADMIN or `no_new_privs`; `EINVAL` on a kernel without seccomp filters.
    pub fn install(&self) -> io::Result<()> {
        self.install_with(0)
    }

    /// Applies it to all threads of the process, none of which may have a filter that the calling one does not have.
    ///
    /// # Errors
    /// As for [`Self::install`], and `ESRCH` if a thread has another filter.
    pub fn install_in_all_threads(&self) -> io::Result<()> {
        self.install_with(libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH)
    }

    fn install_with(&self, flags: libc::c_ulong) -> io::Result<()> {
        install(&self.0, flags).map(drop)
    }
}

/// Applies a filter to the calling thread. Returns what seccomp(2) does: the listener, where the flags ask for one.
pub(super) fn install(program: &[sock_filter], flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let length = libc::c_ushort::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = SockFprog { length, filter: program.as_ptr() };
    // SAFETY: the kernel reads the program and the filter that it points to, both of which live until the call returns.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) } {
        -1 => Err(io::Error::last_os_error()),
        // With TSYNC alone, the number of a thread that cannot be brought along would be returned; here it is an error.
        result => Ok(result),
    }
}

fn instruction(code: u32, operand: u32) -> sock_filter {
    // All codes fit: they are of 16 bits.
    sock_filter { code: code as u16, jt: 0, jf: 0, k: operand }
}

/// Passes over so many instructions if what was loaded is this, and over so many if not.
fn jump(operand: u32, equal: u8, other: u8) -> sock_filter {
    sock_filter { jt: equal, jf: other, ..instruction(JUMP_IF_EQUAL, operand) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a filter says of a call with these second and third arguments, as the kernel would ask it.
    fn verdict(filter: &SyscallFilter, architecture: u32, number: u32, second: u64, third: u64) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter.0[at];
            at += 1;
            match u32::from(code) {
                LOAD => {
                    loaded = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        SECOND_ARGUMENT => second as u32,
                        THIRD_ARGUMENT => third as u32,
                        36 => (third >> 32) as u32,
                        other => panic!("nothing is at {other}"),
                    }
                }
                AND => loaded &= k,
                JUMP_IF_EQUAL => at += usize::from(if loaded == k { jt } else { jf }),
                RETURN => return k,
                other => panic!("no instruction {other}"),
            }
        }
    }

    const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | REFUSAL as u32;
    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;

    #[test]
    fn no_key_is_requested_by_a_program_of_any_architecture() {
        let filter = SyscallFilter::for_programs();
        for Architecture { audit, request_key, .. } in ARCHITECTURES {
            for number in [request_key, request_key | X32] {
                for third in [1, 0x7fff_0000_0000, 0x1234_5678_9abc] {
                    assert_eq!(verdict(&filter, audit, number, 0, third), REFUSED);
                }
                assert_eq!(verdict(&filter, audit, number, 0, 0), ALLOWED, "what is there is found");
            }
            for other in [request_key - 1, request_key + 1, 0] {
                assert_eq!(verdict(&filter, audit, other, 0, 1), ALLOWED);
            }
        }
        let first = ARCHITECTURES[0].request_key;
        assert_eq!(
            ARCHITECTURES.map(|architecture| verdict(&filter, architecture.audit, first, 0, 1)),
            [REFUSED, ALLOWED]
        );
        assert_eq!(verdict(&filter, 0, first, 0, 1), ALLOWED);
    }

    #[test]
    fn nothing_is_typed_on_a_terminal_by_a_program_of_any_architecture() {
        let filter = SyscallFilter::for_programs();
        assert!(ARCHITECTURES[0].ioctl.contains(&(libc::SYS_ioctl as u32)));
        for Architecture { audit, ioctl, .. } in ARCHITECTURES {
            for number in ioctl.iter().flat_map(|number| [*number, *number | X32]) {
                for command in TYPING.map(u64::from) {
                    for upper in [0, 1 << 32, 0xffff_ffff << 32] {
                        assert_eq!(verdict(&filter, audit, number, command | upper, 0), REFUSED);
                    }
                    for other in [command - 1, command + 1, 0, 0x5401] {
                        assert_eq!(verdict(&filter, audit, number, other, 1), ALLOWED);
                    }
                }
                assert_eq!(verdict(&filter, audit, number + 1, TYPING[0].into(), 0), ALLOWED);
            }
        }
    }

    #[test]
    fn what_is_not_allowed_fails_and_the_rest_works() {
        // What the thread needs to end, and to be asked.
        let calls = [
            libc::SYS_futex,
            libc::SYS_munmap,
            libc::SYS_madvise,
            libc::SYS_exit,
            libc::SYS_rt_sigprocmask,
            libc::SYS_sigaltstack,
            libc::SYS_close,
            libc::SYS_mmap,
            libc::SYS_brk,
            libc::SYS_gettid,
            libc::SYS_prctl,
        ];
        let filter = SyscallFilter::allow_only(&calls, &[libc::AF_UNIX]).expect("a filter");
        let thread = std::thread::spawn(move || {
            crate::linux::capabilities::set_no_new_privileges().expect("no new privileges");
            filter.install().expect("installed");
            // SAFETY: these calls take numbers only.
            let results = unsafe {
                [
                    libc::syscall(libc::SYS_getppid),
                    libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).into(),
                    libc::syscall(libc::SYS_gettid),
                    libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).into(),
                ]
            };
            results.map(|result| result >= 0)
        });
        assert_eq!(thread.join().expect("it lives"), [false, false, true, true]);
        // SAFETY: the call takes nothing.
        assert!(unsafe { libc::syscall(libc::SYS_getppid) } >= 0, "other threads are free");
    }
}
