//! Thin, safe wrappers over the kernel's interfaces: namespaces, netlink, mounts, capabilities, processes, system call
//! filters. They know nothing of VPNs and decide nothing.

pub mod background_close;
mod bpf;
pub mod capabilities;
pub mod children;
pub mod clock;
pub mod code_pages;
pub mod datagrams;
pub mod dynamic_user;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod in_place;
pub mod internet_sockets;
pub mod iptables;
pub mod listening_sockets;
pub mod local_socket;
pub mod memory_file;
pub mod mirror;
pub mod mounts;
pub mod namespace;
pub mod netlink;
pub mod nftables;
pub mod poll;
pub mod process;
pub mod seccomp;
pub mod service_manager;
pub mod signals;
pub mod stderr;
pub mod sysctl;
pub mod terminal;
pub mod tun;
pub mod unix_sockets;
pub mod user_namespace;

use std::error::Error;
use std::io;

/// Returns the system's error number of an error (errno(3)), also where the error wraps the one that has it, as
/// [`netlink::NetlinkError`] does.
pub fn errno_of(error: &io::Error) -> Option<i32> {
    let wrapped = std::iter::successors(error.source(), |error| (*error).source());
    let numbers = wrapped.filter_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error());
    error.raw_os_error().into_iter().chain(numbers).next()
}
