//! Thin, safe wrappers over what the kernel offers: namespaces, links and routes, mounts, capabilities, processes. Knows
//! nothing of VPNs, and decides nothing.

pub mod capabilities;
pub mod link;
pub mod mounts;
pub mod namespace;
pub mod netlink;
pub mod poll;
pub mod process;
pub mod route;
pub mod signals;
pub mod sysctl;
pub mod tun;
