//! Budgets: how many descriptors, flows or bytes the relays of a process may use.
//!
//! A relay can always get more clients than the process may have open files. The process has other work that needs
//! descriptors: answering `status`, finding endpoints, writing its state. So the relays share a budget.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many descriptors are left to the rest of the process, if its limit is at least twice that. A keeper accepts 128
/// clients of other users, besides those that hold its tunnel, and the DNS forwarder has up to 157 sockets.
const RESERVED_FOR_PROCESS: usize = 448;

/// The fraction of a budget that is reserved for its ports, in equal shares: a half. So clients of one port never use
/// up what another port needs, and most of the budget is available to the port that is in use.
const RESERVED_FRACTION: usize = 2;

/// How many descriptors a TCP connection needs. A reserved share is a multiple of it.
pub(super) const CONNECTION: usize = 2;

/// A number of descriptors, flows or bytes that all clones of this value share.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    total: usize,
    usage: Mutex<Usage>,
    /// The limit of open files to restore when the budget is dropped.
    former: Option<Rlimit>,
}

/// How much of a budget is in use.
#[derive(Debug, Default)]
struct Usage {
    total: usize,
    /// How much each port uses, by its number.
    ports: HashMap<u64, usize>,
    next_port: u64,
    /// Computed when needed, as ports may be added and removed by the thousand. `None` if the ports have changed since.
    shares: Option<Shares>,
}

/// The reserved shares of the ports.
#[derive(Clone, Copy, Debug)]
struct Shares {
    /// How much is reserved for each port.
    per_port: usize,
    /// How much of all shares is not in use.
    unused: usize,
}

impl Usage {
    fn shares(&mut self, budget: usize) -> Shares {
        let ports = &self.ports;
        *self.shares.get_or_insert_with(|| {
            let per_port = budget / RESERVED_FRACTION / ports.len().max(1);
            let per_port = per_port - per_port % CONNECTION;
            Shares { per_port, unused: ports.values().map(|used| per_port.saturating_sub(*used)).sum() }
        })
    }

    /// Changes the usage in total and that of a port.
    fn update(&mut self, port: Option<u64>, change: impl Fn(usize) -> usize) {
        self.total = change(self.total);
        let Some(used) = port.and_then(|port| self.ports.get_mut(&port)) else { return };
        let former = std::mem::replace(used, change(*used));
        if let Some(Shares { per_port, unused }) = &mut self.shares {
            *unused = *unused + per_port.saturating_sub(*used) - per_port.saturating_sub(former);
        }
    }
}

impl Budget {
    /// Returns a budget of as many descriptors as the process may have open, less those for its other work.
    ///
    /// Raises the soft limit (RLIMIT_NOFILE of getrlimit(2)) to the hard limit until the last clone of the budget is
    /// dropped. The soft limit is low for the sake of programs that use select(2), which this one does not. Programs
    /// that are executed later, such as hooks, get the former limit.
    ///
    /// # Errors
    ///
    /// Returns an error if the limit cannot be raised.
    pub fn of_process() -> io::Result<Self> {
        let former = getrlimit(Resource::Nofile);
        if former.current != former.maximum {
            setrlimit(Resource::Nofile, Rlimit { current: former.maximum, ..former })?;
        }
        let limit = former.maximum.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        Ok(Self::with(limit - RESERVED_FOR_PROCESS.min(limit / 2), Some(former)))
    }

    /// Returns a budget of a given size.
    pub fn new(total: usize) -> Self {
        Self::with(total, None)
    }

