//! Limits which system calls a thread may make (seccomp(2)).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

/// What a call that is not allowed fails with. Whoever makes it may go on without: libraries try what an older kernel would refuse.
const REFUSAL: i32 = libc::EPERM;

/// A list of system calls that are allowed; all others fail with EPERM.
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
        let length = libc::c_ushort::try_from(self.0.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let program = Program { length, filter: self.0.as_ptr() };
        // SAFETY: the kernel reads the program and the filter that it points to, both of which live until the call returns.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
