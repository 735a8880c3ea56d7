//! Forwarding by the host, for local networks: switched on for single interfaces, never for the host, and put back.
//!
//! An interface may be needed by several tunnels, and one keeper may be killed while others go on. So it is written down, for all
//! tunnels of the machine together, what was switched on and who needs it; before it is done, so that whoever comes after a killed one
//! can undo it. The tunnels' own links are not among it: they forward from their beginning, and end with their tunnels.

use std::io;

use serde::{Deserialize, Serialize};

use crate::linux::namespace::{NamespaceId, NetworkNamespace};
use crate::linux::sysctl;
use crate::names::{InterfaceName, TunnelName};
use crate::plan::{ForwardingInterface, Ipv6Forwarding, LocalNetworksPlan};
use crate::registry;
use crate::ruleset::Family;

/// What is written down.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Forwarding(Vec<Switched>);

/// An interface that forwards for tunnels.
#[derive(Debug, Serialize, Deserialize)]
struct Switched {
    interface: InterfaceName,
    /// The network namespace that it is in: keepers of several may share a `/run` (ip-netns(8)).
    namespace: NamespaceId,
    /// The interface's number, by which it is known whatever its name: another of that name is none of ours.
    index: u32,
    /// Whether it forwards IPv4 because it was switched on here.
    ipv4: bool,
    /// The same for IPv6.
    ipv6: bool,
    /// The tunnels that need it.
    tunnels: Vec<TunnelName>,
}

/// Whether this host could forward IPv6 for single interfaces.
pub(super) fn of_ipv6() -> io::Result<Ipv6Forwarding> {
    // Of a kernel without IPv6, nothing is asked.
    if sysctl::get_if_present("net/ipv6/conf/all/forwarding")?.is_some_and(|value| value != "0") {
        return Ok(Ipv6Forwarding::All);
    }
    let each = sysctl::get_if_present("net/ipv6/conf/default/force_forwarding")?;
    Ok(if each.is_some() { Ipv6Forwarding::Each } else { Ipv6Forwarding::Never })
}

/// Writes down that a tunnel needs these networks' interfaces to forward, and no others any more. Returns those that do, or will, for
/// tunnels' sake alone.
pub(super) fn reserve(name: &TunnelName, local: &LocalNetworksPlan) -> io::Result<Vec<ForwardingInterface>> {
    let (ipv4, ipv6) = families(local);
    let here = here()?;
    change(|all| {
        all.forget(name, |interface| !local.interfaces.contains(interface))?;
        for interface in &local.interfaces {
            // One that has gone forwards nothing.
            let Ok(index) = nix::net::if_::if_nametoindex(interface.as_str()) else { continue };
            let position = all.0.iter().position(|one| one.interface == *interface && one.is_there());
            let entry = match position {
                Some(position) => &mut all.0[position],
                None => {
                    let (interface, tunnels) = (interface.clone(), Vec::new());
                    all.0.push(Switched { interface, namespace: here, index, ipv4: false, ipv6: false, tunnels });
                    all.0.last_mut().ok_or(io::ErrorKind::NotFound)?
                }
            };
            entry.ipv4 |= ipv4 && is_off(&ipv4_parameter(interface))?;
            entry.ipv6 |= ipv6 && of_ipv6()? == Ipv6Forwarding::Each && is_off(&ipv6_parameter(interface))?;
            if !entry.tunnels.contains(name) {
                entry.tunnels.push(name.clone());
            }
        }
        let (router4, router6) = routers()?;
        let for_tunnels = |one: &Switched| {
            let families = [(one.ipv4 && !router4, Family::Ipv4), (one.ipv6 && !router6, Family::Ipv6)];
            let interface = one.interface.clone();
            families
                .into_iter()
                .filter(|(alone, _)| *alone)
                .map(move |(_, family)| ForwardingInterface { interface: interface.clone(), family })
        };
        Ok(all.0.iter().filter(|one| one.is_there()).flat_map(for_tunnels).collect())
    })
}

/// Switches on what is written down.
pub(super) fn switch_on() -> io::Result<()> {
    change(|all| {
        for one in all.0.iter().filter(|one| one.is_there()) {
            one.set("1")?;
        }
        Ok(())
    })
}