    fn with(total: usize, former: Option<Rlimit>) -> Self {
        Self(Arc::new(Inner { total, usage: Mutex::default(), former }))
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.0.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an amount out of the budget until the grant is dropped. Returns `None` if less is left.
    pub(super) fn take(&self, amount: usize) -> Option<Grant> {
        self.take_for(None, amount)
    }

    /// Adds a port, which has a reserved share until it is dropped.
    pub(super) fn add_port(&self) -> PortBudget {
        let mut usage = self.usage();
        let number = usage.next_port;
        usage.next_port += 1;
        usage.ports.insert(number, 0);
        usage.shares = None;
        PortBudget { budget: self.clone(), number }
    }

    fn take_for(&self, port: Option<u64>, amount: usize) -> Option<Grant> {
        let mut usage = self.usage();
        let Shares { per_port, unused } = usage.shares(self.0.total);
        let used = port.and_then(|port| usage.ports.get(&port));
        let reserved_for_others = unused - used.map_or(0, |used| per_port.saturating_sub(*used));
        let left = self.0.total.checked_sub(usage.total)?.checked_sub(reserved_for_others)?;
        if amount > left {
            return None;
        }
        usage.update(port, |used| used + amount);
        drop(usage);
        Some(Grant { budget: self.clone(), port, amount })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(former) = self.former.take() {
            // Descriptors above the limit stay open.
            let _ = setrlimit(Resource::Nofile, former);
        }
    }
}

/// A port that has a reserved share of a budget.
#[derive(Debug)]
pub(super) struct PortBudget {
    budget: Budget,
    number: u64,
}

impl PortBudget {
    /// Takes an amount for this port, out of its own share and of what is reserved for none.
    pub(super) fn take(&self, amount: usize) -> Option<Grant> {
        self.budget.take_for(Some(self.number), amount)
    }

    /// Returns whether the port uses more than its reserved share.
    pub(super) fn exceeds_share(&self) -> bool {
        let mut usage = self.budget.usage();
        let per_port = usage.shares(self.budget.0.total).per_port;
        usage.ports.get(&self.number).is_some_and(|used| *used > per_port)
    }
}

impl Drop for PortBudget {
    fn drop(&mut self) {
        let mut usage = self.budget.usage();
        usage.ports.remove(&self.number);
        usage.shares = None;
    }
}

/// An amount that was taken out of a budget. Returned when this is dropped.
#[derive(Debug)]
pub(super) struct Grant {
    budget: Budget,
    port: Option<u64>,
    amount: usize,
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.budget.usage().update(self.port, |used| used.saturating_sub(self.amount));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_never_exceed_the_budget_and_can_be_returned() {
        let budget = Budget::new(5);
        let grants = [budget.take(2).expect("5 are left"), budget.take(2).expect("3 are left")];
        assert!(budget.clone().take(2).is_none() && budget.take(usize::MAX).is_none());
        let last = budget.take(1).expect("1 is left");
        assert!(budget.take(1).is_none());
        drop(grants);
        assert!(budget.take(4).is_some());
        drop(last);
        assert!(budget.take(5).is_some());
    }

    #[test]
    fn each_port_has_a_share_that_no_other_can_take() {
        let budget = Budget::new(40);
        let (one, other) = (budget.add_port(), budget.add_port());
        let take_all = |port: &PortBudget| std::iter::from_fn(|| port.take(2)).collect::<Vec<_>>();
        let of_one = take_all(&one);
        assert_eq!(of_one.len(), 15, "all but the other's share, which is a quarter");
        assert!(one.exceeds_share() && budget.take(1).is_none());
        let of_other = take_all(&other);
        assert_eq!(of_other.len(), 5);
        assert!(!other.exceeds_share(), "it has its share, and no more");
        drop(of_one);
        let of_other = (of_other, take_all(&other));
        assert_eq!(of_other.1.len(), 10);
        // The share of a removed port becomes available to all.
        drop(one);
        assert_eq!(take_all(&other).len(), 5);
        drop(of_other);
        // A grant that outlives its port still counts.
        let grant = other.take(30).expect("all of it");
        drop(other);
        assert!(budget.take(11).is_none());
        drop(grant);
        assert!(budget.take(40).is_some());
    }

    /// A range may have 65535 ports.
    #[test]
    fn nothing_is_reserved_if_there_are_more_ports_than_descriptors() {
        let budget = Budget::new(100);
        let ports: Vec<PortBudget> = (0..1000).map(|_| budget.add_port()).collect();
        let taken: Vec<Grant> = std::iter::from_fn(|| ports[7].take(2)).collect();
        assert_eq!(taken.len(), 50);
        assert!(ports[8].take(2).is_none());
    }
}
