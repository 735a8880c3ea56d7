//! Connections of a program survive when the keeper is killed or replaced, or the configuration reloaded.

mod versions;

use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::launcher::text_of;
use lab::{Lab, Launcher, PROVIDER, Peer, ROUTER, Reach, TUNNEL_CLIENT, WEB, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::lease::status::{Condition, Status};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::registry;

const NAME: &str = "kept";
const PORT: u16 = 7;

/// The time after which a process is taken for hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs vpn-exec, which must succeed.
fn run(arguments: &[&str]) -> Result<Output> {
    let output = vpn_exec(arguments).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", text_of(&output));
    Ok(output)
}

fn keeper() -> Result<i32> {
    Ok(registry::read(&NAME.parse()?)?.context("a tunnel that stays has a state")?.keeper.cast_signed())
}

fn status() -> Result<Status> {
    Ok(serde_json::from_slice(&run(&["status", NAME, "--json"])?.stdout)?)
}

/// Starts an echo server, and returns the addresses of its clients.
fn echo(lab: &Lab) -> Result<std::sync::mpsc::Receiver<std::net::IpAddr>> {
    let listener = lab.web_site.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))?;
    let (sender, callers) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let Ok(mut connection) = connection else { continue };
            if let Ok(peer) = connection.peer_addr() {
                let _ = sender.send(peer.ip().to_canonical());
            }
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = connection.read(&mut buffer) {
                    if connection.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    Ok(callers)
}

/// Connects to the echo server from inside the tunnel.
fn connect() -> Result<TcpStream> {
    let inside = lab::tunnel::namespace(NAME)?;
    let stream = inside.run(|| TcpStream::connect_timeout(&(WEB.ipv4, PORT).into(), lab::patience(PATIENCE)))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream, text: &str) -> Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).with_context(|| format!("no answer to {text:?}"))?;
    ensure!(answer == text.as_bytes(), "{answer:?} for {text:?}");
    Ok(())
}

fn connections_survive(lab: &Lab) -> Result<()> {
    let callers = echo(lab)?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    let file = file.to_str().context("a path in UTF-8")?;
    let up = ["up", file, "--name", NAME, "--backend", lab::backend(), "--wait", "20"];
    run(&up).context("at first")?;
    let first = status()?;
    assert_eq!(first.state, Condition::Up, "{first:?}");
    // Without a program inside, a rootless tunnel ends with its keeper.
    let inside = lab::tunnel::is_rootless().then(|| Launcher::with_tunnel(NAME).program(["sleep", "1000"]).start());
    let mut inside = inside.transpose()?;
    lab::wait_until(lab::patience(PATIENCE), "the program is not inside", || {
        Ok(status()?.programs.len() == usize::from(inside.is_some()))
    })?;
    let mut stream = connect()?;
    assert_eq!(callers.recv_timeout(lab::patience(PATIENCE))?, PROVIDER.ipv4);
    ask(&mut stream, "before")?;

    kill(Pid::from_raw(keeper()?), Signal::SIGKILL)?;
    // Sent while no keeper carries it.
    stream.write_all(b"meanwhile")?;
    run(&up).context("after the keeper was killed")?;
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).context("nothing comes after the keeper was killed")?;
    assert_eq!(&answer, b"meanwhile");

    run(&[up.as_slice(), &["--replace"]].concat())?;
    ask(&mut stream, "replaced")?;

    let text = std::fs::read_to_string(file)?;
    let changed = lab.file(&text.replace("[Peer]", "MTU = 1300\n[Peer]\nPersistentKeepalive = 20"))?;
    let changed = changed.to_str().context("a path in UTF-8")?;
    let reload = ["reload", changed, "--name", NAME, "--backend", lab::backend()];
    let said = String::from_utf8(run(&reload)?.stdout)?;
    assert!(said.contains("MTU") && said.contains("PersistentKeepalive"), "{said}");
    let age = |status: &Status| status.living.as_ref().and_then(|living| living.peers[0].handshake_age);
    ask(&mut stream, "reloaded")?;
    let last = status()?;
    assert!(age(&last).is_some() && last.state == Condition::Up, "the session goes on: {last:?}");
    let living = last.living.context("a living keeper")?;
    assert!(living.interface.tx_packets > 0 && living.interface.rx_packets > 0, "{living:?}");
    assert_eq!(living.interface.addresses[0].addr(), std::net::IpAddr::from(TUNNEL_CLIENT.ipv4));

    assert!(callers.try_recv().is_err(), "it was one connection all the time");
    assert_eq!(lab.capture.leaks()?, []);
    drop(stream);
    if let Some(inside) = &mut inside {
        kill(Pid::from_raw(inside.id().cast_signed()), Signal::SIGTERM)?;
        inside.wait()?;
    }
    run(&["down", NAME]).map(drop)
}

