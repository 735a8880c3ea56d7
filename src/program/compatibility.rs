//! Warnings about programs that are known not to work inside a tunnel as they are called, with what to do about it.
//! Their own errors do not show the reason ("unable to change to root gid").

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::DEFAULT_PATH;

/// Returns the warning about a program, if there is one. `is_rootless` is whether its tunnel is, so that no file's
/// privileges have an effect; `is_root` is whether it runs as root; `variable` reads its environment.
pub fn program_warning(
    command: &[OsString],
    new_privileges: bool,
    is_rootless: bool,
    is_root: bool,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Option<String> {
    let program = Path::new(command.first()?);
    let name = program.file_name()?.to_str()?;
    if is_app_image(program, &variable) && variable("APPIMAGE_EXTRACT_AND_RUN").is_none() {
        return Some(format!(
            "{name} is an AppImage, which cannot mount itself inside: set APPIMAGE_EXTRACT_AND_RUN=1"
        ));
    }
    match name {
        "fusermount" | "fusermount3" => Some(format!(
            "{name} cannot mount inside: mount outside, or for an AppImage set APPIMAGE_EXTRACT_AND_RUN=1"
        )),
        "sudo" | "su" | "doas" | "pkexec" if is_rootless => Some(format!(
            "{name} cannot become another user in a tunnel without root: start vpn-exec with sudo, and give \
             --new-privs"
        )),
        _ if new_privileges => None,
        "sudo" | "su" | "doas" | "pkexec" => {
            Some(format!("{name} cannot become another user without the privileges of its file: give --new-privs"))
        }
        // Turning its sandbox off (APT::Sandbox::User=root) is no way out: its directories belong to the sandbox's
        // user.
        "apt" | "apt-get" if is_root => {
            Some(format!("{name} cannot change to its own user to fetch files: give --new-privs"))
        }
        "runuser" | "setpriv" if is_root => {
            Some(format!("{name} cannot change the user: omit it and give vpn-exec --user NAME, or give --new-privs"))
        }
        _ => None,
    }
}

/// Returns the warning about an X11 display that the program cannot reach, as in a session of `ssh -X`. `has_port`
/// tells whether a port of the host's loopback is open to the program.
pub fn display_warning(display: Option<&str>, has_port: impl Fn(u16) -> bool) -> Option<String> {
    let (host, screen) = display?.rsplit_once(':')?;
    let number: u16 = screen.split('.').next()?.parse().ok()?;
    // The TCP port of a display is 6000 and its number (X(7), "DISPLAY NAMES").
    let port = number.checked_add(6000)?;
    let is_loopback = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
    (is_loopback && !has_port(port)).then(|| {
        format!(
            "the display {host}:{screen} is on the host's loopback: give --host-port {port}, set \
             DISPLAY=host.internal:{screen}, and add its key, which `xauth list` shows, with \
             `xauth add host.internal:{number} . KEY`"
        )
    })
}

/// Returns whether a program is an AppImage: an ELF file with a magic number at offset 8 (AppImage specification,
/// "Image format").
fn is_app_image(program: &Path, variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let found = if program.components().count() > 1 || program.is_absolute() {
        Some(program.to_owned())
    } else {
        let path = variable("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        std::env::split_paths(&path).map(|folder: PathBuf| folder.join(program)).find(|path| path.is_file())
    };
    // Opening another file, such as a named pipe, might block.
    let Some(file) = found.filter(|path| path.is_file()).and_then(|path| File::open(path).ok()) else { return false };
    let mut head = Vec::new();
    let read = file.take(11).read_to_end(&mut head);
    read.is_ok() && head.starts_with(b"\x7fELF") && matches!(head.get(8..), Some(b"AI\x01" | b"AI\x02"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warning(command: &[&str], new_privileges: bool, is_root: bool) -> String {
        let command: Vec<OsString> = command.iter().map(Into::into).collect();
        program_warning(&command, new_privileges, false, is_root, |_| None).unwrap_or_default()
    }

    #[test]
    fn incompatible_programs_have_a_warning_with_advice() {
        assert!(warning(&["/usr/bin/sudo", "id"], false, false).contains("--new-privs"));
        assert!(warning(&["apt-get", "update"], false, true).contains("--new-privs"));
        assert!(warning(&["runuser", "-u", "x", "id"], false, true).contains("--user"));
        assert!(warning(&["fusermount3"], true, true).contains("APPIMAGE_EXTRACT_AND_RUN=1"));
        for (command, new_privileges, is_root) in
            [("sudo", true, false), ("apt-get", true, true), ("apt-get", false, false), ("curl", false, true)]
        {
            assert_eq!(warning(&[command], new_privileges, is_root), "", "{command}");
        }
        assert_eq!(warning(&[], false, true), "");
        let rootless = program_warning(&["sudo".into()], true, true, false, |_| None).unwrap_or_default();
        assert!(rootless.contains("start vpn-exec with sudo"), "{rootless}");
    }

    #[test]
    fn a_display_on_the_hosts_loopback_has_a_warning() {
        let warning = |display| display_warning(Some(display), |port| port == 6011).unwrap_or_default();
        assert!(warning("localhost:10.0").contains("--host-port 6010"));
        assert!(warning("localhost:10.0").contains("DISPLAY=host.internal:10.0"));
        assert!(warning("127.0.0.1:12").contains("--host-port 6012"));
        for reached in
            [":0", ":0.0", "localhost:11.0", "host.internal:10.0", "nonsense", "localhost:x", "localhost:99999"]
        {
            assert_eq!(warning(reached), "", "{reached}");
        }
        assert_eq!(display_warning(None, |_| false), None);
    }

    #[test]
    fn an_app_image_is_recognized_by_its_magic_number() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, head: &[u8]| {
            let path = directory.path().join(name);
            std::fs::write(&path, head).expect("a file");
            path.to_str().expect("UTF-8").to_owned()
        };
        let image = file("image", b"\x7fELF\x02\x01\x01\0AI\x02\0\0\0\0\0");
        assert!(warning(&[&image], false, false).contains("APPIMAGE_EXTRACT_AND_RUN=1"));
        assert_eq!(warning(&[&file("other", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0")], false, false), "");
        assert_eq!(warning(&[&file("short", b"\x7fELF")], false, false), "");
        assert_eq!(
            program_warning(&[image.into()], false, false, false, |_| Some("1".into())),
            None,
            "the variable is set already"
        );
    }
}
