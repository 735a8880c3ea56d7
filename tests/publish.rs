//! Published ports (port forwarding from the host): a program is reached at ports of the host, from everywhere that the
//! host is reached from, and only at these.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::{HOST, HOST_ON_LAN, Lab, Peer, Reach, Snapshot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::poll::wait_for;
use vpn_exec::{lease::status, registry};

const NAME: &str = "pub";

/// How long an operation may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

fn vpn_exec(arguments: &[&str]) -> Result<Output> {
    Ok(lab::vpn_exec(arguments).output()?)
}

fn works(arguments: &[&str]) -> Result<()> {
    let output = vpn_exec(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Takes up a tunnel that publishes some ports, and returns its namespace.
fn up(lab: &Lab, ports: &[&str]) -> Result<NetworkNamespace> {
    up_from(&lab.wg_quick_file(Reach::Ipv4)?, ports)
}

fn up_from(file: &Path, ports: &[&str]) -> Result<NetworkNamespace> {
    let mut arguments = vec!["up", file.to_str().context("UTF-8")?, "--name", NAME, "--backend", lab::backend()];
    ports.iter().for_each(|port| arguments.extend(["--publish", port]));
    works(&arguments)?;
    inside()
}

fn inside() -> Result<NetworkNamespace> {
    lab::tunnel::namespace(NAME)
}

fn down() -> Result<()> {
    works(&["down", NAME])
}

/// Sends all bytes back in upper case, and ends when the client does.
fn shout(inside: &NetworkNamespace, address: impl Into<IpAddr>, port: u16) -> Result<()> {
    let address = SocketAddr::new(address.into(), port);
    let listener = inside.run(|| TcpListener::bind(address))?;
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || shout_back(connection));
        }
    });
    Ok(())
}

fn shout_back(mut connection: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let length = connection.read(&mut buffer)?;
        if length == 0 {
            return connection.shutdown(Shutdown::Write);
        }
        buffer[..length].make_ascii_uppercase();
        connection.write_all(&buffer[..length])?;
    }
}

fn connect(from: &NetworkNamespace, to: impl Into<IpAddr>, port: u16) -> Result<TcpStream> {
    let to = SocketAddr::new(to.into(), port);
    let stream =
        from.run(|| TcpStream::connect_timeout(&to, lab::patience(PATIENCE))).with_context(|| format!("to {to}"))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    Ok(stream)
}

/// Waits for a connection, but not for ever.
fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    let ready = wait_for(&[listener.as_fd()], Some(lab::patience(PATIENCE)))?;
    ensure!(ready[0], "no connection arrives");
    let (stream, from) = listener.accept()?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    Ok((stream, from))
}

/// Sends bytes, ends that direction, and expects the reply and its end.
fn converse(mut stream: TcpStream) -> Result<()> {
    stream.write_all(b"hello")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("the reply does not end")?;
    ensure!(answer == "HELLO", "{answer:?}");
    Ok(())
}

#[test]
fn a_program_is_reached_from_everywhere_on_whatever_address_it_listens() {
    lab::test(Peer::Ours, |lab| {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let before = Snapshot::take()?;
        let inside = up_from(&file, &["8080:80", "8001-8003:81-83", "127.0.0.1:8004:84", "[::1]:8005:85/tcp"])?;
        shout(&inside, Ipv4Addr::LOCALHOST, 80)?;
        shout(&inside, Ipv6Addr::LOCALHOST, 81)?;
        shout(&inside, Ipv4Addr::UNSPECIFIED, 82)?;
        shout(&inside, Ipv6Addr::UNSPECIFIED, 83)?;
        shout(&inside, lab::TUNNEL_CLIENT.ipv4, 84)?;
        shout(&inside, lab::TUNNEL_CLIENT.ipv6, 85)?;
        for port in [8080, 8001, 8002, 8003] {
            for to in HOST.both().into_iter().chain([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]) {
                converse(connect(&lab.host, to, port)?).with_context(|| format!("from the host to {to} {port}"))?;
            }
            for to in HOST_ON_LAN.both() {
                converse(connect(&lab.lan, to, port)?).with_context(|| format!("from the LAN to {to} {port}"))?;
            }
        }
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 8004)?)?;
        converse(connect(&lab.host, Ipv6Addr::LOCALHOST, 8005)?)?;
        ensure!(connect(&lab.lan, HOST_ON_LAN.ipv4, 8004).is_err(), "it is published on the loopback only");
        ensure!(connect(&lab.lan, HOST_ON_LAN.ipv4, 80).is_err(), "the program's own port is not published");
        drop(inside);
        down()?;
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "{changes:#?}");
        Ok(())
    });
}

