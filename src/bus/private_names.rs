//! Private names: names on the bus that only the clients of the filter see. Requests follow the rules of the bus (D-Bus
//! specification, "RequestName" and "ReleaseName").
//!
//! A single-instance program requests a name first, and hands its work to the owner if the name has one. Here it gets
//! the name even if a process outside owns it, so it starts inside. A second instance inside finds the first.

use std::collections::HashMap;

/// An identifier of a client of the filter.
pub(super) type BusClientId = u64;

/// The maximum number of names that a client owns or waits for.
const MAX_NAMES: usize = 512;

/// `ALLOW_REPLACEMENT` of `RequestName`.
const ALLOW_REPLACEMENT: u32 = 1;
/// `REPLACE_EXISTING` of `RequestName`.
const REPLACE_EXISTING: u32 = 2;
/// `DO_NOT_QUEUE` of `RequestName`.
const DO_NOT_QUEUE: u32 = 4;

/// The results of `RequestName` and `ReleaseName`.
pub(super) mod name_result {
    pub(in super::super) const PRIMARY_OWNER: u32 = 1;
    pub(in super::super) const IN_QUEUE: u32 = 2;
    pub(in super::super) const EXISTS: u32 = 3;
    pub(in super::super) const ALREADY_OWNER: u32 = 4;
    pub(in super::super) const RELEASED: u32 = 1;
    pub(in super::super) const NON_EXISTENT: u32 = 2;
    pub(in super::super) const NOT_OWNER: u32 = 3;
}

/// A change of the owner of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OwnerChange {
    pub(super) name: String,
    pub(super) old: Option<BusClientId>,
    pub(super) new: Option<BusClientId>,
}

#[derive(Clone, Copy, Debug)]
struct QueueEntry {
    client: BusClientId,
    flags: u32,
}

/// The private names of all clients.
#[derive(Debug, Default)]
pub(super) struct PrivateNames {
    /// The owner of each name, followed by the clients that wait for it.
    queues: HashMap<String, Vec<QueueEntry>>,
    /// The number of queues that each client is in.
    counts: HashMap<BusClientId, usize>,
}

impl PrivateNames {
    /// Returns the owner of a name.
    pub(super) fn owner(&self, name: &str) -> Option<BusClientId> {
        self.queues.get(name)?.first().map(|owner| owner.client)
    }

