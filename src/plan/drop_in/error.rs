//! The reasons why a service cannot be put into a tunnel by a drop-in.

use std::path::PathBuf;

use thiserror::Error;

use crate::names::{ServiceName, TunnelName};

/// Why a service cannot be put into a tunnel in this way, and what can be done about it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DropInError {
    /// The service that holds tunnels.
    #[error("{0} holds a tunnel itself: leave it outside")]
    Keeper(ServiceName),
    /// The host needs it outside.
    #[error("{0} serves the whole machine: leave it outside")]
    HostsOwn(ServiceName),
    /// An engine runs its program, in a network namespace that the engine makes.
    #[error(
        "a container engine runs the program of {service} in another network namespace: leave the unit's service \
         settings as they are, and give {} the options --network=ns:/run/netns/{tunnel} and \
         --volume=/run/vpn-exec/{tunnel}/resolv.conf:/etc/resolv.conf:ro, and the unit BindsTo= and After=vpn-exec@{tunnel}.service",
        if *.is_docker { "podman (Docker cannot join a namespace by its path)" } else { "podman" }
    )]
    Container {
        /// The service.
        service: ServiceName,
        /// The tunnel.
        tunnel: TunnelName,
        /// Whether the engine is Docker.
        is_docker: bool,
    },
    /// A machine's interface on the host would have the name of the tunnel's.
    #[error("ve-{0} is the name of the tunnel's interface on the host, and of the container's: rename one of them")]
    Collision(TunnelName),
    /// The names of units have fewer characters than those of tunnels.
    #[error("the tunnel {0} cannot be a service, because a unit's name may not contain '=' or '+': rename its profile")]
    TunnelName(TunnelName),
    /// It is to have no network.
    #[error("the unit has PrivateNetwork=yes, a network without a route out: set PrivateNetwork=no in the unit")]
    PrivateNetwork,
    /// It is in another namespace already.
    #[error("the unit already has NetworkNamespacePath={}, and a service can be in one network namespace only: remove that line", .0.display())]
    OtherNamespace(PathBuf),
    /// It shares another service's network.
    #[error(
        "the unit has JoinsNamespaceOf={0}, and would share the network of that unit: remove that line, and put both into the tunnel"
    )]
    JoinsNamespaceOf(String),
    /// What it is passed listens on the host.
    #[error(
        "{unit} listens on {address} outside of the tunnel, and its answers would bypass the tunnel: publish a port of the tunnel \
         instead and disable {unit}, or let it listen inside (NetworkNamespacePath=/run/netns/{tunnel} in its [Socket])"
    )]
    ListensOutside {
        /// The socket unit.
        unit: String,
        /// Where.
        address: String,
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// It is known by a name on a bus that it would not see.
    #[error(
        "the unit has Type=dbus, and the system bus is hidden, because it lets a service ask the host to look up names: --dbus system shows it"
    )]
    Bus,
    /// Where nobody outside sees it.
    #[error(
        "the unit has PIDFile={}, which systemd would not see, because the service has a private /run: put it into a folder of \
         RuntimeDirectory=, or show its folder with --show", .0.display()
    )]
    PidFile(PathBuf),
    /// The host's `/run` would be in the place of the service's own, which is hidden by whatever else is mounted there.
    #[error("the unit binds {0} over the private /run, and with it the host's resolvers: remove that bind")]
    BindsRun(String),
    /// Of several settings for one path, systemd mounts one; and these go before the drop-in's.
    #[error(
        "the unit has /run in ReadWritePaths=, ReadOnlyPaths=, ExecPaths= or NoExecPaths=, which makes systemd show the host's /run with its \
         resolvers: name the paths below it that the service needs instead"
    )]
    UsesRun,
    /// It shows what must not be seen already.
    #[error("the unit binds {0}, through which the host looks up names, bypassing the tunnel: remove that bind")]
    BindsResolver(String),
    /// No path below `/run`, or one that a unit cannot say.
    #[error("cannot show {}: use a path below /run of letters, digits and / . _ - @ or %i", .0.display())]
    Path(PathBuf),
    /// It would show what must not be seen.
    #[error("cannot show {}: the host looks up names through {hidden}, bypassing the tunnel", .path.display())]
    Resolver {
        /// What was to be shown.
        path: PathBuf,
        /// What is hidden.
        hidden: String,
    },
}
