//! Joins the namespace and gives the program its own view of the files that tell of networks and names.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Program, Step};
use crate::linux::mirror::{self, Hidden};
use crate::linux::mounts;
use crate::linux::namespace::{Named, Names};

const ETC: &str = "/etc";
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
    show_own_files(program)?;
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
    // The working directory may lie in what is covered now; by its name it is found as the program will see it. From one that it does
    // not see, it could look around in what is covered.
    let found = isolated.directory.and_then(std::env::set_current_dir);
    found.or_else(|_| std::env::set_current_dir("/")).map_err(doing("find the working directory"))
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

/// Covers `/etc` with a copy that has our own files in the place of the host's, and `/run` and others with copies that do not have what
/// is hidden from the program.
fn show_own_files(program: &Program) -> Step<()> {
    let doing = |what| move |error: io::Error| (what, error);
    // The place is about to be covered, the file with it.
    let resolv_conf = fs::File::open(&program.resolv_conf).map_err(doing("open the tunnel's resolv.conf"))?;
    let views = [
        (RESOLV_CONF, program.names.resolv_conf.clone()),
        (HOSTS, format!("{}{}", program.names.hosts, read(HOSTS)?)),
        (NSSWITCH_CONF, with_hosts_line(&read(NSSWITCH_CONF)?, &program.names.nsswitch_hosts)),
    ];
    let replaced = views.each_ref().map(|(path, _)| PathBuf::from(path));
    mirror::cover(ETC.as_ref(), &program.staging, Hidden(&replaced)).map_err(doing("copy the view of /etc"))?;
    for (path, text) in &views {
        write_readable(path.as_ref(), text).map_err(doing("write the program's own files"))?;
    }
    mounts::make_read_only(ETC.as_ref()).map_err(doing("protect the program's own files"))?;
    // All programs of a tunnel see the same file, into which a change of the resolvers is written.
    let source = PathBuf::from(format!("/proc/self/fd/{}", resolv_conf.as_raw_fd()));
    mounts::bind(&source, RESOLV_CONF.as_ref())
        .and_then(|()| mounts::make_read_only(RESOLV_CONF.as_ref()))
        .map_err(doing("show the tunnel's resolv.conf"))?;

    // On older systems /var/run is a directory of its own, with the same in it.
    let older = program.hidden.iter().filter_map(|path| path.strip_prefix("/run").ok());
    let older: Vec<PathBuf> = older.map(|rest| Path::new("/var/run").join(rest)).collect();
    // Where the copies are built comes last: it is covered then.
    for (directory, hidden) in [("/var/run", &older), ("/var/lib/sss", &program.hidden), ("/run", &program.hidden)] {
        if fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir()) {
            mirror::cover(directory.as_ref(), &program.staging, Hidden(hidden))
                .map_err(doing("hide the host's resolvers"))?;
        }
    }
    Ok(())
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
