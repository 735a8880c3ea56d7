//! `vpn-exec attach` in a sidecar: what an application beside it reaches, and what leaves its network while the sidecar
//! is not up yet, up, without a provider, killed and started again.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::dns::{DnsServer, Question};
use lab::launcher::{run, stdout, text_of};
use lab::{
    HOST, HOST_ON_PRIVATE_LAN, Lab, PRIVATE_LAN, PROVIDER, Packet, Peer, Reach, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB,
};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::plan::NAME_PORTS;

use crate::engine::{Engine, Runtime};
use crate::images::BINARY;

/// The time in which the sidecar has a handshake on an ordinary machine.
const UP: Duration = Duration::from_secs(20);

/// The port that the engine publishes, for port 80.
const PUBLISHED: u16 = 8080;

/// The file in the sidecar.
const FILE: &str = "/etc/wireguard/wg0.conf";

/// An application's container and a sidecar in one network namespace.
struct Shared<'a> {
    lab: &'a Lab,
    engine: &'a Engine,
    /// The option by which a container joins the namespace.
    join: &'static str,
    /// Name servers at every address of the host, with the engine's gateway, and of the neighbour.
    servers: [DnsServer; 2],
    /// The number of questions of each of them, and of the host's resolver, that were judged.
    judged: Cell<[usize; 3]>,
    mount: String,
}

impl<'a> Shared<'a> {
    /// Makes a pod, or where the engine has none, a container whose namespace the others join.
    fn new(lab: &'a Lab, engine: &'a Engine) -> Result<Self> {
        lab.join_private_lan()?;
        let server = |site| DnsServer::start_everywhere(site, &NAME_PORTS);
        let servers = [server(&lab.host)?, server(&lab.lan)?];
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        engine.give_to_user(&file)?;
        let published = format!("--publish={PUBLISHED}:80");
        let dns = format!("--dns={}", TUNNEL_RESOLVER.ipv4);
        let join = if engine.has_pods() {
            engine.succeed(["pod", "create", "--name=p", &published, &dns])?;
            "--pod=p"
        } else {
            engine.succeed(["run", "-d", "--name=net", &published, &dns, crate::images::APP])?;
            "--network=container:net"
        };
        Ok(Self {
            lab,
            engine,
            join,
            servers,
            judged: Cell::default(),
            mount: format!("--volume={}:{FILE}:ro", file.display()),
        })
    }

    /// Runs `vpn-exec attach` with options until it ends or, with `--detach` among the container's options, begins.
    fn attach(&self, container: &[&str], options: &[&str]) -> Result<String> {
        let words = [&["attach", FILE, "--local", "192.168.7.0/24"], options].concat();
        stdout(self.engine.vpn_exec(&[&[self.join, &self.mount], container].concat(), &words))
    }

    fn wait_for_sidecar(&self) -> Result<()> {
        let check = || self.engine.run(["exec", "vpn", BINARY, "attach", "--check"]);
        let otherwise = "the sidecar does not come up";
        lab::wait_until(lab::patience(UP), otherwise, || Ok(check()?.status.success())).with_context(|| {
            let log = self.engine.run(["logs", "vpn"]).map(|output| text_of(&output)).unwrap_or_default();
            format!("{log}\n{}", check().map(|output| text_of(&output)).unwrap_or_default())
        })
    }

