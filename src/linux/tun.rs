//! TUN interfaces (the kernel's Documentation/networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::names::InterfaceName;

/// The flag of an interface that outlives its descriptor (linux/if_tun.h).
const IFF_PERSIST: i32 = 0x0800;

/// The device that creates TUN interfaces.
pub const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_ptr_bad!(
    /// Attaches a descriptor of [`DEVICE`] to an interface.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

nix::ioctl_read_bad!(
    /// Returns the interface that a descriptor of [`DEVICE`] is attached to, and its flags.
    tun_get_iff,
    libc::TUNGETIFF,
    libc::ifreq
);

nix::ioctl_write_int_bad!(
    /// Sets whether the interface outlives its descriptor.
    tun_set_persist,
    libc::TUNSETPERSIST
);

nix::ioctl_write_int_bad!(
    /// Sets the user that may attach to the interface without CAP_NET_ADMIN.
    tun_set_owner,
    libc::TUNSETOWNER
);

nix::ioctl_write_int_bad!(
    /// Sets which packets the reader of a TUN with [`libc::IFF_VNET_HDR`] takes.
    tun_set_offload,
    libc::TUNSETOFFLOAD
);

// What the reader takes (linux/if_tun.h): packets whose checksum is still to be computed, large ones of TCP, and, since
// Linux 6.2, of UDP.
const CHECKSUMS: i32 = 0x01;
const LARGE_TCP: i32 = 0x02 | 0x04 | 0x08;
const LARGE_UDP: i32 = 0x20 | 0x40;

/// The kinds of large packets, of several segments, that an interface and its descriptor pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Whether TCP's are passed.
    pub tcp: bool,
    /// Whether UDP's are passed.
    pub udp: bool,
}

/// A user ID that no user has: the last one is invalid (credentials(7)), and this is the one before it.
const NO_USER: i32 = -2;

/// Creates a TUN interface in the calling thread's network namespace, and returns a descriptor for its packets.
///
/// The descriptor does not block. Each read or write is one IP packet after a `struct virtio_net_hdr`
/// (linux/virtio_net.h). [`set_offloads`] says which large packets pass. The interface outlives the descriptor with its
/// addresses, routes and offloads, but drops all packets without one. It is removed explicitly, or with its namespace.
///
/// # Errors
/// Fails with `ENOENT` or `EACCES` if [`DEVICE`] cannot be opened, with `EPERM` without CAP_NET_ADMIN in the namespace,
/// and with `EEXIST` if the name is taken.
pub fn create(name: &InterfaceName) -> io::Result<OwnedFd> {
    let (device, stays) = open(name, libc::IFF_VNET_HDR)?;
    if stays {
        // The interface existed already. Closing the descriptor leaves it as it was.
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    set_owner(&device)?;
    set_persistent(&device, true)?;
    Ok(device)
}

/// Keeps processes without CAP_NET_ADMIN from attaching to an interface whose own process has ended. Without an owner,
/// everyone who can open [`DEVICE`] may (`tun_not_capable()` in the kernel's drivers/net/tun.c).
fn set_owner(device: &OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the request takes a number.
    let set = |user| unsafe { tun_set_owner(device.as_raw_fd(), user) };
    match set(NO_USER) {
        // The user namespace has no such ID.
        Err(nix::errno::Errno::EINVAL) => set(nix::unistd::geteuid().as_raw().cast_signed())?,
        other => other?,
    };
    Ok(())
}

/// Attaches to a TUN interface from [`create`] whose descriptor is closed. Never creates an interface.
///
/// # Errors
/// Fails with `ENODEV` if there is no such interface, and with `EBUSY` if a process is attached to it.
pub fn attach(name: &InterfaceName) -> io::Result<OwnedFd> {
    let (device, stays) = open(name, libc::IFF_VNET_HDR)?;
    // If the interface does not exist, the kernel creates it. Not being persistent, it is removed with the descriptor.
    if stays { Ok(device) } else { Err(io::Error::from_raw_os_error(libc::ENODEV)) }
}

/// Attaches to an interface as vpn-exec 0.1.0 does, whose packets have no header. Creates it if it does not exist.
///
/// # Errors
/// Fails as [`attach`] does.
#[cfg(test)]
pub(crate) fn attach_as_0_1_0(name: &InterfaceName) -> io::Result<OwnedFd> {
    let (device, _) = open(name, 0)?;
    set_persistent(&device, true)?;
    Ok(device)
}

/// Attaches to an interface, which the kernel creates if necessary, and returns whether it outlives its descriptor.
fn open(name: &InterfaceName, header: libc::c_int) -> io::Result<(OwnedFd, bool)> {
    let device =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(DEVICE)?;
    // SAFETY: `ifreq` is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | header) as libc::c_short;
    // SAFETY: the descriptor is open, and `request` is a live `ifreq`. Its name ends with a NUL, since an interface's
    // name is shorter than the field.
    unsafe { tun_set_iff(device.as_raw_fd(), &raw const request) }?;
    // SAFETY: the descriptor is open, and `request` is a live `ifreq` for the kernel to write to.
    unsafe { tun_get_iff(device.as_raw_fd(), &raw mut request) }?;
    // SAFETY: the kernel has just written the flags, which are the field in use.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((device.into(), i32::from(flags) & IFF_PERSIST != 0))
}

/// Sets the offloads that are wanted and that the kernel has, and returns which large packets pass in both directions.
/// An interface keeps the offloads of the process that was attached before, so they are set in any case. None if the
/// descriptor is not one of [`create`] or [`attach`], and its packets have no header.
pub fn set_offloads(device: &OwnedFd, wanted: Offloads) -> Option<Offloads> {
    // SAFETY: `ifreq` is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `request` is a live `ifreq` for the kernel to write to.
    unsafe { tun_get_iff(device.as_raw_fd(), &raw mut request) }.ok()?;
    // SAFETY: the kernel has just written the flags, which are the field in use.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if i32::from(flags) & libc::IFF_VNET_HDR == 0 {
        return None;
    }
    // SAFETY: the descriptor is open, and the request takes a number.
    let set = |offloads| unsafe { tun_set_offload(device.as_raw_fd(), offloads) }.is_ok();
    let tcp = if wanted.tcp { LARGE_TCP } else { 0 };
    let udp = wanted.udp && set(CHECKSUMS | tcp | LARGE_UDP);
    let tcp = wanted.tcp && (udp || set(CHECKSUMS | LARGE_TCP));
    if !tcp && !udp {
        set(0);
    }
    Some(Offloads { tcp, udp })
}

