//! The unix sockets that the program may connect to.
//!
//! Over such a socket a program can have another process work for it outside the tunnel: the server of a terminal
//! multiplexer, a running browser, a daemon that downloads. So the program may connect to sockets of its tunnel's own
//! network namespace, which is checked when it connects, and of the host's sockets only to those of a short list.
//! `refusal` explains all other attempts.

mod refusal;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use self::refusal::{SocketOwner, is_of_running_instance, known_listener, refusal_message};

use super::Findings;
use crate::config::host_access::ANY;
use crate::config::{Buses, ProgramOptions, SessionBus};

/// The sockets of the host that are allowed by default. A `*` within a component of a path matches any characters of
/// that component; one at the end matches any rest. `~` is the home directory of the program's user.
const ALLOWED: [&str; 38] = [
    // Display: X11 and Wayland.
    "/tmp/.X11-unix/X*",
    "/run/user/*/wayland-*",
    // Sound and video: PulseAudio and PipeWire.
    "/run/user/*/pulse/*",
    "/run/user/*/pipewire-*",
    "/run/pulse/*",
    "/run/pipewire/*",
    "/tmp/pulse-*",
    // Assistive technology and input methods.
    "/run/user/*/at-spi/*",
    "~/.cache/at-spi/*",
    "~/.cache/ibus/*",
    // Agents that keep keys. They do not use the network.
    "/run/user/*/gnupg/S.gpg-agent*",
    "/run/user/*/gnupg/S.keyboxd",
    "/run/user/*/gnupg/S.scdaemon",
    "/run/user/*/gnupg/d.*/S.gpg-agent*",
    "/run/user/*/gnupg/d.*/S.keyboxd",
    "~/.gnupg/S.gpg-agent*",
    "~/.gnupg/S.keyboxd",
    "~/.gnupg/S.scdaemon",
    "/run/user/*/keyring/*",
    "/run/user/*/gcr/*",
    "/run/user/*/ssh-agent*",
    "/run/user/*/openssh_agent",
    "/tmp/ssh-*/agent.*",
    "~/.ssh/agent/*",
    "/run/user/*/kwallet5.socket",
    "/run/user/*/gnupg/d.*/S.scdaemon",
    "~/.cache/git/credential/socket",
    // Display and sound in flatpak's sandboxes.
    "/run/flatpak/wayland-*",
    "/run/flatpak/pulse/*",
    // Printing.
    "/run/cups/cups.sock",
    // Logging.
    "/run/systemd/journal/*",
    "/dev/log",
    // Users and groups. The sockets by which these services resolve host names are hidden.
    "/run/systemd/userdb/*",
    "/run/nslcd/socket",
    "/run/samba/winbindd/pipe",
    // Those of vpn-exec itself.
    "/run/vpn-exec.notify",
    "/run/vpn-exec.bus",
    "/run/vpn-exec/*/socket",
];

/// The environment variables that name a socket which is allowed at any path, and what precedes the path.
const VARIABLES: [(&str, &str); 6] = [
    ("SSH_AUTH_SOCK", ""),
    ("WAYLAND_DISPLAY", ""),
    ("PULSE_SERVER", "unix:"),
    ("PIPEWIRE_REMOTE", ""),
    ("AT_SPI_BUS_ADDRESS", "unix:path="),
    ("CUPS_SERVER", ""),
];

/// The unix sockets of the host that a program may connect to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketsPlan {
    /// Whether all are allowed. Then no filter is installed.
    pub any: bool,
    /// The patterns of the paths that are allowed.
    pub open: Vec<String>,
}

/// Decides which sockets are allowed, whatever the environment.
pub(super) fn decide(options: &ProgramOptions, findings: &mut Findings) -> SocketsPlan {
    let any = options.sockets.iter().any(|socket| socket == ANY);
    if any {
        findings.note("With --socket any the program can use processes outside the tunnel.".into());
    }
    if options.buses.session == SessionBus::Whole {
        findings.note("On the unfiltered session bus the program can start programs outside the tunnel.".into());
    }
    let mut open: Vec<String> = ALLOWED.iter().map(ToString::to_string).collect();
    open.extend(of_buses(&options.buses).iter().map(ToString::to_string));
    open.extend(options.sockets.iter().filter(|socket| *socket != ANY).cloned());
    SocketsPlan { any, open }
}

/// Decides which sockets are allowed for a program. `variable` returns the value of a variable of its environment.
pub fn for_program(options: &ProgramOptions, variable: impl Fn(&str) -> Option<String>) -> SocketsPlan {
    let mut plan = decide(options, &mut Findings::default());
    plan.open.extend(of_environment(&variable));
    if options.buses.session == SessionBus::Whole {
        let address = variable("DBUS_SESSION_BUS_ADDRESS").unwrap_or_default();
        let path = address.strip_prefix("unix:path=").and_then(|rest| rest.split([',', ';']).next());
        plan.open.extend(path.map(str::to_owned));
    }
    plan
}

/// Returns the sockets of the buses that the program may use.
fn of_buses(buses: &Buses) -> &'static [&'static str] {
    match (buses.session, buses.system) {
        (SessionBus::Whole, true) => &["/run/user/*/bus", "/run/dbus/system_bus_socket", "/run/user/*/systemd/*"],
        (SessionBus::Whole, false) => &["/run/user/*/bus"],
        (_, true) => &["/run/dbus/system_bus_socket"],
        (_, false) => &[],
    }
}

