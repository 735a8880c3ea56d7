//! A program inside does not hand its work to a process outside the tunnel: a multiplexer's server, an open browser, a daemon.
//!
//! Each test has the real program serve on the host first, and then a client of it inside. What the server is asked for is a connection
//! to a port of the host's loopback, which nothing inside reaches: who comes there comes from outside. Each has a guilty twin, in which the
//! protection is taken away, and the client gets out.
//!
//! - `support`: the desk at which a user of the host sits, and the judge.
//! - `sockets`: what the rule is, with stand-ins.
//! - `browsers`, `desktop`: programs of a desktop, on the session bus and on a display in memory.
//! - `programs`: multiplexers, editors, ssh, GnuPG, and other programs that run without a display.

mod browsers;
mod desktop;
mod programs;
mod sockets;
mod support;
