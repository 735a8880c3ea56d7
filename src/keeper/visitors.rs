//! The connections to a keeper at its own socket: clients that hold a lease, and clients that have a request. They are
//! of the keeper's own user, or of a root that could do as it likes anyway, so what they pass is received. Other users
//! are served apart ([`super::strangers`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::lease::{self, Event, Request};
use crate::linux::local_socket::PeerCredentials;
use crate::registry::Holder;

/// How many connections of another user may be open: root's, at the keeper of an ordinary user.
const GUESTS: usize = 128;

/// How long one may stay who asks for nothing.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tells a connection from all others of this keeper.
pub(super) type Number = u64;

/// One connection.
#[derive(Debug)]
pub(super) struct Visitor {
    socket: OwnedFd,
    /// Whether it is the keeper's own user, who may ask for anything.
    pub(super) trusted: bool,
    pub(super) pid: i32,
    pub(super) role: Role,
    /// How many connections to processes outside the tunnel were refused to its programs.
    refused: u64,
}

/// What a connection is for.
#[derive(Debug)]
pub(super) enum Role {
    /// Not known yet; it came at this time since boot.
    Guest(Duration),
    /// A lease. The holder is unknown if it lives in another PID namespace.
    Lease(Option<Holder>),
    /// To be told of the tunnel's end, and no more.
    Parting,
}

/// What a visitor has said.
pub(super) enum Said {
    /// It asks for something, and may pass a descriptor.
    Request(Request, Option<OwnedFd>),
    /// What it says cannot be understood.
    Nonsense(String),
    /// It has ended, or says no more.
    End,
    /// Nothing, after all.
    Nothing,
}

/// All connections.
#[derive(Debug)]
pub(super) struct Visitors {
    all: BTreeMap<Number, Visitor>,
    next: Number,
    /// Who has started the keeper, and shares its standard error.
    starter: Option<Number>,
    /// How many connections to processes outside the tunnel were refused to programs.
    refused: u64,
}

impl Visitors {
    pub(super) fn new() -> Self {
        Self { all: BTreeMap::new(), next: 0, starter: None, refused: 0 }
    }

    /// Takes the connection of who has started the keeper, which is a lease.
    pub(super) fn admit_starter(&mut self, socket: OwnedFd, holder: Holder) {
        let pid = holder.process.pid;
        self.starter = Some(self.next);
        self.add(Visitor { socket, trusted: true, pid, role: Role::Lease(Some(holder)), refused: 0 });
    }

    /// Takes a connection. One too many is closed instead.
    pub(super) fn admit(&mut self, socket: OwnedFd, who: &PeerCredentials, now: Duration) {
        let trusted = nix::unistd::geteuid().as_raw() == who.uid;
        let guests = self.all.values().filter(|visitor| !visitor.trusted).count();
        if trusted || guests < GUESTS {
            self.add(Visitor { socket, trusted, pid: who.pid, role: Role::Guest(now), refused: 0 });
        }
    }

    fn add(&mut self, visitor: Visitor) {
        self.all.insert(self.next, visitor);
        self.next += 1;
    }

    /// What to wait for.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (Number, BorrowedFd<'_>)> {
        let listens = |visitor: &Visitor| !matches!(visitor.role, Role::Parting);
        self.all.iter().filter(move |(_, visitor)| listens(visitor)).map(|(n, visitor)| (*n, visitor.socket.as_fd()))
    }

    /// What a visitor says.
    pub(super) fn hear(&self, number: Number) -> Said {
        let Some(visitor) = self.all.get(&number) else { return Said::Nothing };
        match lease::receive(&visitor.socket) {
            Ok(Some((request, passed))) => Said::Request(request, passed),
            Ok(None) => Said::End,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Said::Nothing,
            Err(error) => Said::Nonsense(error.to_string()),
        }
    }

    pub(super) fn get(&mut self, number: Number) -> Option<&mut Visitor> {
        self.all.get_mut(&number)
    }

    /// Whether a visitor is the one that has started the keeper.
    pub(super) fn is_starter(&self, number: Number) -> bool {
        self.starter == Some(number)
    }

    /// Ends a connection.
    pub(super) fn dismiss(&mut self, number: Number) {
        self.all.remove(&number);
    }

    /// Tells one visitor something. One that does not listen is not waited for.
    pub(super) fn tell(&self, number: Number, event: &Event, passed: Option<BorrowedFd<'_>>) {
        let _ = self.reach(number, event, passed);
    }

    /// The same, and says whether it was there to hear it.
    pub(super) fn reach(&self, number: Number, event: &Event, passed: Option<BorrowedFd<'_>>) -> bool {
        let Some(visitor) = self.all.get(&number) else { return false };
        let told = lease::send(&visitor.socket, event, passed);
        if let Err(error) = &told {
            tracing::debug!(%error, "a visitor does not hear");
        }
        told.is_ok()
    }

    /// Tells all who hold a lease, or wait for the tunnel's end.
    pub(super) fn tell_all(&self, event: &Event) {
        self.tell_all_with(event, None);
    }

    /// The same, and passes a descriptor to each.
    pub(super) fn tell_all_with(&self, event: &Event, passed: Option<BorrowedFd<'_>>) {
        for (number, visitor) in &self.all {
            if !matches!(visitor.role, Role::Guest(_)) {
                self.tell(*number, event, passed);
            }
        }
    }

    /// Who holds a lease, as far as they are known.
    pub(super) fn holders(&self) -> Vec<Holder> {
        self.all
            .values()
            .filter_map(|visitor| match &visitor.role {
                Role::Lease(holder) => holder.clone(),
                _ => None,
            })
            .collect()
    }

    /// Takes note of how many connections were refused to the programs of a lease until now.
    pub(super) fn note_refused(&mut self, number: Number, count: u64) {
        if let Some(visitor) = self.all.get_mut(&number) {
            let before = std::mem::replace(&mut visitor.refused, count);
            self.refused = self.refused.saturating_add(count.saturating_sub(before));
        }
    }

    /// How many connections to processes outside the tunnel were refused to programs.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// How many leases there are.
    pub(super) fn leases(&self) -> usize {
        self.all.values().filter(|visitor| matches!(visitor.role, Role::Lease(_))).count()
    }

    /// When the next of those is to be dismissed who ask for nothing.
    pub(super) fn due(&self) -> Option<Duration> {
        let guests = self.all.values().filter_map(|visitor| match visitor.role {
            Role::Guest(since) => Some(since + PATIENCE),
            _ => None,
        });
        guests.min()
    }

    /// Dismisses those who have asked for nothing for too long.
    pub(super) fn dismiss_idle(&mut self, now: Duration) {
        self.all.retain(|_, visitor| !matches!(visitor.role, Role::Guest(since) if since + PATIENCE <= now));
    }
}
