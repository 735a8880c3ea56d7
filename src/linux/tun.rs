//! TUN interfaces (the kernel's Documentation/networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::names::InterfaceName;

/// Marks an interface that outlives its descriptor (linux/if_tun.h).
const IFF_PERSIST: i32 = 0x0800;

/// The device that makes TUN interfaces.
pub const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_ptr_bad!(
    /// Attaches a descriptor of [`DEVICE`] to an interface.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

nix::ioctl_read_bad!(
    /// Reads to which interface a descriptor of [`DEVICE`] is attached, and how.
    tun_get_iff,
    libc::TUNGETIFF,
    libc::ifreq
);

nix::ioctl_write_int_bad!(
    /// Has the interface stay, or go, when its descriptor is closed.
    tun_set_persist,
    libc::TUNSETPERSIST
);

/// Makes a TUN interface of raw IP packets in the calling thread's network namespace, and returns its packets' descriptor:
/// non-blocking, one packet a read or write, no header before it. The interface outlives the descriptor, with its addresses and
/// routes; without one it takes no packet. It ends when it is removed, or with its namespace.
///
/// # Errors
/// `ENOENT` or `EACCES` if there is no usable [`DEVICE`], `EPERM` without CAP_NET_ADMIN over the namespace, `EEXIST` if the name is
/// taken.
pub fn create(name: &InterfaceName) -> io::Result<OwnedFd> {
    let (device, stays) = open(name)?;
    if stays {
        // It was there before: it is let go as it was.
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    set_persistent(&device, true)?;
    Ok(device)
}

/// Attaches to a TUN interface that [`create`] has made and whose descriptor is closed. Never makes one.
///
/// # Errors
/// `ENODEV` if there is none of that name, `EBUSY` if somebody is attached.
pub fn attach(name: &InterfaceName) -> io::Result<OwnedFd> {
    let (device, stays) = open(name)?;
    // The kernel makes one where there is none; as it is not persistent, it goes with its descriptor.
    if stays { Ok(device) } else { Err(io::Error::from_raw_os_error(libc::ENODEV)) }
}

/// Attaches to the interface of a name, made if need be, and says whether it outlives its descriptor.
fn open(name: &InterfaceName) -> io::Result<(OwnedFd, bool)> {
    let device =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(DEVICE)?;
    // SAFETY: `ifreq` is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and `request` is a live `ifreq`, whose name ends with a zero since an interface's name is
    // shorter than the field.
    unsafe { tun_set_iff(device.as_raw_fd(), &raw const request) }?;
    // SAFETY: the descriptor is open, and `request` is a live `ifreq` for the kernel to write to.
    unsafe { tun_get_iff(device.as_raw_fd(), &raw mut request) }?;
    // SAFETY: the kernel has just written the flags, which are the field in use.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((device.into(), i32::from(flags) & IFF_PERSIST != 0))
}

/// Has an interface outlive its descriptor, or go with it.
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
    use crate::linux::namespace::NetworkNamespace;
    use crate::linux::netlink::{Netlink, NetlinkRequest};
    use crate::linux::poll::wait_for;

    /// In a namespace of its own; none where that cannot be made, or [`DEVICE`] is not usable.
    fn in_namespace(test: impl FnOnce() -> io::Result<()> + Send) {
        let usable = OpenOptions::new().read(true).write(true).open(DEVICE).is_ok();
        if !usable || !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: it takes root and {DEVICE}");
            return;
        }
        NetworkNamespace::create(test).expect("a test in a namespace");
    }

    #[test]
    fn an_interface_outlives_its_descriptor_and_is_attached_again() {
        in_namespace(|| {
            let name: InterfaceName = "tun-test".parse().expect("a name");
            let missing = attach(&name).expect_err("nothing is there");
            assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
            let mut netlink = Netlink::open()?;
            assert!(netlink.link(name.as_str())?.is_none(), "and nothing is made");

            let first = create(&name)?;
            let index = netlink.link_index(&name)?;
            for address in ["192.0.2.1/24", "2001:db8::1/64"] {
                let address = address.parse().expect("an address");
                netlink.execute_one(NetlinkRequest::add_address(index, name.as_str(), address))?;
            }
            netlink.execute_one(NetlinkRequest::set_up(index, name.as_str()))?;
            let default = "0.0.0.0/0".parse().expect("a network");
            netlink.execute_one(NetlinkRequest::add_route(index, name.as_str(), default, None))?;
            assert_eq!(attach(&name).expect_err("it is in use").raw_os_error(), Some(libc::EBUSY));
            drop(first);

            let link = netlink.link(name.as_str())?.expect("it stays");
            assert!(link.up && link.kind.as_deref() == Some("tun"), "{link:?}");
            let addresses = netlink.addresses()?;
            assert_eq!(addresses.iter().filter(|(of, address)| *of == index && !is_link_local(address)).count(), 2);
            assert!(netlink.routes()?.iter().any(|route| route.destination == default));
            assert_eq!(create(&name).expect_err("the name is taken").raw_os_error(), Some(libc::EEXIST));

            let second = attach(&name)?;
            let socket = std::net::UdpSocket::bind("192.0.2.1:0")?;
            let mut packet = [0; 128];
            let until = Instant::now() + Duration::from_secs(20);
            loop {
                // The kernel lets packets through again a moment after somebody is attached (net/core/link_watch.c).
                socket.send_to(b"hello", "198.51.100.1:9")?;
                wait_for(&[second.as_fd()], Some(Duration::from_millis(50)))?;
                match rustix::io::read(&second, &mut packet) {
                    // Others' are IPv6's own.
                    Ok(length) if packet[0] >> 4 == 4 => {
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
            assert!(netlink.link(name.as_str())?.is_none(), "it can be removed");
            Ok(())
        });
    }

    fn is_link_local(address: &ipnet::IpNet) -> bool {
        matches!(address, ipnet::IpNet::V6(net) if net.addr().is_unicast_link_local())
    }
}
