//! Forwarding by the host for local networks: switched on for single interfaces, never for the whole host, and restored
//! later.
//!
//! Several tunnels may need the same interface, and a keeper may be killed while others go on. So a file that all
//! tunnels share records which interfaces were switched on and which tunnels need them. It is written first, so that
//! the next tunnel can undo what a killed one did. The tunnels' own links are not recorded: they forward from their
//! creation, and end with their tunnels.

use std::io;

use serde::{Deserialize, Serialize};

use crate::linux::namespace::{NamespaceId, NetworkNamespace};
use crate::linux::sysctl;
use crate::names::{InterfaceName, TunnelName};
use crate::plan::{ForwardingInterface, Ipv6Forwarding, LocalNetworksPlan};
use crate::registry;
use crate::ruleset::Family;

/// The record of the interfaces that forward for tunnels.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct ForwardingRecord(Vec<RecordedInterface>);

/// An interface that forwards for tunnels.
#[derive(Debug, Serialize, Deserialize)]
struct RecordedInterface {
    interface: InterfaceName,
    /// The network namespace of the interface: keepers in several namespaces may share a `/run` (ip-netns(8)).
    namespace: NamespaceId,
    /// The interface's index. It identifies the interface if its name changes or another interface gets the name.
    index: u32,
    /// Whether IPv4 forwarding was switched on here.
    ipv4: bool,
    /// Whether IPv6 forwarding was switched on here.
    ipv6: bool,
    /// The tunnels that need the interface.
    tunnels: Vec<TunnelName>,
}

/// Returns how far this host can forward IPv6.
pub(super) fn of_ipv6() -> io::Result<Ipv6Forwarding> {
    if sysctl::get_if_present("net/ipv6/conf/all/forwarding")?.is_some_and(|value| value != "0") {
        return Ok(Ipv6Forwarding::All);
    }
    let each = sysctl::get_if_present("net/ipv6/conf/default/force_forwarding")?;
    Ok(if each.is_some() { Ipv6Forwarding::Each } else { Ipv6Forwarding::Never })
}

/// Records that a tunnel needs the interfaces of these networks to forward, and no others any more. Returns the
/// interfaces that forward for tunnels only, or will after [`switch_on`].
pub(super) fn reserve(name: &TunnelName, local: &LocalNetworksPlan) -> io::Result<Vec<ForwardingInterface>> {
    let (ipv4, ipv6) = families(local);
    let here = here()?;
    change(|record| {
        record.forget(name, |interface| !local.interfaces.contains(interface))?;
        for interface in &local.interfaces {
            // An interface that has gone forwards nothing.
            let Ok(index) = nix::net::if_::if_nametoindex(interface.as_str()) else { continue };
            let position = record.0.iter().position(|entry| entry.interface == *interface && entry.exists());
            let entry = match position {
                Some(position) => &mut record.0[position],
                None => {
                    let (interface, tunnels) = (interface.clone(), Vec::new());
                    let new =
                        RecordedInterface { interface, namespace: here, index, ipv4: false, ipv6: false, tunnels };
                    record.0.push(new);
                    record.0.last_mut().ok_or(io::ErrorKind::NotFound)?
                }
            };
            entry.ipv4 |= ipv4 && is_off(&ipv4_parameter(interface))?;
            entry.ipv6 |= ipv6 && of_ipv6()? == Ipv6Forwarding::Each && is_off(&ipv6_parameter(interface))?;
            if !entry.tunnels.contains(name) {
                entry.tunnels.push(name.clone());
            }
        }
        let router = is_router()?;
        let for_tunnels = |entry: &RecordedInterface| {
            let interface = entry.interface.clone();
            [(entry.ipv4 && !router.ipv4, Family::Ipv4), (entry.ipv6 && !router.ipv6, Family::Ipv6)]
                .into_iter()
                .filter(|(only_for_tunnels, _)| *only_for_tunnels)
                .map(move |(_, family)| ForwardingInterface { interface: interface.clone(), family })
        };
        Ok(record.0.iter().filter(|entry| entry.exists()).flat_map(for_tunnels).collect())
    })
}

/// Switches forwarding on for all recorded interfaces.
pub(super) fn switch_on() -> io::Result<()> {
    change(|record| {
        for entry in record.0.iter().filter(|entry| entry.exists()) {
            entry.set("1")?;
        }
        Ok(())
    })
}

/// Records that a tunnel needs no interface any more, and switches off those that no tunnel needs.
pub(super) fn release(name: &TunnelName) -> io::Result<()> {
    change(|record| record.forget(name, |_| true))
}

