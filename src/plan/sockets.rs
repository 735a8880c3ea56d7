//! Which unix sockets a program may connect to. A program inside hands its work to a process outside by such a socket: a terminal
//! multiplexer's server, an open browser, a daemon that downloads. So it reaches those of its tunnel's own network namespace, which
//! is decided when it connects, and of the host those of a short list.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Findings;
use crate::config::host_access::ANY;
use crate::config::{Buses, ProgramOptions, SessionBus};

/// The sockets of the host that are open by default. A `*` within a part of a path stands for any characters of that part, one at the end
/// for any rest. `~` is the home directory of the program's user.
const OPEN: [&str; 38] = [
    // The display: X11 and Wayland.
    "/tmp/.X11-unix/X*",
    "/run/user/*/wayland-*",
    // Sound and video: PulseAudio and PipeWire.
    "/run/user/*/pulse/*",
    "/run/user/*/pipewire-*",
    "/run/pulse/*",
    "/run/pipewire/*",
    "/tmp/pulse-*",
    // Assistive technology, and input methods.
    "/run/user/*/at-spi/*",
    "~/.cache/at-spi/*",
    "~/.cache/ibus/*",
    // Agents that keep keys: they fetch nothing.
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
    // The same display and sound, as flatpak's sandboxes name them.
    "/run/flatpak/wayland-*",
    "/run/flatpak/pulse/*",
    // Printing.
    "/run/cups/cups.sock",
    // The log.
    "/run/systemd/journal/*",
    "/dev/log",
    // Users and groups. The resolvers of these services are hidden.
    "/run/systemd/userdb/*",
    "/run/nslcd/socket",
    "/run/samba/winbindd/pipe",
    // Our own.
    "/run/vpn-exec.notify",
    "/run/vpn-exec.bus",
    "/run/vpn-exec/*/socket",
];

/// The variables that name a socket which is open by default wherever it is, and what stands before its path.
const VARIABLES: [(&str, &str); 6] = [
    ("SSH_AUTH_SOCK", ""),
    ("WAYLAND_DISPLAY", ""),
    ("PULSE_SERVER", "unix:"),
    ("PIPEWIRE_REMOTE", ""),
    ("AT_SPI_BUS_ADDRESS", "unix:path="),
    ("CUPS_SERVER", ""),
];

/// A process that does not belong to the tunnel, and uses the network for whoever asks, or runs what it is told to.
struct Known {
    /// The sockets, as patterns.
    sockets: &'static [&'static str],
    /// What listens there.
    who: &'static str,
    /// What it would do outside, and what to do instead.
    why: &'static str,
    /// Whether `why` names the option that opens it.
    has_option: bool,
    /// Whether it is an instance of the program itself, whose place a program that is refused takes.
    is_instance: bool,
}

impl Known {
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

/// Those that are worth a sentence of their own. The first that fits counts.
const KNOWN: [Known; 17] = [
    Known::new(&["*/tmux-*/*"], "the tmux server", "it runs commands outside, `tmux -L NAME` starts one inside"),
    Known::new(
        &["/run/screen/*", "*/.screen/*", "/tmp/screens/*", "/tmp/uscreens/*"],
        "the screen session",
        "it runs commands outside, `screen -S NAME` starts one inside",
    ),
    Known::new(
        &["/run/user/*/emacs/*", "*/emacs*/server"],
        "the Emacs server",
        "it works outside, `emacs --daemon=NAME` starts one inside",
    ),
    Known::new(
        &["*/S.dirmngr"],
        "GnuPG's dirmngr",
        "it asks key servers from outside, `gpgconf --kill dirmngr` ends it, and one starts inside when it is needed",
    ),
    Known::new(
        &["/run/docker.sock", "/run/user/*/docker.sock", "*/.docker/*"],
        "Docker",
        "its daemon downloads images and runs containers outside",
    ),
    Known::new(
        &["/run/podman/*", "/run/user/*/podman/*"],
        "Podman",
        "its service downloads images and runs containers outside",
    ),
    Known::new(
        &["/run/containerd/*", "/run/k3s/containerd/*", "/run/crio/*", "/run/buildkit/*"],
        "the container engine",
        "its daemon downloads images and runs containers outside",
    ),
    Known::new(
        &["/nix/var/nix/daemon-socket/*"],
        "the Nix daemon",
        "it downloads and builds outside, a store of one's own (`--store ~/nix`) needs no daemon",
    ),
    Known::new(&["/run/snapd*"], "snapd", "it downloads and starts programs outside"),
    Known::new(&["/run/libvirt/*", "/run/user/*/libvirt/*"], "libvirt", "its machines run outside"),
    Known::new(
        &["/run/user/*/systemd/private", "/run/systemd/private"],
        "systemd",
        "it starts programs outside, --dbus session and --dbus system together allow it",
    )
    .with_option(),
    Known::new(
        &["/run/user/*/bus"],
        "the session bus",
        "it starts programs there, --dbus-talk NAME opens one service on it, --dbus session all",
    )
    .with_option(),
    Known::new(&["/run/dbus/system_bus_socket"], "the system bus", "it looks names up, --dbus system allows it")
        .with_option(),
    Known::new(&["*/SingletonSocket"], "a browser", "close it, or add --user-data-dir=DIR").instance(),
    Known::new(&["/run/user/*/gvfsd/*"], "GVfs", "it opens addresses of servers outside"),
    Known::new(
        &["/tmp/.ICE-unix/*"],
        "the session manager",
        "it would start the program again outside at the next log-in",
    ),
    Known::new(
        &["*/.ssh/*"],
        "an ssh connection",
        "it was made outside and is shared (ControlMaster), `ssh -o ControlPath=none` makes one inside",
    ),
];

/// Which unix sockets of the host a program may connect to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketsPlan {
    /// Whether all are open: no filter is installed.
    pub any: bool,
    /// The patterns of those that are open.
    pub open: Vec<String>,
}

