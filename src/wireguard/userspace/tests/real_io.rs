//! Tests of the data path with real sockets on the loopback interface. A pair of unix sockets that preserve message
//! boundaries replaces the TUN.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::network::{device, inbound, outbound, peer, public_key};
use crate::wireguard::userspace::{Dropped, Sockets, UserspaceDevice};
use crate::wireguard::{Backend, Device, DeviceConfig};

/// The patience of all tests, enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns the test's end and the device's end of a TUN.
fn tun() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket pair")
}

fn readable(descriptor: BorrowedFd<'_>, within: Duration) -> bool {
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: within.subsec_nanos().into() };
    let mut descriptors = [PollFd::new(&descriptor, PollFlags::IN)];
    poll(&mut descriptors, Some(&timeout)).expect("poll") > 0
}

fn read(tun: &OwnedFd) -> Vec<u8> {
    assert!(readable(tun.as_fd(), PATIENCE), "nothing came");
    let mut buffer = vec![0; 2_000];
    let length = rustix::io::read(tun, &mut buffer).expect("a packet");
    buffer.truncate(length);
    buffer
}

fn start(config: &DeviceConfig) -> (OwnedFd, UserspaceDevice) {
    let (ours, theirs) = tun();
    let sockets = Sockets::bind(0, 0).expect("sockets");
    let device = UserspaceDevice::start(config, theirs, sockets, || Ok(())).expect("a device");
    (ours, device)
}

/// Creates a client and its server on the loopback address of one family.
fn pair(host: &str) -> ((OwnedFd, UserspaceDevice), (OwnedFd, UserspaceDevice)) {
    let server = start(&device(2, vec![peer(1, &["10.0.0.1/32"], None)]));
    let endpoint = format!("{host}:{}", server.1.listen_port());
    let client = start(&device(1, vec![peer(2, &["0.0.0.0/0"], Some(&endpoint))]));
    (client, server)
}

#[test]
fn packets_cross_the_loopback() {
    for host in ["127.0.0.1", "[::1]"] {
        if host == "[::1]" && std::net::UdpSocket::bind("[::1]:0").is_err() {
            continue;
        }
        let ((client_tun, client), (server_tun, server)) = pair(host);
        for _ in 0..500 {
            rustix::io::write(&client_tun, &outbound()).expect("write");
            assert_eq!(read(&server_tun), outbound());
            rustix::io::write(&server_tun, &inbound()).expect("write");
            assert_eq!(read(&client_tun), inbound());
        }
        let status = client.peers().expect("status").remove(0);
        assert_eq!(status.public_key, public_key(2));
        assert!(status.handshake_age.expect("a handshake") < PATIENCE);
        assert!(status.tx_bytes > 500 * 100 && status.rx_bytes > 500 * 100);
        let endpoint = server.peers().expect("status").remove(0).endpoint.expect("an endpoint");
        assert_eq!(endpoint.port(), client.listen_port());
        assert_eq!(client.dropped().expect("counters"), Dropped::default());
        assert_eq!(client.backend(), Backend::Userspace);
    }
}

#[test]
fn a_completed_handshake_is_signalled_at_once_and_only_once() {
    let ((_client_tun, client), (_server_tun, _server)) = pair("127.0.0.1");
    assert!(!readable(client.handshakes(), Duration::ZERO));
    client.initiate_handshake(&public_key(2)).expect("initiate");
    assert!(readable(client.handshakes(), PATIENCE));
    assert!(client.peers().expect("status")[0].handshake_age.is_some());
    let mut count = [0; 8];
    rustix::io::read(client.handshakes(), &mut count).expect("read");
    assert_eq!(u64::from_ne_bytes(count), 1);
    assert!(!readable(client.handshakes(), Duration::ZERO));
}