/// The program's loopback has IPv6 even if the tunnel has none, and some programs use ::1 for `localhost`.
#[test]
fn a_program_on_the_ipv6_loopback_is_reached_in_a_tunnel_without_ipv6() {
    lab::test(Peer::Ours, |lab| {
        let text = lab.wg_quick_text(Reach::Ipv4).replace(&format!(", {}/128", lab::TUNNEL_CLIENT.ipv6), "");
        let inside = up_from(&lab.file(&text)?, &["8080:80", "5300:53/udp"])?;
        shout(&inside, Ipv6Addr::LOCALHOST, 80)?;
        converse(connect(&lab.lan, HOST_ON_LAN.ipv4, 8080)?)?;
        let socket = inside.run(|| UdpSocket::bind((Ipv6Addr::LOCALHOST, 53)))?;
        socket.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.send_to(b"hello", (Ipv4Addr::LOCALHOST, 5300))?;
        let length = socket.recv(&mut [0; 16]).context("no datagram")?;
        ensure!(length == 5);
        drop((socket, inside));
        down()
    });
}

#[test]
fn many_bytes_pass_both_ways_while_a_client_that_never_reads_is_connected() {
    lab::test(Peer::Ours, |lab| {
        const MUCH: usize = 64 << 20;
        let inside = up(lab, &["8080:80"])?;
        shout(&inside, Ipv4Addr::LOCALHOST, 80)?;
        // A client that sends and never reads must be blocked, and not fill up the keeper's memory.
        let mut lazy = connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?;
        lazy.set_write_timeout(Some(Duration::from_millis(300)))?;
        let mut sent = 0;
        while sent < MUCH {
            match lazy.write(&[b'x'; 65536]) {
                Ok(length) => sent += length,
                Err(_) => break,
            }
        }
        ensure!(sent < MUCH, "{sent} bytes were accepted from a client that never reads");

        let mut reader = connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?;
        let mut writer = reader.try_clone()?;
        let sending = std::thread::spawn(move || -> std::io::Result<()> {
            let line: Vec<u8> = (0..65536_u32).map(|number| b'a' + (number % 23) as u8).collect();
            for _ in 0..MUCH / line.len() {
                writer.write_all(&line)?;
            }
            writer.shutdown(Shutdown::Write)
        });
        let (mut received, mut buffer) = (0_usize, vec![0; 65536]);
        loop {
            let length = reader.read(&mut buffer)?;
            if length == 0 {
                break;
            }
            for (at, byte) in buffer[..length].iter().enumerate() {
                ensure!(*byte == b'A' + ((received + at) % 65536 % 23) as u8, "wrong at {}", received + at);
            }
            received += length;
        }
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        ensure!(received == MUCH, "{received} of {MUCH} bytes came back");
        drop((lazy, inside));
        down()
    });
}

#[test]
fn hundreds_of_connections_work_at_once() {
    lab::test(Peer::Ours, |lab| {
        let inside = up(lab, &["8080:80"])?;
        shout(&inside, Ipv4Addr::LOCALHOST, 80)?;
        let streams = (0..300).map(|_| connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)).collect::<Result<Vec<_>>>()?;
        for stream in streams.into_iter().rev() {
            converse(stream)?;
        }
        drop(inside);
        down()
    });
}

