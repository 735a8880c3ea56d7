//! The refusals of the filter, as messages that name the option which would allow the request.

use std::collections::HashMap;
use std::fmt;

use super::message::Malformed;

/// Prefixes of names that toolkits call at each start to explore the desktop: mounts, volumes, shortcuts, settings.
const ROUTINE: [&str; 8] = [
    "org.gtk.vfs.",
    "org.gtk.Private.",
    "org.gtk.MountOperationHandler",
    "org.gnome.Mutter.",
    "org.gnome.SettingsDaemon",
    "org.kde.kded",
    "org.kde.kglobalaccel",
    "org.kde.KWin",
];

/// The maximum number of different refusals that are counted separately.
const MAX_DISTINCT: usize = 512;

/// A refused request. Its `Display` is the message for the user, and the text of the D-Bus error for the client.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BusRefusal {
    /// A call of a name that no rule allows.
    Name {
        /// The well-known name, or a unique name such as `:1.5`.
        name: String,
        /// The method.
        member: String,
    },
    /// A call of a method that no rule allows, while a rule allows other methods of the name.
    Method {
        /// The name.
        name: String,
        /// The interface, if the call had one.
        interface: Option<String>,
        /// The method.
        member: String,
    },
    /// A request to start a service outside.
    Activation {
        /// The name of the service.
        name: String,
    },
    /// A call of a method of the bus itself.
    Bus {
        /// The method.
        member: String,
    },
    /// A match rule for messages between other connections.
    Eavesdropping,
    /// A call from outside of a program that owns no name on the real bus.
    Incoming {
        /// The method.
        member: String,
    },
    /// A client's connection, because the bus is unreachable or rejects the filter.
    NoBus(String),
    /// A connection with an invalid message.
    Malformed(&'static str),
    /// Any refusal beyond the maximum number of different ones.
    More,
}

impl BusRefusal {
    /// Returns the option that would allow the request, if there is one.
    pub fn option(&self) -> Option<String> {
        match self {
            Self::Name { name, .. } | Self::Method { name, .. } | Self::Activation { name }
                if !name.starts_with(':') =>
            {
                Some(format!("--dbus-talk {name}"))
            }
            Self::NoBus(_) | Self::Malformed(_) => None,
            _ => Some("--dbus session".to_owned()),
        }
    }

    /// Returns whether programs commonly make this request and work without it, so that it needs no message.
    pub fn is_routine(&self) -> bool {
        match self {
            Self::Name { name, .. } | Self::Activation { name } => {
                ROUTINE.iter().any(|prefix| name.starts_with(prefix))
            }
            // GTK registers with the session manager, to be called when the session ends.
            Self::Method { member, .. } => member == "RegisterClient",
            Self::Incoming { .. } => true,
            _ => false,
        }
    }
}

impl From<Malformed> for BusRefusal {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed.0)
    }
}

impl fmt::Display for BusRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { name, member } => write!(f, "cannot call {member} of {name}: it is outside the tunnel")?,
            Self::Method { name, interface: Some(interface), member } => {
                write!(f, "cannot call {interface}.{member} of {name}: it may act outside the tunnel")?;
            }
            Self::Method { name, interface: None, member } => {
                write!(f, "cannot call {member} of {name} without an interface: it may act outside the tunnel")?;
            }
            Self::Activation { name } => write!(f, "cannot start {name}: it would run outside the tunnel")?,
            Self::Bus { member } => {
                write!(f, "cannot call {member} of the session bus: it affects programs outside the tunnel")?;
            }
            Self::Eavesdropping => f.write_str("cannot read messages of other programs on the session bus")?,
            Self::Incoming { member } => {
                write!(f, "cannot call {member} of a program inside the tunnel: it owns no name outside")?;
            }
            Self::NoBus(why) => write!(f, "cannot connect to the session bus: {why}")?,
            Self::Malformed(why) => write!(f, "cannot pass a message on to the session bus: {why}")?,
            Self::More => {
                f.write_str("cannot complete further kinds of requests on the session bus: too many were refused")?
            }
        }
        self.option().map_or(Ok(()), |option| write!(f, " ({option} allows it)"))
    }
}

/// A counter of refusals.
#[derive(Debug, Default)]
pub(super) struct Counter(HashMap<BusRefusal, u64>);

impl Counter {
    /// Counts a refusal. Returns it, or [`BusRefusal::More`] in its place, with its count so far.
    pub(super) fn count(&mut self, refusal: BusRefusal) -> (BusRefusal, u64) {
        let known = self.0.contains_key(&refusal) || self.0.len() < MAX_DISTINCT;
        let refusal = if known { refusal } else { BusRefusal::More };
        let times = self.0.entry(refusal.clone()).or_default();
        *times += 1;
        (refusal, *times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_the_option_that_allows_the_request() {
        let name = BusRefusal::Name { name: "org.freedesktop.systemd1".into(), member: "StartTransientUnit".into() };
        assert_eq!(
            name.to_string(),
            "cannot call StartTransientUnit of org.freedesktop.systemd1: it is outside the tunnel \
             (--dbus-talk org.freedesktop.systemd1 allows it)"
        );
        let unique = BusRefusal::Name { name: ":1.5".into(), member: "X".into() };
        assert!(unique.to_string().ends_with("(--dbus session allows it)"));
        assert!(!BusRefusal::NoBus("no".into()).to_string().contains("--dbus"));
    }

    #[test]
    fn the_number_of_different_refusals_is_bounded() {
        let mut counter = Counter::default();
        let one = || BusRefusal::Bus { member: "X".into() };
        assert_eq!([counter.count(one()).1, counter.count(one()).1], [1, 2]);
        for number in 0..2 * MAX_DISTINCT {
            counter.count(BusRefusal::Activation { name: number.to_string() });
        }
        assert!(counter.0.len() <= MAX_DISTINCT + 1);
        assert_eq!(counter.count(BusRefusal::Activation { name: "new".into() }).0, BusRefusal::More);
        assert_eq!(counter.count(one()).1, 3);
    }
}
