//! How many descriptors relays may have open. There are never enough for everybody who may come, and the process has other work, for
//! which some must be left: to be asked how it is, to find endpoints, to write its state down.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many are left to the rest of the process, where there are twice as many: a keeper lets 128 guests in, besides those who hold its
/// tunnel.
const RESERVE: usize = 256;

/// Which part of an allowance is reserved for its ports, in equal shares: a half. So the clients of one port never hold what another port
/// needs, and most of the allowance is there for the port that is used.
const RESERVED: usize = 2;

/// How many descriptors a connection of TCP takes. A reserved share is a multiple of it.
pub(super) const CONNECTION: usize = 2;

/// A number of descriptors that all relays of a process share.
#[derive(Clone, Debug)]
pub struct Allowance(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    books: Mutex<Books>,
    /// The limit of the process as it was.
    former: Option<Rlimit>,
}

/// Who has taken how many.
#[derive(Debug, Default)]
struct Books {
    used: usize,
    /// How many each port has, by its number.
    ports: HashMap<u64, usize>,
    next: u64,
    /// How many are reserved for each port, and how many of those are not taken; none where that has to be computed anew, which is put off
    /// since ports come and go by the thousand.
    shares: Option<Shares>,
}

#[derive(Clone, Copy, Debug)]
struct Shares {
    reserve: usize,
    unused: usize,
}

impl Books {
    /// The shares of the ports that there are now.
    fn shares(&mut self, most: usize) -> Shares {
        let ports = &self.ports;
        *self.shares.get_or_insert_with(|| {
            let reserve = most / RESERVED / ports.len().max(1);
            let reserve = reserve - reserve % CONNECTION;
            Shares { reserve, unused: ports.values().map(|held| reserve.saturating_sub(*held)).sum() }
        })
    }

    /// Enters that a port has so many more, or fewer.
    fn enter(&mut self, port: Option<u64>, change: impl Fn(usize) -> usize) {
        self.used = change(self.used);
        let Some(held) = port.and_then(|port| self.ports.get_mut(&port)) else { return };
        let former = std::mem::replace(held, change(*held));
        if let Some(Shares { reserve, unused }) = &mut self.shares {
            *unused = *unused + reserve.saturating_sub(*held) - reserve.saturating_sub(former);
        }
    }
}

impl Allowance {
    /// As many as the process may have open, less a reserve for its other work. For that its soft limit (RLIMIT_NOFILE of getrlimit(2))
    /// is raised to the hard one until the last copy of this value is dropped. It is low for programs that use select(2), which is none
    /// of ours; what is executed later, as hooks are, shall have it as it was.
    pub fn of_process() -> io::Result<Self> {
        let former = getrlimit(Resource::Nofile);
        if former.current != former.maximum {
            setrlimit(Resource::Nofile, Rlimit { current: former.maximum, ..former })?;
        }
        let limit = former.maximum.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
        Ok(Self::with(limit - RESERVE.min(limit / 2), Some(former)))
    }

    /// So many.
    pub fn of(most: usize) -> Self {
        Self::with(most, None)
    }

    fn with(most: usize, former: Option<Rlimit>) -> Self {
        Self(Arc::new(Inner { most, books: Mutex::default(), former }))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some of them, until what this returns is dropped; none if so many are not left.
    pub(super) fn take(&self, number: usize) -> Option<Share> {
        self.take_for(None, number)
    }

    /// A port, which has a reserved share until it is dropped.
    pub(super) fn port(&self) -> Port {
        let mut books = self.books();
        let number = books.next;
        books.next += 1;
        books.ports.insert(number, 0);
        books.shares = None;
        Port { of: self.clone(), number }
    }

    fn take_for(&self, port: Option<u64>, number: usize) -> Option<Share> {
        let mut books = self.books();
        let Shares { reserve, unused } = books.shares(self.0.most);
        // What is reserved for others is out of reach.
        let held = port.and_then(|port| books.ports.get(&port));
        let reserved = unused - held.map_or(0, |held| reserve.saturating_sub(*held));
        let left = self.0.most.checked_sub(books.used)?.checked_sub(reserved)?;
        if number > left {
            return None;
        }
        books.enter(port, |held| held + number);
        drop(books);
        Some(Share { of: self.clone(), port, number })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(former) = self.former.take() {
            // What is open above the limit stays open.
            let _ = setrlimit(Resource::Nofile, former);
        }
    }
}

/// A port with a reserved share of an allowance.
#[derive(Debug)]
pub(super) struct Port {
    of: Allowance,
    number: u64,
}

impl Port {
    /// Some descriptors for what has come by this port: of its own share, and of what is not reserved.
    pub(super) fn take(&self, number: usize) -> Option<Share> {
        self.of.take_for(Some(self.number), number)
    }

    /// Whether it has more than its own share.
    pub(super) fn is_over(&self) -> bool {
        let mut books = self.of.books();
        let reserve = books.shares(self.of.0.most).reserve;
        books.ports.get(&self.number).is_some_and(|held| *held > reserve)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut books = self.of.books();
        books.ports.remove(&self.number);
        books.shares = None;
    }
}

/// Descriptors that are taken.
#[derive(Debug)]
pub(super) struct Share {
    of: Allowance,
    port: Option<u64>,
    number: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.books().enter(self.port, |held| held.saturating_sub(self.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_given_than_there_are_and_what_is_given_back_is_there_again() {
        let allowance = Allowance::of(5);
        let shares = [allowance.take(2).expect("5 are left"), allowance.take(2).expect("3 are left")];
        assert!(allowance.clone().take(2).is_none() && allowance.take(usize::MAX).is_none());
        let last = allowance.take(1).expect("1 is left");
        assert!(allowance.take(1).is_none());
        drop(shares);
        assert!(allowance.take(4).is_some());
        drop(last);
        assert!(allowance.take(5).is_some());
    }

    #[test]
    fn each_port_has_a_share_that_no_other_takes() {
        let allowance = Allowance::of(40);
        let (one, other) = (allowance.port(), allowance.port());
        let take_all = |port: &Port| std::iter::from_fn(|| port.take(2)).collect::<Vec<_>>();
        let of_one = take_all(&one);
        assert_eq!(of_one.len(), 15, "all but the other's share, which is a quarter");
        assert!(one.is_over() && allowance.take(1).is_none());
        let of_other = take_all(&other);
        assert_eq!(of_other.len(), 5);
        assert!(!other.is_over(), "it has its share, and no more");
        drop(of_one);
        let of_other = (of_other, take_all(&other));
        assert_eq!(of_other.1.len(), 10);
        // With the other, its share is everybody's.
        drop(one);
        assert_eq!(take_all(&other).len(), 5);
        drop(of_other);
        // What outlives its port counts nevertheless.
        let share = other.take(30).expect("all of it");
        drop(other);
        assert!(allowance.take(11).is_none());
        drop(share);
        assert!(allowance.take(40).is_some());
    }

    /// A range may have as many ports as there are numbers.
    #[test]
    fn where_there_are_more_ports_than_descriptors_none_are_reserved() {
        let allowance = Allowance::of(100);
        let ports: Vec<Port> = (0..1000).map(|_| allowance.port()).collect();
        let taken: Vec<Share> = std::iter::from_fn(|| ports[7].take(2)).collect();
        assert_eq!(taken.len(), 50);
        assert!(ports[8].take(2).is_none());
    }
}
