//! What the filter refuses, in a sentence that says how to allow it.

use std::collections::HashMap;
use std::fmt;

/// Beginnings of names that toolkits call at each start, to learn about the desktop: mounts, volumes, shortcuts,
/// settings.
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

/// How many different refusals are told apart.
const DISTINCT: usize = 512;

/// Something that was refused. Its text is one sentence, which the caller of the method gets with the error, too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BusRefusal {
    /// A call of a name that is not to be reached from inside.
    Name {
        /// The name, or the number of a connection, such as `:1.5`.
        name: String,
        /// The method.
        member: String,
    },
    /// A call of a method that is closed, of a name that has open ones.
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
        /// Its name.
        name: String,
    },
    /// A method of the bus itself.
    Bus {
        /// The method.
        member: String,
    },
    /// A match rule that asks for messages between other programs.
    Eavesdropping,
    /// A call from outside, of a program that has no name there.
    Incoming {
        /// The method.
        member: String,
    },
    /// A connection: the bus cannot be reached, or does not let the filter in.
    NoBus(String),
    /// A connection whose messages cannot be passed on.
    Malformed(&'static str),
    /// More than can be told apart.
    More,
}

impl BusRefusal {
    /// Returns the option that would allow it, if there is one.
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

    /// Whether programs ask for this as a matter of course and go on without it, so that a user need not be told.
    pub fn is_routine(&self) -> bool {
        match self {
            Self::Name { name, .. } | Self::Activation { name } => {
                ROUTINE.iter().any(|beginning| name.starts_with(beginning))
            }
            // GTK offers itself to the session manager, which would call it at the end of the session.
            Self::Method { member, .. } => member == "RegisterClient",
            Self::Incoming { .. } => true,
            _ => false,
        }
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
                write!(f, "cannot call {member} of a program inside the tunnel, which has no name outside")?;
            }
            Self::NoBus(why) => write!(f, "cannot connect to the session bus: {why}")?,
            Self::Malformed(why) => write!(f, "cannot pass a message on to the session bus: {why}")?,
            Self::More => f.write_str("cannot do many more things on the session bus")?,
        }
        self.option().map_or(Ok(()), |option| write!(f, " ({option} allows it)"))
    }
}

/// Counts refusals.
#[derive(Debug, Default)]
pub(super) struct Counter(HashMap<BusRefusal, u64>);

impl Counter {
    /// Counts one more, and returns what it is counted as, and how often that was.
    pub(super) fn count(&mut self, refusal: BusRefusal) -> (BusRefusal, u64) {
        let known = self.0.contains_key(&refusal) || self.0.len() < DISTINCT;
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
    fn a_refusal_is_a_sentence_that_says_how_to_allow_it() {
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
    fn refusals_are_counted_and_bounded() {
        let mut counter = Counter::default();
        let one = || BusRefusal::Bus { member: "X".into() };
        assert_eq!([counter.count(one()).1, counter.count(one()).1], [1, 2]);
        for number in 0..2 * DISTINCT {
            counter.count(BusRefusal::Activation { name: number.to_string() });
        }
        assert!(counter.0.len() <= DISTINCT + 1);
        assert_eq!(counter.count(BusRefusal::Activation { name: "new".into() }).0, BusRefusal::More);
        assert_eq!(counter.count(one()).1, 3);
    }
}
