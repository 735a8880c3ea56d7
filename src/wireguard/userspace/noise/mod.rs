//! WireGuard's protocol without its timers (WireGuard paper, section 5): messages, the handshake, cookies and sessions.
//!
//! [`snow`] makes the handshake, `ring` seals and opens the packets. What is here is the framing, and the state that
//! says whether a message is new. Nothing here does input or output, or reads a clock other than the time of day.
//!
//! - `message`: the layout of messages.
//! - `handshake`: both ends of a handshake. `resolver`: the primitives for it.
//! - `cookie`: the MACs of handshake messages, and what a device under load demands. `rate`: how many handshakes an
//!   address may begin then.
//! - `session`, `replay`: the keys of a session, its counters, and the window of what was received.

mod cookie;
mod handshake;
mod message;
mod rate;
mod replay;
mod resolver;
mod session;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;

pub(super) use cookie::{MacChecker, MacVerdict, MacWriter};
pub(super) use handshake::{Initiator, Responder, Timestamp};
pub(super) use message::{COOKIE_REPLY, DATA_HEADER, DATA_OVERHEAD, INITIATION, Message, RESPONSE};
pub(super) use session::{REKEY_AFTER_MESSAGES, Session, SessionKeys};
