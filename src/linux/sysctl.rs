//! Kernel parameters below `/proc/sys` (proc_sys(5)). Those below `net` are the calling thread's network namespace's.

use std::fs;
use std::io;

/// Sets a parameter, given as a path below `/proc/sys`. One that has the value already is not written: a read-only
/// `/proc/sys`, as containers have it, is then no obstacle.
///
/// # Errors
/// `ENOENT` if the kernel has no such parameter.
pub fn set(parameter: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{parameter}");
    if fs::read_to_string(&path)?.trim_end() == value {
        return Ok(());
    }
    fs::write(&path, value)
}

/// Sets a parameter as [`set`] does. One that the kernel does not have (it is older, it was built without, or the
/// interface has just gone) is no error.
pub fn set_if_present(parameter: &str, value: &str) -> io::Result<()> {
    if_present(set(parameter, value)).map(|_| ())
}

/// Reads a parameter, without the end of its line.
pub fn get(parameter: &str) -> io::Result<String> {
    Ok(fs::read_to_string(format!("/proc/sys/{parameter}"))?.trim_end().to_owned())
}

/// Reads a parameter as [`get`] does: nothing if the kernel does not have it.
pub fn get_if_present(parameter: &str) -> io::Result<Option<String>> {
    if_present(get(parameter))
}

fn if_present<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    match answer {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}
