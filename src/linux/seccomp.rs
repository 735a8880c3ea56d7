//! Limits which system calls a thread may make (seccomp(2)).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

/// What a call that is not allowed fails with. Whoever makes it may go on without: libraries try what an older kernel would refuse.
const REFUSAL: i32 = libc::EPERM;

/// Where a filter finds the number of a call, the architecture that it is of, and the third argument, least significant half first
/// (`struct seccomp_data` of linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const THIRD_ARGUMENT: u32 = 32;

/// The bit by which calls of the x32 ABI differ from others of their architecture (`__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;

/// The number of request_key(2) in each architecture whose programs a kernel may execute (`AUDIT_ARCH_*` of linux/audit.h).
#[cfg(target_arch = "x86_64")]
const REQUEST_KEY: [(u32, u32); 2] = [(0xc000_003e, libc::SYS_request_key as u32), (0x4000_0003, 287)];
#[cfg(not(target_arch = "x86_64"))]
const REQUEST_KEY: [(u32, u32); 2] = [(0xc000_00b7, libc::SYS_request_key as u32), (0x4000_0028, 310)];

/// The instructions that are used (linux/bpf_common.h).
const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Which system calls are allowed; all others fail with EPERM.
pub struct Filter(BpfProgram);

/// What the kernel takes a filter as (`struct sock_fprog` of linux/filter.h).
#[repr(C)]
struct Program {
    length: libc::c_ushort,
    filter: *const sock_filter,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filter({} instructions)", self.0.len())
    }
}

impl Filter {
    /// Makes a filter that allows `calls`, and socket(2) and socketpair(2) for address families of `families` alone.
    ///
    /// # Errors
    /// `Unsupported` on an architecture for which no filter can be made.
    pub fn allowing(calls: &[libc::c_long], families: &[libc::c_int]) -> io::Result<Self> {
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

    /// Makes a filter that allows all but to have a key made that is not there yet (request_key(2) with something to call out): the kernel
    /// has a program of the host's do that, outside of all namespaces of the caller's, which for some kinds of keys looks names up
    /// (key.dns_resolver(8)). Keys that are there are found as before. It holds for programs of 32 bits, too.
    pub fn without_key_requests() -> Self {
        const FIRST_ALLOW: u8 = 9;
        const CHECK: u8 = FIRST_ALLOW + 1;
        const LAST_ALLOW: u8 = CHECK + 4;
        const REFUSE: u8 = LAST_ALLOW + 1;
        let mut program = vec![instruction(LOAD, ARCHITECTURE)];
        for (architecture, number) in REQUEST_KEY {
            let here = program.len() as u8;
            program.extend([
                jump(architecture, 0, 3),
                instruction(LOAD, NUMBER),
                instruction(AND, !X32),
                jump(number, CHECK - (here + 4), FIRST_ALLOW - (here + 4)),
            ]);
        }
        program.extend([
            instruction(RETURN, libc::SECCOMP_RET_ALLOW),
            instruction(LOAD, THIRD_ARGUMENT),
            jump(0, 0, REFUSE - (CHECK + 2)),
            instruction(LOAD, THIRD_ARGUMENT + 4),
            jump(0, 0, REFUSE - LAST_ALLOW),
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
    pub fn install_at_no_cost(&self) -> io::Result<()> {
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
    let program = Program { length, filter: program.as_ptr() };
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

    /// What a filter says of a call, as the kernel would ask it.
    fn verdict(filter: &Filter, architecture: u32, number: u32, third: u64) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter.0[at];
            at += 1;
            match u32::from(code) {
                LOAD => {
                    loaded = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
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

    #[test]
    fn no_key_is_requested_by_a_program_of_any_architecture() {
        let filter = Filter::without_key_requests();
        const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | REFUSAL as u32;
        for (architecture, number) in REQUEST_KEY {
            for number in [number, number | X32] {
                for third in [1, 0x7fff_0000_0000, 0x1234_5678_9abc] {
                    assert_eq!(verdict(&filter, architecture, number, third), REFUSED);
                }
                assert_eq!(
                    verdict(&filter, architecture, number, 0),
                    libc::SECCOMP_RET_ALLOW,
                    "what is there is found"
                );
            }
            for other in [number - 1, number + 1, 0] {
                assert_eq!(verdict(&filter, architecture, other, 1), libc::SECCOMP_RET_ALLOW);
            }
        }
        assert_eq!(
            REQUEST_KEY.map(|(architecture, _)| verdict(&filter, architecture, REQUEST_KEY[0].1, 1)),
            [REFUSED, libc::SECCOMP_RET_ALLOW]
        );
        assert_eq!(verdict(&filter, 0, REQUEST_KEY[0].1, 1), libc::SECCOMP_RET_ALLOW);
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
        let filter = Filter::allowing(&calls, &[libc::AF_UNIX]).expect("a filter");
        let thread = std::thread::spawn(move || {
            crate::linux::capabilities::forbid_new_privileges().expect("no new privileges");
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
