//! The paths that a mirror hides.

use std::collections::HashSet;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Paths to hide. The last component of a path may end with `*`, which stands for any characters.
///
/// Each entry of each copied directory is looked up, so the paths are compared as bytes: [`Path`] would split both
/// sides into components each time.
#[derive(Clone, Debug)]
pub struct HiddenPaths {
    whole: HashSet<Vec<u8>>,
    /// The paths with a `*`, without it.
    beginnings: Vec<Vec<u8>>,
    /// The directories that contain a hidden path, at any depth.
    above: HashSet<Vec<u8>>,
}

impl HiddenPaths {
    /// Hides these paths, which are absolute.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let (mut whole, mut beginnings, mut above) = (HashSet::new(), Vec::new(), HashSet::new());
        for path in paths {
            above.extend(path.ancestors().skip(1).map(bytes));
            let mut path = bytes(&path);
            if path.pop_if(|last| *last == b'*').is_some() {
                beginnings.push(path);
            } else {
                whole.insert(path);
            }
        }
        Self { whole, beginnings, above }
    }

    /// Returns whether a path is hidden itself. It has no repeated or trailing slashes.
    pub fn has(&self, path: &Path) -> bool {
        let path = path.as_os_str().as_bytes();
        let matches = |beginning: &Vec<u8>| path.strip_prefix(&**beginning).is_some_and(|rest| !rest.contains(&b'/'));
        self.whole.contains(path) || self.beginnings.iter().any(matches)
    }

    /// Returns whether a hidden path is below a directory, whose path has no repeated or trailing slashes.
    pub fn is_below(&self, directory: &Path) -> bool {
        self.above.contains(directory.as_os_str().as_bytes())
    }
}

/// Returns a path's bytes, without repeated or trailing slashes.
fn bytes(path: &Path) -> Vec<u8> {
    path.components().collect::<PathBuf>().into_os_string().into_vec()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn hidden_paths_are_recognised() {
        let paths = ["/run//nscd/", "/run/dnsmasq*", "/run/systemd/resolve"].map(PathBuf::from);
        let hidden = HiddenPaths::new(paths);
        for (path, has) in [
            ("/run/nscd", true),
            ("/run/nscd2", false),
            ("/run/dnsmasq", true),
            ("/run/dnsmasq.pid", true),
            ("/run/x/dnsmasq", false),
            ("/run/dnsmasq/x", false),
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
