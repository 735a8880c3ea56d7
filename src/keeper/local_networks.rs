//! Local networks in a keeper's life: the host's own network may change under them, and others may take their rules away.

use super::watch::Keeper;
use crate::linux::netlink::monitor::Monitor;
use crate::plan;

impl Keeper {
    /// Hears of changes of the host's rules from now on, if the tunnel has some among them.
    pub(super) fn watch_rules(&mut self) {
        if self.tunnel.plan().local.networks.is_empty() {
            self.rules = None;
        } else if self.rules.is_none() {
            match Monitor::of_rules() {
                Ok(monitor) => self.rules = Some(monitor),
                Err(error) => tracing::warn!("nobody watches over the rules for the local networks: {error}"),
            }
            // They may have been taken away since they were loaded, and nobody has heard of that.
            if let Err(error) = self.tunnel.refresh_host_part() {
                tracing::warn!("{error}");
            }
        }
    }

    /// Finds the local networks again, once the host's network has changed: the interfaces that they are behind, and which there are
    /// where all of the host's were asked for.
    pub(super) fn find_local_networks(&mut self) {
        if self.config.local.networks.is_empty() && !self.config.local.lan {
            return;
        }
        let config = self.config.clone();
        let found = self.plan_anew(&config).map_err(|(reason, _)| reason).and_then(|now| {
            let living = self.tunnel.plan();
            let mut wanted = living.clone();
            wanted.local = now.local;
            wanted.wireguard.routes = now.wireguard.routes;
            wanted.keep_link(living);
            let change = plan::diff(living, &wanted, self.tunnel.living_choice());
            let change = change.map_err(|reasons| reasons.join("; "))?;
            if change != plan::PlanDiff::default() {
                tracing::info!("the local networks are others now");
                self.tunnel.apply(&change, wanted).map_err(|error| error.to_string())?;
            }
            // Whether the host is a router is no part of a plan.
            self.tunnel.refresh_host_part().map_err(|error| error.to_string())
        });
        if let Err(reason) = found {
            tracing::warn!("the local networks stay as they were: {reason}");
        }
        self.watch_rules();
    }

    /// Makes the host's rules again if somebody has taken them away.
    pub(super) fn mend_rules(&mut self) {
        if let Err(error) = self.tunnel.mend_host_part() {
            tracing::warn!("{error}");
        }
    }
}
