//! Sealed files in memory (memfd_create(2)), to hand secrets from one process to another.
//!
//! No process can change such a file. It is in no file system, so other processes cannot open it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

/// The seals that keep a file as it is.
const SEALS: SealFlags = SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// Creates a sealed file. It is closed on exec.
///
/// # Errors
/// Fails as memfd_create(2) and pwrite(2) do.
pub fn seal(contents: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match rustix::fs::memfd_create("vpn-exec", flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3.
        Err(Errno::INVAL) => rustix::fs::memfd_create("vpn-exec", flags),
        other => other,
    }?;
    let mut written = 0;
    while written < contents.len() {
        written += rustix::io::retry_on_intr(|| rustix::io::pwrite(&file, &contents[written..], written as u64))?;
    }
    rustix::fs::fcntl_add_seals(&file, SEALS)?;
    Ok(file)
}

/// Reads a sealed file from its beginning. The file offset is neither used nor changed.
///
/// # Errors
/// Fails with `InvalidData` if the file is not sealed, so that it could change meanwhile, or has more than `max` bytes.
pub fn read(file: BorrowedFd<'_>, max: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if !rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALS)) {
        return Err(invalid("the descriptor is not a sealed file in memory"));
    }
    let length = usize::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(usize::MAX);
    if length > max {
        return Err(invalid("the sealed file is too large"));
    }
    // A buffer that grew would leave copies of secrets in freed memory.
    let mut contents = Zeroizing::new(vec![0; length]);
    let mut filled = 0;
    while filled < length {
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut contents[filled..], filled as u64))? {
            0 => return Err(invalid("the sealed file has changed")),
            more => filled += more,
        }
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_sealed_file_can_be_read_repeatedly_and_not_be_changed() {
        let file = seal(b"secret").expect("a file");
        for _ in 0..2 {
            assert_eq!(*read(file.as_fd(), 6).expect("readable"), b"secret");
        }
        assert_eq!(read(file.as_fd(), 5).expect_err("too long").kind(), io::ErrorKind::InvalidData);
        let changed = std::fs::File::from(file).write_all(b"x");
        assert_eq!(changed.expect_err("sealed").kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_file_that_is_not_sealed_is_refused() {
        let open = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a file");
        assert_eq!(read(open.as_fd(), 10).expect_err("not sealed").kind(), io::ErrorKind::InvalidData);
        let ordinary = tempfile::tempfile().expect("a file");
        assert!(read(ordinary.as_fd(), 10).is_err());
    }
}
