//! The policy of the filter: which services a program inside may call, and which names it may own on the real bus.
//! "Talk" and "own" have the meaning that they have in flatpak(1).

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::message::MAX_NAME;

/// Interfaces that services commonly have, and that only describe the service.
const DESCRIPTIVE: [&str; 3] =
    ["org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer", "org.freedesktop.DBus.ObjectManager"];

/// The interface for properties of another interface, which is the first argument of its methods.
pub const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// A name on the bus, or, with a `*` at the end, all names with that prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern {
    text: String,
    is_prefix: bool,
}

/// The error of a text that is not a valid [`Pattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid D-Bus name: {why}")]
pub struct PatternError {
    text: String,
    why: &'static str,
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let pattern = Self::parse_unchecked(text);
        // A `*` after a dot stands for at least one character: `a.b.` is not a valid name.
        let example = if pattern.text.ends_with('.') { format!("{}x", pattern.text) } else { pattern.text.clone() };
        match check_name(&example) {
            Ok(()) => Ok(pattern),
            Err(why) => Err(PatternError { text: text.to_owned(), why }),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.text, if self.is_prefix { "*" } else { "" })
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Pattern {
    /// Returns whether the pattern covers a name.
    pub fn matches(&self, name: &str) -> bool {
        if self.is_prefix { name.starts_with(&self.text) } else { name == self.text }
    }

    /// Returns a pattern without checking it. A test checks those of the default policy.
    fn parse_unchecked(text: &str) -> Self {
        let (text, is_prefix) = text.strip_suffix('*').map_or((text, false), |prefix| (prefix, true));
        Self { text: text.to_owned(), is_prefix }
    }
}

/// Checks that a text is a well-known name (D-Bus specification, "Bus names"). Unique names, such as `:1.5`, are not.
///
/// # Errors
/// Returns what is wrong with the name.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    if name.len() > MAX_NAME {
        return Err("it has more than 255 characters");
    }
    let elements: Vec<&str> = name.split('.').collect();
    if elements.len() < 2 {
        return Err("it needs at least two parts, as in org.example.App");
    }
    for element in elements {
        if element.is_empty() {
            return Err("it has an empty part");
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

/// A rule that allows calls of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TalkRule {
    /// The names of the service.
    pub name: Pattern,
    /// The allowed methods.
    pub calls: AllowedCalls,
}

/// The methods of a service that a program inside may call. A name alone is not enough: a process can own several
/// names, and serves all of its objects under each of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllowedCalls {
    /// All methods.
    All,
    /// The methods of these interfaces, and of those that only describe the service.
    Only(Vec<InterfaceRule>),
}

/// An interface, or some of its methods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InterfaceRule {
    /// The name of the interface.
    pub name: Pattern,
    /// The methods. An empty list stands for all methods and properties.
    pub members: Vec<String>,
}

/// The method of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodCall<'a> {
    /// The interface. A call may omit it: the service then searches all of its interfaces for the method.
    pub interface: Option<&'a str>,
    /// The method.
    pub member: &'a str,
    /// The interface whose properties are read or written, if `interface` is [`PROPERTIES`].
    pub properties_of: Option<&'a str>,
}

impl AllowedCalls {
    fn allow(&self, call: MethodCall<'_>) -> bool {
        let (Self::Only(interfaces), Some(interface)) = (self, call.interface) else {
            return *self == Self::All;
        };
        if DESCRIPTIVE.contains(&interface) {
            return true;
        }
        if interface == PROPERTIES {
            let may_write = |allowed: &InterfaceRule| allowed.members.is_empty();
            // An empty name stands for all interfaces, and matches no rule.
            return call.properties_of.is_some_and(|of| {
                interfaces
                    .iter()
                    .any(|allowed| allowed.name.matches(of) && (call.member != "Set" || may_write(allowed)))
            });
        }
        interfaces.iter().any(|allowed| {
            let members = &allowed.members;
            allowed.name.matches(interface)
                && (members.is_empty() || members.iter().any(|member| member == call.member))
        })
    }
}

