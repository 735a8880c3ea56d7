//! The program's access to processes on the host: message buses and unix sockets.

use serde::{Deserialize, Serialize};

/// The value of `--socket` and `sockets` that opens all sockets.
pub const ANY: &str = "any";

/// The message buses of the host that a program can reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buses {
    /// The session bus of the program's user.
    pub session: SessionBus,
    /// Whether the program reaches the system bus. There, systemd-resolved, Avahi and NetworkManager resolve names
    /// outside the tunnel, which is a DNS leak.
    pub system: bool,
    /// Names on the session bus that the program can call, besides the default ones.
    pub talk: Vec<String>,
}

/// The part of the session bus that a program can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionBus {
    /// Desktop services that neither start programs nor access the network for the program.
    #[default]
    Filtered,
    /// All of it. The program can start other programs outside the tunnel.
    Whole,
    /// Nothing.
    None,
}

/// The message buses of the host that a service can reach (`vpn-exec unit --dbus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DbusAccess {
    /// Only the session bus of its user.
    #[default]
    Session,
    /// Also the system bus. There, systemd-resolved, Avahi and NetworkManager resolve names outside the tunnel.
    System,
}

/// A value of `--dbus`, or of `dbus` in a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BusChoice {
    /// No session bus.
    None,
    /// The whole session bus, where programs outside the tunnel can be started.
    Session,
    /// Also the system bus, where names are resolved outside the tunnel.
    System,
}

impl BusChoice {
    /// Parses a value.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "none" => Some(Self::None),
            "session" => Some(Self::Session),
            "system" => Some(Self::System),
            _ => None,
        }
    }
}

impl Buses {
    /// Applies the values of `--dbus` or `dbus`. An empty list changes nothing.
    pub fn choose(&mut self, choices: &[BusChoice]) {
        if choices.is_empty() {
            return;
        }
        self.system = choices.contains(&BusChoice::System);
        self.session = if choices.contains(&BusChoice::Session) {
            SessionBus::Whole
        } else if choices.contains(&BusChoice::None) {
            SessionBus::None
        } else {
            SessionBus::Filtered
        };
    }
}

/// Checks a value of `--socket` or `sockets`: the absolute path of a unix socket, which may end with `*`, or `any`.
///
/// # Errors
///
/// Returns a message that says what was expected.
pub fn check_socket(text: &str) -> Result<(), String> {
    let path = text.strip_suffix('*').unwrap_or(text);
    match text {
        ANY => Ok(()),
        _ if !text.starts_with('/') => Err("expected the absolute path of a unix socket, or \"any\"".into()),
        _ if path.contains('*') => Err("only the end of the path can be a `*`".into()),
        _ if path.len() < 2 => Err("this would open all sockets: write \"any\" for that".into()),
        _ if text.split('/').any(|part| part == "..") => Err("the path must not contain `..`".into()),
        _ => Ok(()),
    }
}

/// Checks a value of `--dbus-talk` or `dbus-talk`: a name on the session bus, which may end with `.*`.
///
/// A name has two or more parts with dots between them (D-Bus specification, "Message Protocol Names").
///
/// # Errors
///
/// Returns a message that says what was expected.
pub fn check_bus_name(text: &str) -> Result<(), String> {
    let name = text.strip_suffix(".*").unwrap_or(text);
    let is_part = |part: &str| {
        let is_first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == '-';
        part.starts_with(is_first) && part.chars().all(|c| is_first(c) || c.is_ascii_digit())
    };
    let is_name = name.len() <= 255 && name.contains('.') && name.split('.').all(is_part);
    is_name.then_some(()).ok_or_else(|| "expected a name on the session bus, such as org.kde.kdeconnect".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_combined() {
        let choose = |choices: &[BusChoice]| {
            let mut buses = Buses::default();
            buses.choose(choices);
            (buses.session, buses.system)
        };
        assert_eq!(choose(&[]), (SessionBus::Filtered, false));
        assert_eq!(choose(&[BusChoice::System]), (SessionBus::Filtered, true));
        assert_eq!(choose(&[BusChoice::Session, BusChoice::System]), (SessionBus::Whole, true));
        assert_eq!(choose(&[BusChoice::None]), (SessionBus::None, false));
        let mut buses = Buses { session: SessionBus::Whole, system: true, talk: vec!["a.b".into()] };
        buses.choose(&[BusChoice::None]);
        assert_eq!(buses, Buses { session: SessionBus::None, system: false, talk: vec!["a.b".into()] });
    }

    #[test]
    fn sockets_are_checked() {
        for text in ["any", "/run/x.sock", "/tmp/tmux-1000/*", "/run/x*"] {
            assert_eq!(check_socket(text), Ok(()), "{text}");
        }
        for text in ["", "x", "~/x", "/*", "*", "/a*b", "/a/**", "/", "/run/../x"] {
            assert!(check_socket(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bus_names_are_checked() {
        for text in ["org.kde.kdeconnect", "org.mpris.*", "a.b-c_d9"] {
            assert_eq!(check_bus_name(text), Ok(()), "{text}");
        }
        for text in ["", "org", "*", "org.*", "org..x", ".org.x", "org.9x", "org.x*", "org.x y", ":1.5"] {
            assert!(check_bus_name(text).is_err(), "{text}");
        }
    }
}
