//! Tests of the planner: the decisions for usual and unusual tunnels, what is refused, and that derived names and
//! addresses never collide.

mod decisions;
mod local_networks;
mod properties;
mod refusals;
mod shared_namespace;
mod snapshots;
mod split_dns;
mod veth_addresses;
mod world;
