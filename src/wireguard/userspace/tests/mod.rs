//! Tests of the device against itself: cores joined by a simulated network, with a clock of their own.

mod fuzz;
mod levels;
mod network;
mod protocol;
mod real_io;
mod real_tun;
mod reconfigure;
mod rekeys;
mod timers;
