//! The WireGuard device of a tunnel: the kernel's, or the embedded one if the kernel has none or the user asks for it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::config::BackendChoice;
use crate::failure::{Doing, Failure};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::Netlink;
use crate::linux::netlink::monitor::Monitor;
use crate::linux::tun;
use crate::names::InterfaceName;
use crate::wireguard::kernel::{self, KernelDevice};
use crate::wireguard::userspace::{Sockets, UserspaceDevice};
use crate::wireguard::{Backend, Device, DeviceConfig};

/// How long a killed keeper's TUN and port may stay in use. The kernel may release its lock before them.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// The delay between two attempts to take them over.
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// The descriptors by which a device reports events.
#[derive(Debug, Default)]
pub struct DeviceEvents {
    /// Readable when the data path has ended by itself. None for the kernel's device.
    pub failed: Option<OwnedFd>,
    /// Readable after a handshake. None for the kernel's device, which must be polled.
    pub handshakes: Option<OwnedFd>,
    /// Reports changes of the interfaces in the namespace of the kernel's device, which does not report its own
    /// removal.
    pub links: Option<Monitor>,
}

/// A device, and the descriptors by which it reports events.
pub type CreatedDevice = (Box<dyn Device>, DeviceEvents);

/// The reason why a device cannot be created.
#[derive(Debug)]
pub enum DeviceFailure {
    /// The kernel refuses a TUN interface, or there is no TUN device that this process may open.
    Tun(io::Error),
    /// Another reason.
    Other(Failure),
}

impl From<Failure> for DeviceFailure {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

impl From<DeviceFailure> for Failure {
    /// Adds advice for a machine. A container needs other steps.
    fn from(failure: DeviceFailure) -> Self {
        match failure {
            DeviceFailure::Tun(error) => {
                let advice = match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                        "load the kernel's TUN driver as root: `modprobe tun`"
                    }
                    _ => {
                        "let users open it, as distributions do: `chmod 0666 /dev/net/tun` as root; or run it with sudo"
                    }
                };
                Failure::of(format!("create a TUN interface with {}", tun::DEVICE), &error).advise(advice)
            }
            DeviceFailure::Other(failure) => failure,
        }
    }
}

/// Creates a device in a namespace. `host` is a netlink socket in the host's namespace, which is where the encrypted
/// packets leave.
///
/// `on_data_path_start` runs first in the thread of an embedded device.
///
/// # Errors
/// If the kernel has no WireGuard and the choice is the kernel's, or if there is no TUN device or the port is taken.
pub fn create(
    host: &mut Netlink,
    (name, backend): (&InterfaceName, BackendChoice),
    namespace: NetworkNamespace,
    config: &DeviceConfig,
    on_data_path_start: fn() -> io::Result<()>,
) -> Result<CreatedDevice, DeviceFailure> {
    if backend != BackendChoice::Userspace {
        match kernel::create(host, &namespace, name) {
            Ok(()) => {
                let events = kernel_events(&namespace)?;
                let device = KernelDevice::configure(namespace, name, config);
                let device = device.doing("configure the kernel's WireGuard")?;
                tracing::info!("using the kernel's WireGuard");
                return Ok((Box::new(device), events));
            }
            Err(error) if backend == BackendChoice::Kernel => {
                let failure = Failure::of("use the kernel's WireGuard", &error.into());
                return Err(DeviceFailure::Other(match failure.errno {
                    Some(libc::EOPNOTSUPP) => failure.advise(
                        "this kernel has no WireGuard (module wireguard, Linux 5.6 or newer): use --backend userspace",
                    ),
                    _ => failure,
                }));
            }
            Err(error) => tracing::info!("{error}: using the embedded WireGuard instead"),
        }
    }
    let tun = namespace.run(|| tun::create(name)).map_err(DeviceFailure::Tun)?;
    let embedded = embed(config, tun, on_data_path_start)?;
    tracing::info!("using the embedded WireGuard");
    Ok(embedded)
}

/// Takes over the device that a killed keeper has left in a namespace: the kernel's device, or the TUN that outlived
/// its data path.
///
/// `on_data_path_start` runs first in the thread of an embedded device.
///
/// # Errors
/// If the device has another private key, or another process uses it.
pub fn take_over(
    backend: Backend,
    name: &InterfaceName,
    namespace: NetworkNamespace,
    config: &DeviceConfig,
    on_data_path_start: fn() -> io::Result<()>,
) -> Result<CreatedDevice, Failure> {
    match backend {
        Backend::Kernel => {
            let events = kernel_events(&namespace)?;
            let mut device = KernelDevice::attach(namespace, name, config).doing("take over the kernel's WireGuard")?;
            device.reconfigure(config).doing("configure the kernel's WireGuard")?;
            Ok((Box::new(device), events))
        }
        Backend::Userspace => retry_while_busy(|| {
            let tun = namespace.run(|| tun::attach(name)).doing("take over the TUN interface")?;
            embed(config, tun, on_data_path_start)
        }),
    }
}

fn kernel_events(namespace: &NetworkNamespace) -> Result<DeviceEvents, Failure> {
    let links = namespace.run(Monitor::of_links).doing("watch the kernel's WireGuard")?;
    Ok(DeviceEvents { links: Some(links), ..DeviceEvents::default() })
}

/// Repeats an attempt while a killed process still uses what is needed.
fn retry_while_busy<T>(mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(failure)
                if matches!(failure.errno, Some(libc::EADDRINUSE | libc::EBUSY))
                    && begin.elapsed() < RELEASE_TIMEOUT =>
            {
                std::thread::sleep(RETRY_DELAY);
            }
            other => return other,
        }
    }
}

/// Starts an embedded device on a TUN.
fn embed(
    config: &DeviceConfig,
    tun: OwnedFd,
    on_data_path_start: fn() -> io::Result<()>,
) -> Result<CreatedDevice, Failure> {
    let sockets = Sockets::bind(config.listen_port, config.fwmark)
        .doing(format!("open WireGuard's UDP port {}", config.listen_port))
        .map_err(|failure| {
            failure.advise("leave ListenPort out of the file to use any free port, unless peers connect to this one")
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