/// Switches forwarding on for a tunnel's own link.
pub(super) fn switch_on_link(link: &InterfaceName, local: &LocalNetworksPlan) -> io::Result<()> {
    let (ipv4, ipv6) = families(local);
    for (needed, parameter) in [(ipv4, ipv4_parameter(link)), (ipv6, ipv6_parameter(link))] {
        // Kernels before 6.17 have no such parameter for IPv6. There the whole host forwards, or the plan was refused.
        sysctl::set_if_present(&parameter, if needed { "1" } else { "0" })?;
    }
    Ok(())
}

/// Changes the record, after it was brought up to date with interfaces that were renamed.
fn change<T>(how: impl FnOnce(&mut ForwardingRecord) -> io::Result<T>) -> io::Result<T> {
    let how = |record: &mut ForwardingRecord| {
        record.0.iter_mut().for_each(RecordedInterface::follow_name);
        how(record)
    };
    registry::change_shared(registry::FORWARDING_FILE, |record: &ForwardingRecord| record.0.is_empty(), how)
}

impl ForwardingRecord {
    /// Records that a tunnel does not need some interfaces, and switches off those that no tunnel needs.
    fn forget(&mut self, name: &TunnelName, which: impl Fn(&InterfaceName) -> bool) -> io::Result<()> {
        for entry in self.0.iter_mut().filter(|entry| which(&entry.interface)) {
            entry.tunnels.retain(|tunnel| tunnel != name);
        }
        for entry in self.0.iter().filter(|entry| entry.tunnels.is_empty() && entry.exists()) {
            entry.set("0")?;
        }
        self.0.retain(|entry| !entry.tunnels.is_empty());
        Ok(())
    }
}

impl RecordedInterface {
    /// Takes the new name of an interface that was renamed. It still forwards.
    fn follow_name(&mut self) {
        if !self.is_here() {
            return;
        }
        let name = nix::net::if_::if_indextoname(self.index).ok().and_then(|name| name.to_str().ok()?.parse().ok());
        if let Some(name) = name.filter(|name| *name != self.interface) {
            tracing::info!("the interface {} was renamed to {name}", self.interface);
            self.interface = name;
        }
    }

    /// Returns whether the interface is in the calling thread's network namespace, if it exists.
    fn is_here(&self) -> bool {
        here().is_ok_and(|here| here == self.namespace)
    }

    fn exists(&self) -> bool {
        self.is_here() && nix::net::if_::if_nametoindex(self.interface.as_str()) == Ok(self.index)
    }

    /// Sets the parameters that were switched on here, unless the whole host has become a router since.
    fn set(&self, value: &str) -> io::Result<()> {
        let router = is_router()?;
        let parameters = [
            (self.ipv4 && !router.ipv4, ipv4_parameter(&self.interface)),
            (self.ipv6 && !router.ipv6, ipv6_parameter(&self.interface)),
        ];
        for (_, parameter) in parameters.iter().filter(|(is_ours, _)| *is_ours) {
            // The interface may have gone since the check.
            sysctl::set_if_present(parameter, value)?;
        }
        Ok(())
    }
}

/// The families that the host forwards from all its interfaces.
struct Router {
    ipv4: bool,
    ipv6: bool,
}

fn is_router() -> io::Result<Router> {
    let is_on = |parameter| Ok::<_, io::Error>(sysctl::get_if_present(parameter)?.is_some_and(|value| value != "0"));
    Ok(Router { ipv4: is_on("net/ipv4/ip_forward")?, ipv6: is_on("net/ipv6/conf/all/forwarding")? })
}

fn here() -> io::Result<NamespaceId> {
    NetworkNamespace::current()?.id()
}

/// Returns whether there are IPv4 networks, and IPv6 networks.
fn families(local: &LocalNetworksPlan) -> (bool, bool) {
    let has = |ipv4: bool| local.networks.iter().any(|net| net.addr().is_ipv4() == ipv4);
    (has(true), has(false))
}

fn ipv4_parameter(interface: &InterfaceName) -> String {
    format!("net/ipv4/conf/{interface}/forwarding")
}

/// Unlike `forwarding`, this parameter does not make the interface a router's in other respects, such as the router
/// advertisements that it accepts (Linux 6.17, Documentation/networking/ip-sysctl.rst).
fn ipv6_parameter(interface: &InterfaceName) -> String {
    format!("net/ipv6/conf/{interface}/force_forwarding")
}

fn is_off(parameter: &str) -> io::Result<bool> {
    Ok(sysctl::get_if_present(parameter)?.is_some_and(|value| value == "0"))
}