#[test]
fn connections_survive_a_killed_or_replaced_keeper_with_our_own_peer() {
    lab::test(Peer::Ours, |lab| {
        connections_survive(lab)?;
        Ok(())
    });
}

#[test]
fn connections_survive_a_killed_or_replaced_keeper_with_wireguard_go() {
    lab::test(Peer::WireguardGo, |lab| {
        connections_survive(lab)?;
        Ok(())
    });
}

#[test]
fn a_hundred_tunnels_start_at_once_with_different_addresses() {
    lab::test(Peer::Ours, |lab| {
        const MANY: usize = 100;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("a path in UTF-8")?;
        let before = lab::Snapshot::take()?;
        let names: Vec<String> = (0..MANY).map(|number| format!("many{number}")).collect();
        let all = |arguments: &(dyn Fn(&str) -> Vec<String> + Sync)| -> Result<()> {
            let children = names
                .iter()
                .map(|name| {
                    let mut command = vpn_exec(arguments(name));
                    command.stdout(std::process::Stdio::piped());
                    command.stderr(std::process::Stdio::piped()).spawn()
                })
                .collect::<std::io::Result<Vec<_>>>()?;
            for child in children {
                let output = child.wait_with_output()?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(())
        };
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        all(&|name| words(&["up", file, "--name", name, "--backend", lab::backend()]))?;

        let begin = Instant::now();
        let listed: Vec<Status> = serde_json::from_slice(&run(&["list", "--json"])?.stdout)?;
        // A query does not wait. 60 times its usual duration shows that one did.
        assert!(begin.elapsed() < lab::patience(PATIENCE), "{:?}", begin.elapsed());
        assert_eq!(listed.len(), MANY);
        let links = listed.iter().map(|status| status.living.as_ref().and_then(|living| living.link.as_ref()));
        let links = links.collect::<Option<Vec<_>>>().context("all keepers live")?;
        let mut addresses: Vec<_> = links.iter().flat_map(|link| [link.host_ipv4, link.inner_ipv4]).collect();
        let mut interfaces: Vec<_> = links.iter().map(|link| link.interface.clone()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        interfaces.sort_unstable();
        interfaces.dedup();
        assert_eq!((addresses.len(), interfaces.len()), (2 * MANY, MANY));

        all(&|name| words(&["down", name]))?;
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "after a hundred tunnels: {changes:#?}");
        Ok(())
    });
}

#[test]
fn a_change_of_the_hosts_network_starts_a_handshake() {
    lab::test(Peer::Ours, |lab| {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("a path in UTF-8")?;
        run(&["up", file, "--name", NAME, "--backend", lab::backend(), "--wait", "20"])?;
        let age = || -> Result<u64> {
            let living = status()?.living.context("a living keeper")?;
            living.peers[0].handshake_age.context("a handshake")
        };
        let bytes = || -> Result<(u64, u64)> {
            let living = status()?.living.context("a living keeper")?;
            Ok((living.peers[0].rx_bytes, living.peers[0].tx_bytes))
        };
        // A peer ignores a handshake within REKEY_TIMEOUT, 5 s, of another.
        while age()? < 6 {
            std::thread::sleep(Duration::from_millis(100));
        }
        let before = bytes()?;
        let mut host = Netlink::open()?;
        let eth0 = host.link_index(&"eth0".parse()?)?;
        let default = "0.0.0.0/0".parse()?;
        host.execute_one(NetlinkRequest::delete_route(eth0, "eth0", default))?;
        // The keeper notices the missing route before the route returns.
        std::thread::sleep(Duration::from_secs(1));
        host.execute_one(NetlinkRequest::add_route(eth0, "eth0", default, Some(ROUTER.ipv4.into())))?;
        let begin = Instant::now();
        while age()? >= 6 {
            ensure!(
                begin.elapsed() < lab::patience(PATIENCE),
                "no handshake: nothing was sent, so only the keeper could begin one"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        // The peer's session is kept meanwhile.
        let after = bytes()?;
        assert!(after.0 > before.0 && after.1 > before.1, "{before:?}, then {after:?}");
        run(&["down", NAME]).map(drop)
    });
}
