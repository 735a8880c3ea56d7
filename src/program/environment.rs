//! The environment variables of the program.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::desktop;
use super::identity::{Account, Identity};
use crate::lookup::{CONFIG_VARIABLE, TUNNEL_VARIABLE};

/// Variables that sudo, doas and pkexec set for vpn-exec. They do not apply to the program.
const OF_CALLERS: [&str; 9] = [
    "SUDO_UID",
    "SUDO_GID",
    "SUDO_USER",
    "SUDO_COMMAND",
    "SUDO_HOME",
    "SUDO_TTY",
    "DOAS_USER",
    "PKEXEC_UID",
    // The mailbox of the user that vpn-exec runs as.
    "MAIL",
];

/// The facts about a program that its environment reflects, besides its identity.
#[derive(Clone, Copy, Debug)]
pub(super) struct EnvironmentContext<'a> {
    /// The tunnel's name, if it is known.
    pub(super) tunnel: Option<&'a OsStr>,
    /// The launcher's PID.
    pub(super) launcher: u32,
    /// Whether descriptors are passed to the program (sd_listen_fds(3)).
    pub(super) listens: bool,
    /// The socket for messages to the service manager (sd_notify(3)), if there is one.
    pub(super) notify_socket: Option<&'static str>,
    /// The address of the session bus.
    pub(super) session_bus: BusVariable,
}

/// The value of `DBUS_SESSION_BUS_ADDRESS`.
#[derive(Clone, Copy, Debug)]
pub(super) enum BusVariable {
    /// The value in the environment of vpn-exec, if there is one.
    Inherited,
    /// This address.
    Address(&'static str),
    /// None: the program has no session bus.
    Unset,
}

/// Returns the environment of a program whose process is the calling one, from that of vpn-exec.
pub(super) fn for_program(
    identity: &Identity,
    inherited: Vec<(OsString, OsString)>,
    context: EnvironmentContext<'_>,
) -> Vec<(OsString, OsString)> {
    let launcher = context.launcher.to_string();
    let names_launcher = |name: &str| inherited.iter().any(|(other, value)| other == name && *value == *launcher);
    // The service manager means the program by these, which runs in the launcher's place.
    let pid_variables: Vec<&str> =
        ["WATCHDOG_PID", "SYSTEMD_EXEC_PID"].into_iter().filter(|name| names_launcher(name)).collect();
    let mut user_variables = Vec::new();
    if let Identity::Other(account) = identity {
        user_variables = variables_of(account, &inherited);
    }
    let mut environment = inherited;
    let mut set = |name: &str, value: Option<OsString>| {
        environment.retain(|(other, _)| other != name);
        environment.extend(value.map(|value| (name.into(), value)));
    };
    for (name, value) in user_variables {
        set(name, value);
    }
    if let Some(tunnel) = context.tunnel {
        // The caller's values may name another tunnel.
        set(TUNNEL_VARIABLE, Some(tunnel.to_owned()));
        set(CONFIG_VARIABLE, None);
    }
    let own_pid = || Some(OsString::from(std::process::id().to_string()));
    if context.listens {
        // LISTEN_PIDFDID, which newer service managers set, identifies the launcher's process.
        set("LISTEN_PID", own_pid());
        set("LISTEN_PIDFDID", None);
    }
    for name in pid_variables {
        set(name, own_pid());
    }
    match context.session_bus {
        BusVariable::Inherited => {}
        BusVariable::Address(address) => set("DBUS_SESSION_BUS_ADDRESS", Some(address.into())),
        // Programs then try the bus in the runtime directory, whose refusal names the option that opens it.
        BusVariable::Unset => set("DBUS_SESSION_BUS_ADDRESS", None),
    }
    if let Some(socket) = context.notify_socket {
        set("NOTIFY_SOCKET", Some(socket.into()));
    }
    environment
}

/// Returns the variables to set, or to remove, for a program of another user than vpn-exec's.
fn variables_of(account: &Account, inherited: &[(OsString, OsString)]) -> Vec<(&'static str, Option<OsString>)> {
    let variable = |name: &str| inherited.iter().find(|(other, _)| other == name).map(|(_, value)| value);
    let is = |name: &str, expected: &str| variable(name).is_some_and(|value| value == expected);
    let uid = account.uid.to_string();
    let runtime = PathBuf::from(format!("/run/user/{uid}"));
    let mut variables: Vec<_> = OF_CALLERS.map(|name| (name, None)).into();
    if let Some(entry) = &account.entry {
        variables.extend([
            ("HOME", Some(entry.home.clone().into())),
            ("SHELL", Some(entry.shell.clone().into())),
            ("USER", Some(entry.name.clone().into())),
            ("LOGNAME", Some(entry.name.clone().into())),
        ]);
    }
    let is_caller = is("SUDO_UID", &uid)
        || is("PKEXEC_UID", &uid)
        || account.entry.as_ref().is_some_and(|entry| is("DOAS_USER", &entry.name));
    if is_caller {
        let desktop = desktop::variables(&runtime, account.uid, |name| variable(name).is_some());
        variables.extend(desktop.into_iter().map(|(name, value)| (name, Some(value))));
    }
    let is_own = runtime.metadata().is_ok_and(|found| found.uid() == account.uid);
    variables.push(("XDG_RUNTIME_DIR", is_own.then(|| runtime.into())));
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::identity::UserEntry;

    const NOTHING: EnvironmentContext<'_> = EnvironmentContext {
        tunnel: None,
        launcher: 42,
        listens: false,
        notify_socket: None,
        session_bus: BusVariable::Inherited,
    };

