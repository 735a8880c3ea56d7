//! Who the program is: the user that was asked for, else the one who called sudo, doas or pkexec, else whoever runs vpn-exec.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::unistd::{Gid, Group, Uid, User};
use thiserror::Error;

use super::desktop;
use crate::linux::dynamic_user;

/// Who a program is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Whoever runs vpn-exec, with all that belongs to that.
    Unchanged,
    /// Somebody else.
    Other(Account),
}

/// A user with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// All groups, the supplementary ones included.
    pub groups: Vec<u32>,
    /// What the user database says, unless the user is a mere number.
    pub entry: Option<Entry>,
}

/// An entry of the user database (passwd(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The login name.
    pub name: String,
    /// The home directory.
    pub home: PathBuf,
    /// The login shell.
    pub shell: PathBuf,
}

/// Why an identity was refused.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// There is no such user.
    #[error("there is no user {0}: give a name that `getent passwd` lists, or a number")]
    NoUser(String),
    /// The number that setresuid(2) and its kind take for "as it is".
    #[error("{0} is nobody's number: give one from 0 to 4294967294, or a name")]
    NoNumber(u32),
    /// There is no such group.
    #[error("there is no group {0}: give a name that `getent group` lists, or a number")]
    NoGroup(String),
    /// The database cannot be asked.
    #[error("cannot look up {what}: {error}")]
    System {
        /// Whom.
        what: String,
        /// Why.
        error: io::Error,
    },
}

/// The variables by which sudo, doas and pkexec tell who called them.
const CALLERS: [&str; 3] = ["SUDO_UID", "DOAS_USER", "PKEXEC_UID"];

/// What sudo and its kind set for the program, and that would tell it of them.
const TRACES: [&str; 9] = [
    "SUDO_UID",
    "SUDO_GID",
    "SUDO_USER",
    "SUDO_COMMAND",
    "SUDO_HOME",
    "SUDO_TTY",
    "DOAS_USER",
    "PKEXEC_UID",
    // The mailbox of whoever vpn-exec runs as.
    "MAIL",
];

/// Finds out who the program is to be. `variable` reads the environment.
pub fn choose(
    user: Option<&str>,
    group: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Identity, IdentityError> {
    let is_root = nix::unistd::geteuid().is_root();
    let caller = || CALLERS.iter().find_map(|name| variable(name)).filter(|_| is_root);
    let Some(user) = user.map(str::to_owned).or_else(caller) else {
        return match group {
            None => Ok(Identity::Unchanged),
            Some(group) => account(&nix::unistd::getuid().to_string(), Some(group)).map(Identity::Other),
        };
    };
    account(&user, group).map(Identity::Other)
}

fn account(user: &str, group: Option<&str>) -> Result<Account, IdentityError> {
    let system =
        |error: nix::errno::Errno| IdentityError::System { what: format!("the user {user}"), error: error.into() };
    let number: Option<u32> = user.parse().ok();
    let entry = match known(User::from_name(user)).map_err(system)? {
        Some(entry) => Some(entry),
        None => match number {
            Some(number) => known(User::from_uid(Uid::from_raw(number))).map_err(system)?,
            None => Some(dynamic(user)?),
        },
    };
    let uid = entry.as_ref().map(|entry| entry.uid.as_raw()).or(number).ok_or(IdentityError::NoUser(user.into()))?;
    let gid = match group {
        Some(group) => group_number(group)?,
        // A user that the database does not know has the group of its own number, as systemd and Docker have it.
        None => entry.as_ref().map_or(uid, |entry| entry.gid.as_raw()),
    };
    let mut groups = vec![gid];
    if let Some(entry) = &entry {
        let name = CString::new(entry.name.as_str()).map_err(|_| IdentityError::NoUser(user.into()))?;
        let list = nix::unistd::getgrouplist(&name, Gid::from_raw(gid)).map_err(system)?;
        groups.extend(list.into_iter().map(Gid::as_raw).filter(|group| *group != gid));
    }
    if let Some(none) = [uid].iter().chain(&groups).find(|number| **number == u32::MAX) {
        return Err(IdentityError::NoNumber(*none));
    }
    let entry = entry.map(|entry| Entry { name: entry.name, home: entry.dir, shell: entry.shell });
    Ok(Account { uid, gid, groups, entry })
}

/// A user that systemd has made up for a service, which the C library may not find.
fn dynamic(name: &str) -> Result<User, IdentityError> {
    let found = dynamic_user::find(name)
        .map_err(|error| IdentityError::System { what: format!("the user {name}"), error })?
        .ok_or_else(|| IdentityError::NoUser(name.into()))?;
    Ok(User {
        name: name.to_owned(),
        passwd: CString::default(),
        uid: Uid::from_raw(found.uid),
        gid: Gid::from_raw(found.gid),
        gecos: CString::default(),
        dir: found.home_directory.map_or_else(|| PathBuf::from("/"), PathBuf::from),
        shell: found.shell.map_or_else(|| PathBuf::from("/bin/sh"), PathBuf::from),
    })
}

/// What a database says. By some of its modules, that they know nobody of that name is an error (getpwnam(3)).
fn known<T>(found: nix::Result<Option<T>>) -> nix::Result<Option<T>> {
    match found {
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ESRCH) => Ok(None),
        other => other,
    }
}