/// A refused connection, as it is told to the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Where the socket is.
    pub path: PathBuf,
    /// The sentence: what was refused, and how to allow or to avoid it.
    pub sentence: String,
}

/// Decides which sockets are open.
pub(super) fn decide(options: &ProgramOptions, findings: &mut Findings) -> SocketsPlan {
    let any = options.sockets.iter().any(|socket| socket == ANY);
    if any {
        findings.note("With --socket any the program can have processes outside the tunnel do its work.".into());
    }
    if options.buses.session == SessionBus::Whole {
        findings.note("By the whole session bus the program can start programs outside the tunnel.".into());
    }
    let mut open: Vec<String> = OPEN.iter().map(ToString::to_string).collect();
    open.extend(of_buses(&options.buses).iter().map(ToString::to_string));
    open.extend(options.sockets.iter().filter(|socket| *socket != ANY).cloned());
    SocketsPlan { any, open }
}

/// Decides which sockets are open to a program with this environment.
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

/// The sockets that the buses open.
fn of_buses(buses: &Buses) -> &'static [&'static str] {
    match (buses.session, buses.system) {
        (SessionBus::Whole, true) => &["/run/user/*/bus", "/run/dbus/system_bus_socket", "/run/user/*/systemd/*"],
        (SessionBus::Whole, false) => &["/run/user/*/bus"],
        (_, true) => &["/run/dbus/system_bus_socket"],
        (_, false) => &[],
    }
}

/// The sockets that the program's environment names, of the kinds that are open by default.
fn of_environment(variable: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let named = VARIABLES.iter().filter_map(|(name, prefix)| {
        let value = variable(name)?;
        let path = value.strip_prefix(prefix)?.split([',', ';']).next()?;
        path.starts_with('/').then(|| path.to_owned())
    });
    // GnuPG's agents are where that says.
    let gnupg = variable("GNUPGHOME").filter(|home| home.starts_with('/'));
    let agents = ["S.gpg-agent*", "S.keyboxd", "S.scdaemon"];
    let agents = gnupg.iter().flat_map(|home| agents.map(|agent| format!("{}/{agent}", home.trim_end_matches('/'))));
    named.chain(agents).collect()
}

impl SocketsPlan {
    /// Whether a socket is open, by its path without links. `home` is the directory of the program's user.
    pub fn is_open(&self, path: &Path, home: Option<&Path>) -> bool {
        self.any || self.open.iter().any(|pattern| fits(pattern, path, home))
    }
}

/// The process that listens at a socket, as far as it can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: i32,
    /// Its name.
    pub name: String,
}

impl Refusal {
    /// Describes the refusal of a socket of the host.
    pub fn of(path: &Path, holder: Option<&Holder>) -> Self {
        let shown = path.display().to_string().escape_debug().to_string();
        let known = known(path);
        let who = match (holder, known) {
            (Some(Holder { pid, name }), _) => format!("{name} (pid {pid})"),
            (None, Some(known)) => known.who.to_owned(),
            (None, None) => "a process".to_owned(),
        };
        let sentence = match known {
            Some(known) if known.is_instance => {
                format!("{who} already runs outside the tunnel with this profile: {}", known.why)
            }
            Some(Known { why, has_option: true, .. }) => {
                format!("cannot connect to \"{shown}\": {who} is outside the tunnel; {why}")
            }
            Some(Known { why, .. }) => {
                format!("cannot connect to \"{shown}\": {who} is outside the tunnel; {why}; --socket {shown} allows it")
            }
            None => format!(
                "cannot connect to \"{shown}\": {who} is outside the tunnel, and would work there for the program; \
                 --socket {shown} allows it"
            ),
        };
        Self { path: path.to_owned(), sentence }
    }

