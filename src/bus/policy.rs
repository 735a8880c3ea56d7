//! What a program inside may do on the session bus: whom it may call, and which names it may own there.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::message::MAX_NAME;

/// Interfaces that every service has, and that do no more than describe it.
const DESCRIBING: [&str; 3] =
    ["org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer", "org.freedesktop.DBus.ObjectManager"];

/// Reads and writes properties of another interface, which is the first argument.
pub const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// A name on the bus, or, with a `*` at its end, all names with that beginning.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern {
    beginning: String,
    is_prefix: bool,
}

/// Why a text is not a [`Pattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid D-Bus name: {why}")]
pub struct PatternError {
    text: String,
    why: &'static str,
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let (beginning, is_prefix) = text.strip_suffix('*').map_or((text, false), |beginning| (beginning, true));
        // The part that a * stands for is not empty where a dot is before it.
        let example = if beginning.ends_with('.') { format!("{beginning}x") } else { beginning.to_owned() };
        match check_name(&example) {
            Ok(()) => Ok(Self { beginning: beginning.to_owned(), is_prefix }),
            Err(why) => Err(PatternError { text: text.to_owned(), why }),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.beginning, if self.is_prefix { "*" } else { "" })
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Pattern {
    /// Whether a name is meant.
    pub fn matches(&self, name: &str) -> bool {
        if self.is_prefix { name.starts_with(&self.beginning) } else { name == self.beginning }
    }

    /// A pattern of this source, which is known to be valid: see the tests.
    fn known(text: &str) -> Self {
        let (beginning, is_prefix) = text.strip_suffix('*').map_or((text, false), |beginning| (beginning, true));
        Self { beginning: beginning.to_owned(), is_prefix }
    }
}

/// Checks that a text is a name that a connection may ask for (D-Bus specification, "Bus names"): not one that the bus
/// gives, as `:1.5`.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    if name.len() > MAX_NAME {
        return Err("it has more than 255 characters");
    }
    let elements: Vec<&str> = name.split('.').collect();
    if elements.len() < 2 {
        return Err("it has no dot, as org.example.App has");
    }
    for element in elements {
        if element.is_empty() {
            return Err("there is nothing between two dots");
        }
        if element.starts_with(|first: char| first.is_ascii_digit()) {
            return Err("a part begins with a digit");
        }
        if !element.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)) {
            return Err("it has characters other than letters, digits, '_', '-' and '.'");
        }
    }
    Ok(())
}

/// A name that a program inside may call, and which of its methods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Talk {
    /// The name.
    pub name: Pattern,
    /// The methods.
    pub calls: AllowedCalls,
}

/// Which methods of a service may be called. A process can have several names and answers for all of its objects under
/// each of them, so a name alone says little about what a call does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllowedCalls {
    /// All of them.
    All,
    /// Those of these interfaces, and those that only describe the service.
    Only(Vec<InterfaceRule>),
}

/// An interface, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InterfaceRule {
    /// Its name.
    pub name: Pattern,
    /// The methods; all of them and the properties, if there are none here.
    pub members: Vec<String>,
}

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodCall<'a> {
    /// The interface. A call may leave it out, and the service then looks for the method everywhere.
    pub interface: Option<&'a str>,
    /// The method.
    pub member: &'a str,
    /// The interface whose properties are meant, if the interface is [`PROPERTIES`].
    pub of: Option<&'a str>,
}

impl AllowedCalls {
    fn allow(&self, asked: MethodCall<'_>) -> bool {
        let (Self::Only(interfaces), Some(interface)) = (self, asked.interface) else {
            return *self == Self::All;
        };
        if DESCRIBING.contains(&interface) {
            return true;
        }
        if interface == PROPERTIES {
            let whole = |allowed: &InterfaceRule| allowed.members.is_empty() || asked.member != "Set";
            // Without a name, all interfaces are meant.
            return asked
                .of
                .is_some_and(|of| interfaces.iter().any(|allowed| allowed.name.matches(of) && whole(allowed)));
        }
        interfaces.iter().any(|allowed| {
            let members = &allowed.members;
            allowed.name.matches(interface)
                && (members.is_empty() || members.iter().any(|member| member == asked.member))
        })
    }
}

