//! The state that all clients of the filter share.

use std::collections::HashMap;

use super::policy::BusPolicy;
use super::private_names::{BusClientId, OwnerChange, PrivateNames};
use super::refusal::{BusRefusal, Counter};

/// The shared state: the policy, the clients, their private names, and the refusals so far.
pub(super) struct Shared<'a> {
    pub(super) policy: &'a BusPolicy,
    pub(super) names: PrivateNames,
    /// The clients by the unique names that the bus has given them.
    clients: HashMap<String, BusClientId>,
    /// The unique names of the clients.
    unique_names: HashMap<BusClientId, String>,
    counter: Counter,
    report: &'a mut dyn FnMut(&BusRefusal, u64),
    /// Changes that the clients are yet to be told, each with the client whose request caused it.
    pub(super) owner_changes: Vec<(BusClientId, OwnerChange)>,
}

impl<'a> Shared<'a> {
    /// Returns the state without any clients. `report` is called for each refusal, with its count so far.
    pub(super) fn new(policy: &'a BusPolicy, report: &'a mut dyn FnMut(&BusRefusal, u64)) -> Self {
        Self {
            policy,
            names: PrivateNames::default(),
            clients: HashMap::new(),
            unique_names: HashMap::new(),
            counter: Counter::default(),
            report,
            owner_changes: Vec::new(),
        }
    }

    /// Counts and reports a refusal.
    pub(super) fn refuse(&mut self, refusal: BusRefusal) {
        let (refusal, times) = self.counter.count(refusal);
        (self.report)(&refusal, times);
    }

    /// Notes the unique name that the bus has given to a client.
    pub(super) fn set_unique_name(&mut self, client: BusClientId, name: &str) {
        self.clients.insert(name.to_owned(), client);
        self.unique_names.insert(client, name.to_owned());
    }

    /// Forgets the unique name of a client that has disconnected.
    pub(super) fn forget_unique_name(&mut self, client: BusClientId) {
        if let Some(name) = self.unique_names.remove(&client) {
            self.clients.remove(&name);
        }
    }

    /// Returns the unique name of a client.
    pub(super) fn unique_name(&self, client: BusClientId) -> Option<&str> {
        self.unique_names.get(&client).map(String::as_str)
    }

    /// Returns whether a unique name belongs to a client of the filter.
    pub(super) fn is_client(&self, unique_name: &str) -> bool {
        self.clients.contains_key(unique_name)
    }

    /// Returns the unique name of the owner of a private name.
    pub(super) fn private_owner(&self, name: &str) -> Option<&str> {
        self.unique_name(self.names.owner(name)?)
    }
}
