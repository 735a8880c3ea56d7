//! What of the processes outside the tunnel a program may ask to work for it: message buses, and unix sockets.

use serde::{Deserialize, Serialize};

/// The option that opens all sockets.
pub const ANY: &str = "any";

/// Which message buses of the host's a program can reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buses {
    /// Its user's own, the session bus.
    pub session: SessionBus,
    /// Whether it reaches the system bus, by which it can have systemd-resolved, Avahi or NetworkManager look names up, past the tunnel.
    pub system: bool,
    /// Names on the session bus that it can talk to, besides those that are open by default.
    pub talk: Vec<String>,
}

/// How much of the session bus a program can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionBus {
    /// The services of a desktop that neither run nor fetch anything for it.
    #[default]
    Filtered,
    /// All of it: it can start programs outside the tunnel.
    Whole,
    /// Nothing.
    None,
}

/// What `--dbus` and a profile's `dbus` say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BusChoice {
    /// No session bus.
    None,
    /// The whole session bus, by which programs outside are started.
    Session,
    /// The system bus, too, by which the host looks names up.
    System,
}

impl BusChoice {
    /// Reads one.
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
    /// Takes what was chosen. Nothing leaves all as it is.
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

/// Checks the path of a unix socket, as `--socket` and profiles have it: an absolute path, which may end with `*`, or `any`.
///
/// # Errors
/// What is wrong, and what is expected.
pub fn check_socket(text: &str) -> Result<(), String> {
    let path = text.strip_suffix('*').unwrap_or(text);
    match text {
        ANY => Ok(()),
        _ if !text.starts_with('/') => Err("expected the absolute path of a unix socket, or \"any\"".into()),
        _ if path.contains('*') => Err("a `*` can stand at the end of the path only".into()),
        _ if path.len() < 2 => Err("this would open all sockets: write \"any\" for that".into()),
        _ if text.split('/').any(|part| part == "..") => Err("the path must not contain `..`".into()),
        _ => Ok(()),
    }
}

/// Checks a name on the session bus, as `--dbus-talk` and profiles have it: two parts or more with dots between them (D-Bus
/// specification, "Message Protocol Names"), which may end with `.*`.
///
/// # Errors
/// What is expected.
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
    fn choices_are_brought_together() {
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