fn group_number(group: &str) -> Result<u32, IdentityError> {
    let system =
        |error: nix::errno::Errno| IdentityError::System { what: format!("the group {group}"), error: error.into() };
    match known(Group::from_name(group)).map_err(system)? {
        Some(entry) => Ok(entry.gid.as_raw()),
        None => group.parse().map_err(|_| IdentityError::NoGroup(group.into())),
    }
}

/// What of a program's surroundings its environment tells, besides who it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surroundings {
    /// The process that stands between the program and whoever started it.
    pub(super) launcher: u32,
    /// Whether descriptors are passed to it (sd_listen_fds(3)).
    pub(super) listens: bool,
    /// Where it tells its service manager what it has to (sd_notify(3)), if there is one.
    pub(super) notify: Option<&'static str>,
    /// Where its session bus is.
    pub(super) bus: Bus,
}

/// Where a program's session bus is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bus {
    /// Where the environment that vpn-exec has says.
    Inherited,
    /// At this address, if there is one at all.
    At(Option<&'static str>),
}

impl Identity {
    /// The home directory, if the user has one.
    pub fn home(&self) -> Option<PathBuf> {
        match self {
            Self::Unchanged => std::env::var_os("HOME").map(PathBuf::from),
            Self::Other(account) => account.entry.as_ref().map(|entry| entry.home.clone()),
        }
    }

    /// Makes the calling process this user, for good: real, effective and saved.
    pub(super) fn assume(&self) -> io::Result<()> {
        let Self::Other(account) = self else { return Ok(()) };
        let groups: Vec<Gid> = account.groups.iter().copied().map(Gid::from_raw).collect();
        nix::unistd::setgroups(&groups)?;
        let gid = Gid::from_raw(account.gid);
        nix::unistd::setresgid(gid, gid, gid)?;
        let uid = Uid::from_raw(account.uid);
        nix::unistd::setresuid(uid, uid, uid)?;
        let (users, now) = (nix::unistd::getresuid()?, nix::unistd::getresgid()?);
        if [users.real, users.effective, users.saved] != [uid; 3] || [now.real, now.effective, now.saved] != [gid; 3] {
            return Err(io::Error::other("the system has not changed it"));
        }
        Ok(())
    }

    /// The environment of this user's program, from the one that vpn-exec has. The calling process becomes that program.
    pub(super) fn environment(
        &self,
        inherited: Vec<(OsString, OsString)>,
        surroundings: Surroundings,
    ) -> Vec<(OsString, OsString)> {
        let launcher = surroundings.launcher.to_string();
        let is_launcher = |name: &str| inherited.iter().any(|(other, value)| other == name && *value == *launcher);
        // What says that it is for the launcher is for the program: it is as if the service manager had started that.
        let meant: Vec<&str> =
            ["WATCHDOG_PID", "SYSTEMD_EXEC_PID"].into_iter().filter(|name| is_launcher(name)).collect();
        let variable = |name: &str| inherited.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone());
        let is_called_by = |account: &Account| {
            let is = |name, wanted: &str| variable(name).is_some_and(|value| value == wanted);
            let user = account.uid.to_string();
            let named = account.entry.as_ref().is_some_and(|entry| is("DOAS_USER", &entry.name));
            is("SUDO_UID", &user) || is("PKEXEC_UID", &user) || named
        };
        let mut desktop = Vec::new();
        if let Self::Other(account) = self
            && is_called_by(account)
        {
            let runtime = PathBuf::from(format!("/run/user/{}", account.uid));
            desktop = desktop::variables(&runtime, account.uid, |name| variable(name).is_some());
        }
        let mut environment = inherited;
        let mut set = |name: &str, value: Option<OsString>| {
            environment.retain(|(other, _)| other != name);
            environment.extend(value.map(|value| (name.into(), value)));
        };
        if let Self::Other(account) = self {
            for name in TRACES {
                set(name, None);
            }
            if let Some(entry) = &account.entry {
                set("HOME", Some(entry.home.clone().into()));
                set("SHELL", Some(entry.shell.clone().into()));
                set("USER", Some(entry.name.clone().into()));
                set("LOGNAME", Some(entry.name.clone().into()));
            }
            let runtime = PathBuf::from(format!("/run/user/{}", account.uid));
            let is_own = runtime.metadata().is_ok_and(|status| status.uid() == account.uid);
            for (name, value) in desktop {
                set(name, Some(value));
            }
            set("XDG_RUNTIME_DIR", is_own.then(|| runtime.into()));
        }
        let own = || Some(OsString::from(std::process::id().to_string()));
        if surroundings.listens {
            // The one who is meant is the program, which this process becomes (sd_listen_fds(3)). What newer managers say besides of the
            // launcher's process is not true of it.
            set("LISTEN_PID", own());
            set("LISTEN_PIDFDID", None);
        }
        for name in meant {
            set(name, own());
        }
        if let Bus::At(address) = surroundings.bus {
            // Without this variable, the bus in the runtime directory would be looked for, which is refused with a sentence.
            set("DBUS_SESSION_BUS_ADDRESS", address.map(OsString::from));
        }
        if let Some(socket) = surroundings.notify {
            set("NOTIFY_SOCKET", Some(socket.into()));
        }
        environment
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Surroundings = Surroundings { launcher: 42, listens: false, notify: None, bus: Bus::Inherited };