#[test]
fn a_connection_is_reset_while_the_program_does_not_listen_and_works_later() {
    lab::test(Peer::Ours, |lab| {
        let inside = up(lab, &["8080:80"])?;
        let answer = TcpStream::connect((Ipv4Addr::LOCALHOST, 8080)).and_then(|mut stream| stream.read(&mut [0; 1]));
        let error = answer.err().context("the connection ends without a reset")?;
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}");
        shout(&inside, Ipv4Addr::LOCALHOST, 80)?;
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?)?;
        drop(inside);
        down()
    });
}

#[test]
fn datagrams_pass_both_ways_and_replies_come_from_the_address_that_was_asked() {
    lab::test(Peer::Ours, |lab| {
        let inside = up(lab, &["5300:53/udp", "5301:54/udp"])?;
        for (address, port) in [(IpAddr::from(Ipv4Addr::LOCALHOST), 53), (Ipv6Addr::LOCALHOST.into(), 54)] {
            let socket = inside.run(|| UdpSocket::bind((address, port)))?;
            std::thread::spawn(move || {
                let mut buffer = [0; 2048];
                while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    buffer[..length].make_ascii_uppercase();
                    let _ = socket.send_to(&buffer[..length], from);
                }
            });
        }
        let ask = |from: &NetworkNamespace, to: IpAddr, port: u16| -> Result<()> {
            let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = from.run(|| UdpSocket::bind((any, 0)))?;
            // A connected socket ignores replies from any other address.
            socket.connect((to, port))?;
            socket.set_read_timeout(Some(lab::patience(PATIENCE)))?;
            for text in ["one", "two"] {
                socket.send(text.as_bytes())?;
                let mut buffer = [0; 64];
                let length = socket.recv(&mut buffer).with_context(|| format!("no reply from {to} {port}"))?;
                ensure!(buffer[..length] == *text.to_uppercase().as_bytes());
            }
            Ok(())
        };
        for port in [5300, 5301] {
            for to in HOST.both().into_iter().chain([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]) {
                ask(&lab.host, to, port)?;
            }
            for to in HOST_ON_LAN.both() {
                ask(&lab.lan, to, port)?;
            }
        }
        drop(inside);
        down()
    });
}

#[test]
fn a_port_in_use_is_an_error_before_anything_is_changed() {
    lab::test(Peer::Ours, |lab| {
        let _taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080))?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("UTF-8")?;
        let before = Snapshot::take()?;
        let launch = ["--config", file, "--backend", lab::backend(), "--publish", "8080:80", "--", "true"];
        let start = ["up", file, "--backend", lab::backend(), "--publish", "8080:80"];
        let foreground = ["up", "--foreground", file, "--backend", lab::backend(), "--publish", "8080:80"];
        for arguments in [launch.as_slice(), &start, &foreground] {
            let output = vpn_exec(arguments)?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(125), "{arguments:?}: {text}");
            ensure!(
                text.contains("TCP port 8080 of the host") && text.contains("stop the program that uses the port"),
                "{text}"
            );
            let changes = before.changes_within(PATIENCE)?;
            ensure!(changes.is_empty(), "{arguments:?}: {changes:#?}");
        }
        Ok(())
    });
}

/// The soft limit of open files is for programs that use select(2).
#[test]
fn more_ports_than_the_soft_limit_of_open_files_are_published() {
    lab::test(Peer::Ours, |lab| {
        let former = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(256), ..former })?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let inside = up_from(&file, &["20000-20299:20000-20299"])?;
        shout(&inside, Ipv4Addr::LOCALHOST, 20299)?;
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 20299)?)?;
        reloads(&file, &[])?;
        reloads(&file, &["21000-21299:20000-20299"])?;
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 21299)?)?;
        drop(inside);
        down()?;
        // More ports than the hard limit allows.
        setrlimit(Resource::Nofile, Rlimit { current: Some(256), maximum: Some(256) })?;
        let before = Snapshot::take()?;
        let file = file.to_str().context("UTF-8")?;
        let output = vpn_exec(&["up", file, "--backend", lab::backend(), "--publish", "20000-20299:20000-20299"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(125) && text.contains("raise the hard limit"), "{text}");
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "{changes:#?}");
        Ok(())
    });
}

