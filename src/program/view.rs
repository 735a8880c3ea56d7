//! The program's own view of the host's files: `/etc` without the host's idea of names, `/run` without its resolvers. Both are copies in
//! memory ([`Mirror`]), which a process of their own keeps up to date for as long as the program runs.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::{Program, SetupResult, helpers};
use crate::fault;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::mirror::{HiddenPaths, Mirror};
use crate::linux::mounts;
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::seccomp::SyscallFilter;
use crate::registry::{self, HOSTS, NSSWITCH_CONF};

/// The directories that are copied. Where the copies are built comes last: it is covered then.
const COVERED: [&str; 4] = [ETC, "/var/run", "/var/lib/sss", "/run"];

const ETC: &str = "/etc";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What the process may do that keeps the copies up to date.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ppoll,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_readlinkat,
    libc::SYS_fcntl,
    // What there is of the host's entries, and what is made of them.
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_mkdirat,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_fchmodat,
    libc::SYS_fchmod,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_umount2,
    // Memory, time and the end.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Covers, in the calling process's mount namespace, `/etc` with a copy that has our own files in the place of the host's, and `/run` and
/// others with copies that do not have what is hidden from the program.
pub(super) fn show(program: &Program) -> SetupResult<Mirror> {
    let doing = |what| move |error: io::Error| (what, error);
    let moved = moved();
    let mut mirror = Mirror::new(hidden(program, &moved), &program.staging);
    if fault::is_broken("names") {
        return Ok(mirror);
    }
    // The place is about to be covered, the file with it.
    let resolv_conf = fs::File::open(&program.resolv_conf).map_err(doing("open the tunnel's resolv.conf"))?;
    let views = [
        (RESOLV_CONF, program.names.resolv_conf.clone()),
        (HOSTS, program.names.hosts_file(&read(HOSTS)?)),
        (NSSWITCH_CONF, program.names.nsswitch_file(&read(NSSWITCH_CONF)?)),
    ];
    // Before it is looked at, so that nothing is missed in between.
    for directory in COVERED.into_iter().map(Path::new).chain(moved.iter().map(|(_, place)| &**place)) {
        mirror.guard(directory);
    }
    mirror.cover(ETC.as_ref()).map_err(doing("copy the view of /etc"))?;
    for (path, text) in &views {
        write_readable(path.as_ref(), text).map_err(doing("write the program's own files"))?;
    }
    mounts::make_read_only(ETC.as_ref()).map_err(doing("protect the program's own files"))?;
    // All programs of a tunnel see the same file, into which a change of the resolvers is written.
    let source = PathBuf::from(format!("/proc/self/fd/{}", resolv_conf.as_raw_fd()));
    mounts::bind(&source, RESOLV_CONF.as_ref())
        .and_then(|()| mounts::make_read_only(RESOLV_CONF.as_ref()))
        .map_err(doing("show the tunnel's resolv.conf"))?;
    let others = COVERED.into_iter().filter(|directory| *directory != ETC).map(Path::new);
    for directory in moved.iter().map(|(_, place)| &**place).chain(others) {
        if fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir()) {
            mirror.cover(directory).map_err(doing("hide the host's resolvers"))?;
        }
    }
    Ok(mirror)
}

/// Where those of the directories are that are links, as to a disk with more room: what they are called, and their place. On most systems
/// `/var/run` is a link to `/run`, which is copied anyway.
fn moved() -> Vec<(&'static Path, PathBuf)> {
    let known = |place: &Path| COVERED.iter().any(|directory| Path::new(directory) == place);
    let links = COVERED.into_iter().map(Path::new).filter(|directory| directory.is_symlink());
    let placed = links.filter_map(|directory| Some((directory, fs::canonicalize(directory).ok()?)));
    placed.filter(|(_, place)| !known(place)).collect()
}

/// What the copies do not have. On older systems `/var/run` is a directory of its own, with the same in it as `/run`.
fn hidden(program: &Program, moved: &[(&Path, PathBuf)]) -> HiddenPaths {
    let older = program.hidden.iter().filter_map(|path| path.strip_prefix("/run").ok());
    let older = older.map(|rest| Path::new("/var/run").join(rest));
    let own = [RESOLV_CONF, HOSTS, NSSWITCH_CONF].map(PathBuf::from);
    let mut all: Vec<PathBuf> = program.hidden.iter().cloned().chain(older).chain(own).collect();
    for (directory, place) in moved {
        let there = all.iter().filter_map(|path| path.strip_prefix(directory).ok()).map(|rest| place.join(rest));
        all.extend(there.collect::<Vec<_>>());
    }
    HiddenPaths(all)
}

/// Starts the process that keeps the copies up to date, until `parent`, the caller's own parent, ends or closes the other end of `alive`.
/// `last` is the kernel's last capability.
/// It is the parent's child, so that the program, which the caller becomes, has none that it does not know.
pub(super) fn keep_up_to_date(mirror: &mut Mirror, parent: u32, last: u8, alive: &OwnedFd) -> io::Result<()> {
    if mirror.changes().is_none() {
        return Ok(());
    }
    match process::fork_sibling()? {
        Forked::Parent(_) => Ok(()),
        Forked::Child => {
            let announced = helpers::announce(alive);
            let kept = announced.and_then(|()| limit(mirror, parent, last, alive)).and_then(|()| work(mirror, alive));
            process::exit_now(i32::from(kept.is_err()))
        }
    }
}

/// Leaves this process what it takes to mount, and to look at directories.
fn limit(mirror: &Mirror, parent: u32, last: u8, alive: &OwnedFd) -> io::Result<()> {
    process::set_death_signal(Signal::SIGKILL)?;
    if nix::unistd::getppid().as_raw().cast_unsigned() != parent {
        return Err(io::Error::other("the parent has ended already"));
    }
    // Neither the terminal's signals nor the working directory concern it.
    rustix::process::setsid()?;
    std::env::set_current_dir("/")?;
    process::redirect_to_null(&[0, 1, 2])?;
    let mut own: Vec<i32> = mirror.descriptors().chain([alive.as_raw_fd()]).collect();
    process::close_all_except(&mut own)?;
    // It reads what the host has in its directories: should that take it over, it has no way to more.
    capabilities::raise(CapabilitySet::SETPCAP)?;
    capabilities::limit_bounding_set(CapabilitySet::empty(), last)?;
    capabilities::limit(CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_ADMIN)?;
    capabilities::set_no_new_privileges()?;
    SyscallFilter::allow_only(CALLS, &[])?.install()
}

fn work(mirror: &mut Mirror, alive: &OwnedFd) -> io::Result<()> {
    loop {
        let Some(changes) = mirror.changes() else { return Ok(()) };
        // Nobody says anything there: it is closed.
        if wait_for(&[changes, alive.as_fd()], None)?[1] {
            return Ok(());
        }
        mirror.update()?;
    }
}

/// Writes a file that every user can read, whatever the umask.
fn write_readable(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

fn read(path: &str) -> SetupResult<String> {
    registry::read_host_file(path.as_ref()).map_err(|error| ("read the host's own files", error))
}