/// What a program inside may do on the session bus. It can always call itself and the other clients of its filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// What it may call.
    pub talk: Vec<Talk>,
    /// What it may own for all to see. Any other name it owns only towards those that the same filter serves.
    pub own: Vec<Pattern>,
}

/// A service, and the interfaces of it that a desktop program needs: those of which none runs a program, opens an
/// address or fetches something outside on behalf of who calls.
const DESKTOP: &[(&str, &[&str])] = &[
    ("org.freedesktop.Notifications", &["org.freedesktop.Notifications"]),
    ("org.freedesktop.secrets", &["org.freedesktop.Secret.*"]),
    ("org.kde.kwalletd5", &["org.kde.KWallet"]),
    ("org.kde.kwalletd6", &["org.kde.KWallet"]),
    ("org.a11y.Bus", &["org.a11y.Bus", "org.a11y.Status"]),
    ("org.kde.StatusNotifierWatcher", &["org.kde.StatusNotifierWatcher"]),
    // It calls the items; nothing of it is called.
    ("org.kde.StatusNotifierHost-*", &[]),
    ("com.canonical.AppMenu.Registrar", &["com.canonical.AppMenu.Registrar"]),
    ("ca.desrt.dconf", &["ca.desrt.dconf.*"]),
    ("org.freedesktop.ScreenSaver", &["org.freedesktop.ScreenSaver"]),
    ("org.gnome.ScreenSaver", &["org.gnome.ScreenSaver"]),
    // Input methods.
    ("org.freedesktop.portal.IBus", &["org.freedesktop.IBus.*"]),
    ("org.freedesktop.portal.Fcitx", &["org.fcitx.Fcitx.InputMethod*", "org.fcitx.Fcitx.InputContext*"]),
    ("org.fcitx.Fcitx5", &["org.fcitx.Fcitx.InputMethod*", "org.fcitx.Fcitx.InputContext*"]),
    ("org.fcitx.Fcitx-*", &["org.fcitx.Fcitx.InputMethod*", "org.fcitx.Fcitx.InputContext*"]),
    ("org.freedesktop.portal.Documents", &["org.freedesktop.portal.Documents", "org.freedesktop.portal.FileTransfer"]),
    // Left out, as they run or fetch outside: OpenURI, Email, Background, DynamicLauncher, NetworkMonitor (it resolves
    // names), ProxyResolver (it fetches a script), Location (it asks a server). Portals to come are closed until they
    // are known.
    (
        "org.freedesktop.portal.Desktop",
        &[
            "org.freedesktop.portal.Account",
            "org.freedesktop.portal.Camera",
            "org.freedesktop.portal.Clipboard",
            "org.freedesktop.portal.Device",
            "org.freedesktop.portal.FileChooser",
            "org.freedesktop.portal.GameMode",
            "org.freedesktop.portal.GlobalShortcuts",
            "org.freedesktop.portal.Inhibit",
            "org.freedesktop.portal.InputCapture",
            "org.freedesktop.portal.MemoryMonitor",
            "org.freedesktop.portal.Notification",
            "org.freedesktop.portal.PowerProfileMonitor",
            "org.freedesktop.portal.Print",
            "org.freedesktop.portal.Realtime",
            "org.freedesktop.portal.RemoteDesktop",
            "org.freedesktop.portal.Request",
            "org.freedesktop.portal.ScreenCast",
            "org.freedesktop.portal.Screenshot",
            "org.freedesktop.portal.Secret",
            "org.freedesktop.portal.Session",
            "org.freedesktop.portal.Settings",
            "org.freedesktop.portal.Trash",
            "org.freedesktop.portal.Usb",
            "org.freedesktop.host.portal.Registry",
        ],
    ),
];

/// The same, where a desktop program needs single methods of an interface and the remaining ones do more.
const DESKTOP_MEMBERS: &[(&str, &str, &[&str])] = &[
    ("org.gnome.SessionManager", "org.gnome.SessionManager", &["Inhibit", "Uninhibit", "IsInhibited"]),
    (
        "org.freedesktop.PowerManagement",
        "org.freedesktop.PowerManagement.Inhibit",
        &["Inhibit", "UnInhibit", "HasInhibit"],
    ),
    // SetWallpaperURI fetches.
    ("org.freedesktop.portal.Desktop", "org.freedesktop.portal.Wallpaper", &["SetWallpaperFile"]),
];