#[test]
fn the_successor_of_a_killed_keeper_publishes_the_same_ports() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("without a program inside, a rootless tunnel ends with its keeper")?;
        let inside = up(lab, &["8080:80", "5300:53/udp"])?;
        shout(&inside, Ipv4Addr::LOCALHOST, 80)?;
        let _open = connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?;
        let keeper = registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed();
        kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
        up(lab, &["8080:80", "5300:53/udp"])?;
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?)?;

        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let replace = ["up", file.to_str().context("UTF-8")?, "--name", NAME, "--backend", lab::backend(), "--replace"];
        works(&[replace.as_slice(), &["--publish", "8080:80", "--publish", "5300:53/udp"]].concat())?;
        let begin = Instant::now();
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?)?;
        ensure!(begin.elapsed() < lab::patience(PATIENCE));
        drop(inside);
        down()
    });
}

#[test]
fn clients_of_a_published_port_do_not_come_from_the_programs_loopback() {
    lab::test(Peer::Ours, |lab| {
        let inside = up(lab, &["8080:80"])?;
        let listener = inside.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)))?;
        let _stream = connect(&lab.lan, HOST_ON_LAN.ipv4, 8080)?;
        let (_, from) = accept(&listener)?;
        // Many web interfaces trust all clients from the loopback.
        ensure!(!from.ip().is_loopback(), "{from}");
        drop((listener, inside));
        down()
    });
}

/// Clients of a port that is published on the host's loopback only reach the program from its loopback, as if it ran on
/// the host. Clients of all other ports come from the link, even the host's own programs.
#[test]
fn clients_of_a_port_on_the_hosts_loopback_come_from_the_programs_loopback() {
    lab::test(Peer::Ours, |lab| {
        let on_link = format!("{}:8004:84", HOST_ON_LAN.ipv4);
        let ports = ["127.0.0.1:8080:80", "[::1]:8081:81", "127.0.0.1:8082:82", "8083:83", &on_link];
        let inside = up(lab, &[ports.as_slice(), &["127.0.0.1:5300:53/udp", "5301:53/udp"]].concat())?;
        let listen = |address: IpAddr, port| inside.run(|| TcpListener::bind((address, port)));
        let (ipv4, ipv6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
        let cases: [(IpAddr, u16, IpAddr, u16, Option<IpAddr>); 8] = [
            // The program listens on all addresses, on the loopback, or on that of the other family.
            (Ipv4Addr::UNSPECIFIED.into(), 80, ipv4, 8080, Some(ipv4)),
            (ipv4, 80, ipv4, 8080, Some(ipv4)),
            (ipv6, 80, ipv4, 8080, Some(ipv6)),
            (Ipv6Addr::UNSPECIFIED.into(), 81, ipv6, 8081, Some(ipv6)),
            (ipv4, 81, ipv6, 8081, Some(ipv4)),
            // It listens on another address only.
            (lab::TUNNEL_CLIENT.ipv4.into(), 82, ipv4, 8082, None),
            // The port is not published on the loopback only.
            (Ipv4Addr::UNSPECIFIED.into(), 83, ipv4, 8083, None),
            (Ipv4Addr::UNSPECIFIED.into(), 84, HOST_ON_LAN.ipv4.into(), 8004, None),
        ];
        for (address, port, to, published, expected) in cases {
            let listener = listen(address, port)?;
            let _stream = connect(&lab.host, to, published)?;
            let from = accept(&listener)?.1.ip().to_canonical();
            let is_right = expected.map_or(!from.is_loopback(), |expected| expected == from);
            ensure!(is_right, "a client of {to} {published} reaches {address} from {from}");
        }
        let socket = inside.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)))?;
        socket.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        for (published, is_loopback) in [(5300, true), (5301, false)] {
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            client.send_to(b"hello", (Ipv4Addr::LOCALHOST, published))?;
            let (_, from) = socket.recv_from(&mut [0; 16])?;
            ensure!(from.ip().is_loopback() == is_loopback, "a client of {published} comes from {from}");
        }
        drop((socket, inside));
        down()
    });
}

