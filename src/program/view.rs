//! The program's view of the host's files: `/etc` with the tunnel's name resolution, and `/run` without the host's
//! resolvers. Both are copies in memory ([`Mirror`]). A helper process keeps them up to date while the program runs.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::enter::Starter;
use super::{Program, helpers};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::mirror::{HiddenPaths, Mirror};
use crate::linux::mounts;
use crate::linux::poll::wait_for;
use crate::linux::process::{self, Forked};
use crate::linux::seccomp::SyscallFilter;
use crate::registry::{self, HOSTS, NSSWITCH_CONF};

/// The directories to copy. `/run` comes last: the copies are built there, which covering it hides.
pub(super) const COVERED: [&str; 4] = [ETC, "/var/run", "/var/lib/sss", RUN];

const ETC: &str = "/etc";
const RUN: &str = "/run";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The system calls of the process that keeps the copies up to date, besides [`helpers::BASE_CALLS`].
pub(super) const CALLS: &[libc::c_long] = &[
    // Looking at the host's files.
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_readlinkat,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    // Changing the copies.
    libc::SYS_mkdirat,
    // Files to mount on. The process lacks the capability to make device nodes.
    libc::SYS_mknodat,
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
];

/// Covers `/etc`, `/run` and others in the calling process's mount namespace by copies. Those lack what is hidden from
/// the program, and have the tunnel's files for name resolution.
///
/// # Errors
/// Returns an error if a file cannot be read, or a copy not be made.
pub(super) fn show(program: &Program) -> Result<Mirror, Failure> {
    let linked = linked_directories();
    let mut mirror = Mirror::new(hidden_paths(program, &linked), &program.staging);
    if shows_host_names() {
        return Ok(mirror);
    }
    cover_shared(program, &mut mirror, &linked, false)?;
    cover_run(program, &mut mirror)?;
    Ok(mirror)
}

/// Covers all but `/run`. If the copies are `shared` by several programs, none of them can write to any.
///
/// # Errors
/// As [`show`].
pub(super) fn cover_shared(
    program: &Program,
    mirror: &mut Mirror,
    linked: &[(&Path, PathBuf)],
    shared: bool,
) -> Result<(), Failure> {
    // Opened before the copies cover it.
    let resolv_conf = fs::File::open(&program.resolv_conf).doing("open the tunnel's resolv.conf")?;
    let own_files = [
        (RESOLV_CONF, program.names.resolv_conf.clone()),
        (HOSTS, program.names.hosts_file(&read(HOSTS)?)),
        (NSSWITCH_CONF, program.names.nsswitch_file(&read(NSSWITCH_CONF)?)),
    ];
    // Watched before they are read, so that no change in between is missed.
    let covered = COVERED.into_iter().filter(|directory| *directory != RUN).map(Path::new);
    for directory in covered.chain(linked.iter().map(|(_, target)| &**target)) {
        mirror.guard(directory);
    }
    mirror.cover(ETC.as_ref()).doing("copy /etc")?;
    for (path, text) in &own_files {
        write_readable(path.as_ref(), text).doing("write the program's own files")?;
    }
    mounts::make_read_only(ETC.as_ref()).doing("protect the program's own files")?;
    // A bind mount, so that all programs of the tunnel see a change of its resolvers.
    let source = PathBuf::from(format!("/proc/self/fd/{}", resolv_conf.as_raw_fd()));
    mounts::bind(&source, RESOLV_CONF.as_ref())
        .and_then(|()| mounts::make_read_only(RESOLV_CONF.as_ref()))
        .doing("show the tunnel's resolv.conf")?;
    let others = COVERED.into_iter().filter(|directory| ![ETC, RUN].contains(directory)).map(Path::new);
    for directory in linked.iter().map(|(_, target)| &**target).chain(others) {
        if fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir()) {
            mirror.cover(directory).doing("hide the host's resolvers")?;
            if shared {
                mounts::make_read_only(directory).doing("protect the copies that programs share")?;
            }
        }
    }
    Ok(())
}

/// Covers `/run`, and the directories that a program is to see empty.
///
/// # Errors
/// As [`show`].
pub(super) fn cover_run(program: &Program, mirror: &mut Mirror) -> Result<(), Failure> {
    mirror.guard(RUN.as_ref());
    if fs::symlink_metadata(RUN).is_ok_and(|found| found.is_dir()) {
        mirror.cover(RUN.as_ref()).doing("hide the host's resolvers")?;
    }
    let is_directory = |path: &&PathBuf| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    for directory in program.emptied.iter().filter(is_directory) {
        // This is no barrier: the directory above is the user's, so a program can rename this one in a mount namespace
        // of its own, which takes the mount off. The keeper refuses orders from inside, and no plan is taken from here.
        mounts::empty(directory).doing(format!("hide {}", directory.display()))?;
    }
    Ok(())
}

