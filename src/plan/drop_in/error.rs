//! The reasons why a service cannot be put into a tunnel by a drop-in.

use std::path::PathBuf;

use thiserror::Error;

use crate::names::{ServiceName, TunnelName};

/// A reason why a drop-in cannot put a service into a tunnel, with what to do about it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DropInError {
    /// The service is the keeper of a tunnel.
    #[error("{0} holds a tunnel itself: leave it outside")]
    Keeper(ServiceName),
    /// The whole machine depends on the service.
    #[error("{0} serves the whole machine: leave it outside")]
    HostsOwn(ServiceName),
    /// A container engine runs the service's program, in a network namespace of its own.
    #[error(
        "a container engine runs the program of {service} in another network namespace: leave the unit's service \
         settings as they are, and give {} the options --network=ns:/run/netns/{tunnel} and \
         --volume=/run/vpn-exec/{tunnel}/resolv.conf:/etc/resolv.conf:ro, and the unit BindsTo= and \
         After=vpn-exec@{tunnel}.service",
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
    /// The interface of a container on the host would have the same name as that of the tunnel.
    #[error("ve-{0} is the name of the tunnel's interface on the host, and of the container's: rename one of them")]
    Collision(TunnelName),
    /// A unit's name cannot contain all characters of the tunnel's name.
    #[error("the tunnel {0} cannot be a service, because a unit's name may not contain '=' or '+': rename its profile")]
    TunnelName(TunnelName),
    /// The service has a network without any connection.
    #[error("the unit has PrivateNetwork=yes, a network without a route out: set PrivateNetwork=no in the unit")]
    PrivateNetwork,
    /// The service is in another network namespace already.
    #[error(
        "the unit already has NetworkNamespacePath={}, and a service can be in one network namespace only: remove that \
         line", .0.display()
    )]
    OtherNamespace(PathBuf),
    /// The service shares the network namespace of another unit.
    #[error(
        "the unit has JoinsNamespaceOf={0}, and would share the network of that unit: remove that line, and put \
         both into the tunnel"
    )]
    JoinsNamespaceOf(String),
    /// A socket unit passes the service a socket that listens on the host.
    #[error(
        "{unit} listens on {address} outside of the tunnel, and its answers would bypass the tunnel: publish a port of \
         the tunnel instead and disable {unit}, or let it listen inside \
         (NetworkNamespacePath=/run/netns/{tunnel} in its [Socket])"
    )]
    ListensOutside {
        /// The socket unit.
        unit: String,
        /// The address that it listens on.
        address: String,
        /// The tunnel.
        tunnel: TunnelName,
    },
    /// The service needs a name on the system bus, which is hidden.
    #[error(
        "the unit has Type=dbus, and the system bus is hidden, because it lets a service ask the host to \
         look up names: --dbus system shows it"
    )]
    Bus,
    /// systemd would not see the service's PID file.
    #[error(
        "the unit has PIDFile={}, which systemd would not see, because the service has a private /run: put it into \
         a folder of RuntimeDirectory=, or show its folder with --show", .0.display()
    )]
    PidFile(PathBuf),
    /// The unit binds a directory over `/run`, which would replace the private one.
    #[error("the unit binds {0} over the private /run, and with it the host's resolvers: remove that bind")]
    BindsRun(String),
    /// The unit has a setting for `/run` that takes precedence over the drop-in's: systemd applies one setting for a
    /// path.
    #[error(
        "the unit has /run in ReadWritePaths=, ReadOnlyPaths=, ExecPaths= or NoExecPaths=, which makes systemd show \
         the host's /run with its resolvers: name the paths below it that the service needs instead"
    )]
    UsesRun,
    /// The unit binds the socket of a resolver.
    #[error("the unit binds {0}, through which the host looks up names, bypassing the tunnel: remove that bind")]
    BindsResolver(String),
    /// The path is not below `/run`, or has characters that have a meaning in units.
    #[error("cannot show {}: use a path below /run of letters, digits and / . _ - @ or %i", .0.display())]
    Path(PathBuf),
    /// The path would show the socket of a resolver.
    #[error("cannot show {}: the host looks up names through {hidden}, bypassing the tunnel", .path.display())]
    Resolver {
        /// The path.
        path: PathBuf,
        /// The hidden path, or pattern of paths.
        hidden: String,
    },
}
