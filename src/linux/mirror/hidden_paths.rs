//! The paths that a mirror hides.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Paths to hide. The last component of a path may end with `*`, which stands for any characters.
#[derive(Clone, Debug)]
pub struct HiddenPaths(pub Vec<PathBuf>);

impl HiddenPaths {
    /// Returns whether a path is hidden itself.
    pub fn has(&self, path: &Path) -> bool {
        // Compared as bytes, as this is done for each entry: neither side has a slash too many.
        let path = path.as_os_str().as_bytes();
        self.0.iter().map(|hidden| hidden.as_os_str().as_bytes()).any(|hidden| match hidden.strip_suffix(b"*") {
            Some(begin) => path.strip_prefix(begin).is_some_and(|rest| !rest.contains(&b'/')),
            None => hidden == path,
        })
    }

    /// Returns whether a hidden path is below a directory.
    pub fn is_below(&self, directory: &Path) -> bool {
        self.0.iter().any(|hidden| hidden != directory && hidden.starts_with(directory))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn hidden_paths_are_recognised() {
        let paths = ["/run/nscd", "/run/dnsmasq*", "/run/systemd/resolve"].map(PathBuf::from);
        let hidden = HiddenPaths(paths.into());
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
        // File names need not be valid UTF-8.
        assert!(hidden.has(Path::new(OsStr::from_bytes(b"/run/dnsmasq\xff"))));
        assert!(hidden.is_below(Path::new("/run")) && hidden.is_below(Path::new("/run/systemd")));
        assert!(!hidden.is_below(Path::new("/run/nscd")) && !hidden.is_below(Path::new("/run/sys")));
    }
}
