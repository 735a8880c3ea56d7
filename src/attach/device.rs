//! WireGuard's interface in the namespace: a new one, or the one that a former process has left.

use super::{Site, privileges, requirements};
use crate::config::{BackendChoice, Config};
use crate::failure::{Doing, Failure};
use crate::keeper;
use crate::linux::netlink::NetlinkRequest;
use crate::linux::netlink::link::Link;
use crate::plan::shared_namespace::SharedNamespacePlan;
use crate::tunnel::device::{self, CreatedDevice};
use crate::wireguard::{Backend, DeviceConfig};

/// Creates the device, or takes over one that exists.
///
/// The kernel's device keeps its sessions if its key is the same. A TUN interface is left when the process is killed:
/// it stays with its addresses and routes, and drops all packets. A device of the implementation that was not chosen is
/// removed.
pub(super) fn obtain(site: &mut Site, plan: &SharedNamespacePlan, config: &Config) -> Result<CreatedDevice, Failure> {
    let name = &plan.wireguard.interface;
    let mut device = keeper::device_config(config, plan.wireguard.mtu)?;
    device.fwmark = plan.wireguard.fwmark;
    let namespace = || site.namespace.try_clone().doing("use the network namespace");
    let present = site.netlink.link(name.as_str()).doing(format!("find {name}"))?;
    if let Some(link) = present {
        let backend = backend_of(&link)?;
        let is_wanted = match plan.backend {
            BackendChoice::Auto => true,
            BackendChoice::Kernel => backend == Backend::Kernel,
            BackendChoice::Userspace => backend == Backend::Userspace,
        };
        if is_wanted && let Some(taken) = take_over(backend, site, plan, &device)? {
            tracing::info!("took over the interface {name}");
            return Ok(taken);
        }
        let remove = NetlinkRequest::delete_link(link.index, name.as_str());
        site.netlink.execute_one(remove).doing(format!("remove the former {name}"))?;
    }
    let namespace = namespace()?;
    device::create(&mut site.netlink, (name, plan.backend), namespace, &device, privileges::limit_data_path)
        .map_err(requirements::explain_device)
}

/// Takes a device over, unless it has another private key.
fn take_over(
    backend: Backend,
    site: &Site,
    plan: &SharedNamespacePlan,
    config: &DeviceConfig,
) -> Result<Option<CreatedDevice>, Failure> {
    let name = &plan.wireguard.interface;
    let namespace = site.namespace.try_clone().doing("use the network namespace")?;
    match device::take_over(backend, name, namespace, config, privileges::limit_data_path) {
        Ok((mut device, events)) => {
            // A device of the kernel keeps its own port and mark.
            device.rebind(config.listen_port, config.fwmark).doing(format!("configure the interface {name}"))?;
            Ok(Some((device, events)))
        }
        Err(failure) if backend == Backend::Kernel => {
            tracing::debug!("{failure}");
            Ok(None)
        }
        Err(failure) if failure.errno == Some(libc::EBUSY) => {
            Err(failure.advise(format!("another process has attached a tunnel here and serves {name}: end it first")))
        }
        Err(failure) => Err(requirements::explain_tun(failure)),
    }
}

/// Returns the implementation of a device that exists.
fn backend_of(link: &Link) -> Result<Backend, Failure> {
    match link.kind.as_deref() {
        Some("wireguard") => Ok(Backend::Kernel),
        Some("tun") => Ok(Backend::Userspace),
        kind => Err(Failure::new(format!(
            "the interface {} of this network namespace is not WireGuard's, but of the kind {}",
            link.name,
            kind.unwrap_or("unknown")
        ))
        .advise("rename that interface: an attached tunnel needs the name")),
    }
}
