//! The protocol between a keeper and its clients.
//!
//! They exchange messages over a local socket (unix(7), SOCK_SEQPACKET) at `/run/vpn-exec/NAME/socket`. A client that
//! joins holds a *lease*: the open connection. The kernel closes the connection however the client ends, so the keeper
//! always learns of the end. Users other than the keeper's own connect to `/run/vpn-exec/NAME/public`, and may only
//! query the status.
//!
//! - `messages`: what the two sides send.
//! - `client`: the client's side. The keeper's side is in [`crate::keeper`].
//! - [`status`]: the answer to a query of the status.
//! - [`handover`]: the configuration that every lease holder gets, to start a successor of a keeper that was killed.
//! - `unnamed`: what such a successor needs besides, if the tunnel is rootless.

mod client;
pub mod handover;
mod messages;
pub mod status;
mod unnamed;

pub use client::{ANSWER_TIMEOUT, Lease, hand_over, not_up, reload, take_down, take_down_if};
pub use messages::KeeperEvent;
pub(crate) use messages::{
    ClientRequest, MAX_MESSAGE, NO_VIEW_SERVER, Received, ViewKey, answer_file, receive_request, send,
};
pub use unnamed::UnnamedTunnel;
