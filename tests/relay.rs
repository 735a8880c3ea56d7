//! A relay with many clients at once, with few descriptors, and with clients that are idle or have vanished.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::{HOST_ON_LAN, Lab, Peer, Reach, Skip};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vpn_exec::config::ports::parse_publish;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::sysctl;
use vpn_exec::relay::{self, Budget, Limits, Relay, RelayedPort, Targets};
use vpn_exec::{lease::status, registry};

const NAME: &str = "many";

/// How long an operation may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait for a reply that must not arrive.
const SILENCE: Duration = Duration::from_millis(500);

/// The host's address: each test runs in a namespace of its own.
const HOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Takes up a tunnel that publishes port 80 as 8080, from a shell that sets a limit first.
fn up(lab: &Lab, limit: &str) -> Result<NetworkNamespace> {
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let way = if lab::tunnel::is_rootless() { "--rootless" } else { "" };
    let up = format!("{limit} && exec \"$0\" up {way} \"$1\" --name {NAME} --backend userspace --publish 8080:80");
    let program = lab::launcher::binary();
    let output = Command::new("sh").arg("-c").arg(up).arg(program).arg(file).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lab::tunnel::namespace(NAME)
}

fn down() -> Result<()> {
    let output = lab::vpn_exec(["down", NAME]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn connect() -> Result<TcpStream> {
    let stream = TcpStream::connect((HOST, 8080))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Accepts all connections to port 80 inside.
fn accept_all(inside: &NetworkNamespace) -> Result<mpsc::Receiver<TcpStream>> {
    let listener = inside.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)))?;
    let (sender, accepted) = mpsc::channel();
    std::thread::spawn(move || listener.incoming().map_while(Result::ok).try_for_each(|stream| sender.send(stream)));
    Ok(accepted)
}

/// Sends all bytes back.
fn echo(mut stream: TcpStream) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
    });
}

/// Raises the limit of open files of this process to the hard limit, and returns it.
fn raise_own_limit() -> Result<usize> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    Ok(limit.maximum.unwrap_or(u64::MAX).try_into()?)
}

#[test]
fn thousands_of_connections_work_at_once() {
    lab::test(Peer::Ours, |lab| {
        // Each takes two descriptors here, and two in the keeper.
        let many = 4000.min((raise_own_limit()? - 600) / 2);
        // A usual soft limit of a shell. The keeper has to raise it.
        let inside = up(lab, "ulimit -S -n 256")?;
        let accepted = accept_all(&inside)?;
        let mut pairs = Vec::with_capacity(many);
        for number in 0..many {
            let mut client = connect().with_context(|| format!("number {number}"))?;
            client.write_all(&u32::try_from(number)?.to_be_bytes())?;
            let server = accepted.recv_timeout(PATIENCE).with_context(|| format!("number {number}"))?;
            server.set_read_timeout(Some(PATIENCE))?;
            pairs.push((client, server));
        }
        // All connections work and lead to the right client. The oldest is tried last.
        for (number, (client, server)) in pairs.iter_mut().enumerate().rev() {
            let mut bytes = [0; 4];
            server.read_exact(&mut bytes).with_context(|| format!("number {number}"))?;
            ensure!(usize::try_from(u32::from_be_bytes(bytes))? == number, "{bytes:?} is not {number}");
            server.write_all(&bytes)?;
            client.read_exact(&mut bytes).with_context(|| format!("number {number}"))?;
        }
        ensure!(
            registry::read(&NAME.parse()?)?.is_some()
                && status::of(&NAME.parse()?)?.is_some_and(|it| it.living.is_some())
        );
        drop((pairs, inside));
        down()
    });
}

/// Returns whether the connection sends bytes back.
fn is_alive(mut stream: &TcpStream) -> bool {
    let mut received = [0; 5];
    stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut received)).is_ok() && received == *b"hello"
}