    fn pair(name: &str, value: &str) -> (OsString, OsString) {
        (name.into(), value.into())
    }

    #[test]
    fn variables_for_the_launcher_are_for_the_program() {
        let inherited = vec![
            pair("WATCHDOG_PID", "42"),
            pair("SYSTEMD_EXEC_PID", "41"),
            pair("LISTEN_PIDFDID", "7"),
            pair("NOTIFY_SOCKET", "/run/systemd/notify"),
        ];
        let unchanged =
            for_program(&Identity::Unchanged, inherited.clone(), EnvironmentContext { launcher: 1, ..NOTHING });
        assert_eq!(unchanged, inherited);
        let context = EnvironmentContext { listens: true, notify_socket: Some("/inside"), ..NOTHING };
        let mut environment = for_program(&Identity::Unchanged, inherited, context);
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

    #[test]
    fn the_environment_is_that_of_the_programs_user() {
        let entry = UserEntry { name: "ann".into(), home: "/home/ann".into(), shell: "/bin/zsh".into() };
        let account = Account { uid: 4_000_000, gid: 1, groups: vec![1], entry: Some(entry) };
        let inherited = [("HOME", "/root"), ("SUDO_USER", "ann"), ("LANG", "C"), ("XDG_RUNTIME_DIR", "/run/user/0")]
            .map(|(name, value)| pair(name, value));
        let mut environment = for_program(&Identity::Other(account), inherited.into(), NOTHING);
        environment.sort();
        let expected =
            [("HOME", "/home/ann"), ("LANG", "C"), ("LOGNAME", "ann"), ("SHELL", "/bin/zsh"), ("USER", "ann")]
                .map(|(name, value)| pair(name, value));
        assert_eq!(environment, expected);
    }

    #[test]
    fn the_program_finds_its_own_tunnel() {
        let inherited = vec![pair(TUNNEL_VARIABLE, "other"), pair(CONFIG_VARIABLE, "wg0.conf"), pair("LANG", "C")];
        let context = EnvironmentContext { tunnel: Some("mullvad".as_ref()), ..NOTHING };
        let environment = for_program(&Identity::Unchanged, inherited, context);
        assert_eq!(environment, [pair("LANG", "C"), pair(TUNNEL_VARIABLE, "mullvad")]);
    }

    #[test]
    fn the_session_bus_is_inherited_replaced_or_unset() {
        let bus = |session_bus| {
            let inherited = vec![pair("DBUS_SESSION_BUS_ADDRESS", "unix:path=/outside")];
            let environment =
                for_program(&Identity::Unchanged, inherited, EnvironmentContext { session_bus, ..NOTHING });
            environment.into_iter().next().map(|(_, value)| value)
        };
        assert_eq!(bus(BusVariable::Inherited), Some("unix:path=/outside".into()));
        assert_eq!(bus(BusVariable::Address("unix:path=/inside")), Some("unix:path=/inside".into()));
        assert_eq!(bus(BusVariable::Unset), None);
    }
}
