//! TUN interfaces (the kernel's Documentation/networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::names::InterfaceName;

/// The device that makes TUN interfaces.
pub const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_ptr_bad!(
    /// Attaches a descriptor of [`DEVICE`] to an interface.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

/// Makes a TUN interface of raw IP packets in the calling thread's network namespace, and returns its packets' descriptor:
/// non-blocking, one packet a read or write, no header before it. The interface is gone when the descriptor is closed, however
/// the process ends.
///
/// # Errors
/// `ENOENT` or `EACCES` if there is no usable [`DEVICE`], `EPERM` without CAP_NET_ADMIN over the namespace, `EBUSY` if the name
/// is taken.
pub fn open(name: &InterfaceName) -> io::Result<OwnedFd> {
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
    Ok(device.into())
}
