//! The file descriptors of the calling process: redirecting them, closing those that were inherited, and passing some
//! on to a program.

use std::fs;
use std::io;
use std::os::fd::RawFd;

/// Redirects standard descriptors (0 to 2) to `/dev/null`.
///
/// # Errors
/// Fails if `/dev/null` cannot be opened, and with `EBADF` for other descriptors.
pub fn redirect_to_null(descriptors: &[RawFd]) -> io::Result<()> {
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for descriptor in descriptors {
        match *descriptor {
            libc::STDIN_FILENO => rustix::stdio::dup2_stdin(&null)?,
            libc::STDOUT_FILENO => rustix::stdio::dup2_stdout(&null)?,
            libc::STDERR_FILENO => rustix::stdio::dup2_stderr(&null)?,
            _ => return Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }
    Ok(())
}

/// Closes the descriptors `first` to `last`, which must be inherited and not owned by any value in this process.
///
/// # Errors
/// Fails if the open descriptors cannot be listed, which only kernels before 5.11 need.
pub fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    for_range(first, last, 0, |descriptor| {
        // SAFETY: by the contract above no value in this process owns the descriptor.
        unsafe { libc::close(descriptor) };
    })
}

/// Closes all inherited descriptors from 3 on, except those that are `kept`.
///
/// # Errors
/// Fails as [`close_range`] does.
pub fn close_all_except(kept: &mut [RawFd]) -> io::Result<()> {
    kept.sort_unstable();
    let mut first = 3;
    for descriptor in kept {
        close_range(first, *descriptor - 1)?;
        first = *descriptor + 1;
    }
    close_range(first, RawFd::MAX)
}

/// Gives the calling thread a descriptor table of its own in which only `kept` is open (close_range(2),
/// `CLOSE_RANGE_UNSHARE`). Other threads keep their descriptors.
///
/// The thread must not use any other descriptor afterwards, nor any value that owns one.
///
/// # Errors
/// Fails before Linux 5.9. Then nothing has changed.
pub fn unshare_descriptors(kept: RawFd) -> io::Result<()> {
    let close = |first: RawFd, last: RawFd, flags: libc::c_uint| {
        // SAFETY: the first call makes the table the thread's own, and by the contract above the thread uses nothing
        // that is closed in it. The tables of other threads are not touched.
        match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    close(kept + 1, RawFd::MAX, libc::CLOSE_RANGE_UNSHARE)?;
    if kept > 0 { close(0, kept - 1, 0) } else { Ok(()) }
}

/// Sets the close-on-exec flag of all descriptors from `first` on.
///
/// # Errors
/// Fails as [`close_range`] does.
pub fn set_close_on_exec_from(first: RawFd) -> io::Result<()> {
    for_range(first, RawFd::MAX, libc::CLOSE_RANGE_CLOEXEC, |descriptor| {
        // SAFETY: setting a flag invalidates no descriptor. On a closed one the call fails.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    })
}

/// Changes all open descriptors of a range by close_range(2), or one by one where the kernel (before 5.11) lacks it.
fn for_range(first: RawFd, last: RawFd, flags: libc::c_uint, one: impl Fn(RawFd)) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: the callers say why the effect on the descriptors is sound.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if result == 0 {
        return Ok(());
    }
    let numbers = fs::read_dir("/proc/self/fd")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let numbers: Vec<RawFd> = numbers.filter(|number| (first..=last).contains(number)).collect();
    numbers.into_iter().for_each(one);
    Ok(())
}

/// Returns whether a descriptor is open.
pub fn is_open(descriptor: RawFd) -> bool {
    // SAFETY: the query changes nothing, and fails with EBADF on a closed descriptor.
    unsafe { libc::fcntl(descriptor, libc::F_GETFD) != -1 }
}

/// Clears the close-on-exec flag of the descriptors `first..first + count`, so that a program inherits them.
///
/// # Errors
/// Fails with `EBADF` if one of them is not open.
pub fn clear_close_on_exec(first: RawFd, count: RawFd) -> io::Result<()> {
    for number in first..first.saturating_add(count) {
        // SAFETY: clearing a flag invalidates no descriptor. On a closed one the call fails.
        if unsafe { libc::fcntl(number, libc::F_SETFD, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
