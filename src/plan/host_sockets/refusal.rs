//! Explains to the user why a connection to a socket of the host was refused, and what to do.

use std::path::Path;

use super::matches_pattern;

/// A service of the host that uses the network or runs programs for its clients, outside the tunnel.
struct KnownService {
    /// The patterns of its sockets.
    sockets: &'static [&'static str],
    /// Its name.
    who: &'static str,
    /// What it does outside the tunnel, and what to do instead.
    why: &'static str,
    /// Whether `why` names the option that allows it.
    has_option: bool,
    /// Whether it is a running instance of the program itself. A program that cannot connect to it would take over its
    /// profile.
    is_instance: bool,
}

impl KnownService {
    const fn new(sockets: &'static [&'static str], who: &'static str, why: &'static str) -> Self {
        Self { sockets, who, why, has_option: false, is_instance: false }
    }

    const fn with_option(self) -> Self {
        Self { has_option: true, ..self }
    }

    const fn instance(self) -> Self {
        Self { is_instance: true, ..self }
    }
}

/// The services with an explanation of their own. The first match counts.
const KNOWN: [KnownService; 17] = [
    KnownService::new(&["*/tmux-*/*"], "the tmux server", "it runs commands outside, `tmux -L NAME` starts one inside"),
    KnownService::new(
        &["/run/screen/*", "*/.screen/*", "/tmp/screens/*", "/tmp/uscreens/*"],
        "the screen session",
        "it runs commands outside, `screen -S NAME` starts one inside",
    ),
    KnownService::new(
        &["/run/user/*/emacs/*", "*/emacs*/server"],
        "the Emacs server",
        "it works outside, `emacs --daemon=NAME` starts one inside",
    ),
    KnownService::new(
        &["*/S.dirmngr"],
        "GnuPG's dirmngr",
        "it asks key servers from outside, `gpgconf --kill dirmngr` ends it, and one starts inside when it is needed",
    ),
    KnownService::new(
        &["/run/docker.sock", "/run/user/*/docker.sock", "*/.docker/*"],
        "Docker",
        "its daemon downloads images and runs containers outside",
    ),
    KnownService::new(
        &["/run/podman/*", "/run/user/*/podman/*"],
        "Podman",
        "its service downloads images and runs containers outside",
    ),
    KnownService::new(
        &["/run/containerd/*", "/run/k3s/containerd/*", "/run/crio/*", "/run/buildkit/*"],
        "the container engine",
        "its daemon downloads images and runs containers outside",
    ),
    KnownService::new(
        &["/nix/var/nix/daemon-socket/*"],
        "the Nix daemon",
        "it downloads and builds outside, a private store (`--store ~/nix`) needs no daemon",
    ),
    KnownService::new(&["/run/snapd*"], "snapd", "it downloads and starts programs outside"),
    KnownService::new(&["/run/libvirt/*", "/run/user/*/libvirt/*"], "libvirt", "its virtual machines run outside"),
    KnownService::new(
        &["/run/user/*/systemd/private", "/run/systemd/private"],
        "systemd",
        "it starts programs outside, --dbus session and --dbus system together allow it",
    )
    .with_option(),
    KnownService::new(
        &["/run/user/*/bus"],
        "the session bus",
        "it starts programs there, --dbus-talk NAME opens one service on it, --dbus session all",
    )
    .with_option(),
    KnownService::new(
        &["/run/dbus/system_bus_socket"],
        "the system bus",
        "services on it resolve names, --dbus system allows it",
    )
    .with_option(),
    KnownService::new(&["*/SingletonSocket"], "a browser", "close it, or add --user-data-dir=DIR").instance(),
    KnownService::new(&["/run/user/*/gvfsd/*"], "GVfs", "it opens addresses of servers outside"),
    KnownService::new(
        &["/tmp/.ICE-unix/*"],
        "the session manager",
        "it would start the program outside the tunnel at the next login",
    ),
    KnownService::new(
        &["*/.ssh/*"],
        "an ssh connection",
        "it was made outside and is shared (ControlMaster), `ssh -o ControlPath=none` makes one inside",
    ),
];

/// The process that listens on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOwner {
    /// Its process ID.
    pub pid: i32,
    /// Its name.
    pub name: String,
}

/// Returns the message about a refused connection to a socket, whose owner may be known: what was refused, and how to
/// allow or avoid it.
pub fn refusal_message(path: &Path, owner: Option<&SocketOwner>) -> String {
    let shown = path.display().to_string().escape_debug().to_string();
    let known = known(path);
    let who = match (owner, known) {
        (Some(SocketOwner { pid, name }), _) => format!("{name} (pid {pid})"),
        (None, Some(known)) => known.who.to_owned(),
        (None, None) => "a process".to_owned(),
    };
    match known {
        Some(known) if known.is_instance => {
            format!("{who} already runs outside the tunnel with this profile: {}", known.why)
        }
        Some(KnownService { why, has_option: true, .. }) => {
            format!("cannot connect to \"{shown}\": {who} is outside the tunnel; {why}")
        }
        Some(KnownService { why, .. }) => {
            format!("cannot connect to \"{shown}\": {who} is outside the tunnel; {why}; --socket {shown} allows it")
        }
        None => format!(
            "cannot connect to \"{shown}\": {who} is outside the tunnel, and could use the network there for the \
             program; --socket {shown} allows it"
        ),
    }
}

/// Returns whether a socket is that of a running instance of a program. A second instance that cannot connect to it
/// would take over its profile, so that instance must be killed instead.
pub fn is_of_running_instance(path: &Path) -> bool {
    known(path).is_some_and(|known| known.is_instance)
}

fn known(path: &Path) -> Option<&'static KnownService> {
    KNOWN.iter().find(|known| known.sockets.iter().any(|socket| matches_pattern(socket, path, None)))
}

/// Returns the name of the service that is known to listen on a socket.
pub fn known_listener(path: &Path) -> Option<&'static str> {
    known(path).map(|known| known.who)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let owner = SocketOwner { pid: 812, name: "tmux: server".into() };
        for (path, owner, words) in [
            (
                "/tmp/tmux-1000/default",
                Some(&owner),
                &["tmux: server (pid 812)", "tmux -L NAME", "--socket /tmp/tmux"][..],
            ),
            ("/run/docker.sock", None, &["Docker", "outside the tunnel", "--socket /run/docker.sock"]),
            ("/run/user/1000/bus", None, &["session bus", "--dbus-talk NAME", "--dbus session"]),
            ("/home/ann/x.sock", None, &["outside the tunnel", "--socket /home/ann/x.sock"]),
            ("/tmp/.org.chromium.Chromium.x/SingletonSocket", Some(&owner), &["already runs", "--user-data-dir=DIR"]),
        ] {
            let message = refusal_message(path.as_ref(), owner);
            for word in words {
                assert!(message.contains(word), "{message}");
            }
            assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
        }
        assert!(is_of_running_instance("/x/SingletonSocket".as_ref()) && !is_of_running_instance("/x/bus".as_ref()));
    }
}
