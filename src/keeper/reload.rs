//! Changes a running tunnel to another configuration.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::Reread;
use super::clients::KeeperClients;
use super::event_loop::Keeper;
use super::lifecycle::device_config;
use super::privileges::capabilities_for_ports;
use crate::config::{self, Config};
use crate::failure::{Doing, Failure};
use crate::lease::KeeperEvent;
use crate::lease::handover::Handover;
use crate::linux::capabilities;
use crate::plan::{self, Plan};
use crate::tunnel::Tunnel;
use crate::wireguard::DeviceConfig;

/// The configuration of a running tunnel.
pub(super) struct Configuration {
    pub(super) config: Config,
    /// The same in a sealed file, for the clients and a successor.
    pub(super) handover: OwnedFd,
    /// How to read it again. None if the keeper cannot.
    pub(super) reread: Option<Reread>,
}

impl Keeper {
    /// Changes the tunnel to the configuration in a sealed file or, without one, to the configuration that the keeper
    /// reads again. Returns a phrase for each change.
    ///
    /// # Errors
    /// If the configuration cannot be read or applied. Then nothing has changed.
    pub(super) fn reload(&mut self, sealed: Option<BorrowedFd<'_>>) -> Result<Vec<String>, Failure> {
        let handover = match sealed {
            Some(file) => Handover::open(file).map_err(Failure::new)?,
            None => self.reread()?,
        };
        self.change_to(&handover)
    }

    /// Reads the configuration again, applies it, and logs the result, because no client waits for an answer.
    pub(super) fn reload_and_log(&mut self) {
        log(self.reload(None));
    }

    /// Applies this keeper's own configuration to a tunnel that it has taken over, and logs the result.
    pub(super) fn reload_own(&mut self) {
        let own = self.configuration.handover.try_clone().doing("read the configuration");
        log(own.and_then(|own| self.reload(Some(own.as_fd()))));
    }

    /// Reads the configuration again where the keeper has read it first.
    fn reread(&mut self) -> Result<Handover, Failure> {
        match &mut self.configuration.reread {
            Some(reread) => reread(),
            None => Err(Failure::new("this tunnel's keeper cannot read its configuration again")
                .advise("name the file or the profile: `vpn-exec reload NAME`")),
        }
    }

    fn change_to(&mut self, handover: &Handover) -> Result<Vec<String>, Failure> {
        let current = &self.configuration;
        let config = handover.config().map_err(Failure::new)?;
        if config.name != current.config.name {
            return Err(Failure::new(format!("this configuration is for the tunnel {}", config.name)));
        }
        let differences = config::difference(&current.config, &config);
        let former = device_config(&current.config, self.endpoints.mtu)?;
        if config.local.has_networks() {
            // A link that appears after the facts are read is reported.
            self.host_network.watch_links(&self.tunnel, &config);
        }
        let mut plan = self.tunnel.plan_again(&config)?;
        plan.keep_link(self.tunnel.plan());
        let device = device_config(&config, plan.wireguard.mtu)?;
        let sealed = handover.seal_with(&plan).doing("keep the configuration")?;
        let change = plan::diff(self.tunnel.plan(), &plan, self.tunnel.running_backend())
            .map_err(|reasons| unchangeable(&reasons, &config))?;

        // Binding to a port is the likeliest step to fail, so it comes first.
        let ports = self.ports.prepare(&self.tunnel, &plan)?;
        let dns = match self.dns.prepare(&self.tunnel, &plan) {
            Ok(dns) => dns,
            Err(failure) => {
                self.ports.abandon(&self.tunnel, ports);
                return Err(failure);
            }
        };
        // Before the change: a keeper that is killed meanwhile leaves a successor that completes it.
        self.clients.broadcast_with(&KeeperEvent::Changed, Some(sealed.as_fd()));
        if let Err(failure) = change_tunnel(&mut self.tunnel, &change, plan, &former, &device) {
            self.clients.broadcast_with(&KeeperEvent::Changed, Some(self.configuration.handover.as_fd()));
            self.ports.abandon(&self.tunnel, ports);
            return Err(failure);
        }
        self.ports.commit(&self.tunnel, ports);
        self.dns.commit(dns);
        let configuration = &mut self.configuration;
        (configuration.config, configuration.handover) = (config, sealed);
        self.endpoints.configure(&configuration.config);
        self.host_network.watch_links(&self.tunnel, &self.configuration.config);
        self.host_network.watch_rules(&mut self.tunnel);
        if let Some(mtu) = change.mtu {
            self.endpoints.mtu = mtu;
        }
        Ok(differences.iter().map(config::Difference::as_change).collect())
    }
}

/// Passes the changed plan of a rootless tunnel to the clients, one of which may start a successor. The plan of the
/// machine's tunnels is on the disk, where only root can change it.
pub(super) fn pass_plan(handover: &mut OwnedFd, clients: &KeeperClients, plan: &Plan) -> Result<(), Failure> {
    if plan.rootless {
        *handover = Handover::open(handover.as_fd()).and_then(|read| read.seal_with(plan)).doing("keep the plan")?;
        clients.broadcast_with(&KeeperEvent::Changed, Some(handover.as_fd()));
    }
    Ok(())
}

/// Changes the WireGuard device, its interface and the rules. After a failure they are as they were.
fn change_tunnel(
    tunnel: &mut Tunnel,
    change: &plan::PlanDiff,
    plan: Plan,
    former: &DeviceConfig,
    device: &DeviceConfig,
) -> Result<(), Failure> {
    if let Some((port, mark)) = change.socket {
        // The plan has compared a rootless tunnel's port with those that need no privilege.
        if !plan.rootless {
            require_port(port)?;
        }
        let rebound = tunnel.device_mut().map_or(Ok(()), |device| device.rebind(port, mark));
        rebound.doing(format!("use the UDP port {port}"))?;
    }
    let configured = tunnel.device_mut().map_or(Ok(()), |living| living.reconfigure(device));
    let applied = configured.doing("configure the WireGuard device").and_then(|()| tunnel.apply(change, plan));
    applied.inspect_err(|_| {
        // The failure to report is the first one.
        if let Some(device) = tunnel.device_mut() {
            let _ = device.reconfigure(former);
            let _ = device.rebind(former.listen_port, former.fwmark);
        }
    })
}

/// Fails if a port needs a capability that the keeper has dropped.
fn require_port(port: u16) -> Result<(), Failure> {
    let needed = capabilities_for_ports([port]);
    if capabilities::permitted().doing("read the capabilities")?.contains(needed) {
        return Ok(());
    }
    Err(Failure::new("the keeper has given up the right to use a port below 1024")
        .advise(format!("take the tunnel down and up again, or choose another port than {port}")))
}

fn unchangeable(reasons: &[String], config: &Config) -> Failure {
    Failure::new(format!("this cannot be changed while the tunnel is up: {}", reasons.join("; ")))
        .advise(format!("take it down with `vpn-exec down {}`, and up again", config.name))
}

/// Logs the result of a change that no client waits for.
fn log(changed: Result<Vec<String>, Failure>) {
    match changed {
        Ok(changes) if changes.is_empty() => tracing::info!("the configuration is unchanged"),
        Ok(changes) => tracing::info!("changed the configuration: {}", changes.join("; ")),
        Err(failure) => tracing::error!("keeping the present configuration: {failure}"),
    }
}