/// Names that programs own for the desktop's sake: media players and symbols in the tray.
const DESKTOP_OWN: &[&str] =
    &["org.mpris.MediaPlayer2.*", "org.kde.StatusNotifierItem-*", "org.freedesktop.StatusNotifierItem-*"];

impl Policy {
    /// Returns what desktop programs need and what has nothing act for them outside: notifications, secrets,
    /// accessibility, the tray, settings, inhibiting the screen saver, input methods, and the portals that neither run
    /// nor fetch anything.
    pub fn default_desktop() -> Self {
        let whole = DESKTOP.iter().map(|(name, interfaces)| Talk {
            name: Pattern::known(name),
            calls: AllowedCalls::Only(
                interfaces
                    .iter()
                    .map(|name| InterfaceRule { name: Pattern::known(name), members: Vec::new() })
                    .collect(),
            ),
        });
        let parts = DESKTOP_MEMBERS.iter().map(|(name, interface, members)| Talk {
            name: Pattern::known(name),
            calls: AllowedCalls::Only(vec![InterfaceRule {
                name: Pattern::known(interface),
                members: members.iter().map(|&member| member.to_owned()).collect(),
            }]),
        });
        Self { talk: whole.chain(parts).collect(), own: DESKTOP_OWN.iter().map(|name| Pattern::known(name)).collect() }
    }

    /// Allows all calls of these names, too.
    #[must_use]
    pub fn with_talk(mut self, names: impl IntoIterator<Item = Pattern>) -> Self {
        self.talk.extend(names.into_iter().map(|name| Talk { name, calls: AllowedCalls::All }));
        self
    }

    /// Whether a name may be called at all. Its owner may then call back, and send signals.
    pub fn talks_to(&self, name: &str) -> bool {
        self.talk.iter().any(|talk| talk.name.matches(name))
    }

    /// Whether a name may be owned for all to see.
    pub fn may_own(&self, name: &str) -> bool {
        self.own.iter().any(|own| own.matches(name))
    }

    /// Whether a program inside may know who owns a name.
    pub fn shows(&self, name: &str) -> bool {
        self.talks_to(name) || self.may_own(name)
    }

    /// Whether a call of a service that has one of these names is allowed.
    pub fn allows<'a>(&self, names: impl IntoIterator<Item = &'a str>, asked: MethodCall<'_>) -> bool {
        names.into_iter().any(|name| self.talk.iter().any(|talk| talk.name.matches(name) && talk.calls.allow(asked)))
    }
}