/// Reads a header of the PROXY protocol, version 2. Returns the client's address, and the host's address that it
/// connected to.
fn read_header(connection: &mut TcpStream) -> Result<(SocketAddr, SocketAddr)> {
    let mut begin = [0; 16];
    connection.read_exact(&mut begin)?;
    ensure!(begin[..12] == *b"\r\n\r\n\0\r\nQUIT\n" && begin[12] == 0x21, "{begin:?}");
    let mut rest = vec![0; u16::from_be_bytes([begin[14], begin[15]]).into()];
    connection.read_exact(&mut rest)?;
    let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
    let ipv4 = |at: usize| -> Result<IpAddr> { Ok(<[u8; 4]>::try_from(&rest[at..at + 4])?.into()) };
    let ipv6 = |at: usize| -> Result<IpAddr> { Ok(<[u8; 16]>::try_from(&rest[at..at + 16])?.into()) };
    Ok(match (begin[13], rest.len()) {
        (0x11, 12) => (SocketAddr::new(ipv4(0)?, port(8)), SocketAddr::new(ipv4(4)?, port(10))),
        (0x21, 36) => (SocketAddr::new(ipv6(0)?, port(32)), SocketAddr::new(ipv6(16)?, port(34))),
        other => bail!("{other:?}"),
    })
}

#[test]
fn with_the_proxy_protocol_a_program_learns_its_clients_address() {
    lab::test(Peer::Ours, |lab| {
        let inside = up(lab, &["8080:80,proxy-protocol=v2", "[::1]:8081:80,proxy-protocol=v2", "8082:80"])?;
        let listener = inside.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)))?;
        let own = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let ways = HOST.both().into_iter().chain(own).map(|to| (&lab.host, to, 8080));
        let from_lan = HOST_ON_LAN.both().into_iter().map(|to| (&lab.lan, to, 8080));
        for (from, to, port) in ways.chain(from_lan).chain([(&lab.host, own[1], 8081)]) {
            for speaks_first in [true, false] {
                let mut client = connect(from, to, port)?;
                if speaks_first {
                    client.write_all(b"hello")?;
                }
                let (mut connection, _) = accept(&listener).with_context(|| format!("by {to} {port}"))?;
                let (source, destination) = read_header(&mut connection)?;
                ensure!(source == client.local_addr()?, "{source} is not {:?}", client.local_addr());
                ensure!(destination == SocketAddr::new(to, port), "{destination} is not {to} {port}");
                if speaks_first {
                    let mut received = [0; 5];
                    connection.read_exact(&mut received)?;
                    ensure!(received == *b"hello");
                }
                // The client does not receive the header.
                connection.write_all(b"welcome")?;
                let mut answer = [0; 7];
                client.read_exact(&mut answer)?;
                ensure!(answer == *b"welcome");
            }
        }
        // Without the option there is no header.
        connect(&lab.host, HOST.ipv4, 8082)?.write_all(b"hello")?;
        let mut received = Vec::new();
        accept(&listener)?.0.read_to_end(&mut received)?;
        ensure!(received == b"hello", "{received:?}");
        drop((listener, inside));
        down()
    });
}

/// Reloads a file with other published ports.
fn reload(file: &Path, ports: &[&str]) -> Result<Output> {
    let mut arguments = vec!["reload", file.to_str().context("UTF-8")?, "--name", NAME, "--backend", lab::backend()];
    ports.iter().for_each(|port| arguments.extend(["--publish", port]));
    vpn_exec(&arguments)
}