/// Returns whether a connection has been reset. Only reads: a write may report that too late.
fn is_gone(mut stream: &TcpStream) -> Result<bool> {
    stream.set_nonblocking(true)?;
    let read = stream.read(&mut [0]);
    stream.set_nonblocking(false)?;
    Ok(!matches!(read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock))
}

/// Waits until at least `gone` connections are gone, and returns the numbers of the others.
fn left(streams: &[TcpStream], gone: usize) -> Result<Vec<usize>> {
    let mut left = Vec::new();
    lab::wait_until(lab::patience(PATIENCE), &format!("{gone} connections do not end"), || {
        left.clear();
        for (number, stream) in streams.iter().enumerate() {
            if !is_gone(stream)? {
                left.push(number);
            }
        }
        Ok(streams.len() - left.len() >= gone)
    })?;
    Ok(left)
}

#[test]
fn when_descriptors_run_out_connections_of_the_client_that_holds_most_are_evicted() {
    lab::test(Peer::Ours, |lab| {
        const MANY: usize = 200;
        let inside = up(lab, "ulimit -n 512")?;
        let accepted = accept_all(&inside)?;
        std::thread::spawn(move || accepted.into_iter().for_each(echo));
        let from_lan = || -> Result<TcpStream> {
            let to = (HOST_ON_LAN.ipv4, 8080).into();
            let stream = lab.lan.run(|| TcpStream::connect_timeout(&to, lab::patience(PATIENCE)))?;
            stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
            Ok(stream)
        };
        // This one is idle for longer than all connections of the other client.
        let first = from_lan()?;
        ensure!(is_alive(&first));
        let hog = (0..MANY).map(|_| connect()).collect::<Result<Vec<_>>>()?;
        // The newest work, and the oldest have been evicted for them.
        ensure!(is_alive(&hog[MANY - 1]), "the newest connection does not work");
        let living = left(&hog, MANY / 4)?;
        ensure!((50..MANY).contains(&living.len()), "{} of {MANY} are left", living.len());
        ensure!(living[0] == MANY - living.len(), "not only the longest-idle were evicted: {living:?}");
        ensure!(is_alive(&first), "a connection of the other client was evicted");
        for _ in 0..3 {
            ensure!(is_alive(&from_lan()?), "a new connection does not work");
        }
        // Existing connections can move many bytes, and the keeper has the descriptors that it needs for itself.
        let much: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
        let (mut writer, mut received) = (first.try_clone()?, vec![0; much.len()]);
        let sent = much.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        (&first).read_exact(&mut received)?;
        writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        ensure!(received == much);
        let is_up = status::of(&NAME.parse()?)?.is_some_and(|status| status.living.is_some());
        ensure!(is_up, "the keeper does not answer");
        drop((hog, first, inside));
        down()
    });
}

/// Echoes the bytes of connections to a port of the calling thread's namespace.
fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((HOST, port))?;
    std::thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(echo));
    Ok(())
}

/// Connects from an address to a port of the host, and sends bytes both ways.
fn converse(from: impl Into<IpAddr>, port: u16) -> Result<TcpStream> {
    let from = from.into();
    let to: IpAddr = if from.is_ipv4() { HOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let stream = connect_from(SocketAddr::new(from, 0), SocketAddr::new(to, port))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    ensure!(is_alive(&stream), "the connection from {from} to port {port} does not work");
    Ok(stream)
}

fn loopback(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, last)
}

#[test]
fn the_longest_idle_connection_of_the_client_that_holds_most_is_evicted() {
    lab::world::test(|| {
        // Room for ten connections.
        let _relay = relay("8080:80", Limits::new(Budget::new(20)))?;
        serve(80)?;
        let first = converse(loopback(3), 8080)?;
        let hog = (0..30).map(|_| converse(loopback(2), 8080)).collect::<Result<Vec<_>>>()?;
        ensure!(left(&hog, 21)? == (21..30).collect::<Vec<_>>());
        // A connection that is in use is not the longest-idle one, however old it is.
        ensure!(is_alive(&hog[21]));
        let second = converse(loopback(4), 8080)?;
        ensure!(left(&hog, 22)?.iter().copied().eq([21].into_iter().chain(23..30)));
        ensure!(is_alive(&first) && is_alive(&second));
        Ok(())
    });
}

