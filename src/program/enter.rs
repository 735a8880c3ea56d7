//! Joins the namespace and gives the program its own view of the files that tell of networks and names.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Program, Step};
use crate::linux::mounts;
use crate::linux::namespace::{Named, Names};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";
const NSSWITCH_CONF: &str = "/etc/nsswitch.conf";

/// What a process needs from the host's side of its mount namespace, once it has one of its own.
pub(super) struct Isolated {
    names: Names,
    directory: io::Result<PathBuf>,
}

/// Moves the calling process into a mount namespace of its own, with its own view of names. The tunnel need not be there yet.
pub(super) fn isolate(program: &Program) -> Step<Isolated> {
    let doing = |what| move |error: io::Error| (what, error);
    let names = Names::hold().map_err(doing("open the tunnel's namespace"))?;
    let directory = std::env::current_dir();
    mounts::isolate().map_err(doing("make a mount namespace"))?;
    show_own_names(program)?;
    Ok(Isolated { names, directory })
}

/// Moves the calling process, which is isolated already, into the program's network namespace.
pub(super) fn enter(program: &Program, isolated: Isolated) -> Step<()> {
    let doing = |what| move |error: io::Error| (what, error);
    match isolated.names.look_up(&program.namespace).map_err(doing("open the tunnel's namespace"))? {
        Named::Namespace(namespace) => namespace.enter().map_err(doing("enter the tunnel's namespace"))?,
        Named::File(_) | Named::Free => {
            return Err(("open the tunnel's namespace", io::Error::from(io::ErrorKind::NotFound)));
        }
    }
    // A sysfs shows the network namespace in which it was mounted, so this comes last.
    show_own_sys().map_err(doing("mount /sys for the tunnel's namespace"))?;
    // The working directory may lie in what is covered now; by its name it is found as the program will see it.
    if let Ok(directory) = isolated.directory {
        let _ = std::env::set_current_dir(directory);
    }
    Ok(())
}

fn show_own_sys() -> io::Result<()> {
    if !Path::new("/sys/class/net").exists() {
        return Ok(());
    }
    mounts::replace_sys().or_else(|error| {
        tracing::debug!(%error, "/sys cannot be mounted anew, so the interfaces in it are hidden");
        mounts::hide_sys_interfaces()
    })
}

/// Puts our own `/etc/resolv.conf`, `/etc/hosts` and `/etc/nsswitch.conf` over the host's, from a file system in memory that
/// nobody can write to.
fn show_own_names(program: &Program) -> Step<()> {
    let doing = |what| move |error: io::Error| (what, error);
    let staging = &program.staging;
    // The place is about to be covered, the file with it.
    let resolv_conf = fs::File::open(&program.resolv_conf).map_err(doing("open the tunnel's resolv.conf"))?;
    mounts::memory(staging).map_err(doing("make a file system in memory"))?;
    let views = [
        View { path: RESOLV_CONF, text: program.names.resolv_conf.clone() },
        View { path: HOSTS, text: format!("{}{}", program.names.hosts, read(HOSTS)?) },
        View { path: NSSWITCH_CONF, text: with_hosts_line(&read(NSSWITCH_CONF)?, &program.names.nsswitch_hosts) },
    ];
    for view in &views {
        write_readable(&view.staged(staging), &view.text).map_err(doing("write the program's own files"))?;
    }
    let missing: Vec<&View> = views.iter().filter(|view| !Path::new(view.path).exists()).collect();
    if !missing.is_empty() {
        add_files(staging, &missing).map_err(doing(
            "add a missing file to the program's view of /etc (an empty /etc/resolv.conf on the host would do, too)",
        ))?;
    }
    mounts::make_read_only(staging).map_err(doing("protect the program's own files"))?;
    for view in views.iter().filter(|view| !missing.iter().any(|missing| missing.path == view.path)) {
        // A mount on a symbolic link's end: on the link itself there can be none.
        let target = fs::canonicalize(view.path).map_err(doing("find the host's own file"))?;
        mounts::bind(&view.staged(staging), &target).map_err(doing("show the program's own files"))?;
    }
    // All programs of a tunnel see the same file, into which a change of the resolvers is written.
    let target = fs::canonicalize(RESOLV_CONF).map_err(doing("find the program's own resolv.conf"))?;
    let source = PathBuf::from(format!("/proc/self/fd/{}", resolv_conf.as_raw_fd()));
    mounts::bind(&source, &target)
        .and_then(|()| mounts::make_read_only(&target))
        .map_err(doing("show the tunnel's resolv.conf"))?;
    mounts::detach(staging).map_err(doing("hide the place of the program's own files"))
}

/// Whether the host lacks one of the files that the program is to see.
pub(super) fn adds_files() -> bool {
    [RESOLV_CONF, HOSTS, NSSWITCH_CONF].iter().any(|path| !Path::new(path).exists())
}

/// A file as the program sees it.
struct View {
    path: &'static str,
    text: String,
}

impl View {
    fn staged(&self, staging: &Path) -> PathBuf {
        staging.join(self.path.trim_start_matches("/etc/"))
    }
}

/// Adds files to the program's view of `/etc` that the host has not, or has as symbolic links that lead nowhere: on nothing there
/// can be no mount, so `/etc` gets a layer.
fn add_files(staging: &Path, missing: &[&View]) -> io::Result<()> {
    let layer = staging.join("layer");
    fs::create_dir(&layer)?;
    mounts::memory(&layer)?;
    mounts::overlay(Path::new("/etc"), &layer)?;
    for view in missing {
        match fs::remove_file(view.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        write_readable(Path::new(view.path), &view.text)?;
    }
    mounts::detach(&layer)
}

/// Writes a file that every user can read, whatever the umask.
fn write_readable(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

/// The text of a host's file; empty if there is none.
fn read(path: &'static str) -> Step<String> {
    match fs::read(path) {
        Ok(bytes) => {
            let mut text = String::from_utf8_lossy(&bytes).into_owned();
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            Ok(text)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(("read the host's own files", error)),
    }
}

/// The text of an nsswitch.conf(5) with another line for host names.
fn with_hosts_line(text: &str, hosts: &str) -> String {
    let mut lines: Vec<&str> =
        text.lines().filter(|line| !line.trim_start().to_ascii_lowercase().starts_with("hosts:")).collect();
    lines.push(hosts);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_line_of_nsswitch_changes() {
        let host =
            "# comment\npasswd: files systemd\nhosts: mymachines resolve [!UNAVAIL=return] dns\nnetworks: files\n";
        assert_eq!(
            with_hosts_line(host, "hosts: files dns"),
            "# comment\npasswd: files systemd\nnetworks: files\nhosts: files dns\n"
        );
        assert_eq!(with_hosts_line("", "hosts: files dns"), "hosts: files dns\n");
    }
}
