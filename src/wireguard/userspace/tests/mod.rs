//! The device against itself, without input or output and with a clock of its own: cores joined by a pretend network.

mod fuzz;
mod network;
mod protocol;
mod real_io;
mod reconfigure;
mod timers;
