//! A tunnel's WireGuard device: the kernel's, or the embedded one where the kernel has none or it is asked for; made anew, or taken over
//! from a keeper that was killed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::config::BackendChoice;
use crate::failure::{Doing, Failure};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::Netlink;
use crate::linux::netlink::monitor::Monitor;
use crate::linux::tun;
use crate::plan::Plan;
use crate::wireguard::kernel::{self, KernelDevice};
use crate::wireguard::userspace::{Sockets, UserspaceDevice};
use crate::wireguard::{Backend, Device, DeviceConfig};

/// How long a killed keeper's TUN and port may take to be free: its lock may be the first that the kernel lets go of.
const LET_GO: Duration = Duration::from_secs(2);

/// What a device signals to whoever holds the tunnel.
#[derive(Debug, Default)]
pub struct DeviceEvents {
    /// Readable once the data path has ended by itself. None for the kernel's.
    pub failed: Option<OwnedFd>,
    /// Readable after a completed handshake. None for the kernel's, which has to be asked.
    pub handshakes: Option<OwnedFd>,
    /// Hears of changes of the interfaces around the kernel's, which may be removed as any other and says nothing of it.
    pub links: Option<Monitor>,
}

type Made = (Box<dyn Device>, DeviceEvents);

/// Makes a device in a namespace. `host` is a netlink socket of the host's, to which the encrypted packets belong.
///
/// `on_data_path_start` runs first in the thread of an embedded device.
pub(super) fn make(
    host: &mut Netlink,
    plan: &Plan,
    namespace: NetworkNamespace,
    config: &DeviceConfig,
    on_data_path_start: fn() -> io::Result<()>,
) -> Result<Made, Failure> {
    let name = &plan.wireguard.interface;
    if plan.backend != BackendChoice::Userspace {
        match kernel::make(host, &namespace, name) {
            Ok(()) => {
                let events = kernel_events(&namespace)?;
                let device = KernelDevice::configure(namespace, name, config);
                let device = device.doing("configure the kernel's WireGuard")?;
                tracing::info!("using the kernel's WireGuard");
                return Ok((Box::new(device), events));
            }
            Err(error) if plan.backend == BackendChoice::Kernel => {
                let missing = error.raw_os_error() == Some(libc::EOPNOTSUPP);
                return Err(error).doing("use the kernel's WireGuard").map_err(|mut error| {
                    if missing {
                        let advice =
                            "this kernel has no WireGuard (module wireguard, Linux 5.6 or newer): use --backend userspace";
                        error.advice = Some(advice.into());
                    }
                    error
                });
            }
            Err(error) => tracing::info!("{error}: using the embedded WireGuard instead"),
        }
    }
    let tun = namespace.run(|| tun::create(name)).map_err(|error| {
        let advice = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => "load the kernel's TUN driver: `modprobe tun`",
            _ => "give access to it (distributions ship it with mode 0666), or run vpn-exec as root",
        };
        Failure::of(format!("make a TUN interface with {}", tun::DEVICE), &error).advise(advice)
    })?;
    let embedded = embed(config, tun, on_data_path_start)?;
    tracing::info!("using the embedded WireGuard");
    Ok(embedded)
}

/// Takes over the device that a killed keeper has left in a namespace: the kernel's as it stands, or the TUN that outlived its data path.
///
/// `on_data_path_start` runs first in the thread of an embedded device.
pub(super) fn take_over(
    made: Backend,
    plan: &Plan,
    namespace: NetworkNamespace,
    config: &DeviceConfig,
    on_data_path_start: fn() -> io::Result<()>,
) -> Result<Made, Failure> {
    let name = &plan.wireguard.interface;
    match made {
        Backend::Kernel => {
            let events = kernel_events(&namespace)?;
            let mut device = KernelDevice::attach(namespace, name, config).doing("take over the kernel's WireGuard")?;
            device.reconfigure(config).doing("configure the kernel's WireGuard")?;
            Ok((Box::new(device), events))
        }
        Backend::Userspace => until_let_go(|| {
            let tun = namespace.run(|| tun::attach(name)).doing("take over the TUN interface")?;
            embed(config, tun, on_data_path_start)
        }),
    }
}

fn kernel_events(namespace: &NetworkNamespace) -> Result<DeviceEvents, Failure> {
    let links = namespace.run(Monitor::of_links).doing("watch the kernel's WireGuard")?;
    Ok(DeviceEvents { links: Some(links), ..DeviceEvents::default() })
}

/// Tries again while a killed process still lets go of what is needed.
fn until_let_go<T>(mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(error) if matches!(error.errno, Some(libc::EADDRINUSE | libc::EBUSY)) && begin.elapsed() < LET_GO => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

/// Starts an embedded device on a TUN.
fn embed(config: &DeviceConfig, tun: OwnedFd, on_data_path_start: fn() -> io::Result<()>) -> Result<Made, Failure> {
    let sockets = Sockets::bind(config.listen_port, config.fwmark);
    let sockets = sockets.doing(format!("open WireGuard's UDP port {}", config.listen_port));
    let sockets = sockets.map_err(|error| {
        let advice = "leave ListenPort out of the file, if nobody has to reach this end: any free port will do";
        error.advise(advice)
    })?;
    let device =
        UserspaceDevice::start(config, tun, sockets, on_data_path_start).doing("start the embedded WireGuard")?;
    let events = DeviceEvents {
        failed: Some(device.failed().try_clone_to_owned().doing("watch the embedded WireGuard")?),
        handshakes: Some(device.handshakes().try_clone_to_owned().doing("watch the embedded WireGuard")?),
        links: None,
    };
    Ok((Box::new(device), events))
}