    /// Returns the packets that left by the uplink or into the local network, and the questions that resolvers outside
    /// of the tunnel received, since the last call. Packets that leave the tunnel at the provider may reach the host.
    fn leaks(&self) -> Result<BTreeSet<String>> {
        let by_provider = |packet: &Packet| {
            packet.flow.as_ref().is_some_and(|flow| {
                let ends = [Some(flow.clone()), flow.quoted()].into_iter().flatten();
                // Without the provider, nothing translates the customer's address in answers to it.
                let through = [PROVIDER.both(), TUNNEL_CLIENT.both()].concat();
                ends.flat_map(|flow| [flow.source, flow.destination]).any(|end| through.contains(&end.ip()))
            })
        };
        let mut leaks: BTreeSet<String> = BTreeSet::new();
        leaks.extend(
            self.lab.capture.leaks()?.into_iter().filter(|packet| !by_provider(packet)).map(|p| format!("{p:?}")),
        );
        let mut judged = self.judged.get();
        for (server, judged) in self.servers.iter().chain([&self.lab.resolver]).zip(&mut judged) {
            let questions = server.questions().split_off(*judged);
            *judged += questions.len();
            let direct = |question: &&Question| !PROVIDER.both().contains(&question.from);
            let stamped = questions.iter().filter(direct).filter(|question| question.name.contains("leak-"));
            leaks.extend(stamped.map(|question| format!("{question:?}")));
        }
        self.judged.set(judged);
        self.lab.capture.forget()?;
        Ok(leaks)
    }

    /// Requires that the application reaches nothing outside of its local networks, by any vector.
    fn expect_no_leak(&self, application: &mut Agent, stage: &str) -> Result<()> {
        application.succeed(&format!("begin-stage {stage}"))?;
        application.succeed(&format!("complete-stage {stage}"))?;
        std::thread::sleep(lab::patience(Duration::from_millis(100)));
        let leaks = self.leaks()?;
        let first: Vec<_> = leaks.iter().take(10).collect();
        ensure!(leaks.is_empty(), "{} leaks in the stage {stage:?}, among them {first:#?}", leaks.len());
        Ok(())
    }

    /// Requires that clients on the host, in the local network and in the Internet reach the published port, and that
    /// the application reaches the local network.
    fn expect_local_traffic(&self, application: &mut Agent) -> Result<()> {
        let lab = self.lab;
        let mut clients = vec![(&lab.host, "127.0.0.1".into()), (&lab.host, HOST.ipv4.to_string())];
        clients.push((&lab.lan, HOST_ON_PRIVATE_LAN.ipv4.to_string()));
        clients.push((&lab.web_site, HOST.ipv4.to_string()));
        for (site, at) in clients {
            let url = format!("http://{at}:{PUBLISHED}/");
            let got = site.run(|| lab::http::get(&url, lab::patience(Duration::from_secs(10))));
            assert_eq!(got.with_context(|| url.clone())?, "page", "{url}");
        }
        assert_eq!(application.succeed(&get(PRIVATE_LAN.ipv4.into()))?, "a page in the local network");
        // The last packets of these connections.
        std::thread::sleep(lab::patience(Duration::from_millis(100)));
        lab.capture.forget()
    }

    fn expect_the_tunnel(&self, application: &mut Agent, ipv6: bool) -> Result<()> {
        assert_eq!(application.succeed(&get(WEB.ipv4.into()))?, PROVIDER.ipv4.to_string());
        if ipv6 {
            assert_eq!(application.succeed(&get(WEB.ipv6.into()))?, PROVIDER.ipv6.to_string());
        }
        application.succeed("resolve web.example")?;
        Ok(())
    }

    fn expect_nothing(&self, application: &mut Agent) -> Result<()> {
        for address in WEB.both() {
            application.fail(&get(address))?;
        }
        application.fail("resolve web.example").map(drop)
    }
}

fn get(address: IpAddr) -> String {
    format!("get http://{}/", std::net::SocketAddr::new(address, 80))
}

