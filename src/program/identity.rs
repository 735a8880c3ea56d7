//! The identity of the program: the requested user, or else the caller of sudo, doas or pkexec, or else the user that
//! runs vpn-exec.

use std::ffi::CString;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User};

use crate::failure::{Doing, Failure};
use crate::linux::dynamic_user;
use crate::session::CALLERS;

/// The identity of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The user and the groups of vpn-exec.
    Unchanged,
    /// Another account.
    Other(Account),
}

/// A user with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The user ID.
    pub uid: u32,
    /// The primary group ID.
    pub gid: u32,
    /// All group IDs, the primary one first.
    pub groups: Vec<u32>,
    /// The entry in the user database. A user that was given as a number may have none.
    pub entry: Option<UserEntry>,
}

/// An entry in the user database (passwd(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserEntry {
    /// The login name.
    pub name: String,
    /// The home directory.
    pub home: PathBuf,
    /// The login shell.
    pub shell: PathBuf,
}

/// Returns the identity of the program. `variable` reads the environment.
///
/// # Errors
/// Returns an error if there is no such user or group, or if the user database cannot be read.
pub fn choose(
    user: Option<&str>,
    group: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Identity, Failure> {
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

fn account(user: &str, group: Option<&str>) -> Result<Account, Failure> {
    let what = || format!("look up the user {user:?}");
    let number: Option<u32> = user.parse().ok();
    let entry = match found(User::from_name(user)).doing(what())? {
        Some(entry) => Some(entry),
        None => match number {
            Some(number) => found(User::from_uid(Uid::from_raw(number))).doing(what())?,
            None => Some(find_dynamic(user)?),
        },
    };
    let uid = entry.as_ref().map(|entry| entry.uid.as_raw()).or(number).ok_or_else(|| no_user(user))?;
    let gid = match group {
        Some(group) => group_id(group)?,
        // As in systemd and Docker, the primary group of a user without an entry has the same number.
        None => entry.as_ref().map_or(uid, |entry| entry.gid.as_raw()),
    };
    let mut groups = vec![gid];
    if let Some(entry) = &entry {
        let name = CString::new(entry.name.as_str()).map_err(|_| no_user(user))?;
        let list = nix::unistd::getgrouplist(&name, Gid::from_raw(gid)).doing(what())?;
        groups.extend(list.into_iter().map(Gid::as_raw).filter(|group| *group != gid));
    }
    // setresuid(2) and setresgid(2) take this number for "unchanged".
    if uid == u32::MAX || groups.contains(&u32::MAX) {
        return Err(Failure::new(format!("{} is not a valid user or group ID", u32::MAX))
            .advise("give an ID from 0 to 4294967294, or a name"));
    }
    let entry = entry.map(|entry| UserEntry { name: entry.name, home: entry.dir, shell: entry.shell });
    Ok(Account { uid, gid, groups, entry })
}

/// Finds a dynamic user of systemd, which the C library finds only with nss-systemd(8).
fn find_dynamic(name: &str) -> Result<User, Failure> {
    let found = dynamic_user::find(name).doing(format!("look up the user {name:?}"))?.ok_or_else(|| no_user(name))?;
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

/// Turns the errors by which some modules of the user database report a missing entry (getpwnam(3)) into `None`.
fn found<T>(result: nix::Result<Option<T>>) -> nix::Result<Option<T>> {
    match result {
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        other => other,
    }
}

fn group_id(group: &str) -> Result<u32, Failure> {
    match found(Group::from_name(group)).doing(format!("look up the group {group:?}"))? {
        Some(entry) => Ok(entry.gid.as_raw()),
        None => group.parse().map_err(|_| {
            Failure::new(format!("there is no group {group:?}"))
                .advise("give a name that `getent group` lists, or a group ID")
        }),
    }
}

fn no_user(user: &str) -> Failure {
    Failure::new(format!("there is no user {user:?}")).advise("give a name that `getent passwd` lists, or a user ID")
}

impl Identity {
    /// Returns the home directory, if the user has one.
    pub fn home(&self) -> Option<PathBuf> {
        match self {
            Self::Unchanged => std::env::var_os("HOME").map(PathBuf::from),
            Self::Other(account) => account.entry.as_ref().map(|entry| entry.home.clone()),
        }
    }

    /// Changes the real, effective and saved user and group IDs of the calling process for good.
    ///
    /// # Errors
    /// Returns an error if a system call fails, or did not have this effect.
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
            return Err(io::Error::other("the system calls had no effect"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables<'a>(list: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |name| list.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
    }

    fn refusal(user: &str, group: Option<&str>) -> String {
        choose(Some(user), group, variables(&[])).expect_err("refused").message
    }

    #[test]
    fn the_requested_user_precedes_the_caller_of_sudo() {
        let identity = choose(Some("1234567"), None, variables(&[("SUDO_UID", "0")])).expect("a valid user ID");
        let account = Account { uid: 1_234_567, gid: 1_234_567, groups: vec![1_234_567], entry: None };
        assert_eq!(identity, Identity::Other(account));
    }

    #[test]
    fn a_requested_group_precedes_the_users_own() {
        let Ok(Identity::Other(account)) = choose(Some("0"), Some("4321"), variables(&[])) else {
            panic!("an account")
        };
        assert_eq!((account.uid, account.gid), (0, 4321));
        assert_eq!(account.groups[0], 4321);
    }

    #[test]
    fn unknown_users_and_groups_are_refused() {
        assert_eq!(refusal("no such user", None), "there is no user \"no such user\"");
        assert_eq!(refusal("0", Some("no such group")), "there is no group \"no such group\"");
    }

    #[test]
    fn the_id_that_means_unchanged_is_refused() {
        for (user, group) in [("4294967295", None), ("4294967295", Some("0")), ("0", Some("4294967295"))] {
            assert_eq!(refusal(user, group), "4294967295 is not a valid user or group ID");
        }
    }
}