#[test]
fn an_endpoint_can_be_set_later_and_an_unknown_peer_is_an_error() {
    let (_server_tun, server) = start(&device(2, vec![peer(1, &["10.0.0.1/32"], None)]));
    let (_client_tun, client) = start(&device(1, vec![peer(2, &["0.0.0.0/0"], None)]));
    client.initiate_handshake(&public_key(2)).expect("a missing endpoint is no error");
    let endpoint = format!("127.0.0.1:{}", server.listen_port()).parse().expect("an endpoint");
    client.set_endpoint(&public_key(2), endpoint).expect("set");
    assert!(readable(client.handshakes(), PATIENCE));
    let error = client.set_endpoint(&public_key(7), endpoint).expect_err("unknown");
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_device_stops_promptly_and_closes_its_descriptors() {
    let (tun, mut device) = start(&device(1, vec![peer(2, &["0.0.0.0/0"], None)]));
    let port = device.listen_port();
    let begin = Instant::now();
    device.stop();
    assert!(begin.elapsed() < Duration::from_secs(1));
    Sockets::bind(port, 0).expect("the port is free again");
    assert!(!readable(tun.as_fd(), Duration::ZERO), "the TUN is still there");
    assert!(device.peers().is_err() && device.rebind(port, 0).is_err());
    drop(device);
    assert!(read(&tun).is_empty(), "the TUN is closed");
}

#[test]
fn the_loss_of_the_tun_is_noticed() {
    let (tun, device) = start(&device(1, vec![peer(2, &["0.0.0.0/0"], None)]));
    assert!(!readable(device.failed(), Duration::ZERO));
    drop(tun);
    assert!(readable(device.failed(), PATIENCE));
    for error in [
        device.peers().map(drop).expect_err("ended"),
        device.initiate_handshake(&public_key(2)).err().unwrap_or_else(|| device.peers().expect_err("ended")),
    ] {
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert!(error.to_string().contains("the TUN was closed"), "{error}");
    }
}

#[test]
fn errors_of_the_network_do_not_stop_the_device() {
    let ((client_tun, client), (server_tun, server)) = pair("127.0.0.1");
    let right = server.listen_port();
    // A closed port (ICMP errors), an address that cannot be sent to, a family that may have no route.
    let closed = Sockets::bind(0, 0).expect("sockets").port();
    for endpoint in
        [format!("127.0.0.1:{closed}"), "255.255.255.255:9".into(), "[2001:db8::1]:9".into(), "127.0.0.1:0".into()]
    {
        client.set_endpoint(&public_key(2), endpoint.parse().expect("an endpoint")).expect("set");
        client.initiate_handshake(&public_key(2)).expect("initiate");
        rustix::io::write(&client_tun, &outbound()).expect("write");
    }
    assert!(!readable(client.failed(), Duration::from_millis(50)));
    assert_eq!(client.peers().expect("alive").len(), 1);
    client.set_endpoint(&public_key(2), format!("127.0.0.1:{right}").parse().expect("an endpoint")).expect("set");
    assert_eq!(read(&server_tun), outbound());
}

#[test]
fn the_thread_runs_the_hook_first_and_has_a_name_and_no_signals() {
    let before = SigSet::thread_get_mask().expect("a mask");
    let (_tun, theirs) = tun();
    let (sender, receiver) = std::sync::mpsc::channel();
    let sockets = Sockets::bind(0, 0).expect("sockets");
    let hook = move || {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("procfs");
        sender.send(status).map_err(io::Error::other)
    };
    let _device = UserspaceDevice::start(&device(1, vec![]), theirs, sockets, hook).expect("a device");
    let status = receiver.try_recv().expect("the hook has run before start returns");
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).expect("a field").trim_matches([':', '\t']).to_owned()
    };
    assert_eq!(field("Name"), "wireguard");
    // All except SIGKILL and SIGSTOP, which cannot be blocked, and two that glibc reserves.
    let blocked = u64::from_str_radix(&field("SigBlk"), 16).expect("a mask");
    let (kill, stop, internal) = (1 << 8, 1 << 18, 0b11 << 31);
    assert_eq!(blocked | kill | stop | internal, u64::MAX);
    assert_eq!(SigSet::thread_get_mask().expect("a mask"), before, "the caller's mask is as it was");
}

#[test]
fn a_failing_hook_is_an_error() {
    let (ours, theirs) = tun();
    let sockets = Sockets::bind(0, 0).expect("sockets");
    let hook = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
    let error = UserspaceDevice::start(&device(1, vec![]), theirs, sockets, hook).map(drop).expect_err("an error");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    assert!(read(&ours).is_empty(), "the TUN is closed");
}