impl fmt::Display for Policy {
    /// A line for each name: what may be called, then what may be owned.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for talk in &self.talk {
            write!(f, "call {}", talk.name)?;
            match &talk.calls {
                AllowedCalls::All => {}
                AllowedCalls::Only(interfaces) if interfaces.is_empty() => {
                    f.write_str(": nothing; it may call back")?
                }
                AllowedCalls::Only(interfaces) => {
                    for (at, interface) in interfaces.iter().enumerate() {
                        write!(f, "{}{}", if at == 0 { ": " } else { ", " }, interface.name)?;
                        if !interface.members.is_empty() {
                            write!(f, " ({})", interface.members.join(", "))?;
                        }
                    }
                }
            }
            writeln!(f)?;
        }
        self.own.iter().try_for_each(|own| writeln!(f, "own {own}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked<'a>(interface: &'a str, member: &'a str) -> MethodCall<'a> {
        MethodCall { interface: Some(interface), member, of: None }
    }

    #[test]
    fn names_of_the_default_policy_are_valid() {
        let policy = Policy::default_desktop();
        for talk in &policy.talk {
            assert_eq!(talk.name.to_string().parse(), Ok(talk.name.clone()));
            let AllowedCalls::Only(interfaces) = &talk.calls else { panic!("{} is wholly open", talk.name) };
            interfaces.iter().for_each(|interface| assert!(interface.name.to_string().parse::<Pattern>().is_ok()));
        }
        policy.own.iter().for_each(|own| assert_eq!(own.to_string().parse(), Ok(own.clone())));
    }

    #[test]
    fn a_pattern_is_a_name_or_the_beginning_of_names() {
        let pattern = |text: &str| text.parse::<Pattern>();
        assert!(pattern("org.example.App").expect("valid").matches("org.example.App"));
        assert!(!pattern("org.example.App").expect("valid").matches("org.example.App2"));
        assert!(pattern("org.example.*").expect("valid").matches("org.example.App"));
        assert!(!pattern("org.example.*").expect("valid").matches("org.example"));
        assert!(pattern("org.example.Item-*").expect("valid").matches("org.example.Item-12-1"));
        for text in [
            "",
            "*",
            "org",
            "org.*x",
            ":1.5",
            ".org.x",
            "org..x",
            "org.1x",
            "org.x y",
            &format!("a.{}", "x".repeat(254)),
        ] {
            assert!(pattern(text).is_err(), "{text}");
        }
    }

    #[test]
    fn portals_that_act_outside_are_closed() {
        let policy = Policy::default_desktop();
        let portal = |interface: &str, member| {
            policy.allows(
                ["org.freedesktop.portal.Desktop"],
                asked(&format!("org.freedesktop.portal.{interface}"), member),
            )
        };
        for interface in
            ["OpenURI", "Email", "Background", "DynamicLauncher", "NetworkMonitor", "ProxyResolver", "Location"]
        {
            assert!(!portal(interface, "X"), "{interface}");
        }
        for interface in ["Settings", "FileChooser", "Print", "Request", "Session", "ScreenCast"] {
            assert!(portal(interface, "X"), "{interface}");
        }
        assert!(portal("Wallpaper", "SetWallpaperFile") && !portal("Wallpaper", "SetWallpaperURI"));
        assert!(!policy.talks_to("org.freedesktop.portal.Flatpak") && !policy.talks_to("org.gtk.vfs.Daemon"));
    }

    #[test]
    fn a_process_answers_only_for_the_interfaces_of_its_names() {
        let policy = Policy::default_desktop();
        let shell = ["org.gnome.Shell", "org.freedesktop.Notifications"];
        assert!(policy.allows(shell, asked("org.freedesktop.Notifications", "Notify")));
        assert!(policy.allows(shell, asked("org.freedesktop.DBus.Peer", "Ping")));
        assert!(!policy.allows(shell, asked("org.gnome.Shell", "Eval")));
        assert!(!policy.allows(shell, MethodCall { interface: None, member: "Notify", of: None }));
        let properties = |of, member| MethodCall { interface: Some(PROPERTIES), member, of };
        let portal = ["org.freedesktop.portal.Desktop"];
        assert!(policy.allows(portal, properties(Some("org.freedesktop.portal.Settings"), "Get")));
        assert!(!policy.allows(portal, properties(Some("org.freedesktop.portal.OpenURI"), "Get")));
        assert!(
            !policy.allows(portal, properties(None, "Get")) && !policy.allows(portal, properties(Some(""), "GetAll"))
        );
        let session = ["org.gnome.SessionManager"];
        assert!(policy.allows(session, asked("org.gnome.SessionManager", "Inhibit")));
        assert!(!policy.allows(session, asked("org.gnome.SessionManager", "Setenv")));
        assert!(policy.allows(session, properties(Some("org.gnome.SessionManager"), "Get")));
        assert!(!policy.allows(session, properties(Some("org.gnome.SessionManager"), "Set")));
        let opened = policy.with_talk(["org.gnome.Shell".parse().expect("valid")]);
        assert!(opened.allows(shell, asked("org.gnome.Shell", "Eval")));
        assert!(opened.allows(shell, MethodCall { interface: None, member: "Eval", of: None }));
    }

    #[test]
    fn a_policy_can_be_printed() {
        let policy = Policy {
            talk: Policy::default_desktop()
                .talk
                .into_iter()
                .filter(|talk| talk.name.matches("org.gnome.SessionManager"))
                .collect(),
            own: vec![Pattern::known("org.mpris.*")],
        };
        let text = policy.clone().with_talk([Pattern::known("org.example.App")]).to_string();
        let expected = "call org.gnome.SessionManager: org.gnome.SessionManager (Inhibit, Uninhibit, IsInhibited)\n\
                        call org.example.App\nown org.mpris.*\n";
        assert_eq!(text, expected);
        assert_eq!(serde_json::to_value(&policy).expect("serialized")["own"][0], "org.mpris.*");
    }
}
