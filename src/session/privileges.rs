//! The privileges of a launcher: those that root has, or those that a user gains in a user namespace.

use std::os::fd::AsFd;

use super::obstacles::{self, Before};
use crate::failure::{Doing, Failure};
use crate::fault;
use crate::linux::capabilities::{self, CapabilitySet};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::user_namespace;
use crate::names::TunnelName;
use crate::registry::{self, Scope};

/// The capabilities without which no tunnel can be made on the host.
fn of_root() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::SETPCAP
}

/// The variables by which sudo, doas and pkexec name their caller.
pub(crate) const CALLERS: [&str; 3] = ["SUDO_UID", "DOAS_USER", "PKEXEC_UID"];

/// Returns whether this process is root's on behalf of a caller of sudo or the like.
pub(crate) fn is_root_for_caller() -> bool {
    nix::unistd::geteuid().is_root() && CALLERS.iter().any(|name| std::env::var_os(name).is_some())
}

/// Chooses whose tunnels this process uses: the machine's if it has the privileges for that, or else those of its
/// user. `rootless` forces the latter.
///
/// # Errors
/// If the capabilities cannot be read, or if the caller of sudo would get a program that runs as root.
pub(crate) fn choose_scope(rootless: bool) -> Result<(), Failure> {
    let scope = scope_for(rootless)?;
    if scope == Scope::User && is_root_for_caller() {
        // Root's user namespace has no other user.
        let why = if rootless { "--rootless was given" } else { "root lacks the capabilities for another one here" };
        return Err(Failure::new(format!("the tunnel and its program would be root's, because {why}"))
            .advise("run it without sudo"));
    }
    scope.enter();
    Ok(())
}

fn scope_for(rootless: bool) -> Result<Scope, Failure> {
    let is_privileged = capabilities::permitted().doing("read the capabilities")?.contains(of_root());
    Ok(if is_privileged && !rootless { Scope::System } else { Scope::User })
}

/// Chooses the scope for a command that starts no program. A list has the tunnels of both.
///
/// # Errors
/// If the capabilities cannot be read.
pub(crate) fn choose_scope_to_look() -> Result<(), Failure> {
    scope_for(false)?.enter();
    Ok(())
}

/// Returns why [`choose_scope`] has chosen as it has.
pub(crate) fn reason_of_scope(rootless: bool) -> &'static str {
    match (Scope::current(), nix::unistd::geteuid().is_root()) {
        (Scope::System, true) => "you are root",
        (Scope::System, false) => "this process has CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP",
        (Scope::User, _) if rootless => "--rootless was given",
        (Scope::User, true) => "this process lacks CAP_SYS_ADMIN, CAP_NET_ADMIN or CAP_SETPCAP",
        (Scope::User, false) => "you are not root",
    }
}

/// Chooses the scope of a running tunnel: first that of [`choose_scope`], as a user's own tunnel goes before the
/// machine's of that name, then the other.
///
/// # Errors
/// If the capabilities cannot be read.
pub(crate) fn choose_scope_of(name: &TunnelName) -> Result<(), Failure> {
    choose_scope_to_look()?;
    let first = Scope::current();
    let other = if first == Scope::System { Scope::User } else { Scope::System };
    let exists = |scope: Scope| {
        scope.enter();
        registry::path_of(name).is_dir()
    };
    if !exists(first) && !exists(other) {
        first.enter();
    }
    Ok(())
}

/// Checks for the privileges that making a tunnel of the machine needs, before anything is touched.
///
/// # Errors
/// If a capability is missing.
pub(crate) fn require_privileges() -> Result<(), Failure> {
    if Scope::current() == Scope::User || capabilities::permitted().doing("read the capabilities")?.contains(of_root())
    {
        return Ok(());
    }
    Err(Failure::new("vpn-exec needs root, or the capabilities CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP")
        .advise("run it as root: `sudo vpn-exec …`; the program still runs as you, without privileges"))
}

/// The capabilities of a launcher. Root has them already; a user gains them with [`Privileges::gain`].
#[derive(Debug)]
pub(crate) struct Privileges {
    needed: CapabilitySet,
}

impl Privileges {
    /// Drops all capabilities but `needed` from the calling process.
    ///
    /// # Errors
    /// What the system refuses.
    pub(crate) fn limit(needed: CapabilitySet) -> Result<Self, Failure> {
        if Scope::current() == Scope::System {
            capabilities::limit(needed, needed).doing("drop privileges")?;
        }
        Ok(Self { needed })
    }

    /// Moves the calling process into the user namespace of a user's tunnel, whose network namespace this is. It has
    /// the needed capabilities there, and no others. Does nothing for a tunnel of the machine.
    ///
    /// # Errors
    /// If the user namespace belongs to another user, or if the keeper has not passed the network namespace.
    pub(crate) fn gain_in(&self, namespace: Option<&NetworkNamespace>) -> Result<(), Failure> {
        if Scope::current() == Scope::System {
            return Ok(());
        }
        let namespace = namespace.ok_or_else(|| Failure::new("the keeper has not passed the tunnel's namespace"))?;
        if !fault::is_broken("user-namespace") {
            user_namespace::enter_owner(namespace.as_fd()).doing("enter the tunnel's user namespace")?;
        }
        capabilities::limit(self.needed, self.needed).doing("drop privileges")
    }

    /// Moves the calling process into a new user namespace, as [`Privileges::gain_in`] does. Returns the network
    /// namespace for the tunnel, which is created here: some systems allow the former and forbid the latter. Does
    /// nothing for a tunnel of the machine.
    ///
    /// # Errors
    /// If the system forbids user namespaces, with the remedy.
    pub(crate) fn gain(&self) -> Result<Option<NetworkNamespace>, Failure> {
        if Scope::current() == Scope::System {
            return Ok(None);
        }
        let before = Before::look();
        let user = if fault::is_broken("user-namespace") { Ok(()) } else { user_namespace::create() };
        let created = user.and_then(|()| NetworkNamespace::create(|| Ok(())));
        let (namespace, ()) = created.map_err(|error| obstacles::explain(&error, before))?;
        capabilities::limit(self.needed, self.needed).doing("drop privileges")?;
        Ok(Some(namespace))
    }
}
