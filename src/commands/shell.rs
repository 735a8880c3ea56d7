//! `vpn-exec shell`: runs the user's shell in a tunnel.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::unistd::{Uid, User};

use super::run;
use crate::cli::ShellArgs;
use crate::failure::Failure;
use crate::program::identity::Identity;

pub(super) fn run(arguments: &ShellArgs) -> Result<ExitCode, Failure> {
    run::run(&arguments.launch, |identity| {
        let entry = |uid| User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.shell);
        vec![shell_of(identity, std::env::var_os("SHELL"), entry).into()]
    })
}

/// Returns the shell of the program's user: `$SHELL` if that is the caller, else the login shell (passwd(5)), else
/// /bin/sh. `entry` reads the user database.
fn shell_of(identity: &Identity, variable: Option<OsString>, entry: impl Fn(u32) -> Option<PathBuf>) -> PathBuf {
    let shell = match identity {
        Identity::Unchanged => {
            let own = variable.map(PathBuf::from).filter(|shell| shell.is_absolute());
            own.or_else(|| entry(nix::unistd::geteuid().as_raw()))
        }
        // sudo sets SHELL to root's.
        Identity::Other(account) => account.entry.as_ref().map(|entry| entry.shell.clone()),
    };
    // An empty field in passwd(5) stands for /bin/sh.
    shell.filter(|shell| shell.is_absolute()).unwrap_or_else(|| Path::new("/bin/sh").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::identity::{Account, UserEntry};

    #[test]
    fn the_shell_is_the_program_users() {
        let login = |_| Some(PathBuf::from("/bin/dash"));
        let shell = |identity: &Identity, variable: Option<&str>| shell_of(identity, variable.map(Into::into), login);
        assert_eq!(shell(&Identity::Unchanged, Some("/bin/zsh")), Path::new("/bin/zsh"));
        assert_eq!(shell(&Identity::Unchanged, Some("zsh")), Path::new("/bin/dash"));
        assert_eq!(shell(&Identity::Unchanged, None), Path::new("/bin/dash"));
        assert_eq!(shell_of(&Identity::Unchanged, None, |_| None), Path::new("/bin/sh"));
        let account = |shell: Option<&str>| {
            let entry = shell.map(|shell| UserEntry { name: "ann".into(), home: "/".into(), shell: shell.into() });
            Identity::Other(Account { uid: 1, gid: 1, groups: vec![1], entry })
        };
        assert_eq!(shell(&account(Some("/bin/fish")), Some("/bin/zsh")), Path::new("/bin/fish"));
        assert_eq!(shell(&account(Some("")), Some("/bin/zsh")), Path::new("/bin/sh"));
        assert_eq!(shell(&account(None), Some("/bin/zsh")), Path::new("/bin/sh"));
    }
}
