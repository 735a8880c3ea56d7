//! Tests of the device with a TUN of the kernel, in a network namespace. They need root.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::network::{device, peer};
use crate::linux::datagrams::{Ecn, Outbox};
use crate::linux::namespace::NetworkNamespace;
use crate::linux::netlink::{Netlink, NetlinkRequest};
use crate::linux::poll::wait_for;
use crate::linux::tun;
use crate::names::InterfaceName;
use crate::wireguard::userspace::offload::HEADER;
use crate::wireguard::userspace::tun_io::TunIo;
use crate::wireguard::userspace::{Levels, Sockets, UserspaceDevice};

const PATIENCE: Duration = Duration::from_secs(20);

/// The lengths of an IPv4 header and a UDP header, and of each datagram's content.
const HEADERS: usize = 28;
const CONTENT: usize = 1_000;

fn in_namespace(test: impl FnOnce(&InterfaceName) -> io::Result<()> + Send) {
    let usable = std::fs::OpenOptions::new().read(true).write(true).open(tun::DEVICE).is_ok();
    if !usable || !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root and {}", tun::DEVICE);
        return;
    }
    let name = "tun-test".parse().expect("a name");
    NetworkNamespace::create(|| test(&name)).expect("a test in a namespace");
}

fn take_up(name: &InterfaceName) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let index = netlink.link_index(name)?;
    let address = "10.0.0.1/24".parse().expect("an address");
    netlink.execute_one(NetlinkRequest::add_address(index, name.as_str(), address))?;
    Ok(netlink.execute_one(NetlinkRequest::set_up(index, name.as_str()))?)
}

/// Sends three datagrams as one message into the TUN, and returns the lengths of the packets that it gives.
fn lengths(tun: &OwnedFd, header: usize) -> io::Result<Vec<usize>> {
    let socket = UdpSocket::bind("10.0.0.1:0")?;
    let deadline = Instant::now() + PATIENCE;
    let mut lengths = Vec::new();
    // The kernel passes packets a moment after the attachment (net/core/link_watch.c).
    while lengths.is_empty() {
        assert!(Instant::now() < deadline, "no packet passes");
        let mut outbox = Outbox::new(4 * CONTENT, true, true);
        for _ in 0..3 {
            outbox.room(CONTENT).expect("room").fill(1);
            outbox.push("10.0.0.2:9".parse().expect("an endpoint"), Ecn::NOT_CAPABLE, CONTENT);
        }
        outbox.flush(|_| Some(socket.as_fd()));
        wait_for(&[tun.as_fd()], Some(Duration::from_millis(50)))?;
        let mut packet = vec![0; 70_000];
        loop {
            match rustix::io::read(tun, &mut *packet) {
                // The kernel's own IPv6 packets are skipped.
                Ok(length) if packet[header] >> 4 == 4 => lengths.push(length),
                Ok(_) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(lengths)
}

/// The interface keeps its offloads, with which the packets of version 0.1.0 would be whole messages without checksums.
#[test]
fn a_tun_passes_between_this_version_and_an_older_one() {
    in_namespace(|name| {
        let config = device(1, vec![peer(2, &["10.0.0.0/24"], None)]);
        let single = [HEADERS + CONTENT; 3];
        let start = |tun| UserspaceDevice::start(&config, tun, Sockets::bind(0, 0)?, || Ok(()));

        let first = start(tun::create(name)?)?;
        take_up(name)?;
        drop(first);
        let older = tun::attach_as_0_1_0(name)?;
        assert_eq!(lengths(&older, 0)?, single, "the older one after this one");
        drop(older);

        let newer = tun::attach(name)?;
        let same = newer.try_clone()?;
        let takes_udp = TunIo::new(newer, Levels::ALL).offloads().udp;
        let single_with_header = single.map(|length| HEADER + length);
        let expected = if takes_udp { vec![HEADER + HEADERS + 3 * CONTENT] } else { single_with_header.to_vec() };
        assert_eq!(lengths(&same, HEADER)?, expected, "this one after the older one");
        drop(same);

        // A killed one leaves its offloads. The next one sets its own.
        let killed = tun::attach(name)?;
        let same = killed.try_clone()?;
        assert!(tun::set_offloads(&killed, tun::Offloads { tcp: true, udp: true }).is_some());
        drop((killed, same));
        let next = tun::attach(name)?;
        let same = next.try_clone()?;
        assert!(!TunIo::new(next, Levels::NONE).offloads().udp);
        assert_eq!(lengths(&same, HEADER)?, single_with_header, "without offloads after a killed one with them");
        drop(same);

        // An interface that the older one has made.
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(name)?;
        netlink.execute_one(NetlinkRequest::delete_link(index, name.as_str()))?;
        drop(tun::attach_as_0_1_0(name)?);
        take_up(name)?;
        let newer = tun::attach(name)?;
        let same = newer.try_clone()?;
        let _newer = TunIo::new(newer, Levels::ALL);
        assert_eq!(lengths(&same, HEADER)?, expected, "this one with the older one's interface");
        Ok(())
    });
}