/// The rules for a program inside. It may always call itself and the other clients of its filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BusPolicy {
    /// The services that it may call.
    pub talk: Vec<TalkRule>,
    /// The names that it may own on the real bus. Any other name is private to the clients of the filter.
    pub own: Vec<Pattern>,
}

/// Services, and the interfaces that desktop programs need. None of these runs a program, opens a URL or fetches data
/// outside on behalf of the caller.
const DESKTOP: &[(&str, &[&str])] = &[
    ("org.freedesktop.Notifications", &["org.freedesktop.Notifications"]),
    ("org.freedesktop.secrets", &["org.freedesktop.Secret.*"]),
    ("org.kde.kwalletd5", &["org.kde.KWallet"]),
    ("org.kde.kwalletd6", &["org.kde.KWallet"]),
    ("org.a11y.Bus", &["org.a11y.Bus", "org.a11y.Status"]),
    ("org.kde.StatusNotifierWatcher", &["org.kde.StatusNotifierWatcher"]),
    // The host calls tray items, which never call it.
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
    // Left out because they run programs or use the network outside: OpenURI, Email, Background, DynamicLauncher,
    // NetworkMonitor (resolves names), ProxyResolver (fetches a script), Location (queries a server). An allow list
    // keeps future portals closed.
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

/// Services, interfaces and methods, where only some methods of the interface are harmless.
const DESKTOP_MEMBERS: &[(&str, &str, &[&str])] = &[
    ("org.gnome.SessionManager", "org.gnome.SessionManager", &["Inhibit", "Uninhibit", "IsInhibited"]),
    (
        "org.freedesktop.PowerManagement",
        "org.freedesktop.PowerManagement.Inhibit",
        &["Inhibit", "UnInhibit", "HasInhibit"],
    ),
    // SetWallpaperURI fetches the URL.
    ("org.freedesktop.portal.Desktop", "org.freedesktop.portal.Wallpaper", &["SetWallpaperFile"]),
];

/// Names that the desktop looks for: media players and tray items.
const DESKTOP_OWN: &[&str] =
    &["org.mpris.MediaPlayer2.*", "org.kde.StatusNotifierItem-*", "org.freedesktop.StatusNotifierItem-*"];

impl BusPolicy {
    /// Returns the policy for desktop programs: notifications, secrets, accessibility, the tray, settings, inhibiting
    /// the screen saver, input methods, and the portals that neither run programs nor use the network outside.
    pub fn default_desktop() -> Self {
        let whole = DESKTOP.iter().map(|(name, interfaces)| TalkRule {
            name: Pattern::parse_unchecked(name),
            calls: AllowedCalls::Only(
                interfaces
                    .iter()
                    .map(|name| InterfaceRule { name: Pattern::parse_unchecked(name), members: Vec::new() })
                    .collect(),
            ),
        });
        let parts = DESKTOP_MEMBERS.iter().map(|(name, interface, members)| TalkRule {
            name: Pattern::parse_unchecked(name),
            calls: AllowedCalls::Only(vec![InterfaceRule {
                name: Pattern::parse_unchecked(interface),
                members: members.iter().map(|&member| member.to_owned()).collect(),
            }]),
        });
        Self {
            talk: whole.chain(parts).collect(),
            own: DESKTOP_OWN.iter().map(|name| Pattern::parse_unchecked(name)).collect(),
        }
    }

    /// Adds rules that allow all calls of these names.
    #[must_use]
    pub fn with_talk(mut self, names: impl IntoIterator<Item = Pattern>) -> Self {
        self.talk.extend(names.into_iter().map(|name| TalkRule { name, calls: AllowedCalls::All }));
        self
    }

    /// Returns whether a rule for calls covers a name. The owner of such a name may call back and send signals.
    pub fn talks_to(&self, name: &str) -> bool {
        self.talk.iter().any(|talk| talk.name.matches(name))
    }

    /// Returns whether a program inside may own a name on the real bus.
    pub fn may_own(&self, name: &str) -> bool {
        self.own.iter().any(|own| own.matches(name))
    }

    /// Returns whether a program inside may see the owner of a name.
    pub fn is_visible(&self, name: &str) -> bool {
        self.talks_to(name) || self.may_own(name)
    }

    /// Returns whether a program inside may call a method of a service with one of these names.
    pub fn allows<'a>(&self, names: impl IntoIterator<Item = &'a str>, call: MethodCall<'_>) -> bool {
        names.into_iter().any(|name| self.talk.iter().any(|talk| talk.name.matches(name) && talk.calls.allow(call)))
    }
}

