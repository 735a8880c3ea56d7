//! Tests of the device against itself: cores joined by a simulated network, with a clock of their own.

mod fuzz;
mod network;
mod protocol;
mod real_io;
mod reconfigure;
mod timers;
