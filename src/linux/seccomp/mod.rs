//! Filters that limit the system calls of a thread (seccomp(2)).

mod allow_list;
mod architecture;
pub mod connect;

use std::fmt;
use std::io;

use libc::sock_filter;

use super::bpf::{self, Instruction};
use architecture::{ARCHITECTURE, ARCHITECTURES, Architecture, NUMBER, X32, argument};

/// The error of a forbidden call. Libraries fall back as on an older kernel.
const REFUSAL: i32 = libc::EPERM;

/// The ioctl(2) commands that insert input into a terminal as if a user had typed it: TIOCSTI (ioctl_tty(2)) and
/// TIOCLINUX, which pastes a console's selection (ioctl_console(2)). They have the same numbers in all
/// [`ARCHITECTURES`].
const TYPING: [u32; 2] = [0x5412, 0x541c];

/// A filter that forbids system calls: they fail with `EPERM`.
pub struct SyscallFilter(Vec<sock_filter>);

impl fmt::Debug for SyscallFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SyscallFilter({} instructions)", self.0.len())
    }
}

impl SyscallFilter {
    /// Creates a filter that allows only `calls`, and socket(2) and socketpair(2) for the address families `families`.
    ///
    /// # Errors
    /// Fails with `Unsupported` on an architecture whose numbers are not known here.
    pub fn allow_only(calls: &[libc::c_long], families: &[libc::c_int]) -> io::Result<Self> {
        match cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            true => Ok(Self(allow_list::program(calls, families))),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Creates the filter of the programs inside. It forbids two things, in 32-bit programs as well:
    ///
    /// - Making the kernel create a missing key (request_key(2) with call-out information). For that, the kernel runs a
    ///   program of the host outside of all the caller's namespaces, which may resolve host names
    ///   (key.dns_resolver(8)). Existing keys are found as before.
    /// - Typing on a terminal by ioctl(2). The terminal may belong to a shell of root, which would execute the input
    ///   after the program has ended. The kernel ignores the upper half of the command, and so does the filter.
    pub fn for_programs() -> Self {
        use Instruction::{IfEqual, Label, Load, Mask, Return, Unless};

        #[derive(Clone, Copy, PartialEq, Eq)]
        enum ProgramLabel {
            NextArchitecture(usize),
            Ioctl,
            RequestKey,
            Refuse,
        }

        let mut program = vec![Load(ARCHITECTURE)];
        for (index, Architecture { audit, request_key, ioctl, .. }) in ARCHITECTURES.iter().enumerate() {
            program.extend([
                Unless(*audit, ProgramLabel::NextArchitecture(index)),
                Load(NUMBER),
                Mask(!X32),
                IfEqual(*request_key, ProgramLabel::RequestKey),
            ]);
            program.extend(ioctl.iter().map(|number| IfEqual(*number, ProgramLabel::Ioctl)));
            program.extend([Return(libc::SECCOMP_RET_ALLOW), Label(ProgramLabel::NextArchitecture(index))]);
        }
        program.extend([Return(libc::SECCOMP_RET_ALLOW), Label(ProgramLabel::Ioctl), Load(argument(1))]);
        program.extend(TYPING.map(|command| IfEqual(command, ProgramLabel::Refuse)));
        program.extend([
            Return(libc::SECCOMP_RET_ALLOW),
            Label(ProgramLabel::RequestKey),
            Load(argument(2)),
            Unless(0, ProgramLabel::Refuse),
            Load(argument(2) + 4),
            Unless(0, ProgramLabel::Refuse),
            Return(libc::SECCOMP_RET_ALLOW),
            Label(ProgramLabel::Refuse),
            Return(libc::SECCOMP_RET_ERRNO | REFUSAL.unsigned_abs()),
        ]);
        Self(bpf::assemble(&program))
    }

    /// Installs the filter like [`Self::install`], but leaves speculative execution as it is.
    ///
    /// Before Linux 5.16, every filter slowed its threads down by mitigations for code that reads secrets of its own
    /// process (the kernel's Documentation/userspace-api/spec_ctrl.rst).
    ///
    /// # Errors
    /// Fails as [`Self::install`] does.
    pub fn install_without_speculation_limits(&self) -> io::Result<()> {
        self.install_with(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW)
    }

    /// Installs the filter in the calling thread and its future threads and children. It cannot be removed.
    ///
    /// # Errors
    /// Fails with `EACCES` unless the thread has CAP_SYS_ADMIN or `no_new_privs`, and with `EINVAL` on a kernel without
    /// seccomp filters.
    pub fn install(&self) -> io::Result<()> {
        self.install_with(0)
    }

    /// Installs the filter in all threads of the process.
    ///
    /// # Errors
    /// Fails as [`Self::install`] does, and with `ESRCH` if another thread has a filter that the calling one does not
    /// have.
    pub fn install_in_all_threads(&self) -> io::Result<()> {
        self.install_with(libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH)
    }

    fn install_with(&self, flags: libc::c_ulong) -> io::Result<()> {
        install(&self.0, flags).map(drop)
    }
}

/// Installs a filter in the calling thread, and returns the result of seccomp(2): a descriptor if the flags ask for
/// one.
fn install(program: &[sock_filter], flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let program = bpf::Program::of(program)?;
    // SAFETY: the kernel reads the program and the filter that it points to, both of which live until the call returns.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) } {
        -1 => Err(io::Error::last_os_error()),
        // Without TSYNC_ESRCH, TSYNC would return the ID of a thread that cannot have the filter.
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the filter's verdict on a call with these second and third arguments.
    fn verdict(filter: &SyscallFilter, architecture: u32, number: u32, second: u64, third: u64) -> u32 {
        architecture::run(&filter.0, architecture, number, [0, second, third, 0, 0, 0])
    }

    const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | REFUSAL as u32;
    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;

    #[test]
    fn programs_of_all_architectures_cannot_request_missing_keys() {
        let filter = SyscallFilter::for_programs();
        for Architecture { audit, request_key, .. } in ARCHITECTURES {
            for number in [request_key, request_key | X32] {
                for third in [1, 0x7fff_0000_0000, 0x1234_5678_9abc] {
                    assert_eq!(verdict(&filter, audit, number, 0, third), REFUSED);
                }
                assert_eq!(verdict(&filter, audit, number, 0, 0), ALLOWED, "existing keys are found");
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
    fn programs_of_all_architectures_cannot_type_on_a_terminal() {
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
    fn calls_that_are_not_allowed_fail_and_others_work() {
        // The calls that the thread needs to return its results and to end.
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
        assert_eq!(thread.join().expect("the thread ends normally"), [false, false, true, true]);
        // SAFETY: the call takes no arguments.
        assert!(unsafe { libc::syscall(libc::SYS_getppid) } >= 0, "other threads are not filtered");
    }
}
