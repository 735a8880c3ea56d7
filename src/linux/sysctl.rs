//! Kernel parameters below `/proc/sys` (proc_sys(5)). Those below `net` belong to the calling thread's network
//! namespace.

use std::fs;
use std::io;

/// Sets a parameter, given as a path below `/proc/sys`.
///
/// A parameter that has the value already is not written, so a read-only `/proc/sys`, as in containers, does no harm
/// then.
///
/// # Errors
/// Fails with `ENOENT` if the kernel has no such parameter, and with `EROFS` or `EACCES` if it cannot be written.
pub fn set(parameter: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{parameter}");
    if fs::read_to_string(&path)?.trim_end() == value {
        return Ok(());
    }
    fs::write(&path, value)
}

/// Sets a parameter as [`set`] does, if the kernel has it. Older kernels, reduced kernels and interfaces that have just
/// been removed lack parameters.
///
/// # Errors
/// Fails with `EROFS` or `EACCES` if the parameter cannot be written.
pub fn set_if_present(parameter: &str, value: &str) -> io::Result<()> {
    if_present(set(parameter, value)).map(|_| ())
}

/// Returns the value of a parameter without its newline.
///
/// # Errors
/// Fails with `ENOENT` if the kernel has no such parameter.
pub fn get(parameter: &str) -> io::Result<String> {
    Ok(fs::read_to_string(format!("/proc/sys/{parameter}"))?.trim_end().to_owned())
}

/// Returns the value of a parameter as [`get`] does, or none if the kernel does not have it.
///
/// # Errors
/// Fails if the parameter exists, but cannot be read.
pub fn get_if_present(parameter: &str) -> io::Result<Option<String>> {
    if_present(get(parameter))
}

fn if_present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}
