//! The leases on a tunnel: whether launchers are still expected back after a takeover, and whether any ended without
//! leaving.

use std::time::Duration;

use super::clients::KeeperClients;
use super::privileges::with_all_capabilities;
use crate::failure::{Doing, Failure};
use crate::linux::clock::boot_time;
use crate::linux::namespace::NamespaceId;
use crate::linux::process::ProcessId;
use crate::registry::Holder;
use crate::tunnel::Tunnel;

/// How long the launchers that held a lease on a killed keeper have to join its successor.
const RETURN_TIMEOUT: Duration = Duration::from_secs(2);

/// What a keeper knows of its leases besides the connections.
#[derive(Debug, Default)]
pub(super) struct Leases {
    /// Whether a launcher has ended without leaving. Processes of its program may still run inside.
    pub(super) any_abandoned: bool,
    /// The launchers that are expected back.
    expected: Option<Expected>,
}

/// The launchers that held a lease on the killed keeper and have not joined this one yet.
#[derive(Debug)]
struct Expected {
    launchers: Vec<ProcessId>,
    /// The time since boot until which they may join.
    until: Duration,
}

impl Leases {
    /// Takes over the leases that a killed keeper has written down. Kills the processes of those whose launchers have
    /// ended. Needs all capabilities.
    pub(super) fn inherit(tunnel: &Tunnel, clients: &KeeperClients) -> Result<Self, Failure> {
        let mut leases = Self::default();
        let (alive, ended): (Vec<Holder>, Vec<Holder>) =
            tunnel.holders().into_iter().partition(|holder| holder.process.is_alive());
        for holder in ended {
            leases.any_abandoned = true;
            if let Some(mounts) = holder.mounts {
                tunnel.kill_left_behind(mounts).doing("kill the processes that a dead launcher left")?;
            }
        }
        let joined = clients.holders();
        let launchers: Vec<ProcessId> =
            alive.into_iter().map(|holder| holder.process).filter(|process| !has_process(&joined, process)).collect();
        if !launchers.is_empty() {
            leases.expected = Some(Expected { launchers, until: boot_time() + RETURN_TIMEOUT });
        }
        Ok(leases)
    }

    /// Forgets the expected launchers that have joined or ended. Returns whether none is expected any more since this
    /// call.
    pub(super) fn stop_expecting(&mut self, clients: &KeeperClients, now: Duration) -> bool {
        let Some(expected) = &mut self.expected else { return false };
        let joined = clients.holders();
        expected.launchers.retain(|process| !has_process(&joined, process) && process.is_alive());
        let is_over = expected.launchers.is_empty() || expected.until <= now;
        if is_over {
            self.expected = None;
        }
        is_over
    }

    /// Returns whether launchers are expected back.
    pub(super) fn is_expecting(&self) -> bool {
        self.expected.is_some()
    }

    /// Returns the time since boot until which launchers are expected.
    pub(super) fn due(&self) -> Option<Duration> {
        self.expected.as_ref().map(|expected| expected.until)
    }

    /// Writes down the launchers that hold a lease, and those that are expected back.
    pub(super) fn write_down(&self, tunnel: &mut Tunnel, clients: &KeeperClients) -> Result<(), Failure> {
        let expected = self.expected.as_ref().map_or(&[][..], |expected| &expected.launchers);
        tunnel.update_state(|state| state.holders = merged(clients.holders(), &state.holders, expected))
    }

    /// Kills the processes that a launcher which ended without leaving has left: those with its program's mount
    /// namespace.
    pub(super) fn clean_up_after(&mut self, tunnel: &Tunnel, mounts: Option<NamespaceId>) {
        self.any_abandoned = true;
        let killed = mounts.map(|mounts| with_all_capabilities(|| tunnel.kill_left_behind(mounts)));
        if let Some(Err(error) | Ok(Err(error))) = killed {
            tracing::warn!("cannot kill the processes that a dead launcher left: {error}");
        }
    }
}

/// Returns the present holders, and those of the former ones that are expected back.
fn merged(mut present: Vec<Holder>, former: &[Holder], expected: &[ProcessId]) -> Vec<Holder> {
    let is_missing = |holder: &&Holder| expected.contains(&holder.process) && !has_process(&present, &holder.process);
    let missing: Vec<Holder> = former.iter().filter(is_missing).cloned().collect();
    present.extend(missing);
    present
}

fn has_process(holders: &[Holder], process: &ProcessId) -> bool {
    holders.iter().any(|holder| holder.process == *process)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(pid: u32) -> Holder {
        Holder { process: ProcessId::of(pid.cast_signed()).expect("a living process"), mounts: None }
    }

    fn expecting(holder: &Holder, until: Duration) -> Leases {
        let launchers = vec![holder.process.clone()];
        Leases { any_abandoned: false, expected: Some(Expected { launchers, until }) }
    }

    #[test]
    fn an_expected_launcher_stays_written_down_until_it_joins() {
        let own = holder(std::process::id());
        let parent = holder(std::os::unix::process::parent_id());
        let both = [own.clone(), parent.clone()];
        assert_eq!(merged(vec![], &both, &[own.process.clone()]), std::slice::from_ref(&own));
        assert_eq!(merged(vec![own.clone()], &both, &[own.process.clone()]), [own.clone()]);
        assert_eq!(merged(vec![parent.clone()], &both, &[own.process.clone()]), [parent, own]);
    }

    #[test]
    fn a_launcher_is_expected_for_a_limited_time() {
        let until = Duration::from_secs(100);
        let mut leases = expecting(&holder(std::process::id()), until);
        let no_clients = KeeperClients::new();
        assert!(!leases.stop_expecting(&no_clients, until - Duration::from_millis(1)));
        assert_eq!((leases.is_expecting(), leases.due()), (true, Some(until)));
        assert!(leases.stop_expecting(&no_clients, until));
        assert!(!leases.is_expecting());
        assert!(!leases.stop_expecting(&no_clients, until), "the change is reported once");
    }
}
