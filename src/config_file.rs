//! Reads a configuration from a file, a pipe, a descriptor (`/proc/self/fd/N`) or standard input (`-`).
//!
//! The contents are wiped from memory when dropped. The parsers are in [`crate::config`].

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use thiserror::Error;
use zeroize::Zeroizing;

use crate::config::{MAX_BYTES, wg_quick};

/// The initial size of the buffer in bytes. It holds any typical file, so that a single call reads it.
const INITIAL_CAPACITY: usize = 16 * 1024;

/// The contents of a configuration file, with its name.
#[derive(Debug)]
pub struct ConfigFile {
    /// The name for messages.
    pub name: String,
    /// The contents.
    pub contents: Contents,
    /// A warning if other users can read or change the file. For regular files only.
    pub warning: Option<String>,
}

/// The bytes of a configuration file. Wiped when dropped, and never printed.
pub struct Contents(Zeroizing<Vec<u8>>);

impl std::ops::Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Contents({} bytes)", self.0.len())
    }
}

/// The reason why a configuration cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Opening or reading failed.
    #[error("cannot read {name}")]
    Io {
        /// The name of the file.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The file has an unsuitable type, such as a directory.
    #[error("cannot read {name}: it is a {kind}, not a file")]
    Kind {
        /// The name of the file.
        name: String,
        /// The type of the file.
        kind: &'static str,
    },
    /// The file is too large for a configuration.
    #[error("cannot read {name}: it is {format} of more than {MAX_BYTES} bytes, not a configuration")]
    TooLarge {
        /// The name of the file.
        name: String,
        /// The format, as far as the first bytes tell.
        format: &'static str,
    },
}

/// Reads a configuration to its end. A pipe ends when its last writer closes it. The path `-` is standard input.
///
/// # Errors
///
/// Fails if the file cannot be opened or read, is neither a file nor a pipe, or has more than [`MAX_BYTES`].
pub fn read(path: &Path) -> Result<ConfigFile, ReadError> {
    if path == Path::new("-") {
        let input = io::stdin();
        // Read from the descriptor, because the buffer of `io::Stdin` is never wiped.
        let input = input.as_fd().try_clone_to_owned();
        return input
            .map_err(|source| ReadError::Io { name: "standard input".to_owned(), source })
            .and_then(|input| read_open(File::from(input), "standard input", None));
    }
    let name = path.display().to_string();
    // O_NOCTTY: a terminal must not become the controlling one. Opening a pipe waits for a writer.
    let open = File::options().read(true).custom_flags(nix::libc::O_NOCTTY).open(path);
    match open {
        Ok(file) => read_open(file, &name, Some(path)),
        Err(source) => Err(ReadError::Io { name, source }),
    }
}

fn read_open(mut file: File, name: &str, path: Option<&Path>) -> Result<ConfigFile, ReadError> {
    let failed = |source| ReadError::Io { name: name.to_owned(), source };
    let metadata = file.metadata().map_err(failed)?;
    let kind = metadata.file_type();
    let unfit = match () {
        () if kind.is_dir() => Some("directory"),
        () if kind.is_socket() => Some("socket"),
        () if kind.is_block_device() => Some("block device"),
        () => None,
    };
    if let Some(kind) = unfit {
        return Err(ReadError::Kind { name: name.to_owned(), kind });
    }
    // The mode is that of the opened file: the path may lead to another one by now.
    let warning = if kind.is_file() { exposure(metadata.mode(), name, path) } else { None };
    let contents = read_wiped(&mut file).map_err(failed)?;
    if contents.len() > MAX_BYTES {
        let format = wg_quick::binary_format(&contents).unwrap_or("a file");
        return Err(ReadError::TooLarge { name: name.to_owned(), format });
    }
    Ok(ConfigFile { name: name.to_owned(), contents: Contents(contents), warning })
}