#[test]
fn ipv6_clients_are_counted_by_their_network() {
    lab::world::test(|| {
        let mut netlink = Netlink::open()?;
        let lo = netlink.link("lo")?.context("lo")?.index;
        let address = |net: u16, host: u16| Ipv6Addr::new(0x2001, 0xdb8, 0, net, 0, 0, 0, host);
        for (net, host) in (1..=30).map(|host| (1, host)).chain([(2, 1), (3, 1)]) {
            netlink.execute_one(NetlinkRequest::add_address(lo, "lo", IpNet::new(address(net, host).into(), 128)?))?;
        }
        let _relay = relay("8080:80", Limits::new(Budget::new(20)))?;
        serve(80)?;
        let first = converse(address(2, 1), 8080)?;
        let hog = (1..=30).map(|host| converse(address(1, host), 8080)).collect::<Result<Vec<_>>>()?;
        ensure!(left(&hog, 21)? == (21..30).collect::<Vec<_>>());
        let second = converse(address(3, 1), 8080)?;
        ensure!(is_alive(&first) && is_alive(&second), "each address of a network counts as a client");
        Ok(())
    });
}

#[test]
fn each_port_has_a_share_that_clients_of_other_ports_cannot_take() {
    lab::world::test(|| {
        // Room for twenty connections, of which five are reserved for each port.
        let _relay = relay("8080:80,8081:81", Limits::new(Budget::new(40)))?;
        serve(80)?;
        serve(81)?;
        // One client that holds most of all, within the share of its port.
        let own = (0..5).map(|_| converse(loopback(2), 8081)).collect::<Result<Vec<_>>>()?;
        // Many clients with a connection each.
        let others = (100..140).map(|last| converse(loopback(last), 8080)).collect::<Result<Vec<_>>>()?;
        ensure!(left(&others, 25)? == (25..40).collect::<Vec<_>>());
        ensure!(own.iter().all(is_alive), "a connection within the share of its port was evicted");
        // Connections beyond the share use the rest that all ports have.
        let sixth = converse(loopback(2), 8081)?;
        let seventh = converse(loopback(3), 8081)?;
        ensure!(is_alive(&sixth) != is_alive(&own[0]) && is_alive(&seventh));
        ensure!(left(&others, 25)?.len() <= 15);
        Ok(())
    });
}

/// A client that vanishes without closing its connection does not hold descriptors for ever. The program cannot notice
/// this itself, as its own probes (SO_KEEPALIVE of socket(7)) only reach the relay.
#[test]
fn a_client_that_has_vanished_is_noticed() {
    lab::world::test(|| {
        for (parameter, value) in [("time", "1"), ("intvl", "1"), ("probes", "2")] {
            sysctl::set(&format!("net/ipv4/tcp_keepalive_{parameter}"), value)?;
        }
        let _relay = relay("8080:80", Limits::new(Budget::new(10)))?;
        let listener = TcpListener::bind((HOST, 80))?;
        let client = connect()?;
        let (mut program, _) = listener.accept()?;
        let vanish = format!(
            "add table ip gone; add chain ip gone out {{ type filter hook output priority 0; }}; add rule ip gone out \
             tcp sport {} drop",
            client.local_addr()?.port()
        );
        match Command::new("nft").arg(vanish).output() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let reason = "there is no nft (Debian's package nftables)";
                return Err(Skip::error(reason, lab::variables::REQUIRE_PEERS));
            }
            output => ensure!(output?.status.success()),
        }
        program.set_read_timeout(Some(PATIENCE))?;
        let end = program.read(&mut [0]).map_err(|error| error.kind());
        ensure!(matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
        Ok(())
    });
}

