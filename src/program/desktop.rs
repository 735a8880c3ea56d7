//! The environment variables by which programs find the sockets of their user's desktop. sudo removes them, so they are
//! derived from the sockets in the user's runtime directory (`XDG_RUNTIME_DIR`).

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The sockets of SSH agents: those of GNOME, of OpenSSH, and of GnuPG. The last exists even where it is not used.
const SSH_AGENTS: [&str; 5] = ["gcr/ssh", "keyring/ssh", "openssh_agent", "ssh-agent.socket", "gnupg/S.gpg-agent.ssh"];

/// Returns the variables for a user's sockets in the directory `runtime`, except those that are set already. Ignores a
/// directory that another user may have created or may enter, and sockets of other users.
pub(super) fn variables(runtime: &Path, user: u32, is_set: impl Fn(&str) -> bool) -> Vec<(&'static str, OsString)> {
    let is_own = |path: &Path| fs::symlink_metadata(path).ok().filter(|found| found.uid() == user);
    let is_private = is_own(runtime).is_some_and(|found| found.is_dir() && found.mode() & 0o7777 == 0o700);
    if !is_private {
        return Vec::new();
    }
    let socket = |name: &str| -> Option<PathBuf> {
        let path = runtime.join(name);
        is_own(&path).filter(|found| found.file_type().is_socket()).map(|_| path)
    };
    let bus = || socket("bus").map(|path| format!("unix:path={}", path.display()).into());
    let wayland = || (0..10).map(|number| format!("wayland-{number}")).find(|name| socket(name).is_some());
    let pulse = || socket("pulse/native").map(|path| format!("unix:{}", path.display()).into());
    let agent = || SSH_AGENTS.into_iter().find_map(socket).map(PathBuf::into_os_string);
    let found: [(&str, &dyn Fn() -> Option<OsString>); 4] = [
        ("DBUS_SESSION_BUS_ADDRESS", &bus),
        ("WAYLAND_DISPLAY", &|| wayland().map(OsString::from)),
        ("PULSE_SERVER", &pulse),
        ("SSH_AUTH_SOCK", &agent),
    ];
    found.into_iter().filter(|(name, _)| !is_set(name)).filter_map(|(name, find)| Some((name, find()?))).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_the_users_own_sockets_in_a_private_directory_are_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let runtime = directory.path();
        let mode = |mode| fs::set_permissions(runtime, fs::Permissions::from_mode(mode)).expect("a mode");
        let user = nix::unistd::geteuid().as_raw();
        mode(0o700);
        fs::create_dir(runtime.join("keyring")).expect("a directory");
        let _sockets =
            ["bus", "wayland-1", "keyring/ssh"].map(|name| UnixListener::bind(runtime.join(name)).expect("a socket"));
        fs::write(runtime.join("wayland-0"), "not a socket").expect("a file");
        fs::create_dir(runtime.join("pulse")).expect("a directory");
        std::os::unix::fs::symlink(runtime.join("bus"), runtime.join("pulse/native")).expect("a link");

        let at = |name: &str| runtime.join(name).display().to_string();
        let expected: Vec<(&str, OsString)> = vec![
            ("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={}", at("bus")).into()),
            ("WAYLAND_DISPLAY", "wayland-1".into()),
            ("SSH_AUTH_SOCK", at("keyring/ssh").into()),
        ];
        assert_eq!(variables(runtime, user, |_| false), expected);
        assert_eq!(variables(runtime, user, |name| name != "WAYLAND_DISPLAY"), expected[1..2]);
        assert_eq!(variables(runtime, user + 1, |_| false), []);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(runtime, &link).expect("a link");
        assert_eq!(variables(&link, user, |_| false), [], "another user may have made the link");
        mode(0o755);
        assert_eq!(variables(runtime, user, |_| false), []);
    }
}
