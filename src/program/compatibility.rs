//! Programs that are known not to work with the privileges that a program has inside, and what to do about each. They end with errors
//! that say nothing of it ("unable to change to root gid").

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::DEFAULT_PATH;

/// What to say before a program is started, if anything. `is_root` is whether it runs as root, `variable` reads its environment.
pub fn advice(
    command: &[OsString],
    new_privileges: bool,
    is_root: bool,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Option<String> {
    let program = Path::new(command.first()?);
    let name = program.file_name()?.to_str()?;
    if is_app_image(program, &variable) && variable("APPIMAGE_EXTRACT_AND_RUN").is_none() {
        return Some(format!(
            "{name} is an AppImage, which mounts itself by fusermount3; no program inside can mount: set APPIMAGE_EXTRACT_AND_RUN=1"
        ));
    }
    match name {
        "fusermount" | "fusermount3" => Some(format!(
            "{name} cannot mount inside: mount outside, or for an AppImage set APPIMAGE_EXTRACT_AND_RUN=1"
        )),
        _ if new_privileges => None,
        "sudo" | "su" | "doas" | "pkexec" => {
            Some(format!("{name} becomes another user by its file's privileges, which takes --new-privs"))
        }
        // Without its sandbox (APT::Sandbox::User=root) it could not write into its own folders, which belong to the sandbox's user.
        "apt" | "apt-get" if is_root => {
            Some(format!("{name} changes its user to fetch files, which takes --new-privs"))
        }
        "runuser" | "setpriv" if is_root => Some(format!(
            "{name} changes the user, which takes --new-privs: leave it out, and give vpn-exec the user (--user NAME)"
        )),
        _ => None,
    }
}

/// What to say of a display that the program does not reach, as in a session by `ssh -X`. `has_port` is whether a port of the host's
/// loopback is opened to the program.
pub fn display_advice(display: Option<&str>, has_port: impl Fn(u16) -> bool) -> Option<String> {
    let (host, screen) = display?.rsplit_once(':')?;
    let number: u16 = screen.split('.').next()?.parse().ok()?;
    // The port of a display (X(7), "display names").
    let port = number.checked_add(6000)?;
    let is_loopback = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
    (is_loopback && !has_port(port)).then(|| {
        format!(
            "the display {host}:{screen} is on the host's loopback: give --host-port {port}, and run the program with \
             DISPLAY=host.internal:{screen}, for which `xauth add host.internal:{number} . KEY` adds the key that `xauth list` shows"
        )
    })
}

/// Whether a program is an AppImage: an ELF file that says so behind its first bytes (the AppImage specification, "image format").
fn is_app_image(program: &Path, variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let found = if program.components().count() > 1 || program.is_absolute() {
        Some(program.to_owned())
    } else {
        let path = variable("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        std::env::split_paths(&path).map(|folder: PathBuf| folder.join(program)).find(|path| path.is_file())
    };
    // Opening anything else, such as a named pipe, might wait.
    let Some(file) = found.filter(|path| path.is_file()).and_then(|path| File::open(path).ok()) else { return false };
    let mut head = Vec::new();
    let read = file.take(11).read_to_end(&mut head);
    read.is_ok() && head.starts_with(b"\x7fELF") && matches!(head.get(8..), Some(b"AI\x01" | b"AI\x02"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(command: &[&str], new_privileges: bool, is_root: bool) -> String {
        let command: Vec<OsString> = command.iter().map(Into::into).collect();
        advice(&command, new_privileges, is_root, |_| None).unwrap_or_default()
    }

    #[test]
    fn what_cannot_work_is_said_with_what_to_do() {
        assert!(told(&["/usr/bin/sudo", "id"], false, false).contains("--new-privs"));
        assert!(told(&["apt-get", "update"], false, true).contains("--new-privs"));
        assert!(told(&["runuser", "-u", "x", "id"], false, true).contains("--user"));
        assert!(told(&["fusermount3"], true, true).contains("APPIMAGE_EXTRACT_AND_RUN=1"));
        for (command, new_privileges, is_root) in
            [("sudo", true, false), ("apt-get", true, true), ("apt-get", false, false), ("curl", false, true)]
        {
            assert_eq!(told(&[command], new_privileges, is_root), "", "{command}");
        }
        assert_eq!(told(&[], false, true), "");
    }

    #[test]
    fn a_display_of_the_hosts_loopback_is_said() {
        let told = |display| display_advice(Some(display), |port| port == 6011).unwrap_or_default();
        assert!(told("localhost:10.0").contains("--host-port 6010"));
        assert!(told("localhost:10.0").contains("DISPLAY=host.internal:10.0"));
        assert!(told("127.0.0.1:12").contains("--host-port 6012"));
        for reached in
            [":0", ":0.0", "localhost:11.0", "host.internal:10.0", "nonsense", "localhost:x", "localhost:99999"]
        {
            assert_eq!(told(reached), "", "{reached}");
        }
        assert_eq!(display_advice(None, |_| false), None);
    }

    #[test]
    fn an_app_image_is_known_by_its_first_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str, head: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, head).expect("a file");
            path.to_str().expect("UTF-8").to_owned()
        };
        let image = file("image", b"\x7fELF\x02\x01\x01\0AI\x02\0\0\0\0\0");
        assert!(told(&[&image], false, false).contains("APPIMAGE_EXTRACT_AND_RUN=1"));
        assert_eq!(told(&[&file("other", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0")], false, false), "");
        assert_eq!(told(&[&file("short", b"\x7fELF")], false, false), "");
        assert_eq!(advice(&[image.into()], false, false, |_| Some("1".into())), None, "it is set already");
    }
}
