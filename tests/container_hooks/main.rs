//! The tunnels of containers that an engine makes: `oci-hook`, `cdi` and `cni`. A process in a network namespace of its
//! own plays the container (`lab::Pod`); `tests/containers` runs real engines.
//!
//! - [`lifetime`]: when a tunnel begins and ends, and what is left after crashes.
//! - [`network`]: what the container reaches.
//! - [`names`]: which tunnels a container can have.
//! - [`pods`]: the network plugin.
//! - [`support`]: a container, and what the tests expect of it.

mod lifetime;
mod names;
mod network;
mod pods;
mod support;