/// splice(2) stops at urgent data (tcp(7)), which telnet and FTP send to interrupt a transfer. It must arrive at its
/// position in the stream, and the bytes after it as well.
#[test]
fn urgent_data_does_not_stop_the_stream() {
    lab::world::test(|| {
        // With descriptors for pipes, and without.
        for descriptors in [10, 2] {
            let relay = relay("8080:80", Limits::new(Budget::new(descriptors)))?;
            let listener = TcpListener::bind((HOST, 80))?;
            let client = connect()?;
            let (mut program, _) = listener.accept()?;
            for stream in [&client, &program] {
                stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
            }
            for (from, mut to) in [(&client, &program), (&program, &client)] {
                let mut expected = Vec::new();
                for round in 0..20_u8 {
                    let (before, urgent, after) = ([b'a' + round; 9], [b'A' + round], [b'0'; 3]);
                    let mut writer = from;
                    writer.write_all(&before)?;
                    let sent = rustix::net::send(from, &urgent, rustix::net::SendFlags::OOB)?;
                    ensure!(sent == 1);
                    writer.write_all(&after)?;
                    expected.extend([&before[..], &urgent, &after].concat());
                }
                let mut received = vec![0; expected.len()];
                to.read_exact(&mut received).context("the bytes after urgent data")?;
                ensure!(received == expected, "{}", String::from_utf8_lossy(&received));
            }
            client.shutdown(std::net::Shutdown::Write)?;
            ensure!(program.read(&mut [0; 1])? == 0);
            drop((client, program, listener, relay));
        }
        Ok(())
    });
}

/// A socket that connects to a port where no process listens may have been given that very port. Then it is connected
/// to itself (RFC 9293 section 3.5, simultaneous open), receives its own bytes, and keeps the port from the program.
#[test]
fn a_relay_never_connects_to_itself() {
    lab::world::test(|| {
        sysctl::set("net/ipv4/ip_local_port_range", "4000\t4001")?;
        let _relay = relay("8080:4000,8080:4000/udp", Limits::new(Budget::new(10)))?;
        let from = |port| SocketAddr::from((HOST, port));
        for port in 5000..5010 {
            let client = connect_from(from(port), from(8080))?;
            let received = reply_on(client);
            ensure!(received.is_none(), "the client received its own bytes: {received:?}");
            let client = socket(port)?;
            client.connect((HOST, 8080))?;
            client.set_read_timeout(Some(SILENCE / 10))?;
            client.send(b"hello")?;
            let received = client.recv(&mut [0; 16]);
            ensure!(received.is_err(), "the client received its own datagram");
        }
        TcpListener::bind((HOST, 4000))?;
        socket(4000)?;
        Ok(())
    });
}

/// Connects from one address to another.
fn connect_from(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let family = if from.is_ipv4() { rustix::net::AddressFamily::INET } else { rustix::net::AddressFamily::INET6 };
    let socket = rustix::net::socket(family, rustix::net::SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &from)?;
    rustix::net::connect(&socket, &to)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SILENCE))?;
    Ok(stream)
}

/// Sends bytes, and returns the reply if there is one.
fn reply_on(mut stream: TcpStream) -> Option<Vec<u8>> {
    let mut received = [0; 16];
    stream.write_all(b"hello").ok()?;
    match stream.read(&mut received) {
        Ok(length @ 1..) => Some(received[..length].to_vec()),
        _ => None,
    }
}

/// Relays ports of the calling thread's namespace to other ports there.
fn relay(ports: &str, limits: Limits) -> Result<Relay> {
    let mut relayed: Vec<RelayedPort> = Vec::new();
    for text in ports.split(',') {
        relayed.extend(parse_publish(text).map_err(anyhow::Error::msg)?.iter().map(RelayedPort::from));
    }
    Ok(Relay::start(relay::bind(&relayed)?, Targets::Addresses(vec![HOST.into()]), None, limits, || Ok(()))?)
}