/// Returns whether a test has the program see the host's name resolution.
pub(super) fn shows_host_names() -> bool {
    fault::is_broken("names")
}

/// Returns the directories that are symbolic links to other places, such as another disk, and their targets. On most
/// systems `/var/run` is a link to `/run`, which is covered anyway.
pub(super) fn linked_directories() -> Vec<(&'static Path, PathBuf)> {
    let is_covered = |target: &Path| COVERED.iter().any(|directory| Path::new(directory) == target);
    let links = COVERED.into_iter().map(Path::new).filter(|directory| directory.is_symlink());
    let targets = links.filter_map(|directory| Some((directory, fs::canonicalize(directory).ok()?)));
    targets.filter(|(_, target)| !is_covered(target)).collect()
}

/// Returns the paths that the copies lack. On older systems `/var/run` is a directory with the same entries as `/run`.
pub(super) fn hidden_paths(program: &Program, linked: &[(&Path, PathBuf)]) -> HiddenPaths {
    let in_run = program.hidden.iter().filter_map(|path| path.strip_prefix("/run").ok());
    let in_var_run = in_run.map(|rest| Path::new("/var/run").join(rest));
    let own = [RESOLV_CONF, HOSTS, NSSWITCH_CONF].map(PathBuf::from);
    let mut hidden: Vec<PathBuf> = program.hidden.iter().cloned().chain(in_var_run).chain(own).collect();
    for (directory, target) in linked {
        let below = hidden.iter().filter_map(|path| path.strip_prefix(directory).ok());
        let in_target: Vec<PathBuf> = below.map(|rest| target.join(rest)).collect();
        hidden.extend(in_target);
    }
    HiddenPaths::new(hidden)
}

/// Starts the process that keeps the copies up to date until the launcher ends or closes the other end of the helpers'
/// socket. The process is the launcher's child: the program, which the caller becomes, must not have unknown
/// children.
///
/// # Errors
/// Returns an error if the process cannot be created.
pub(super) fn keep_up_to_date(mirror: &mut Mirror, last: u8, starter: &Starter<'_>) -> io::Result<()> {
    let socket = starter.helpers;
    if mirror.changes().is_none() {
        return Ok(());
    }
    match process::fork_sibling()? {
        Forked::Parent(_) => Ok(()),
        Forked::Child => {
            let updated = helpers::announce(socket)
                .and_then(|()| confine(mirror, starter.launcher, last, socket))
                .and_then(|()| update(mirror, socket));
            process::exit_now(i32::from(updated.is_err()))
        }
    }
}

/// Leaves the calling process only the right to mount and to read directories. It reads names that the host's users
/// choose: if that takes it over, it cannot reach further.
fn confine(mirror: &Mirror, launcher: u32, last: u8, socket: &OwnedFd) -> io::Result<()> {
    helpers::end_with_parent(launcher)?;
    let mut kept: Vec<i32> = mirror.descriptors().chain([socket.as_raw_fd()]).collect();
    helpers::detach(&mut kept)?;
    capabilities::raise(CapabilitySet::SETPCAP)?;
    capabilities::limit_bounding_set(CapabilitySet::empty(), last)?;
    capabilities::limit(CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_ADMIN)?;
    capabilities::set_no_new_privileges()?;
    SyscallFilter::allow_only(&[helpers::BASE_CALLS, CALLS].concat(), &[])?.install()
}

/// Updates the copies until the launcher closes its end of the socket.
fn update(mirror: &mut Mirror, socket: &OwnedFd) -> io::Result<()> {
    loop {
        let Some(changes) = mirror.changes() else { return Ok(()) };
        // The launcher sends nothing: the socket is readable once it is closed.
        if wait_for(&[changes, socket.as_fd()], None)?[1] {
            return Ok(());
        }
        mirror.update()?;
    }
}

/// Writes a file that all users can read, whatever the umask.
fn write_readable(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

fn read(path: &str) -> Result<String, Failure> {
    registry::read_host_file(path.as_ref()).doing(format!("read {path}"))
}
