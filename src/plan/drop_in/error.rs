//! The reasons why a service cannot be put into a tunnel by a drop-in.

use std::path::PathBuf;

use thiserror::Error;

use crate::names::{ServiceName, TunnelName};

/// Why a service cannot be put into a tunnel in this way, and what can be done about it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DropInError {
    /// The service that holds tunnels.
    #[error("{0} holds a tunnel itself, and must stay outside")]
    Keeper(ServiceName),
    /// The host needs it outside.
    #[error("{0} serves the whole machine, which would be without it: leave it outside")]
    HostsOwn(ServiceName),
    /// An engine runs its program, in a network namespace that the engine makes.
    #[error(
        "an engine runs the program of {service} in a network namespace of its own, outside of the tunnel: leave the unit's service \
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
    #[error(
        "ve-{0} is the interface of the tunnel on the host, and the container's as well: give one of them another name"
    )]
    Collision(TunnelName),
    /// The names of units have fewer characters than those of tunnels.
    #[error("the tunnel {0} cannot be a service, since the name of a unit has no '=' and no '+': rename its profile")]
    TunnelName(TunnelName),
    /// It is to have no network.
    #[error("the unit has PrivateNetwork=yes, a network without any way out: set PrivateNetwork=no in the unit")]
    PrivateNetwork,
    /// It is in another namespace already.
    #[error("the unit has NetworkNamespacePath={} already, and a service is in one network namespace: take that line away", .0.display())]
    OtherNamespace(PathBuf),
    /// It shares another service's network.
    #[error(
        "the unit has JoinsNamespaceOf={0}, and would share the network of that unit: take that line away, and put both into the tunnel"
    )]
    JoinsNamespaceOf(String),
    /// What it is passed listens on the host.
    #[error(
        "{unit} listens at {address} outside of the tunnel, and what comes there would be answered past it: publish a port of the tunnel \
         instead, and disable {unit}, or have it listen inside (NetworkNamespacePath=/run/netns/{tunnel} in its [Socket])"
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
        "the unit has Type=dbus, and the system bus is hidden, where anybody can have the host look names up: --dbus system shows it"
    )]
    Bus,
    /// Where nobody outside sees it.
    #[error(
        "the unit has PIDFile={}, which systemd would not see: /run is the service's own inside. Put it into a folder of RuntimeDirectory=, \
         or show its folder with --show", .0.display()
    )]
    PidFile(PathBuf),
    /// The host's `/run` would be in the place of the service's own, which is hidden by whatever else is mounted there.
    #[error(
        "the unit binds {0}, and the host's resolvers with it, in the place of a /run without them: take that away"
    )]
    BindsRun(String),
    /// Of several settings for one path, systemd mounts one; and these go before the drop-in's.
    #[error(
        "the unit has /run in ReadWritePaths=, ReadOnlyPaths=, ExecPaths= or NoExecPaths=, by which systemd shows the host's /run, and the \
         host's resolvers with it: name what is below it that the service needs instead"
    )]
    UsesRun,
    /// It shows what must not be seen already.
    #[error("the unit binds {0}, by which the host looks names up, past the tunnel: take that away")]
    BindsResolver(String),
    /// No path below `/run`, or one that a unit cannot say.
    #[error("{} cannot be shown: give a path below /run, of letters, digits and / . _ - @ or %i", .0.display())]
    Path(PathBuf),
    /// It would show what must not be seen.
    #[error("{} cannot be shown: {hidden} is there, by which the host looks names up, past the tunnel", .path.display())]
    Resolver {
        /// What was to be shown.
        path: PathBuf,
        /// What is hidden.
        hidden: String,
    },
}