fn reloads(file: &Path, ports: &[&str]) -> Result<String> {
    let output = reload(file, ports)?;
    ensure!(output.status.success(), "{ports:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a reload that must fail, and returns its messages.
fn reload_fails(file: &Path, ports: &[&str]) -> Result<String> {
    let output = reload(file, ports)?;
    ensure!(output.status.code() == Some(125), "{ports:?} are published");
    Ok(String::from_utf8(output.stderr)?)
}

/// Returns whether a connection sends bytes back.
fn is_alive(mut stream: &TcpStream) -> bool {
    let mut answer = [0; 2];
    stream.write_all(b"hi").and_then(|()| stream.read_exact(&mut answer)).is_ok() && answer == *b"HI"
}

/// Returns whether a connection has ended.
fn has_ended(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(length) => length == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_reload_changes_ports_and_leaves_other_connections_alone() {
    lab::test(Peer::Ours, |lab| {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let before = Snapshot::take()?;
        let inside = up_from(&file, &[])?;
        for port in [80, 81, 82] {
            shout(&inside, Ipv4Addr::UNSPECIFIED, port)?;
        }
        let echo = inside.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)))?;
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = echo.recv_from(&mut buffer) {
                let _ = echo.send_to(&buffer[..length], from);
            }
        });
        let host = HOST.ipv4;
        // The first ports of a tunnel that had none.
        let said = reloads(&file, &["8080:80", "8081:81", "5300:53/udp"])?;
        ensure!(said.contains("published ports: was none, is now 8080:80/tcp, 8081:81/tcp, 5300:53/udp"), "{said}");
        let (stays, goes) = (connect(&lab.host, host, 8080)?, connect(&lab.lan, HOST_ON_LAN.ipv4, 8081)?);
        ensure!(is_alive(&stays) && is_alive(&goes));
        let flow = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        flow.connect((Ipv4Addr::LOCALHOST, 5300))?;
        flow.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        flow.send(b"hello")?;
        flow.recv(&mut [0; 16])?;

        reloads(&file, &["8080:80", "8082:82"])?;
        ensure!(is_alive(&stays), "a connection of an unchanged port has ended");
        ensure!(has_ended(&goes), "a connection of an unpublished port is still open");
        ensure!(connect(&lab.host, host, 8081).is_err(), "the unpublished port still accepts connections");
        converse(connect(&lab.host, host, 8082)?)?;
        let unreachable = flow.send(b"hello").and_then(|_| flow.recv(&mut [0; 16]));
        ensure!(unreachable.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused));

        // Another target: the port is never closed, but connections to the former target end.
        let to_82 = connect(&lab.host, host, 8082)?;
        reloads(&file, &["8080:81", "8082:82"])?;
        ensure!(has_ended(&stays) && is_alive(&to_82));
        converse(connect(&lab.host, host, 8080)?)?;

        // On one address, and on all addresses again.
        reloads(&file, &["127.0.0.1:8080:81", "8082:82"])?;
        converse(connect(&lab.host, Ipv4Addr::LOCALHOST, 8080)?)?;
        ensure!(connect(&lab.lan, HOST_ON_LAN.ipv4, 8080).is_err() && is_alive(&to_82));
        reloads(&file, &["8080:81", "8082:82"])?;
        converse(connect(&lab.lan, HOST_ON_LAN.ipv4, 8080)?)?;
        ensure!(is_alive(&to_82));
        // The unspecified address of a family conflicts with each address.
        reloads(&file, &["0.0.0.0:8080:81", "8082:82"])?;
        reloads(&file, &["127.0.0.1:8080:81", "8082:82"])?;
        ensure!(connect(&lab.lan, HOST_ON_LAN.ipv4, 8080).is_err() && is_alive(&to_82));
        reloads(&file, &["0.0.0.0:8080:81", "8082:82"])?;
        converse(connect(&lab.lan, HOST_ON_LAN.ipv4, 8080)?)?;
        reloads(&file, &["8080:81", "8082:82"])?;
        ensure!(is_alive(&to_82));

        // The successor of a killed keeper has the changed ports.
        let mut program = lab::vpn_exec(["--tunnel", NAME, "--", "sleep", "60"]).spawn()?;
        let keeper = || -> Result<i32> { Ok(registry::read(&NAME.parse()?)?.context("a state")?.keeper.cast_signed()) };
        let (former, begin) = (keeper()?, Instant::now());
        let is_inside = || -> Result<bool> { Ok(status::of(&NAME.parse()?)?.is_some_and(|status| status.leases > 0)) };
        while !is_inside()? {
            ensure!(begin.elapsed() < lab::patience(PATIENCE), "the program does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        kill(Pid::from_raw(former), Signal::SIGKILL)?;
        while keeper()? == former || connect(&lab.host, host, 8082).is_err() {
            ensure!(begin.elapsed() < lab::patience(PATIENCE), "there is no successor");
            std::thread::sleep(Duration::from_millis(5));
        }
        converse(connect(&lab.host, host, 8080)?)?;
        ensure!(connect(&lab.host, host, 8081).is_err());

        // No ports at all.
        reloads(&file, &[])?;
        ensure!(connect(&lab.host, host, 8080).is_err() && connect(&lab.host, host, 8082).is_err());
        program.kill()?;
        program.wait()?;
        drop(inside);
        works(&["down", NAME, "--force"])?;
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "{changes:#?}");
        Ok(())
    });
}

