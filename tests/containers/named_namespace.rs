//! Containers that join a tunnel's network namespace by its name: `podman run --network ns:/run/netns/NAME`.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::Agent;
use lab::dns::DnsServer;
use lab::launcher::{errors_of, run, stdout, text_of};
use lab::{HOST, Lab, PRIVATE_LAN, PROVIDER, Peer, Reach, TUNNEL_RESOLVER, WEB, vpn_exec};

use crate::engine::{Engine, Runtime};

/// The option by which a container joins the tunnel.
const NETWORK: &str = "--network=ns:/run/netns/lab";

/// Makes a standing tunnel `lab` that publishes port 8080 for port 80.
fn up(lab: &Lab) -> Result<()> {
    lab.join_private_lan()?;
    let mut command = vpn_exec(["up"]);
    command.arg(lab.wg_quick_file(Reach::Ipv4)?).args(["--name", "lab", "--backend", "userspace", "--wait", "20"]);
    command.args(["--publish", "8080:80"]).args(lab::local_networks());
    stdout(command).map(drop)
}

fn web4() -> String {
    format!("get http://{}/", WEB.ipv4)
}

fn expect_the_tunnel(agent: &mut Agent) -> Result<()> {
    assert_eq!(agent.succeed(&web4())?, PROVIDER.ipv4.to_string());
    assert_eq!(agent.succeed(&format!("get http://[{}]/", WEB.ipv6))?, PROVIDER.ipv6.to_string());
    assert_eq!(agent.succeed(&format!("get http://{}/", PRIVATE_LAN.ipv4))?, "a page in the local network");
    Ok(())
}

fn joins_by_the_name(runtime: Runtime) {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(runtime)?;
        up(lab)?;
        let resolver = TUNNEL_RESOLVER.ipv4.to_string();
        let mut first = engine.agent(&[NETWORK, "--name=first", "--dns", &resolver])?;
        expect_the_tunnel(&mut first)?;
        assert_eq!(first.succeed("resolve web.example")?, format!("{} {}", WEB.ipv4, WEB.ipv6));
        assert_eq!(lab.tunnel_resolver.questions().len(), 2, "both questions reached the tunnel's resolver");

        // The tunnel publishes the container's port.
        first.succeed("serve 80 page")?;
        for (site, at) in [(&lab.host, "127.0.0.1".into()), (&lab.web_site, HOST.ipv4.to_string())] {
            let got =
                site.run(|| lab::http::get(&format!("http://{at}:8080/"), lab::patience(Duration::from_secs(10))));
            assert_eq!(got?, "page", "at {at}");
        }

        // More containers join by the name, or by the first container.
        let files = ["resolv.conf", "hosts"].map(|name| format!("-v=/run/vpn-exec/lab/{name}:/etc/{name}:ro"));
        let mut second = engine.agent(&[NETWORK, &files[0], &files[1]])?;
        expect_the_tunnel(&mut second)?;
        assert_eq!(second.succeed("resolve web.example")?, format!("{} {}", WEB.ipv4, WEB.ipv6));
        second.succeed("resolve host.internal")?;
        let mut third = engine.agent(&["--network=container:first"])?;
        expect_the_tunnel(&mut third)?;
        for agent in [third, second, first] {
            agent.finish_well()?;
        }
        Ok(())
    });
}

#[test]
fn containers_of_runc_join_a_tunnel_by_its_name() {
    joins_by_the_name(Runtime::Runc);
}

#[test]
fn containers_of_crun_join_a_tunnel_by_its_name() {
    joins_by_the_name(Runtime::Crun);
}

#[test]
fn a_container_in_a_tunnel_leaks_nothing_and_the_capture_sees_one_on_a_bridge() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(Runtime::Runc)?;
        up(lab)?;
        // Without `--dns`, podman copies the host's resolvers: here one in a local network of the tunnel.
        let neighbour = DnsServer::start_everywhere(&lab.lan, &[53])?;
        neighbour.set("web.example", &WEB.both());
        fs::write("/etc/resolv.conf", format!("nameserver {}\noptions timeout:1 attempts:1\n", PRIVATE_LAN.ipv4))?;
        let acts = [web4(), "resolve web.example".into(), format!("lookup {} web.example", PRIVATE_LAN.ipv4)];
        lab.capture.forget()?;
        let mut agent = engine.agent(&[NETWORK])?;
        assert_eq!(agent.act(&acts[0])?, Ok(PROVIDER.ipv4.to_string()));
        for act in &acts[1..] {
            agent.fail(act)?;
        }
        lab.provider.stop()?;
        agent.fail(&acts[0])?;
        assert_eq!(lab.capture.leaks()?, []);
        assert_eq!(neighbour.questions(), []);
        agent.finish_well()?;

        // The twin.
        let mut agent = engine.agent(&[])?;
        assert_eq!(agent.succeed(&acts[0])?, HOST.ipv4.to_string());
        agent.succeed_within(Duration::from_secs(10), &acts[1])?;
        ensure!(!lab.capture.leaks()?.is_empty(), "the capture does not see a container on a bridge");
        ensure!(!neighbour.questions().is_empty(), "the resolver in the local network logs no question");
        agent.finish_well()?;
        Ok(())
    });
}

/// podman ignores `-p` without a message, as the namespace is not its own.
#[test]
fn a_port_that_podman_publishes_does_not_reach_a_container_in_a_tunnel() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(Runtime::Runc)?;
        up(lab)?;
        let mut agent = engine.agent(&[NETWORK, "-p", "8088:80"])?;
        agent.succeed("serve 80 page")?;
        let got = lab::http::get("http://127.0.0.1:8088/", Duration::from_secs(1));
        assert_eq!(got.expect_err("a request to the port").kind(), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(agent.finish_well()?, "");
        Ok(())
    });
}

#[test]
fn a_tunnel_is_not_taken_down_under_a_container() {
    lab::test(Peer::Ours, |lab| {
        let engine = Engine::podman(Runtime::Runc)?;
        up(lab)?;
        let mut agent = engine.agent(&[NETWORK])?;
        let refused = run(vpn_exec(["down", "lab"]))?;
        assert_eq!(refused.status.code(), Some(125), "{}", text_of(&refused));
        ensure!(
            errors_of(&refused).contains("lab-agent"),
            "the refusal does not name the program: {}",
            text_of(&refused)
        );
        expect_the_tunnel(&mut agent)?;

        stdout(vpn_exec(["down", "lab", "--force"]))?;
        agent.end()?;
        // A container does not start without the tunnel: podman does not fall back to another network.
        engine.fail(["run", "--rm", NETWORK, crate::images::APP, "true"])?;
        Ok(())
    });
}
