//! Code that is compiled twice: into the lab, for the tests, and into `lab-agent`, the program that tests run.
//!
//! The agent is a binary of the package vpn-exec, because cargo builds a package's binaries with each of its tests. A
//! binary cannot use a dev-dependency such as the lab, so it includes this folder by its path. Modules here therefore
//! use the standard library, vpn-exec and vpn-exec's own dependencies only, and refer to each other by `super`.

pub mod addresses;
pub mod http_client;
pub mod key_search;
pub mod patience;
pub mod protocol;
pub mod sending;
pub mod stamp;
pub mod surroundings;
pub mod variables;
