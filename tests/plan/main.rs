//! The planner's promises: what is decided for the usual tunnels, what is refused, and that nothing derived ever collides.

mod decisions;
mod local_networks;
mod properties;
mod refusals;
mod snapshots;
mod veth_addresses;
mod world;