/// Returns the sockets that the program's environment names, of the kinds that are allowed by default.
fn of_environment(variable: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let named = VARIABLES.iter().filter_map(|(name, prefix)| {
        let value = variable(name)?;
        let path = value.strip_prefix(prefix)?.split([',', ';']).next()?;
        path.starts_with('/').then(|| path.to_owned())
    });
    // GnuPG's agents have their sockets there.
    let gnupg = variable("GNUPGHOME").filter(|home| home.starts_with('/'));
    let agents = ["S.gpg-agent*", "S.keyboxd", "S.scdaemon"];
    let agents = gnupg.iter().flat_map(|home| agents.map(|agent| format!("{}/{agent}", home.trim_end_matches('/'))));
    named.chain(agents).collect()
}

impl SocketsPlan {
    /// Returns whether a program may connect to a socket. `path` has no symbolic links; `home` is the home directory of
    /// the program's user.
    pub fn allows(&self, path: &Path, home: Option<&Path>) -> bool {
        self.any || self.open.iter().any(|pattern| matches_pattern(pattern, path, home))
    }
}

/// Returns whether a path matches a pattern.
fn matches_pattern(pattern: &str, path: &Path, home: Option<&Path>) -> bool {
    let path = path.as_os_str().as_bytes();
    match (pattern.strip_prefix('~'), home) {
        (Some(rest), Some(home)) => {
            path.strip_prefix(home.as_os_str().as_bytes()).is_some_and(|path| matches_bytes(rest.as_bytes(), path))
        }
        (Some(_), None) => false,
        (None, _) => matches_bytes(pattern.as_bytes(), path),
    }
}

fn matches_bytes(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*'] => true,
        // A leading `*/` matches any number of components, for names that are known in any directory.
        [b'*', b'/', ..] => (0..=text.len()).any(|at| matches_bytes(&pattern[1..], &text[at..])),
        [b'*', rest @ ..] => {
            let part = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
            (0..=part).any(|at| matches_bytes(rest, &text[at..]))
        }
        [byte, rest @ ..] => text.first() == Some(byte) && matches_bytes(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(sockets: &[&str], buses: Buses) -> SocketsPlan {
        let sockets = sockets.iter().map(ToString::to_string).collect();
        decide(&ProgramOptions { sockets, buses, ..ProgramOptions::default() }, &mut Findings::default())
    }

    fn is_allowed(plan: &SocketsPlan, path: &str) -> bool {
        plan.allows(path.as_ref(), Some("/home/ann".as_ref()))
    }

    #[test]
    fn only_a_short_list_is_allowed_by_default() {
        let plan = plan(&[], Buses::default());
        for allowed in [
            "/tmp/.X11-unix/X0",
            "/run/user/1000/wayland-1",
            "/run/user/1000/pulse/native",
            "/run/user/1000/pipewire-0",
            "/run/user/1000/gnupg/S.gpg-agent.ssh",
            "/run/user/1000/gnupg/d.abc/S.gpg-agent",
            "/home/ann/.gnupg/S.gpg-agent",
            "/run/user/1000/keyring/ssh",
            "/run/user/1000/at-spi/bus_0",
            "/run/cups/cups.sock",
            "/run/systemd/journal/dev-log",
            "/run/vpn-exec/mullvad/socket",
        ] {
            assert!(is_allowed(&plan, allowed), "{allowed}");
        }
        for refused in [
            "/tmp/tmux-1000/default",
            "/run/user/1000/bus",
            "/run/user/1000/systemd/private",
            "/run/user/1000/gnupg/S.dirmngr",
            "/run/user/1000/gnupg/x/y/S.gpg-agent",
            "/home/eve/.gnupg/S.gpg-agent",
            "/run/docker.sock",
            "/nix/var/nix/daemon-socket/socket",
            "/home/ann/.ssh/control-host",
            "/run/dbus/system_bus_socket",
            "/run/cups/cups.sock2",
            "/x/run/cups/cups.sock",
        ] {
            assert!(!is_allowed(&plan, refused), "{refused}");
        }
    }

    #[test]
    fn options_allow_more() {
        let session = |session, system| Buses { session, system, talk: Vec::new() };
        let whole = plan(&[], session(SessionBus::Whole, false));
        assert!(is_allowed(&whole, "/run/user/1000/bus") && !is_allowed(&whole, "/run/user/1000/systemd/private"));
        let both = plan(&[], session(SessionBus::Whole, true));
        assert!(
            is_allowed(&both, "/run/user/1000/systemd/private") && is_allowed(&both, "/run/dbus/system_bus_socket")
        );
        let named = plan(&["/run/docker.sock", "/tmp/tmux-1000/*"], Buses::default());
        assert!(is_allowed(&named, "/run/docker.sock") && is_allowed(&named, "/tmp/tmux-1000/a/b"));
        assert!(!is_allowed(&named, "/tmp/tmux-1001/a") && !named.any);
        assert!(is_allowed(&plan(&["any"], Buses::default()), "/anything"));
    }

    #[test]
    fn sockets_that_the_environment_names_are_allowed() {
        let named = |name: &str, value: &str| {
            let (name, value) = (name.to_owned(), value.to_owned());
            of_environment(move |asked| (asked == name).then(|| value.clone()))
        };
        assert_eq!(named("SSH_AUTH_SOCK", "/home/ann/agent"), ["/home/ann/agent"]);
        assert_eq!(named("PULSE_SERVER", "unix:/x/native"), ["/x/native"]);
        assert_eq!(named("AT_SPI_BUS_ADDRESS", "unix:path=/x/bus,guid=1"), ["/x/bus"]);
        for (name, value) in [("WAYLAND_DISPLAY", "wayland-1"), ("PULSE_SERVER", "tcp:host"), ("TMUX", "/tmp/tmux-1/x")]
        {
            assert!(named(name, value).is_empty(), "{name}");
        }
    }
}
