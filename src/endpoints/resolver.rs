//! Looks up the names of endpoints.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;

use rustix::event::EventfdFlags;

use super::LookUp;
use crate::config::Endpoint;
use crate::keys::PublicKey;

/// The answer to one lookup.
#[derive(Debug)]
pub(super) struct ResolverAnswer {
    /// The peer whose endpoint was looked up.
    pub(super) peer: PublicKey,
    /// All addresses, in the order that the host's resolver prefers (getaddrinfo(3), RFC 6724).
    pub(super) addresses: io::Result<Vec<SocketAddr>>,
}

/// Looks up endpoints on threads, since a resolver may take long and the caller must not wait for it.
pub(super) struct Resolver {
    look_up: LookUp,
    answers: mpsc::Receiver<ResolverAnswer>,
    sender: mpsc::Sender<ResolverAnswer>,
    ready: OwnedFd,
}

impl Resolver {
    pub(super) fn new(look_up: LookUp) -> io::Result<Self> {
        let (sender, answers) = mpsc::channel();
        let ready = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { look_up, answers, sender, ready })
    }

    /// Starts to look up a peer's endpoint.
    pub(super) fn resolve(&self, peer: PublicKey, endpoint: Endpoint) -> io::Result<()> {
        let (look_up, sender, ready) = (self.look_up.clone(), self.sender.clone(), self.ready.try_clone()?);
        std::thread::Builder::new().name("resolver".into()).spawn(move || {
            let addresses = look_up(&endpoint);
            // The receiver is gone when the tunnel is being taken down.
            if sender.send(ResolverAnswer { peer, addresses }).is_ok() {
                let _ = rustix::io::write(&ready, &1_u64.to_ne_bytes());
            }
        })?;
        Ok(())
    }

    /// Returns the next answer, if there is one.
    pub(super) fn next_answer(&self) -> Option<ResolverAnswer> {
        let _ = rustix::io::read(&self.ready, &mut [0_u8; 8]);
        self.answers.try_recv().ok()
    }
}

impl AsFd for Resolver {
    /// Returns a descriptor that is readable when there may be an answer.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// Looks up an endpoint with the C library's resolver, in the calling thread's network namespace.
///
/// # Errors
/// If the name does not resolve, or the address's zone is not the name of an interface.
pub fn look_up(endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
    match endpoint {
        Endpoint::Name { host, port } => Ok((host.as_str(), *port).to_socket_addrs()?.collect()),
        Endpoint::Address { address, zone: None } => Ok(vec![*address]),
        Endpoint::Address { address, zone: Some(zone) } => {
            let index = nix::net::if_::if_nametoindex(zone.as_str())?;
            let mut address = *address;
            if let SocketAddr::V6(address) = &mut address {
                address.set_scope_id(index);
            }
            Ok(vec![address])
        }
    }
}
