//! The proof that nothing leaks: a matrix of [`vectors`], by which a program may try to send or to look up a name, and
//! of [`stages`] of a tunnel's life. The program of a cell repeats its attempts as long as the stage lasts. Each
//! attempt carries the names of its vector and its stage, so that a leak identifies itself.
//!
//! The [`judge`] sees all packets on all interfaces of the host and the logs of all its resolvers. It does not ask the
//! program. Each cell has a twin that proves that the judge sees leaks: the same program in the same stage without
//! vpn-exec's protections, or without vpn-exec.

mod attached;
mod first;
mod gateway;
mod judge;
mod protections;
mod resolvers;
mod stages;
mod standing;
mod vectors;