impl fmt::Display for BusPolicy {
    /// Writes a line for each rule: first those for calls, then the names that may be owned.
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

    fn call<'a>(interface: &'a str, member: &'a str) -> MethodCall<'a> {
        MethodCall { interface: Some(interface), member, properties_of: None }
    }

    #[test]
    fn names_of_the_default_policy_are_valid() {
        let policy = BusPolicy::default_desktop();
        for talk in &policy.talk {
            assert_eq!(talk.name.to_string().parse(), Ok(talk.name.clone()));
            let AllowedCalls::Only(interfaces) = &talk.calls else {
                panic!("all methods of {} are allowed", talk.name)
            };
            interfaces.iter().for_each(|interface| assert!(interface.name.to_string().parse::<Pattern>().is_ok()));
        }
        policy.own.iter().for_each(|own| assert_eq!(own.to_string().parse(), Ok(own.clone())));
    }

    #[test]
    fn a_pattern_is_a_name_or_a_prefix() {
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
    fn portals_that_act_outside_are_refused() {
        let policy = BusPolicy::default_desktop();
        let portal = |interface: &str, member| {
            policy.allows(
                ["org.freedesktop.portal.Desktop"],
                call(&format!("org.freedesktop.portal.{interface}"), member),
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
    fn only_the_interfaces_of_a_name_may_be_called() {
        let policy = BusPolicy::default_desktop();
        let shell = ["org.gnome.Shell", "org.freedesktop.Notifications"];
        assert!(policy.allows(shell, call("org.freedesktop.Notifications", "Notify")));
        assert!(policy.allows(shell, call("org.freedesktop.DBus.Peer", "Ping")));
        assert!(!policy.allows(shell, call("org.gnome.Shell", "Eval")));
        assert!(!policy.allows(shell, MethodCall { interface: None, member: "Notify", properties_of: None }));
        let properties = |of, member| MethodCall { interface: Some(PROPERTIES), member, properties_of: of };
        let portal = ["org.freedesktop.portal.Desktop"];
        assert!(policy.allows(portal, properties(Some("org.freedesktop.portal.Settings"), "Get")));
        assert!(!policy.allows(portal, properties(Some("org.freedesktop.portal.OpenURI"), "Get")));
        assert!(
            !policy.allows(portal, properties(None, "Get")) && !policy.allows(portal, properties(Some(""), "GetAll"))
        );
        let session = ["org.gnome.SessionManager"];
        assert!(policy.allows(session, call("org.gnome.SessionManager", "Inhibit")));
        assert!(!policy.allows(session, call("org.gnome.SessionManager", "Setenv")));
        assert!(policy.allows(session, properties(Some("org.gnome.SessionManager"), "Get")));
        assert!(!policy.allows(session, properties(Some("org.gnome.SessionManager"), "Set")));
        let opened = policy.with_talk(["org.gnome.Shell".parse().expect("valid")]);
        assert!(opened.allows(shell, call("org.gnome.Shell", "Eval")));
        assert!(opened.allows(shell, MethodCall { interface: None, member: "Eval", properties_of: None }));
    }

    #[test]
    fn a_policy_can_be_printed() {
        let policy = BusPolicy {
            talk: BusPolicy::default_desktop()
                .talk
                .into_iter()
                .filter(|talk| talk.name.matches("org.gnome.SessionManager"))
                .collect(),
            own: vec![Pattern::parse_unchecked("org.mpris.*")],
        };
        let text = policy.clone().with_talk([Pattern::parse_unchecked("org.example.App")]).to_string();
        let expected = "call org.gnome.SessionManager: org.gnome.SessionManager (Inhibit, Uninhibit, IsInhibited)\n\
                        call org.example.App\nown org.mpris.*\n";
        assert_eq!(text, expected);
        assert_eq!(serde_json::to_value(&policy).expect("serialized")["own"][0], "org.mpris.*");
    }
}
