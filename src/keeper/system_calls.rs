//! The system calls that the threads of a running keeper may make (seccomp(2)).
//!
//! The keeper executes nothing, mounts nothing, traces nothing, and opens no raw socket. The data path's thread, which
//! reads packets from the Internet, opens nothing at all.
//!
//! The list of the main thread depends mostly on the C library's resolver, which may load any module that
//! nsswitch.conf(5) names. So it allows what is harmless, instead of only what appears in a trace.

use std::io;

use crate::linux::seccomp::SyscallFilter;

/// The calls of a thread that computes, waits, and moves bytes between open descriptors.
const DATA: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_create1,
    libc::SYS_close,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rseq,
    libc::SYS_restart_syscall,
    // Limiting the thread further.
    libc::SYS_seccomp,
    libc::SYS_prctl,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The calls of a thread that relays connections: sockets of the families that its filter allows, and pipes.
const CONNECTIONS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_splice,
    libc::SYS_pipe2,
    libc::SYS_fcntl,
];

/// The calls of the thread that opens the sockets from which the relay to local networks replies.
const REPLIES: &[libc::c_long] = &[libc::SYS_bind, libc::SYS_setsockopt];

/// The calls of the DNS forwarder's thread. It opens no sockets: those that it has are in the tunnel's namespace.
const DNS_FORWARDER: &[libc::c_long] = &[libc::SYS_accept4, libc::SYS_connect, libc::SYS_ppoll, libc::SYS_fcntl];

/// The further calls of the main thread and of the C library's resolver.
const KEEPER: &[libc::c_long] = &[
    // Files.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_ftruncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_flock,
    libc::SYS_ioctl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_memfd_create,
    libc::SYS_close_range,
    // Sockets of the families in FAMILIES.
    libc::SYS_bind,
    libc::SYS_listen,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_signalfd4,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    // Threads.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_membarrier,
    libc::SYS_sched_getaffinity,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getppid,
    // Killing the processes in the tunnel.
    libc::SYS_kill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    // Entering the tunnel's namespace, and removing its name.
    libc::SYS_setns,
    libc::SYS_umount2,
];

/// The older calls for the same purposes that only x86-64 has.
#[cfg(target_arch = "x86_64")]
mod legacy {
    pub(super) const DATA: &[libc::c_long] = &[libc::SYS_epoll_wait];

    pub(super) const DNS_FORWARDER: &[libc::c_long] = &[libc::SYS_poll];

    pub(super) const KEEPER: &[libc::c_long] = &[
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_access,
        libc::SYS_readlink,
        libc::SYS_mkdir,
        libc::SYS_rmdir,
        libc::SYS_unlink,
        libc::SYS_rename,
        libc::SYS_chmod,
        libc::SYS_poll,
        libc::SYS_select,
        libc::SYS_pipe,
        libc::SYS_dup2,
        libc::SYS_time,
        libc::SYS_arch_prctl,
    ];
}

/// Other architectures have no older calls.
#[cfg(not(target_arch = "x86_64"))]
mod legacy {
    pub(super) const DATA: &[libc::c_long] = &[];
    pub(super) const DNS_FORWARDER: &[libc::c_long] = &[];
    pub(super) const KEEPER: &[libc::c_long] = &[];
}

/// The socket families that the keeper and the C library's resolver use. Raw packets, virtual machines and the kernel's
/// cryptography are not among them.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Returns the filter of the main thread and of the threads that it starts later. A keeper that runs hooks at its end
/// has no filter, because the hooks would inherit it.
pub(super) fn keeper() -> io::Result<SyscallFilter> {
    SyscallFilter::allow_only(&[DATA, legacy::DATA, CONNECTIONS, KEEPER, legacy::KEEPER].concat(), &FAMILIES)
}

/// Returns the filter of the main thread of an attached tunnel's process and of its resolver's threads. As the first
/// process of a container, it reaps children that it has not started.
pub(super) fn attached() -> io::Result<SyscallFilter> {
    let reaping = [libc::SYS_wait4, libc::SYS_waitid];
    let calls = [DATA, legacy::DATA, CONNECTIONS, KEEPER, legacy::KEEPER, &reaping].concat();
    SyscallFilter::allow_only(&calls, &FAMILIES)
}

/// Returns the filter of a thread that relays ports: it opens connections and pipes.
pub(super) fn relay() -> io::Result<SyscallFilter> {
    SyscallFilter::allow_only(&[DATA, legacy::DATA, CONNECTIONS].concat(), &[libc::AF_INET, libc::AF_INET6])
}

/// Returns the filter of the thread that opens the sockets from which the relay to local networks replies.
pub(super) fn replies() -> io::Result<SyscallFilter> {
    SyscallFilter::allow_only(&[DATA, legacy::DATA, REPLIES].concat(), &[libc::AF_INET, libc::AF_INET6])
}

/// Returns the filter of the DNS forwarder's thread.
pub(super) fn dns_forwarder() -> io::Result<SyscallFilter> {
    SyscallFilter::allow_only(&[DATA, legacy::DATA, DNS_FORWARDER, legacy::DNS_FORWARDER].concat(), &[])
}

/// Returns the filter of the data path's thread.
pub(super) fn data_path() -> io::Result<SyscallFilter> {
    SyscallFilter::allow_only(&[DATA, legacy::DATA].concat(), &[])
}
