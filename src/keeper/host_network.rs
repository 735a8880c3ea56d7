//! Watches the host's network and firewall rules, which other programs change, and keeps local networks reachable.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::config::Config;
use crate::failure::Failure;
use crate::linux::clock::boot_time;
use crate::linux::netlink::monitor::Monitor;
use crate::plan::{self, Plan};
use crate::tunnel::Tunnel;

/// The delay between a change of the host's network and the keeper's reaction. One change arrives as many messages.
const SETTLE_DELAY: Duration = Duration::from_millis(250);

/// The shortest sleep of the machine after which the keeper searches for the peers again.
const SHORTEST_SLEEP: Duration = Duration::from_secs(2);

/// The keeper's view of changes on the host.
pub(super) struct HostNetwork {
    network: Monitor,
    /// Reports changes of the host's firewall rules, if some of them are the tunnel's.
    rules: Option<Monitor>,
    /// When to react to a change, as time since boot.
    settle_at: Option<Duration>,
    /// The time that the machine has slept since boot.
    slept: Duration,
}

impl HostNetwork {
    /// Starts to watch.
    pub(super) fn watch(tunnel: &mut Tunnel, config: &Config) -> io::Result<Self> {
        let network = Monitor::of_network()?;
        let mut watched = Self { network, rules: None, settle_at: None, slept: time_slept() };
        watched.watch_links(tunnel, config);
        watched.watch_rules(tunnel);
        Ok(watched)
    }

    /// Starts to watch the links of other tunnels if the tunnel is to have local networks: these may contain the links.
    /// Otherwise stops to watch them, because the start of a tunnel would wake all keepers.
    pub(super) fn watch_links(&self, tunnel: &Tunnel, config: &Config) {
        let ignored = (!config.local.has_networks()).then(|| plan::links_of_others(tunnel.plan().veth.as_ref()));
        if let Err(error) = self.network.ignore(ignored) {
            tracing::warn!("cannot choose the changes of the host's network to watch: {error}");
        }
    }

    /// Starts or stops to watch the host's firewall rules, depending on whether the tunnel has local networks.
    pub(super) fn watch_rules(&mut self, tunnel: &mut Tunnel) {
        // Nothing is changed at the host for a rootless tunnel.
        if tunnel.plan().local.networks.is_empty() || tunnel.plan().rootless {
            self.rules = None;
        } else if self.rules.is_none() {
            match Monitor::of_rules() {
                Ok(monitor) => self.rules = Some(monitor),
                Err(error) => tracing::warn!("cannot watch the firewall rules for local networks: {error}"),
            }
            // They may have been removed after they were loaded and before the monitor was opened.
            if let Err(failure) = tunnel.refresh_host_rules() {
                tracing::warn!("{failure}");
            }
        }
    }

    /// The descriptors that are readable after a change. None while a change settles.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let monitors = [Some(&self.network), self.rules.as_ref()].into_iter().flatten();
        monitors.filter(|_| self.settle_at.is_none()).map(AsFd::as_fd)
    }

    /// Notes that there was a change at a time since boot.
    pub(super) fn note_change(&mut self, now: Duration) {
        self.settle_at = Some(now + SETTLE_DELAY);
    }

    /// Returns when a change will have settled, as time since boot.
    pub(super) fn due(&self) -> Option<Duration> {
        self.settle_at
    }

    /// Returns whether a change has settled. If so, the monitors are to be drained now.
    pub(super) fn has_settled(&mut self, now: Duration) -> bool {
        self.settle_at.take_if(|at| *at <= now).is_some()
    }

    /// Takes all messages about the host's network. Returns whether there were any.
    pub(super) fn drain_network(&self) -> io::Result<bool> {
        self.network.drain()
    }

    /// Takes all messages about the host's firewall rules. Returns whether there were any.
    pub(super) fn drain_rules(&self) -> io::Result<bool> {
        self.rules.as_ref().map_or(Ok(false), Monitor::drain)
    }

    /// Returns whether the machine has slept since the last call.
    pub(super) fn has_slept(&mut self) -> bool {
        let before = std::mem::replace(&mut self.slept, time_slept());
        let has_slept = self.slept > before + SHORTEST_SLEEP;
        if has_slept {
            tracing::info!("the machine has resumed from sleep");
        }
        has_slept
    }
}

/// Adapts the tunnel's local networks to the host's changed network: the interfaces that lead to them, and the networks
/// themselves if the configuration asks for all of the host's. `pass_plan` passes a changed plan on, before and after a
/// failure.
pub(super) fn update_local_networks(
    tunnel: &mut Tunnel,
    config: &Config,
    pass_plan: impl FnMut(&Plan) -> Result<(), Failure>,
) {
    // A container reaches local networks by its own interfaces.
    if !config.local.has_networks() || tunnel.container().is_some() {
        return;
    }
    if let Err(failure) = try_update(tunnel, config, pass_plan) {
        tracing::warn!("cannot update the local networks: {failure}");
    }
}

fn try_update(
    tunnel: &mut Tunnel,
    config: &Config,
    mut pass_plan: impl FnMut(&Plan) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let now = tunnel.plan_again(config)?;
    let running = tunnel.plan();
    let mut changed = running.clone();
    changed.local = now.local;
    changed.wireguard.routes = now.wireguard.routes;
    changed.dns.forwarder = now.dns.forwarder;
    changed.keep_link(running);
    let change =
        plan::diff(running, &changed, tunnel.running_backend()).map_err(|reasons| Failure::new(reasons.join("; ")))?;
    if change != plan::PlanDiff::default() {
        tracing::info!("the local networks have changed");
        pass_plan(&changed)?;
        if let Err(failure) = tunnel.apply(&change, changed) {
            pass_plan(tunnel.plan())?;
            return Err(failure);
        }
    }
    // Whether the host itself forwards packets is not a part of the plan.
    tunnel.refresh_host_rules()
}

/// Returns the time that the machine has slept since boot.
fn time_slept() -> Duration {
    let awake = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    boot_time().saturating_sub(awake)
}
