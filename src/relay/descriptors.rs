//! How many descriptors relays may have open. There are never enough for everybody who may come, and the process has other work, for
//! which some must be left: to be asked how it is, to find endpoints, to write its state down.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many are left to the rest of the process, where there are twice as many: a keeper lets 128 guests in, besides those who hold its
/// tunnel.
const RESERVE: usize = 256;

/// A number of descriptors that all relays of a process share.
#[derive(Clone, Debug)]
pub struct Allowance(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    used: AtomicUsize,
    /// The limit of the process as it was.
    former: Option<Rlimit>,
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
        Self(Arc::new(Inner { most, used: AtomicUsize::new(0), former }))
    }

    /// Some of them, until what this returns is dropped; none if so many are not left.
    pub(super) fn take(&self, number: usize) -> Option<Share> {
        let enough = |used: usize| used.checked_add(number).filter(|used| *used <= self.0.most);
        let taken = self.0.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough);
        taken.is_ok().then(|| Share { of: self.clone(), number })
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

/// Descriptors that are taken.
#[derive(Debug)]
pub(super) struct Share {
    of: Allowance,
    number: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.0.used.fetch_sub(self.number, Ordering::Relaxed);
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
}
