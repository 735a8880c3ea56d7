//! Thin, safe wrappers over what the kernel offers: namespaces, links and routes, mounts, capabilities, processes. Knows
//! nothing of VPNs, and decides nothing.

pub mod apart;
pub mod capabilities;
pub mod clock;
pub mod connections;
pub mod dynamic_user;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod iptables;
pub mod link;
pub mod listeners;
pub mod local_socket;
pub mod memory_file;
pub mod mirror;
pub mod monitor;
pub mod mounts;
pub mod namespace;
pub mod netlink;
pub mod nftables;
pub mod poll;
pub mod process;
pub mod route;
pub mod seccomp;
pub mod service_manager;
pub mod signals;
pub mod standard_error;
pub mod sysctl;
pub mod terminal;
pub mod timer;
pub mod tun;
pub mod unix_sockets;
