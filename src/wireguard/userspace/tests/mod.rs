//! Tests of the device: cores that are connected by a simulated network, with a simulated clock.

mod fuzz;
mod network;
mod protocol;
mod real_io;
mod reconfigure;
mod timers;
