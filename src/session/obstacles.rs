//! What keeps an ordinary user from making a user namespace, and the remedy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::sysctl;

/// What has to be looked at before a user namespace is made: a new one has limits and capabilities of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Before {
    /// The kind of namespaces, `user` or `net`, of which the user may have none.
    limit: Option<&'static str>,
    /// Whether this is root without CAP_SETFCAP. Since Linux 5.12 such a process has no user namespace in which it is
    /// itself.
    is_bare_root: bool,
}

impl Before {
    /// Looks at the calling process and its user namespace.
    pub(super) fn look() -> Self {
        let is_zero = |kind: &&str| {
            let limit = sysctl::get_if_present(&format!("user/max_{kind}_namespaces")).ok().flatten();
            limit.is_some_and(|limit| limit == "0")
        };
        let can_map = capabilities::permitted().is_ok_and(|permitted| permitted.contains(CapabilitySet::SETFCAP));
        let is_bare_root = nix::unistd::geteuid().is_root() && !can_map;
        Self { limit: ["user", "net"].into_iter().find(is_zero), is_bare_root }
    }
}

/// What is known about the system.
struct System<'a> {
    /// Returns the value of a kernel parameter, if there is one of that name.
    parameter: &'a dyn Fn(&str) -> Option<String>,
    before: Before,
    /// Whether a limit of namespaces was reached.
    is_exhausted: bool,
    /// Whether the kernel's parameters can be read at all.
    has_parameters: bool,
    /// The mounts that this process sees: `/proc/self/mountinfo`.
    mounts: String,
    /// Whether this process has a filter of system calls.
    is_filtered: bool,
    /// Whether this is a container of podman or Docker.
    is_container: bool,
    /// The executable of this process.
    program: PathBuf,
}

/// Returns the failure to make a user namespace, with what forbids it. AppArmor lets a user make one and forbids what
/// is done in it, so all failures up to the first network namespace are the same.
pub(super) fn explain(error: &io::Error, before: Before) -> Failure {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let system = System {
        parameter: &|name| sysctl::get_if_present(name).ok().flatten(),
        before,
        is_exhausted: error.raw_os_error() == Some(libc::ENOSPC),
        has_parameters: Path::new("/proc/sys/user").exists(),
        mounts: fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
        is_filtered: status.lines().any(|line| line.starts_with("Seccomp:") && !line.ends_with('0')),
        is_container: ["/.dockerenv", "/run/.containerenv"].iter().any(|file| Path::new(file).exists()),
        program: std::env::current_exe().unwrap_or_else(|_| "/usr/bin/vpn-exec".into()),
    };
    Failure::of("make a user namespace, in which no root is needed", error).advise(remedy(&system))
}

fn remedy(system: &System<'_>) -> String {
    let is = |parameter: &str, value: &str| (system.parameter)(parameter).is_some_and(|present| present == value);
    // A chroot whose directory is no mount has no mount at its root. The kernel gives no process there a user namespace
    // (user_namespaces(7)).
    let is_chroot = !system.mounts.is_empty() && !system.mounts.lines().any(has_root);
    if !system.has_parameters {
        "mount /proc with its directory sys, which tells what forbids them; or run it with sudo".to_owned()
    } else if let Some(kind) = system.before.limit {
        let what = if kind == "net" { "network namespaces" } else { "them" };
        format!("allow {what}: `sysctl user.max_{kind}_namespaces=15000`; or run it with sudo")
    } else if system.is_exhausted {
        "raise the limits user.max_user_namespaces and user.max_net_namespaces (sysctl(8)); or run it with sudo"
            .to_owned()
    } else if is("kernel/unprivileged_userns_clone", "0") {
        "allow them: `sysctl kernel.unprivileged_userns_clone=1`; or run it with sudo".to_owned()
    } else if system.before.is_bare_root {
        "root needs the capability CAP_SETFCAP for that, or CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP to do without: \
         run it with sudo, or let the container or service have them"
            .to_owned()
    } else if is_chroot {
        "the kernel allows none in a chroot: run it outside, or in a container instead".to_owned()
    } else if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        format!("AppArmor restricts them: {}; or run it with sudo", apparmor_remedy(&system.program))
    } else if system.is_container {
        "in a container, use `vpn-exec attach` (docs/how-to/containers.md), or let the container nest others".to_owned()
    } else if system.is_filtered {
        "a filter of system calls (seccomp) of this container or service may forbid them: allow unshare and setns in \
         it, or run it elsewhere"
            .to_owned()
    } else {
        "run it with sudo, or see user_namespaces(7) for what may forbid them".to_owned()
    }
}