fn socket(port: u16) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((HOST, port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Sends a datagram and a reply to it. Returns the source address that the server sees.
fn exchange(client: &UdpSocket, server: &UdpSocket) -> Result<SocketAddr> {
    client.send(b"hello")?;
    let (_, from) = server.recv_from(&mut [0; 16])?;
    server.send_to(b"welcome", from)?;
    client.recv(&mut [0; 16])?;
    Ok(from)
}

#[test]
fn a_flow_ends_when_it_is_idle_and_not_before() {
    lab::world::test(|| {
        const IDLE: Duration = Duration::from_secs(2);
        let limits = Limits { idle: IDLE, ..Limits::new(Budget::new(10)) };
        let _relay = relay("5300:53/udp", limits)?;
        let (server, client, other) = (socket(53)?, socket(0)?, socket(0)?);
        client.connect((HOST, 5300))?;
        other.connect((HOST, 5300))?;
        let (flow, idle) = (exchange(&client, &server)?, exchange(&other, &server)?);
        ensure!(flow != idle, "two clients share a flow");
        let begin = Instant::now();
        while begin.elapsed() < 2 * IDLE {
            ensure!(exchange(&client, &server)? == flow, "a flow that is in use has ended");
            std::thread::sleep(IDLE / 40);
        }
        // The server cannot reply to the idle flow any more.
        let answer = UdpSocket::connect(&server, idle).and_then(|()| server.send(b"late"));
        let refused = answer.and_then(|_| server.recv(&mut [0; 16])).err().map(|error| error.kind());
        ensure!(refused == Some(std::io::ErrorKind::ConnectionRefused), "{refused:?}: the idle flow has not ended");
        Ok(())
    });
}

#[test]
fn when_descriptors_run_out_flows_of_the_client_that_holds_most_are_evicted() {
    lab::world::test(|| {
        let _relay = relay("5300:53/udp,8080:80", Limits::new(Budget::new(40)))?;
        let server = socket(53)?;
        let from = |address| -> Result<UdpSocket> {
            let client = UdpSocket::bind((address, 0))?;
            client.set_read_timeout(Some(lab::patience(PATIENCE)))?;
            client.connect((HOST, 5300))?;
            Ok(client)
        };
        let first = from(loopback(3))?;
        let flow = exchange(&first, &server)?;
        let hog = (0..40).map(|_| from(loopback(2))).collect::<Result<Vec<_>>>()?;
        let flows = hog.iter().map(|client| exchange(client, &server)).collect::<Result<Vec<_>>>()?;
        ensure!(exchange(&first, &server)? == flow, "another client's flow was evicted");
        let is_there = |flow: &SocketAddr| UdpSocket::bind(flow).is_err();
        // The share of the TCP port, a quarter of all, is not touched.
        ensure!(flows.iter().filter(|flow| is_there(flow)).count() == 29);
        serve(80)?;
        let streams = (0..2).map(|_| converse(loopback(2), 8080)).collect::<Result<Vec<_>>>()?;
        ensure!(streams.iter().all(is_alive));
        Ok(())
    });
}

#[test]
fn when_descriptors_run_out_the_longest_idle_flow_is_evicted() {
    lab::world::test(|| {
        let _relay = relay("5300:53/udp", Limits::new(Budget::new(2)))?;
        let server = socket(53)?;
        let clients = (0..3).map(|_| socket(0)).collect::<Result<Vec<_>>>()?;
        for client in &clients {
            client.connect((HOST, 5300))?;
        }
        let flows = clients.iter().map(|client| exchange(client, &server)).collect::<Result<Vec<_>>>()?;
        ensure!(
            exchange(&clients[1], &server)? == flows[1] && exchange(&clients[2], &server)? == flows[2],
            "the flows in use were evicted"
        );
        // The port of an open socket cannot be bound.
        let is_there = |flow: &SocketAddr| UdpSocket::bind(flow).is_err();
        ensure!(flows.iter().map(is_there).eq([false, true, true]));
        // The client of the evicted flow gets a new one.
        exchange(&clients[0], &server)?;
        Ok(())
    });
}