fn keeps_its_promises(engine: impl FnOnce() -> Result<Engine>, ipv6: bool) {
    lab::test(Peer::Ours, |lab| {
        let engine = engine()?;
        let shared = Shared::new(lab, &engine)?;
        // The twin: before the namespace is closed, the capture and the resolvers see the application.
        let mut application = engine.agent(&[shared.join])?;
        assert_eq!(application.succeed(&get(WEB.ipv4.into()))?, HOST.ipv4.to_string());
        application.succeed("begin-stage open")?;
        application.succeed("complete-stage open")?;
        let seen = shared.leaks()?;
        for vector in ["udp4-internet", "tcp4-internet", "bound4", "from-each-address4"] {
            let stamp = format!("leak-{vector}-at-open");
            ensure!(seen.iter().any(|leak| leak.contains(&stamp)), "{vector} is not seen, only {seen:#?}");
        }
        application.finish()?;

        shared.attach(&["--rm"], &["--closed"])?;
        std::thread::sleep(lab::patience(Duration::from_millis(500)));
        shared.leaks()?;
        let mut application = engine.agent(&[shared.join])?;
        application.succeed("serve 80 page")?;
        shared.expect_nothing(&mut application)?;
        shared.expect_no_leak(&mut application, "closed")?;
        shared.expect_local_traffic(&mut application)?;

        shared.attach(&["--detach", "--name=vpn"], &[])?;
        shared.wait_for_sidecar()?;
        shared.expect_the_tunnel(&mut application, ipv6)?;
        shared.expect_no_leak(&mut application, "up")?;
        shared.expect_local_traffic(&mut application)?;

        lab.provider.stop()?;
        shared.expect_no_leak(&mut application, "provider-dead")?;
        lab.provider.restart()?;

        engine.succeed(["kill", "vpn"])?;
        shared.expect_nothing(&mut application)?;
        shared.expect_no_leak(&mut application, "killed")?;
        shared.expect_local_traffic(&mut application)?;

        engine.succeed(["start", "vpn"])?;
        shared.wait_for_sidecar()?;
        shared.expect_the_tunnel(&mut application, ipv6)?;
        shared.expect_no_leak(&mut application, "restarted")?;

        // Ends at once, and opens nothing.
        engine.succeed(["stop", "vpn"])?;
        assert_eq!(engine.succeed(["inspect", "vpn", "--format", "{{.State.ExitCode}}"])?.trim(), "0");
        shared.expect_nothing(&mut application)?;
        shared.expect_no_leak(&mut application, "stopped")?;
        application.finish()?;
        Ok(())
    });
}

#[test]
fn a_sidecar_under_podman_with_runc_keeps_its_promises() {
    keeps_its_promises(|| Engine::podman(Runtime::Runc), true);
}

#[test]
fn a_sidecar_under_podman_with_crun_keeps_its_promises() {
    keeps_its_promises(|| Engine::podman(Runtime::Crun), true);
}

#[test]
fn a_sidecar_under_an_ordinary_users_podman_keeps_its_promises() {
    keeps_its_promises(Engine::rootless_podman, true);
}

/// Docker switches IPv6 off in the namespace.
#[test]
fn a_sidecar_under_docker_keeps_its_promises() {
    keeps_its_promises(Engine::docker, false);
}

/// The lab's host is itself in a container, as a node of kind is. tests/vm/inside/host-network has an ordinary machine.
#[test]
fn a_container_that_shares_the_network_of_its_machine_is_refused() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(Runtime::Runc)?;
        let mount = format!("--volume={}:{FILE}:ro", lab.wg_quick_file(Reach::Ipv4)?.display());
        // Two containers of the node, whose links are ports of a bridge.
        let others = [NetworkNamespace::create(|| Ok(()))?.0, NetworkNamespace::create(|| Ok(()))?.0];
        let mut netlink = Netlink::open()?;
        for (port, other) in ["port1", "port2"].iter().zip(&others) {
            let inner = "eth0".parse()?;
            netlink.execute_one(NetlinkRequest::add_veth(
                &port.parse()?,
                &inner,
                TargetNamespace::Other(other.as_fd()),
            ))?;
        }
        for more in [&[][..], &["--closed"], &["--backend=kernel", "--closed"]] {
            let words = [&["attach", FILE], more].concat();
            let refused = run(engine.vpn_exec(&["--rm", "--network=host", &mount], &words))?;
            ensure!(!refused.status.success(), "the host has the tunnel");
            ensure!(text_of(&refused).contains("which would lose its network"), "{}", text_of(&refused));
            let page = lab::http::get(&format!("http://{}/", WEB.ipv4), lab::patience(UP))?;
            assert_eq!(page.trim(), HOST.ipv4.to_string());
        }
        Ok(())
    });
}
