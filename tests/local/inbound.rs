//! Inbound packets through the tunnel: answers, and connections to opened ports. Others are dropped.

use std::io::Write;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Peer, TUNNEL_CLIENT, WEB};

use super::{WORKS, file, finish, inside, url, works};

/// The time to wait for a packet that must not come.
const NEVER: Duration = Duration::from_millis(700);

/// Connects from the provider's side of the tunnel.
fn connect(lab: &Lab, address: SocketAddr, usual: Duration) -> Result<TcpStream> {
    Ok(lab.provider.site().run(|| TcpStream::connect_timeout(&address, lab::patience(usual)))?)
}

#[test]
fn only_an_opened_port_is_reached_through_the_tunnel() {
    lab::test(Peer::Ours, |lab| {
        for (options, open) in
            [(&[][..], false), (&["--open", "8000-8002/tcp"], true), (&["--open", "8000/udp"], false)]
        {
            let mut agent = inside(lab, options)?;
            agent.succeed("serve 8001 inside")?;
            // From now on, the provider knows the tunnel's endpoint.
            agent.succeed_within(WORKS, &format!("get {}", url(WEB.ipv4, 80)))?;
            for address in TUNNEL_CLIENT.both() {
                let address = SocketAddr::new(address, 8001);
                let patience = if open { WORKS } else { NEVER };
                let connected = connect(lab, address, patience);
                ensure!(connected.is_ok() == open, "{options:?} {address}: {connected:?}");
            }
            finish(agent)?;
        }
        Ok(())
    });
}

#[test]
fn only_expected_datagrams_come_in() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = inside(lab, &["--open", "9000/udp", "--name", "datagrams"])?;
        agent.succeed_within(WORKS, &format!("get {}", url(WEB.ipv4, 80)))?;
        let namespace = lab::tunnel::namespace("datagrams")?;
        let listen = |port: u16| {
            namespace.run(|| {
                let socket = UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, port))?;
                socket.set_read_timeout(Some(lab::patience(NEVER)))?;
                Ok(socket)
            })
        };
        let (open, closed) = (listen(9000)?, listen(9001)?);
        lab.provider.site().run(|| {
            for port in [9000, 9001] {
                for address in TUNNEL_CLIENT.both() {
                    UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?
                        .send_to(b"hello", (address, port))?;
                }
            }
            Ok(())
        })?;
        let mut buffer = [0; 16];
        for _ in 0..2 {
            open.recv(&mut buffer).context("an open port hears")?;
        }
        ensure!(closed.recv(&mut buffer).is_err(), "another does not");
        finish(agent)?;
        Ok(())
    });
}

#[test]
fn opened_ports_change_while_programs_run() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = inside(lab, &["--name", "opening"])?;
        agent.succeed("serve 8000 inside")?;
        agent.succeed_within(WORKS, &format!("get {}", url(WEB.ipv4, 80)))?;
        let address = SocketAddr::new(TUNNEL_CLIENT.ipv4.into(), 8000);
        ensure!(connect(lab, address, NEVER).is_err());
        let reload = |more: &[&str]| {
            works(&[&["reload", file(lab)?, "--name", "opening", "--backend", lab::backend()], more].concat())
        };
        ensure!(String::from_utf8(reload(&["--open", "8000"])?.stdout)?.contains("open ports"));
        let mut connection = connect(lab, address, WORKS)?;
        reload(&[])?;
        ensure!(connect(lab, address, NEVER).is_err());
        // Established connections continue.
        connection.set_read_timeout(Some(lab::patience(WORKS)))?;
        connection.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        let mut answer = [0; 4];
        std::io::Read::read_exact(&mut connection, &mut answer).context("it is answered")?;
        finish(agent)?;
        Ok(())
    });
}