    /// Returns the owner of a name, followed by the clients that wait for it.
    pub(super) fn queue(&self, name: &str) -> Option<impl Iterator<Item = BusClientId> + '_> {
        Some(self.queues.get(name)?.iter().map(|waiting| waiting.client))
    }

    /// Returns all owned names.
    pub(super) fn all(&self) -> impl Iterator<Item = &str> {
        self.queues.keys().map(String::as_str)
    }

    /// Gives a client a name, or a place in its queue. Returns the result of `RequestName`, or `None` if the client has
    /// too many names already.
    pub(super) fn request(
        &mut self,
        name: &str,
        client: BusClientId,
        flags: u32,
    ) -> Option<(u32, Option<OwnerChange>)> {
        let entry = QueueEntry { client, flags };
        let change = |old, new| Some(OwnerChange { name: name.to_owned(), old, new });
        let known = self.queues.get(name).is_some_and(|queue| queue.iter().any(|waiting| waiting.client == client));
        if !known && self.counts.get(&client).is_some_and(|count| *count >= MAX_NAMES) {
            return None;
        }
        let Some(queue) = self.queues.get_mut(name) else {
            self.queues.insert(name.to_owned(), vec![entry]);
            *self.counts.entry(client).or_default() += 1;
            return Some((name_result::PRIMARY_OWNER, change(None, Some(client))));
        };
        let owner = queue[0];
        if owner.client == client {
            queue[0] = entry;
            return Some((name_result::ALREADY_OWNER, None));
        }
        queue.retain(|waiting| waiting.client != client);
        let (answer, change) = if flags & REPLACE_EXISTING != 0 && owner.flags & ALLOW_REPLACEMENT != 0 {
            queue.insert(0, entry);
            if owner.flags & DO_NOT_QUEUE != 0 {
                queue.remove(1);
                self.uncount(owner.client);
            }
            (name_result::PRIMARY_OWNER, change(Some(owner.client), Some(client)))
        } else if flags & DO_NOT_QUEUE != 0 {
            (name_result::EXISTS, None)
        } else {
            queue.push(entry);
            (name_result::IN_QUEUE, None)
        };
        match (known, answer) {
            (true, name_result::EXISTS) => self.uncount(client),
            (false, name_result::PRIMARY_OWNER | name_result::IN_QUEUE) => *self.counts.entry(client).or_default() += 1,
            _ => {}
        }
        Some((answer, change))
    }

    /// Takes a name, or a place in its queue, from a client. Returns the result of `ReleaseName`.
    pub(super) fn release(&mut self, name: &str, client: BusClientId) -> (u32, Option<OwnerChange>) {
        let Some(queue) = self.queues.get_mut(name) else { return (name_result::NON_EXISTENT, None) };
        let Some(place) = queue.iter().position(|waiting| waiting.client == client) else {
            return (name_result::NOT_OWNER, None);
        };
        queue.remove(place);
        let new = queue.first().map(|owner| owner.client);
        if new.is_none() {
            self.queues.remove(name);
        }
        self.uncount(client);
        let change = (place == 0).then(|| OwnerChange { name: name.to_owned(), old: Some(client), new });
        (name_result::RELEASED, change)
    }

    /// Takes all names from a client that has disconnected.
    pub(super) fn forget(&mut self, client: BusClientId) -> Vec<OwnerChange> {
        let has = |queue: &[QueueEntry]| queue.iter().any(|waiting| waiting.client == client);
        let names: Vec<String> =
            self.queues.iter().filter(|(_, queue)| has(queue)).map(|(name, _)| name.clone()).collect();
        names.iter().filter_map(|name| self.release(name, client).1).collect()
    }

    fn uncount(&mut self, client: BusClientId) {
        if let Some(count) = self.counts.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(old: Option<BusClientId>, new: Option<BusClientId>) -> Option<OwnerChange> {
        Some(OwnerChange { name: "a.b".into(), old, new })
    }

    #[test]
    fn a_name_has_one_owner_and_a_queue() {
        let mut names = PrivateNames::default();
        assert_eq!(names.request("a.b", 1, 0), Some((name_result::PRIMARY_OWNER, change(None, Some(1)))));
        assert_eq!(names.request("a.b", 1, 0), Some((name_result::ALREADY_OWNER, None)));
        assert_eq!(names.request("a.b", 2, DO_NOT_QUEUE), Some((name_result::EXISTS, None)));
        assert_eq!(names.request("a.b", 2, REPLACE_EXISTING), Some((name_result::IN_QUEUE, None)));
        assert_eq!(names.queue("a.b").expect("owned").collect::<Vec<_>>(), [1, 2]);
        assert_eq!(names.release("a.b", 3), (name_result::NOT_OWNER, None));
        assert_eq!(names.release("a.b", 1), (name_result::RELEASED, change(Some(1), Some(2))));
        assert_eq!(names.release("a.b", 2), (name_result::RELEASED, change(Some(2), None)));
        assert_eq!(names.release("a.b", 2), (name_result::NON_EXISTENT, None));
        assert!(names.counts.is_empty() && names.all().next().is_none());
    }

    #[test]
    fn an_owner_that_allows_replacement_is_replaced() {
        let mut names = PrivateNames::default();
        names.request("a.b", 1, ALLOW_REPLACEMENT);
        assert_eq!(
            names.request("a.b", 2, REPLACE_EXISTING | ALLOW_REPLACEMENT | DO_NOT_QUEUE),
            Some((name_result::PRIMARY_OWNER, change(Some(1), Some(2))))
        );
        assert_eq!(names.queue("a.b").expect("owned").collect::<Vec<_>>(), [2, 1]);
        assert_eq!(
            names.request("a.b", 1, REPLACE_EXISTING),
            Some((name_result::PRIMARY_OWNER, change(Some(2), Some(1))))
        );
        assert_eq!(names.queue("a.b").expect("owned").collect::<Vec<_>>(), [1]);
        // A client leaves the queue with DO_NOT_QUEUE.
        names.request("a.b", 3, 0);
        assert_eq!(names.request("a.b", 3, DO_NOT_QUEUE), Some((name_result::EXISTS, None)));
        assert_eq!(names.forget(1), [change(Some(1), None).expect("a change")]);
        assert!(names.counts.is_empty());
    }

    #[test]
    fn the_number_of_names_of_a_client_is_limited() {
        let mut names = PrivateNames::default();
        for number in 0..MAX_NAMES {
            assert!(names.request(&format!("a.n{number}"), 1, 0).is_some());
        }
        assert!(names.request("a.b", 1, 0).is_none() && names.request("a.n0", 1, 0).is_some());
        assert!(names.request("a.b", 2, 0).is_some());
        assert_eq!(names.forget(1).len(), MAX_NAMES);
        assert_eq!(names.owner("a.b"), Some(2));
    }
}
