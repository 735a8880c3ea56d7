//! Text files that are changed in place, because they are mount points, such as a container's `/etc/resolv.conf`:
//! another file cannot be renamed to a mount point (rename(2)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Sets the text of an existing file, and returns whether the file had another text.
///
/// A file that has the text already is not written, so that a read-only file does no harm then. A reader meets what it
/// meets with [`overwrite`].
///
/// # Errors
/// Fails with `ENOENT` if there is no such file, with `EROFS`, `EACCES` or `EPERM` if it cannot be written, and with
/// `InvalidInput` if it is not a regular file.
pub fn set_text(path: &Path, text: &str) -> io::Result<bool> {
    // A FIFO must not block.
    let open = |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK).open(path);
    let before = read_regular(&open(OpenOptions::new().read(true))?)?;
    if before == text.as_bytes() {
        return Ok(false);
    }
    overwrite(&open(OpenOptions::new().write(true))?, text)?;
    Ok(true)
}

/// Replaces the text of a file that is open for writing.
///
/// A process that reads it at the same instant never gets an empty file or a part of a text: one call writes as many
/// bytes as the longer of the two texts has, and only then the file is truncated. It may get the beginning of one text
/// and the rest of the other, and empty lines or zero bytes behind a shorter text, as most file systems do not lock a
/// file that is read.
///
/// # Errors
/// Fails as write(2) and ftruncate(2) do.
pub fn overwrite(file: &File, text: &str) -> io::Result<()> {
    let before = usize::try_from(file.metadata()?.len()).unwrap_or_default();
    let mut padded = text.as_bytes().to_vec();
    padded.resize(padded.len().max(before), b'\n');
    file.write_all_at(&padded, 0)?;
    if padded.len() > text.len() { file.set_len(text.len() as u64) } else { Ok(()) }
}

fn read_regular(file: &File) -> io::Result<Vec<u8>> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut &*file, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_text_is_replaced_in_the_same_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("resolv.conf");
        assert_eq!(set_text(&path, "x").expect_err("no such file").kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, "nameserver 10.0.0.1\nsearch a b c\n").expect("written");
        let link = directory.path().join("link");
        symlink(&path, &link).expect("a link");
        let file = std::fs::metadata(&path).expect("a file").ino();
        for text in ["nameserver 10.0.0.2\n", "", "nameserver fd00::1\nnameserver fd00::2\noptions edns0\n"] {
            assert!(set_text(&link, text).expect("set"));
            assert_eq!(std::fs::read_to_string(&path).expect("read"), text);
            assert!(!set_text(&path, text).expect("unchanged"));
        }
        assert_eq!(std::fs::metadata(&path).expect("a file").ino(), file);
    }

    #[test]
    fn an_unchanged_file_is_not_written_and_other_kinds_are_refused() {
        assert!(!set_text(Path::new("/proc/sys/kernel/ostype"), "Linux\n").expect("it has the text"));
        let directory = tempfile::tempdir().expect("a directory");
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).expect("a FIFO");
        for other in [&fifo, Path::new("/dev/null"), directory.path()] {
            assert_eq!(set_text(other, "x").expect_err("no file").kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn a_reader_never_meets_a_truncated_text() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("resolv.conf");
        let texts = ["nameserver 10.0.0.1\nsearch example.org\n", "nameserver 10.0.0.2\n"];
        std::fs::write(&path, texts[0]).expect("written");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for _ in 0..2000 {
                    let text = std::fs::read(&path).expect("read");
                    let is_whole = text.len() >= texts[1].len();
                    let byte_of = |text: &str, place: usize| text.as_bytes().get(place).copied().unwrap_or(b'\n');
                    let mut bytes = text.iter().enumerate();
                    let is_padding = |at: usize, byte: u8| byte == 0 && at >= texts[1].len();
                    let is_known = bytes
                        .all(|(at, byte)| is_padding(at, *byte) || texts.iter().any(|text| byte_of(text, at) == *byte));
                    assert!(is_whole && is_known, "{:?}", String::from_utf8_lossy(&text));
                }
            });
            let mut next = texts.iter().cycle().skip(1);
            while !reader.is_finished() {
                set_text(&path, next.next().expect("endless")).expect("set");
            }
        });
    }
}