/// Switches off what nobody needs any more once this tunnel does not.
pub(super) fn give_back(name: &TunnelName) -> io::Result<()> {
    change(|all| all.forget(name, |_| true))
}

/// Switches forwarding on for a tunnel's own link.
pub(super) fn switch_on_link(link: &InterfaceName, local: &LocalNetworksPlan) -> io::Result<()> {
    let (ipv4, ipv6) = families(local);
    for (wanted, parameter) in [(ipv4, ipv4_parameter(link)), (ipv6, ipv6_parameter(link))] {
        // Older kernels forward IPv6 from all interfaces, or the networks were refused.
        sysctl::set_if_present(&parameter, if wanted { "1" } else { "0" })?;
    }
    Ok(())
}

/// Has what is written down changed.
fn change<T>(how: impl FnOnce(&mut Forwarding) -> io::Result<T>) -> io::Result<T> {
    let how = |all: &mut Forwarding| {
        all.0.iter_mut().for_each(Switched::follow);
        how(all)
    };
    registry::change_shared(registry::FORWARDING, |all: &Forwarding| all.0.is_empty(), how)
}

impl Forwarding {
    /// Takes note that a tunnel does not need some interfaces, and switches those off that nobody needs.
    fn forget(&mut self, name: &TunnelName, which: impl Fn(&InterfaceName) -> bool) -> io::Result<()> {
        for one in self.0.iter_mut().filter(|one| which(&one.interface)) {
            one.tunnels.retain(|tunnel| tunnel != name);
        }
        for one in self.0.iter().filter(|one| one.tunnels.is_empty() && one.is_there()) {
            one.set("0")?;
        }
        self.0.retain(|one| !one.tunnels.is_empty());
        Ok(())
    }
}

impl Switched {
    /// Takes note of another name that it was given: it still forwards.
    fn follow(&mut self) {
        if !self.is_here() {
            return;
        }
        let name = nix::net::if_::if_indextoname(self.index).ok().and_then(|name| name.to_str().ok()?.parse().ok());
        if let Some(name) = name.filter(|name| *name != self.interface) {
            tracing::info!("{} is called {name} now", self.interface);
            self.interface = name;
        }
    }

    /// Whether it would be in the calling thread's namespace.
    fn is_here(&self) -> bool {
        here().is_ok_and(|here| here == self.namespace)
    }

    fn is_there(&self) -> bool {
        self.is_here() && nix::net::if_::if_nametoindex(self.interface.as_str()) == Ok(self.index)
    }

    /// Sets what was switched on here. Where the whole host has become a router since, it stays one.
    fn set(&self, to: &str) -> io::Result<()> {
        let (router4, router6) = routers()?;
        let switches = [
            (self.ipv4 && !router4, ipv4_parameter(&self.interface)),
            (self.ipv6 && !router6, ipv6_parameter(&self.interface)),
        ];
        for (_, parameter) in switches.iter().filter(|(ours, _)| *ours) {
            // It may have gone in this instant.
            sysctl::set_if_present(parameter, to)?;
        }
        Ok(())
    }
}

/// Whether the host forwards IPv4, and IPv6, from all its interfaces.
fn routers() -> io::Result<(bool, bool)> {
    let is_on = |parameter| Ok::<_, io::Error>(sysctl::get_if_present(parameter)?.is_some_and(|value| value != "0"));
    Ok((is_on("net/ipv4/ip_forward")?, is_on("net/ipv6/conf/all/forwarding")?))
}

fn here() -> io::Result<NamespaceId> {
    NetworkNamespace::current()?.id()
}

fn families(local: &LocalNetworksPlan) -> (bool, bool) {
    let has = |ipv4: bool| local.networks.iter().any(|net| net.addr().is_ipv4() == ipv4);
    (has(true), has(false))
}

fn ipv4_parameter(interface: &InterfaceName) -> String {
    format!("net/ipv4/conf/{interface}/forwarding")
}

/// Unlike `forwarding`, this does not make the interface a router's in other respects, such as whose advertisements it takes.
fn ipv6_parameter(interface: &InterfaceName) -> String {
    format!("net/ipv6/conf/{interface}/force_forwarding")
}

fn is_off(parameter: &str) -> io::Result<bool> {
    Ok(sysctl::get_if_present(parameter)?.is_some_and(|value| value == "0"))
}
