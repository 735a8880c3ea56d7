//! A program inside cannot use a process outside of the tunnel: the server of a multiplexer, a running browser, a
//! daemon.
//!
//! Each test starts the real program on the host, and then a client of it inside. The client requests a connection to a
//! port of the host's loopback interface, which no program inside reaches, so a connection there comes from outside.
//! Each test has a twin without the protection, in which the request succeeds.
//!
//! - `support`: the environment of a user of the host, and the judge.
//! - `sockets`: the rule itself, with simple servers.
//! - `browsers`, `desktop`: desktop programs, on the session bus and on a virtual display.
//! - `programs`: multiplexers, editors, ssh, GnuPG, and other programs that run without a display.

mod browsers;
mod desktop;
mod programs;
mod sockets;
mod support;