/// Returns whether a line of `/proc/self/mountinfo` is that of a mount at the root.
fn has_root(line: &str) -> bool {
    line.split(' ').nth(4) == Some("/")
}

/// Returns how AppArmor allows a program user namespaces. Its profiles have patterns in place of paths, in quotes if
/// there are spaces.
fn apparmor_remedy(program: &Path) -> String {
    let path = program.display().to_string();
    let is_plain = |letter: char| letter.is_alphanumeric() || "/._-+ ".contains(letter);
    if !path.chars().all(is_plain) {
        return "move this program to a path without special characters, or to /usr/bin, whose profile is in \
                units/apparmor"
            .to_owned();
    }
    let path = if path.contains(' ') { format!("\"{path}\"") } else { path };
    format!(
        "allow this program with `echo 'abi <abi/4.0>, profile vpn-exec {path} flags=(unconfined) {{ userns, }}' \
         >/etc/apparmor.d/vpn-exec && apparmor_parser -r /etc/apparmor.d/vpn-exec`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n22 21 0:5 / /proc rw - proc proc rw\n";

    fn remedy_with(parameters: &[(&str, &str)], change: impl FnOnce(&mut System<'_>)) -> String {
        let parameter = |name: &str| {
            let found = parameters.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let mut system = System {
            parameter: &parameter,
            before: Before::default(),
            is_exhausted: false,
            has_parameters: true,
            mounts: ROOT.into(),
            is_filtered: false,
            is_container: false,
            program: "/home/ann/bin/vpn-exec".into(),
        };
        change(&mut system);
        remedy(&system)
    }

    #[test]
    fn each_obstacle_has_its_remedy() {
        for (parameter, value, expected) in [
            ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
            ("kernel/apparmor_restrict_unprivileged_userns", "1", "profile vpn-exec /home/ann/bin/vpn-exec flags"),
            ("user/max_user_namespaces", "100", "see user_namespaces(7)"),
        ] {
            let said = remedy_with(&[(parameter, value)], |_| {});
            assert!(said.contains(expected), "{parameter}: {said}");
        }
        for kind in ["user", "net"] {
            let said = remedy_with(&[], |system| system.before.limit = Some(kind));
            assert!(said.contains(&format!("sysctl user.max_{kind}_namespaces=")), "{said}");
        }
        let said = remedy_with(&[], |system| system.is_exhausted = true);
        assert!(said.contains("raise the limits user.max_user_namespaces"), "{said}");
        let said = remedy_with(&[], |system| system.before.is_bare_root = true);
        assert!(said.contains("CAP_SETFCAP"), "{said}");
        let said = remedy_with(&[], |system| system.has_parameters = false);
        assert!(said.contains("mount /proc"), "{said}");
        let said = remedy_with(&[], |system| system.mounts = ROOT.replace("/ / rw", "/ /mnt rw"));
        assert!(said.contains("in a chroot"), "{said}");
        let said = remedy_with(&[], |system| system.is_container = true);
        assert!(said.contains("vpn-exec attach"), "{said}");
        let said = remedy_with(&[], |system| system.is_filtered = true);
        assert!(said.contains("seccomp"), "{said}");
    }

    #[test]
    fn a_path_in_a_profile_is_quoted() {
        let restricted = [("kernel/apparmor_restrict_unprivileged_userns", "1")];
        let said = remedy_with(&restricted, |system| system.program = "/home/ann/my programs/vpn-exec".into());
        assert!(said.contains("profile vpn-exec \"/home/ann/my programs/vpn-exec\" flags"), "{said}");
        for path in ["/home/ann/it's/vpn-exec", "/home/ann/*/vpn-exec", "/home/{a,b}/vpn-exec"] {
            let said = remedy_with(&restricted, |system| system.program = path.into());
            assert!(!said.contains(path) && said.contains("without special characters"), "{said}");
        }
    }
}