    /// Whether a program that is refused there would take the place of the running instance, so that it is to be ended instead.
    pub fn takes_over(path: &Path) -> bool {
        known(path).is_some_and(|known| known.is_instance)
    }
}

fn known(path: &Path) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.sockets.iter().any(|socket| fits(socket, path, None)))
}

/// Returns who is known to listen at a socket.
pub fn listener_of(path: &Path) -> Option<&'static str> {
    known(path).map(|known| known.who)
}

/// Whether a path fits a pattern.
fn fits(pattern: &str, path: &Path, home: Option<&Path>) -> bool {
    let path = path.as_os_str().as_bytes();
    match (pattern.strip_prefix('~'), home) {
        (Some(rest), Some(home)) => {
            path.strip_prefix(home.as_os_str().as_bytes()).is_some_and(|path| fits_bytes(rest.as_bytes(), path))
        }
        (Some(_), None) => false,
        (None, _) => fits_bytes(pattern.as_bytes(), path),
    }
}

fn fits_bytes(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*'] => true,
        // At the beginning it stands for whole parts as well: such patterns are those of names that are known anywhere.
        [b'*', b'/', ..] => (0..=text.len()).any(|at| fits_bytes(&pattern[1..], &text[at..])),
        [b'*', rest @ ..] => {
            let part = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
            (0..=part).any(|at| fits_bytes(rest, &text[at..]))
        }
        [byte, rest @ ..] => text.first() == Some(byte) && fits_bytes(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(sockets: &[&str], buses: Buses) -> SocketsPlan {
        let sockets = sockets.iter().map(ToString::to_string).collect();
        decide(&ProgramOptions { sockets, buses, ..ProgramOptions::default() }, &mut Findings::default())
    }

    fn is_open(plan: &SocketsPlan, path: &str) -> bool {
        plan.is_open(path.as_ref(), Some("/home/ann".as_ref()))
    }

    #[test]
    fn a_short_list_is_open_and_all_else_is_closed() {
        let plan = plan(&[], Buses::default());
        for open in [
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
            assert!(is_open(&plan, open), "{open}");
        }
        for closed in [
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
            assert!(!is_open(&plan, closed), "{closed}");
        }
    }

    #[test]
    fn options_open_more() {
        let session = |session, system| Buses { session, system, talk: Vec::new() };
        let whole = plan(&[], session(SessionBus::Whole, false));
        assert!(is_open(&whole, "/run/user/1000/bus") && !is_open(&whole, "/run/user/1000/systemd/private"));
        let both = plan(&[], session(SessionBus::Whole, true));
        assert!(is_open(&both, "/run/user/1000/systemd/private") && is_open(&both, "/run/dbus/system_bus_socket"));
        let named = plan(&["/run/docker.sock", "/tmp/tmux-1000/*"], Buses::default());
        assert!(is_open(&named, "/run/docker.sock") && is_open(&named, "/tmp/tmux-1000/a/b"));
        assert!(!is_open(&named, "/tmp/tmux-1001/a") && !named.any);
        assert!(is_open(&plan(&["any"], Buses::default()), "/anything"));
    }

    #[test]
    fn the_environment_names_sockets() {
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

    #[test]
    fn refusals_say_what_to_do() {
        let holder = Holder { pid: 812, name: "tmux: server".into() };
        for (path, holder, words) in [
            (
                "/tmp/tmux-1000/default",
                Some(&holder),
                &["tmux: server (pid 812)", "tmux -L NAME", "--socket /tmp/tmux"][..],
            ),
            ("/run/docker.sock", None, &["Docker", "outside the tunnel", "--socket /run/docker.sock"]),
            ("/run/user/1000/bus", None, &["session bus", "--dbus-talk NAME", "--dbus session"]),
            ("/home/ann/x.sock", None, &["outside the tunnel", "--socket /home/ann/x.sock"]),
            ("/tmp/.org.chromium.Chromium.x/SingletonSocket", Some(&holder), &["already runs", "--user-data-dir=DIR"]),
        ] {
            let Refusal { sentence, .. } = Refusal::of(path.as_ref(), holder);
            for word in words {
                assert!(sentence.contains(word), "{sentence}");
            }
            assert!(!sentence.contains('\n') && !sentence.ends_with('.'), "{sentence}");
        }
        assert!(Refusal::takes_over("/x/SingletonSocket".as_ref()) && !Refusal::takes_over("/x/bus".as_ref()));
    }
}
