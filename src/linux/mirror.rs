//! A directory as another in memory shows it: all of its entries but some, by bind mounts (mount(2)).
//!
//! What hides an entry is that the copy has none of that name. A mount over the entry would not do: the kernel takes it away with the
//! entry, in all mount namespaces, when the host removes that (rename(2), unlink(2)), and what the host makes then under the same
//! name would be seen.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::mounts;

/// Paths that are not to be seen. The last part of one may end with `*`, which stands for any rest of a name.
#[derive(Clone, Copy, Debug)]
pub struct Hidden<'a>(pub &'a [PathBuf]);

impl Hidden<'_> {
    /// Whether a path is one of them.
    pub fn has(&self, path: &Path) -> bool {
        self.0.iter().any(|hidden| {
            let wildcard = hidden.file_name().and_then(|name| name.to_str()?.strip_suffix('*'));
            match (wildcard, path.file_name().and_then(|name| name.to_str())) {
                (Some(begin), Some(name)) => hidden.parent() == path.parent() && name.starts_with(begin),
                _ => hidden == path,
            }
        })
    }

    /// Whether one of them is below a directory.
    pub fn is_below(&self, directory: &Path) -> bool {
        self.0.iter().any(|hidden| hidden != directory && hidden.starts_with(directory))
    }
}

/// Covers a directory, in the calling process's mount namespace, with a copy in memory that has all of its entries but those that are
/// `hidden`, here or further below. `staging` is a directory to build it at, which may be below it.
///
/// The copy has the entries of this instant. What is inside of a directory that is an entry is the host's own, so whatever is made
/// there later is seen.
///
/// # Errors
/// If the system refuses. Then the directory may be covered by a part of it, so nobody is to run in this mount namespace.
pub fn cover(directory: &Path, staging: &Path, hidden: Hidden<'_>) -> io::Result<()> {
    mounts::memory(staging)?;
    fs::set_permissions(staging, fs::metadata(directory)?.permissions())?;
    copy(directory, staging, staging, hidden)?;
    mounts::put(staging, directory)
}

fn copy(from: &Path, to: &Path, staging: &Path, hidden: Hidden<'_>) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (from.join(entry.file_name()), to.join(entry.file_name()));
        if hidden.has(&source) {
            continue;
        }
        match show(&source, &target, staging, hidden) {
            // It has gone in the meantime, or may not be looked at, such as another user's file system in user space.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES | libc::ESTALE)) => {
                tracing::debug!(path = %source.display(), %error, "hidden from the program");
            }
            other => other?,
        }
    }
    Ok(())
}

fn show(source: &Path, target: &Path, staging: &Path, hidden: Hidden<'_>) -> io::Result<()> {
    let found = fs::symlink_metadata(source)?;
    if found.is_symlink() {
        return std::os::unix::fs::symlink(fs::read_link(source)?, target);
    }
    if !found.is_dir() {
        fs::OpenOptions::new().write(true).create_new(true).open(target)?;
        return mounts::bind(source, target);
    }
    let mode = found.mode() & 0o7777;
    fs::DirBuilder::new().mode(mode).create(target)?;
    if hidden.is_below(source) {
        // Whatever the umask has made of it.
        fs::set_permissions(target, fs::Permissions::from_mode(mode))?;
        return copy(source, target, staging, hidden);
    }
    // What is being built shall not be seen in itself.
    if staging.starts_with(source) { mounts::bind(source, target) } else { mounts::bind_all(source, target) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_paths_are_recognised() {
        let paths = ["/run/nscd", "/run/dnsmasq*", "/run/systemd/resolve"].map(PathBuf::from);
        let hidden = Hidden(&paths);
        for (path, has) in [
            ("/run/nscd", true),
            ("/run/nscd2", false),
            ("/run/dnsmasq", true),
            ("/run/dnsmasq.pid", true),
            ("/run/x/dnsmasq", false),
            ("/run/systemd", false),
            ("/run/systemd/resolve", true),
            ("/run", false),
        ] {
            assert_eq!(hidden.has(Path::new(path)), has, "{path}");
        }
        assert!(hidden.is_below(Path::new("/run")) && hidden.is_below(Path::new("/run/systemd")));
        assert!(!hidden.is_below(Path::new("/run/nscd")) && !hidden.is_below(Path::new("/run/sys")));
    }
}
