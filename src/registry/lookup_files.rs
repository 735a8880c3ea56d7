//! The host's files that decide how names are looked up, and the tunnel's versions of them.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::linux::in_place;

/// The host's names of hosts (hosts(5)).
pub const HOSTS: &str = "/etc/hosts";

/// The host's configuration of lookups (nsswitch.conf(5)).
pub const NSSWITCH_CONF: &str = "/etc/nsswitch.conf";

/// Reads one of the host's files, and completes its last line. The text is empty if the C library would read no file
/// there either: if it does not exist, is not a regular file, or is a link that leads in a circle. A named pipe is not
/// waited for.
///
/// # Errors
/// If the file exists and cannot be read. The error names it.
pub fn read_host_file(path: &Path) -> io::Result<String> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut file = match fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ENXIO)) =>
        {
            return Ok(String::new());
        }
        Err(error) => return Err(named(error)),
    };
    if !file.metadata().map_err(named)?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(named)?;
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// Writes a file that is mounted over one of the host's inside. An existing file is overwritten in place, since the
/// mounts show that very file.
pub(super) fn write_mounted(path: &Path, text: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    in_place::overwrite(&file, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_irregular_host_file_is_empty() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("hosts");
        assert_eq!(read_host_file(&path).expect("no error"), "");
        assert_eq!(read_host_file(directory.path()).expect("no error"), "");
        assert_eq!(read_host_file(&path.join("below")).expect("no error"), "");
        std::os::unix::fs::symlink(&path, &path).expect("a link to itself");
        assert_eq!(read_host_file(&path).expect("no error"), "");
    }

    #[test]
    fn the_last_line_of_a_host_file_is_completed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("hosts");
        fs::write(&path, "127.0.0.1 localhost").expect("written");
        assert_eq!(read_host_file(&path).expect("read"), "127.0.0.1 localhost\n");
    }

    #[test]
    fn a_mounted_file_is_overwritten_in_place() {
        use std::os::unix::fs::MetadataExt;

        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("resolv.conf");
        let mut inodes = Vec::new();
        for text in ["nameserver 10.0.0.1\n", "nameserver 10.0.0.1\nsearch example.org\n", "short\n", ""] {
            write_mounted(&path, text).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("read"), text);
            inodes.push(fs::metadata(&path).expect("a file").ino());
        }
        assert!(inodes.iter().all(|inode| *inode == inodes[0]));
    }
}