/// Reads to the end, at most one byte more than [`MAX_BYTES`]. Wipes each buffer that it outgrows.
fn read_wiped(file: &mut impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut buffer = Zeroizing::new(vec![0; INITIAL_CAPACITY]);
    let mut length = 0;
    loop {
        if length == buffer.len() {
            if length > MAX_BYTES {
                break;
            }
            let mut larger = Zeroizing::new(vec![0; (length * 2).min(MAX_BYTES + 1)]);
            larger[..length].copy_from_slice(&buffer);
            buffer = larger;
        }
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(length);
    Ok(buffer)
}

/// Returns a warning if a file with this mode can be read or changed by users other than its owner.
fn exposure(mode: u32, name: &str, path: Option<&Path>) -> Option<String> {
    let rights = |shift: u32| match (mode >> shift) & 0o6 {
        0o4 => Some("read"),
        0o2 => Some("change"),
        0o6 => Some("read and change"),
        _ => None,
    };
    let who = match (rights(3), rights(0)) {
        (None, None) => return None,
        (Some(group), Some(others)) if group == others => format!("its group (g) and other users (o) can {group} it"),
        (Some(group), Some(others)) => format!("its group (g) can {group} it, other users (o) can {others} it"),
        (Some(group), None) => format!("its group (g) can {group} it"),
        (None, Some(others)) => format!("other users (o) can {others} it"),
    };
    let remedy = path.map_or(String::new(), |path| format!("; try: chmod go-rwx {}", shell_word(path)));
    Some(format!("{name} has mode {:04o}: {who}, and it may hold a private key{remedy}", mode & 0o7777))
}

/// Quotes a path for a shell, if necessary.
fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=@%:,".contains(c);
    if path.chars().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"[Interface]\n").expect("written");
        file.as_file().set_permissions(PermissionsExt::from_mode(mode)).expect("its mode");
        file
    }

    #[test]
    fn warning_names_the_permissions() {
        let warning = |mode| exposure(mode, "wg0.conf", Some(Path::new("wg0.conf")));
        assert_eq!(warning(0o100600), None);
        assert_eq!(warning(0o100711), None);
        assert_eq!(
            warning(0o100644).as_deref(),
            Some(
                "wg0.conf has mode 0644: its group (g) and other users (o) can read it, and it may hold a private key; \
                 try: chmod go-rwx wg0.conf"
            )
        );
        assert!(warning(0o640).is_some_and(|text| text.contains("0640: its group (g) can read it,")));
        assert!(warning(0o604).is_some_and(|text| text.contains("0604: other users (o) can read it,")));
        assert!(warning(0o620).is_some_and(|text| text.contains("its group (g) can change it,")));
        assert!(warning(0o666).is_some_and(|text| text.contains("can read and change it,")));
        assert_eq!(shell_word(Path::new("a b'c")), r"'a b'\''c'");
    }

    #[test]
    fn file_is_read_with_a_warning() {
        let open = file(0o640);
        let read_back = read(open.path()).expect("readable");
        assert_eq!(&*read_back.contents, b"[Interface]\n");
        assert!(read_back.warning.expect("a warning").contains(&format!("chmod go-rwx {}", open.path().display())));
        assert_eq!(read(file(0o600).path()).expect("readable").warning, None);
    }

    #[test]
    fn pipe_is_read_by_descriptor() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let sender = std::thread::spawn(move || {
            // More than the capacity of a pipe and of the initial buffer.
            writer.write_all(&vec![b'#'; 300_000]).expect("written");
        });
        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        let read_back = read(Path::new(&path)).expect("readable");
        sender.join().expect("the writer");
        assert_eq!((read_back.contents.len(), read_back.name, read_back.warning), (300_000, path, None));
    }

    #[test]
    fn unsuitable_files_are_refused() {
        assert!(matches!(read(Path::new("/")), Err(ReadError::Kind { kind: "directory", .. })));
        assert!(matches!(read(Path::new("/dev/zero")), Err(ReadError::TooLarge { .. })));
        assert!(matches!(read(Path::new("/nonexistent")), Err(ReadError::Io { .. })));
        let exact = vec![b'#'; MAX_BYTES];
        assert_eq!(read_wiped(&mut &exact[..]).expect("readable").len(), MAX_BYTES);
        let over = vec![b'#'; MAX_BYTES + 2];
        assert_eq!(read_wiped(&mut &over[..]).expect("readable").len(), MAX_BYTES + 1);
        let photograph = file(0o600);
        std::fs::write(photograph.path(), [b"\xff\xd8\xff\xe0", &over[..]].concat()).expect("written");
        let message = read(photograph.path()).expect_err("too large").to_string();
        assert!(message.contains("it is a JPEG image of more than"), "{message}");
    }

    #[test]
    fn contents_are_not_printed() {
        let secret = ConfigFile {
            name: "f".to_owned(),
            contents: Contents(Zeroizing::new(b"PrivateKey = x".to_vec())),
            warning: None,
        };
        assert!(!format!("{secret:?}").contains("Private") && format!("{secret:?}").contains("14 bytes"));
    }
}