/// Sets whether an interface outlives its descriptor.
///
/// # Errors
/// Fails as the ioctl `TUNSETPERSIST` does.
pub fn set_persistent(device: &OwnedFd, persistent: bool) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the request takes a number.
    unsafe { tun_set_persist(device.as_raw_fd(), persistent.into()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::linux::capabilities::{self, CapabilitySet};
    use crate::linux::namespace::NetworkNamespace;
    use crate::linux::netlink::{Netlink, NetlinkRequest};
    use crate::linux::poll::wait_for;

    /// The length of the header before a packet.
    const VNET_HEADER: usize = 10;

    /// Runs a test in a new namespace. Skips it without root or a usable [`DEVICE`].
    fn in_namespace(test: impl FnOnce() -> io::Result<()> + Send) {
        let usable = OpenOptions::new().read(true).write(true).open(DEVICE).is_ok();
        if !usable || !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root and {DEVICE}");
            return;
        }
        NetworkNamespace::create(test).expect("a test in a namespace");
    }

    #[test]
    fn an_interface_outlives_its_descriptor_and_is_attached_again() {
        in_namespace(|| {
            let name: InterfaceName = "tun-test".parse().expect("a name");
            let missing = attach(&name).expect_err("no such interface");
            assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
            let mut netlink = Netlink::open()?;
            assert!(netlink.link(name.as_str())?.is_none(), "no interface was created");

            let first = create(&name)?;
            let index = netlink.link_index(&name)?;
            for address in ["192.0.2.1/24", "2001:db8::1/64"] {
                let address = address.parse().expect("an address");
                netlink.execute_one(NetlinkRequest::add_address(index, name.as_str(), address))?;
            }
            netlink.execute_one(NetlinkRequest::set_up(index, name.as_str()))?;
            let default = "0.0.0.0/0".parse().expect("a network");
            netlink.execute_one(NetlinkRequest::add_route(index, name.as_str(), default, None))?;
            assert_eq!(attach(&name).expect_err("in use").raw_os_error(), Some(libc::EBUSY));
            drop(first);

            let link = netlink.link(name.as_str())?.expect("a persistent interface");
            assert!(link.up && link.kind.as_deref() == Some("tun"), "{link:?}");
            let addresses = netlink.addresses()?;
            assert_eq!(addresses.iter().filter(|(of, address)| *of == index && !is_link_local(address)).count(), 2);
            assert!(netlink.routes()?.iter().any(|route| route.destination == default));
            assert_eq!(create(&name).expect_err("the name is taken").raw_os_error(), Some(libc::EEXIST));
            let without_privilege = std::thread::scope(|scope| {
                let stranger = scope.spawn(|| {
                    capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty()).expect("fewer capabilities");
                    attach(&name).map(drop)
                });
                stranger.join().expect("a thread")
            });
            assert_eq!(without_privilege.expect_err("a stranger").raw_os_error(), Some(libc::EPERM));

            let second = attach(&name)?;
            let socket = std::net::UdpSocket::bind("192.0.2.1:0")?;
            let mut packet = [0; 128];
            let until = Instant::now() + Duration::from_secs(20);
            loop {
                // The kernel passes packets again a moment after the attachment (net/core/link_watch.c).
                socket.send_to(b"hello", "198.51.100.1:9")?;
                wait_for(&[second.as_fd()], Some(Duration::from_millis(50)))?;
                match rustix::io::read(&second, &mut packet) {
                    // The kernel's own IPv6 packets, such as router solicitations, are skipped.
                    Ok(length) if packet[VNET_HEADER] >> 4 == 4 => {
                        assert_eq!(&packet[length - 5..length], b"hello");
                        break;
                    }
                    Ok(_) | Err(rustix::io::Errno::AGAIN) => assert!(Instant::now() < until, "no packet passes"),
                    Err(error) => return Err(error.into()),
                }
            }
            assert!(netlink.counters(&name)?.tx_packets > 0);
            drop(second);
            netlink.execute_one(NetlinkRequest::delete_link(index, name.as_str()))?;
            assert!(netlink.link(name.as_str())?.is_none(), "removed");
            Ok(())
        });
    }

    fn is_link_local(address: &ipnet::IpNet) -> bool {
        matches!(address, ipnet::IpNet::V6(net) if net.addr().is_unicast_link_local())
    }
}
