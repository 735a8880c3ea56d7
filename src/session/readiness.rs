//! Waiting until a tunnel is made and, if asked for, connected.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::{Origin, Session};
use crate::failure::{Doing, Failure};
use crate::lease::{KeeperEvent, Lease, status};
use crate::linux::poll::wait_for;
use crate::names::TunnelName;

/// The phrase for a broken connection to the keeper, as it follows "cannot".
const HEAR: &str = "read from the connection to the keeper";

/// The time without a handshake after which the user gets a notice, as long as the first handshake is waited for.
const NOTICE_DELAY: Duration = Duration::from_secs(2);

/// How far the wait for a tunnel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The namespace has its name, so that processes can enter it.
    Named,
    /// The tunnel is made. A handshake may still have to be waited for.
    Made,
    /// Nothing is left to wait for.
    Ready,
    /// The first handshake takes long enough for a notice.
    Slow,
    /// No peer has completed a handshake in time.
    TimedOut,
    /// The keeper was killed.
    KeeperKilled,
    /// Another of the watched descriptors is readable, or the event concerns another matter.
    Other,
}

/// The wait for a tunnel.
#[derive(Debug)]
pub(crate) struct Readiness {
    is_made: bool,
    /// How long the first handshake may take once the tunnel is made. None if it is not waited for.
    wait: Option<Duration>,
    deadline: Option<Instant>,
    /// When the notice about a missing handshake is due, if it still is.
    notice_due: Option<Instant>,
}

impl Readiness {
    /// Begins to wait. Without `wait`, a tunnel is ready as soon as it is made.
    pub(crate) fn new(is_made: bool, wait: Option<Duration>) -> Self {
        let mut readiness = Self { is_made: false, wait, deadline: None, notice_due: None };
        if is_made {
            readiness.made();
        }
        readiness
    }

    fn made(&mut self) {
        self.is_made = true;
        self.deadline = self.wait.map(|wait| Instant::now() + wait);
        self.notice_due = self.wait.map(|_| Instant::now() + NOTICE_DELAY);
    }

    /// Returns whether the tunnel is made.
    pub(crate) fn is_made(&self) -> bool {
        self.is_made
    }

    /// Waits for the keeper's next event, or until one of the `others` is readable.
    ///
    /// # Errors
    /// The keeper's own failure to make the tunnel; system errors.
    pub(crate) fn advance(&mut self, lease: &mut Lease, others: &[BorrowedFd<'_>]) -> Result<Progress, Failure> {
        // The news may have come while another request was answered, so the lease knows.
        if self.is_made && (lease.is_connected() || self.wait.is_none()) {
            return Ok(Progress::Ready);
        }
        let due = self.notice_due.into_iter().chain(self.deadline).min();
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let watched: Vec<BorrowedFd<'_>> = [lease.as_fd()].into_iter().chain(others.iter().copied()).collect();
        let readable = wait_for(&watched, left).doing(HEAR)?;
        if !readable[0] {
            let now = Instant::now();
            return Ok(if readable.contains(&true) {
                Progress::Other
            } else if self.deadline.is_some_and(|due| now >= due) {
                Progress::TimedOut
            } else if self.notice_due.take_if(|due| now >= *due).is_some() {
                Progress::Slow
            } else {
                Progress::Other
            });
        }
        Ok(match lease.next_event().doing(HEAR)? {
            Some(KeeperEvent::Named) => Progress::Named,
            Some(KeeperEvent::Made) => {
                self.made();
                Progress::Made
            }
            Some(KeeperEvent::Connected) => Progress::Ready,
            Some(KeeperEvent::Failed(failure)) => return Err(failure),
            Some(KeeperEvent::Gone) | None => Progress::KeeperKilled,
            Some(_) => Progress::Other,
        })
    }
}

impl Session {
    /// Begins to wait for the tunnel, and for its first handshake if `wait` is given.
    pub(crate) fn readiness(&self, wait: Option<Duration>) -> Readiness {
        Readiness::new(self.origin == Origin::Joined, wait)
    }

    /// Takes the next step of the wait, as [`Readiness::advance`]. A tunnel that was adopted is brought up to date once
    /// it is made.
    ///
    /// # Errors
    /// As [`Readiness::advance`]; also if the keeper was killed, or if there was no handshake in time.
    pub(crate) fn advance(
        &mut self,
        readiness: &mut Readiness,
        others: &[BorrowedFd<'_>],
    ) -> Result<Progress, Failure> {
        let progress = readiness.advance(&mut self.lease, others)?;
        let (name, wait) = (&self.plan.name, readiness.wait.unwrap_or_default());
        match progress {
            Progress::Made => self.bring_up_to_date()?,
            Progress::Slow => {
                tracing::warn!("no handshake with any peer yet: waiting for it up to {} s", wait.as_secs())
            }
            Progress::TimedOut => return Err(no_handshake(name, wait)),
            Progress::KeeperKilled => return Err(Failure::new("the tunnel's keeper was killed")),
            Progress::Ready if readiness.wait.is_some() && readiness.notice_due.is_none() => {
                tracing::warn!("a handshake was completed: the tunnel {name} is up now");
            }
            Progress::Named | Progress::Ready | Progress::Other => {}
        }
        Ok(progress)
    }

    /// Waits until the tunnel is made and, with `wait`, until its first handshake.
    ///
    /// # Errors
    /// As [`Session::advance`].
    pub(crate) fn wait_until_ready(&mut self, wait: Option<Duration>) -> Result<(), Failure> {
        let mut readiness = self.readiness(wait);
        while self.advance(&mut readiness, &[])? != Progress::Ready {}
        Ok(())
    }
}

/// Returns the failure of a tunnel without a handshake, with the reason that its keeper knows.
fn no_handshake(name: &TunnelName, waited: Duration) -> Failure {
    let what = format!("no handshake with any peer within {} s", waited.as_secs());
    let living = status::of(name).ok().flatten().and_then(|status| status.living);
    let unresolved = living.as_ref().and_then(|living| {
        let peer = living.peers.iter().find(|peer| peer.endpoint.is_none() && peer.configured_endpoint.is_some())?;
        peer.configured_endpoint.as_ref().map(|endpoint| format!("the endpoint {endpoint} is not resolved yet"))
    });
    match living.and_then(|living| living.problem).or(unresolved) {
        Some(problem) => Failure::new(format!("{what}: {problem}"))
            .advise("check the endpoint's name in the file, and that this machine can resolve names"),
        None => Failure::new(what).advise(
            "check that the endpoint can be reached from here, and that the provider knows this key; -v shows each attempt",
        ),
    }
}