    #[test]
    fn what_is_meant_for_the_launcher_is_for_the_program() {
        let pair = |name: &str, value: &str| (OsString::from(name), OsString::from(value));
        let inherited = vec![
            pair("WATCHDOG_PID", "42"),
            pair("SYSTEMD_EXEC_PID", "41"),
            pair("LISTEN_PIDFDID", "7"),
            pair("NOTIFY_SOCKET", "/run/systemd/notify"),
        ];
        let unchanged = Identity::Unchanged.environment(inherited.clone(), Surroundings { launcher: 1, ..NOTHING });
        assert_eq!(unchanged, inherited);
        let surroundings = Surroundings { listens: true, notify: Some("/inside"), ..NOTHING };
        let mut environment = Identity::Unchanged.environment(inherited, surroundings);
        environment.sort();
        let own = std::process::id().to_string();
        assert_eq!(
            environment,
            [
                pair("LISTEN_PID", &own),
                pair("NOTIFY_SOCKET", "/inside"),
                pair("SYSTEMD_EXEC_PID", "41"),
                pair("WATCHDOG_PID", &own)
            ]
        );
    }

    fn variables<'a>(list: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |name| list.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn who_was_asked_for_goes_before_who_called() {
        let identity = choose(Some("1234567"), None, variables(&[("SUDO_UID", "0")])).expect("a number will do");
        let account = Account { uid: 1_234_567, gid: 1_234_567, groups: vec![1_234_567], entry: None };
        assert_eq!(identity, Identity::Other(account));
    }

    #[test]
    fn a_group_by_number_goes_before_the_users_own() {
        let Ok(Identity::Other(account)) = choose(Some("0"), Some("4321"), variables(&[])) else {
            panic!("an account")
        };
        assert_eq!((account.uid, account.gid), (0, 4321));
        assert_eq!(account.groups[0], 4321);
    }

    #[test]
    fn whom_nobody_knows_is_refused() {
        assert!(matches!(choose(Some("no such user"), None, variables(&[])), Err(IdentityError::NoUser(_))));
        assert!(matches!(choose(Some("0"), Some("no such group"), variables(&[])), Err(IdentityError::NoGroup(_))));
    }

    #[test]
    fn the_number_that_means_no_change_is_refused() {
        for (user, group) in [("4294967295", None), ("4294967295", Some("0")), ("0", Some("4294967295"))] {
            assert!(matches!(choose(Some(user), group, variables(&[])), Err(IdentityError::NoNumber(u32::MAX))));
        }
    }

    #[test]
    fn the_environment_is_the_users_own() {
        let entry = Entry { name: "ann".into(), home: "/home/ann".into(), shell: "/bin/zsh".into() };
        let account = Account { uid: 4_000_000, gid: 1, groups: vec![1], entry: Some(entry) };
        let inherited = [("HOME", "/root"), ("SUDO_USER", "ann"), ("LANG", "C"), ("XDG_RUNTIME_DIR", "/run/user/0")]
            .map(|(name, value)| (name.into(), value.into()));
        let mut environment = Identity::Other(account).environment(inherited.into(), NOTHING);
        environment.sort();
        let expected =
            [("HOME", "/home/ann"), ("LANG", "C"), ("LOGNAME", "ann"), ("SHELL", "/bin/zsh"), ("USER", "ann")]
                .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        assert_eq!(environment, expected);
    }
}
