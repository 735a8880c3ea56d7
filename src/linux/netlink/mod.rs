//! Route netlink (rtnetlink(7)): interfaces, addresses, routes and policy rules, read and changed by batches of
//! requests.
//!
//! The sockets are synchronous: a set-up is a short list of requests in a fixed order, and one system call sends the
//! whole list. A socket stays in the network namespace in which it was opened, so one thread can hold a socket for each
//! namespace that it configures.

pub mod address;
pub(super) mod channel;
pub mod link;
pub mod link_filter;
pub mod monitor;
pub mod route;
pub mod rule;

use std::fmt;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

use channel::Channel;

/// The maximum number of requests in one datagram. The socket's receive buffer must hold all their acknowledgements.
const BATCH: usize = 64;

/// A route netlink socket in the network namespace in which it was opened.
pub struct Netlink {
    channel: Channel,
}

/// A request for one change.
#[derive(Debug)]
pub struct NetlinkRequest {
    /// What the request does, as it follows "cannot": "add the address 10.0.0.1/32 to wg0".
    what: String,
    message: RouteNetlinkMessage,
    flags: u16,
    /// The error numbers that count as success, such as `EEXIST` if the object may exist already.
    tolerated: &'static [i32],
}

impl NetlinkRequest {
    /// Creates a request that makes a new object.
    fn create(what: String, message: RouteNetlinkMessage) -> Self {
        Self { what, message, flags: NLM_F_CREATE | NLM_F_EXCL, tolerated: &[] }
    }

    /// Creates a request that changes an object.
    fn change(what: String, message: RouteNetlinkMessage) -> Self {
        Self { what, message, flags: 0, tolerated: &[] }
    }

    /// Creates a request that removes an object. `missing` are the error numbers for one that does not exist, which
    /// count as success.
    fn remove(what: String, message: RouteNetlinkMessage, missing: &'static [i32]) -> Self {
        Self { what, message, flags: 0, tolerated: missing }
    }

    /// Makes the request succeed if the object exists already.
    #[must_use]
    pub fn or_exists(self) -> Self {
        Self { tolerated: &[libc::EEXIST], ..self }
    }
}

/// A change that the kernel refused.
#[derive(Debug)]
pub struct NetlinkError {
    what: String,
    error: io::Error,
    explanation: Option<String>,
}

impl NetlinkError {
    /// Returns the system's error number (errno(3)).
    pub fn raw_os_error(&self) -> Option<i32> {
        self.error.raw_os_error()
    }
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.error)?;
        match &self.explanation {
            Some(explanation) => write!(f, " (the kernel says: {explanation})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for NetlinkError {
    /// The system's error, in which [`super::errno_of`] finds the error number.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<NetlinkError> for io::Error {
    /// Keeps the message. The error number is found by [`super::errno_of`].
    fn from(error: NetlinkError) -> io::Error {
        io::Error::new(error.error.kind(), error)
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails as socket(2) and bind(2) do.
    pub fn open() -> io::Result<Self> {
        Ok(Self { channel: Channel::open(NETLINK_ROUTE)? })
    }

    /// Makes changes in order, in as few system calls as possible.
    ///
    /// # Errors
    /// Fails with the first refused change. The kernel has tried the changes after it as well; the caller has to undo
    /// them.
    pub fn execute(&mut self, requests: Vec<NetlinkRequest>) -> Result<(), NetlinkError> {
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            self.execute_batch(requests.by_ref().take(BATCH).collect())?;
        }
        Ok(())
    }

    fn execute_batch(&mut self, requests: Vec<NetlinkRequest>) -> Result<(), NetlinkError> {
        let first = self.channel.next_sequence();
        let mut names = Vec::with_capacity(requests.len());
        let mut batch = Vec::new();
        for request in requests {
            let NetlinkRequest { what, message, flags, tolerated } = request;
            self.channel.append(&mut batch, message, flags | NLM_F_REQUEST | NLM_F_ACK);
            names.push((what, tolerated));
        }
        let acks = match self.channel.send(&batch).and_then(|()| self.channel.collect_acks(first, names.len())) {
            Ok(acks) => acks,
            Err(error) => {
                let what = names.into_iter().next().map_or_else(String::new, |(what, _)| what);
                return Err(NetlinkError { what, error, explanation: None });
            }
        };
        for ((what, tolerated), ack) in names.into_iter().zip(acks) {
            match ack {
                Some((error, explanation)) if !error.raw_os_error().is_some_and(|it| tolerated.contains(&it)) => {
                    return Err(NetlinkError { what, error, explanation });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes one change.
    ///
    /// # Errors
    /// Fails if the kernel refuses the change.
    pub fn execute_one(&mut self, request: NetlinkRequest) -> Result<(), NetlinkError> {
        self.execute(vec![request])
    }

    /// Sends a question that has one answer.
    fn query(&mut self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let mut answers = self.channel.ask(message, NLM_F_REQUEST | NLM_F_ACK)?;
        answers.pop().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    /// Sends a question that has a list of answers, and returns those that the library can parse.
    fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.channel.ask(message, NLM_F_REQUEST | NLM_F_DUMP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::capabilities::{self, CapabilitySet};
    use crate::linux::errno_of;

    #[test]
    fn a_refused_change_keeps_its_error_number_and_its_message() {
        // The thread gives up all capabilities, so the kernel answers EPERM to root as well.
        let refused = std::thread::spawn(|| {
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty()).expect("fewer capabilities");
            let mut netlink = Netlink::open().expect("a socket");
            netlink.execute_one(NetlinkRequest::set_mtu(1, "lo", 1500)).expect_err("refused")
        });
        let refused = refused.join().expect("a thread");
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        let error = io::Error::from(refused);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(errno_of(&error), Some(libc::EPERM));
        assert!(error.to_string().starts_with("cannot set the MTU of lo to 1500: "), "{error}");
    }
}