#[test]
fn a_program_that_listens_on_a_new_address_of_its_tunnel_is_reached() {
    lab::test(Peer::Ours, |lab| {
        const NEW: Ipv4Addr = Ipv4Addr::new(10, 99, 99, 99);
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let inside = up_from(&file, &["8080:80", "5300:53/udp"])?;
        let text = std::fs::read_to_string(&file)?;
        std::fs::write(&file, text.replacen("Address = ", &format!("Address = {NEW}/32, "), 1))?;
        let said = reloads(&file, &["8080:80", "5300:53/udp"])?;
        ensure!(said.contains(&NEW.to_string()), "{said}");
        shout(&inside, NEW, 80)?;
        converse(connect(&lab.lan, HOST_ON_LAN.ipv4, 8080)?)?;
        let socket = inside.run(|| UdpSocket::bind((NEW, 53)))?;
        socket.set_read_timeout(Some(lab::patience(PATIENCE)))?;
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        client.send_to(b"hello", (Ipv4Addr::LOCALHOST, 5300))?;
        let mut buffer = [0; 16];
        let (length, _) = socket.recv_from(&mut buffer).context("no datagram")?;
        ensure!(buffer[..length] == *b"hello");
        drop((socket, inside));
        down()
    });
}

#[test]
fn a_reload_with_ports_that_cannot_be_bound_changes_nothing() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("ports below 1024")?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let inside = up_from(&file, &["8080:80", "8081:81"])?;
        shout(&inside, Ipv4Addr::UNSPECIFIED, 80)?;
        shout(&inside, Ipv4Addr::UNSPECIFIED, 81)?;
        let connected = [connect(&lab.lan, HOST_ON_LAN.ipv4, 8080)?, connect(&lab.lan, HOST_ON_LAN.ipv4, 8081)?];
        let _taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9000))?;
        for (ports, complaint) in [
            (&["9001:91", "9000:90"][..], "stop the program that uses the port"),
            // Together with a port that moves to one address; and a port that moves to an address that the host does
            // not have.
            (&["127.0.0.1:8080:80", "9000:90"], "stop the program that uses the port"),
            (&["198.51.100.99:8080:80", "9001:91"], "publish on an address that the host has"),
            (&["8080:80", "8081:81", "80:80"], "the capability for ports below 1024"),
        ] {
            let said = reload_fails(&file, ports)?;
            ensure!(said.contains(complaint), "{ports:?}: {said}");
            ensure!(connect(&lab.host, HOST.ipv4, 9001).is_err(), "{ports:?}: a part of the change is applied");
            ensure!(connected.iter().all(is_alive), "{ports:?}: a connection has ended");
            for port in [8080, 8081] {
                converse(connect(&lab.lan, HOST_ON_LAN.ipv4, port)?)?;
            }
            // A port that was closed for the change and reopened still has its connections.
            ensure!(reload(&file, &["8080:80", "8081:81"])?.stdout == b"nothing has changed\n");
        }
        reloads(&file, &[])?;
        ensure!(connected.iter().all(has_ended));
        drop(inside);
        down()
    });
}
