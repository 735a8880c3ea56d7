//! Tests of the lab itself: its network works as documented, and each of its judges detects what it is for.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::dns::RecordType::{A, AAAA};
use lab::dns::{Question, lookup};
use lab::{
    CLUSTER_RESOLVER, CLUSTER_SERVICE, Context, HOST, HOST_ON_LAN, LAN, Lab, POD, POD_GATEWAY, PROVIDER, PROVIDER_PORT,
    Peer, Pod, ROUTER, Reach, Result, Snapshot, TUNNEL_CLIENT, TUNNEL_RESOLVER, WEB,
};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::sysctl;
use vpn_exec::wireguard::userspace::{Sockets, UserspaceDevice};

const SECOND: Duration = Duration::from_secs(1);

/// The time in which a request succeeds, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

fn get(url: &str) -> io::Result<String> {
    lab::http::get(url, PATIENCE)
}

#[test]
fn servers_see_the_host_without_a_tunnel() {
    lab::test(Peer::Ours, |lab| {
        assert_eq!(get(&format!("http://{}/", WEB.ipv4))?, format!("{}\n", HOST.ipv4));
        assert_eq!(get(&format!("http://[{}]/", WEB.ipv6))?, format!("{}\n", HOST.ipv6));
        assert_eq!(get(&format!("http://{}/", LAN.ipv4))?, "a page in the local network\n");
        assert_eq!(get(&format!("http://[{}]:80/", LAN.ipv6))?, "a page in the local network\n");
        assert_eq!(lab.web.clients(), HOST.both());
        Ok(())
    });
}

#[test]
fn the_neighbour_does_not_reach_the_internet() {
    lab::test(Peer::Ours, |lab| {
        let found = lab.lan.run(|| get(&format!("http://{}/", WEB.ipv4)));
        assert_eq!(found.expect_err("a request from the neighbour").kind(), io::ErrorKind::NetworkUnreachable);
        Ok(())
    });
}

#[test]
fn name_servers_serve_names_and_log_questions() {
    lab::test(Peer::Ours, |lab| {
        let server = IpAddr::from(ROUTER.ipv4);
        assert_eq!(lookup(server, "VPN.example", A, PATIENCE)?, [PROVIDER.ipv4]);
        assert_eq!(lookup(ROUTER.ipv6.into(), "vpn.example", AAAA, PATIENCE)?, [PROVIDER.ipv6]);
        let unknown = lookup(server, "late.example", A, SECOND);
        assert_eq!(unknown.expect_err("a name that no test has set").kind(), io::ErrorKind::NotFound);
        let dead = IpAddr::from([198, 51, 100, 33]);
        lab.resolver.set("late.example", &[dead, PROVIDER.ipv4.into()]);
        assert_eq!(lookup(server, "late.example", A, PATIENCE)?, [dead, PROVIDER.ipv4.into()]);
        assert_eq!(lookup(server, "late.example", AAAA, PATIENCE)?, Vec::<IpAddr>::new());
        lab.resolver.forget("late.example");
        assert!(lookup(server, "late.example", A, SECOND).is_err());

        let questions = lab.resolver.questions();
        assert_eq!(questions.len(), 6);
        assert_eq!(questions[0], Question { from: HOST.ipv4.into(), name: "vpn.example".into(), kind: A });
        assert_eq!(lab.tunnel_resolver.questions(), []);

        // The system's lookups go to the host's resolver, too.
        assert!(HOST.both().map(|address| format!("{address}\n")).contains(&get("http://web.example/")?));
        assert!(lab.resolver.questions().iter().any(|question| question.name == "web.example"));
        Ok(())
    });
}

#[test]
fn the_capture_finds_leaks() {
    lab::test(Peer::Ours, |lab| {
        let names = |lab: &Lab| -> Result<Vec<String>> {
            Ok(lab.capture.leaks()?.iter().map(|packet| format!("{packet:?}")).collect())
        };
        let from_host = UdpSocket::bind("0.0.0.0:0")?;
        // A packet that looks like WireGuard's, to the provider, which does not answer.
        from_host.send_to(&[1, 0, 0, 0, 7], (PROVIDER.ipv4, PROVIDER_PORT))?;
        lookup(ROUTER.ipv4.into(), "vpn.example", A, PATIENCE)?;
        assert_eq!(names(lab)?, Vec::<String>::new());
        assert!(lab.capture.uplink()?.len() >= 3);

        get(&format!("http://{}/", LAN.ipv4))?;
        assert!(lab.capture.lan()?.len() >= 3);
        assert!(names(lab)?.iter().any(|packet| packet.contains("GET /")), "{:?}", names(lab)?);
        lab.capture.forget()?;

        from_host.send_to(b"in plain", (PROVIDER.ipv4, PROVIDER_PORT))?;
        let found = names(lab)?;
        assert!(found.len() == 1 && found[0].contains("in plain"), "{found:?}");

        lab.capture.forget()?;
        lookup(ROUTER.ipv4.into(), "web.example", A, PATIENCE)?;
        assert_eq!(names(lab)?.len(), 2, "a question for another name, and its answer");

        lab.capture.forget()?;
        get(&format!("http://[{}]/", WEB.ipv6))?;
        let found = names(lab)?;
        assert!(found.iter().any(|packet| packet.starts_with("out TCP") && packet.contains("GET /")), "{found:?}");
        Ok(())
    });
}

#[test]
fn the_snapshot_finds_changes() {
    lab::test(Peer::Ours, |_lab| {
        let before = Snapshot::take()?;
        get(&format!("http://{}/", WEB.ipv4))?;
        assert_eq!(before.changes_to(&Snapshot::take()?), Vec::<String>::new(), "counters must be left out");
        let text = format!("{before:?}");
        assert!(text.lines().count() > 300);
        for section in ["link", "address", "route", "rule", "mount", "sysctl", "run", "resolver", "program"] {
            assert!(text.lines().any(|line| line.starts_with(&format!("{section}: "))), "nothing about {section}");
        }

        let mut found: Vec<(&str, Vec<String>)> = Vec::new();
        let mut after = |section: &'static str| -> Result<()> {
            let changes = before.changes_to(&Snapshot::take()?);
            found.push((section, changes));
            Ok(())
        };
        sysctl::set("net/ipv4/ip_forward", "1")?;
        after("sysctl")?;
        sysctl::set("net/ipv4/ip_forward", "0")?;

        let mut netlink = Netlink::open()?;
        let lan = netlink.link("lan0")?.context("the host has lan0")?;
        netlink.execute_one(NetlinkRequest::add_address(lan.index, "lan0", "192.0.2.200/32".parse()?))?;
        after("address")?;
        netlink.execute_one(NetlinkRequest::add_route(lan.index, "lan0", "192.0.2.201/32".parse()?, None))?;
        after("route")?;
        netlink.execute_one(NetlinkRequest::add_veth(
            &"ve-x".parse()?,
            &"ve-y".parse()?,
            vpn_exec::linux::netlink::link::TargetNamespace::Current,
        ))?;
        after("link")?;
        lab::nat::masquerade()?;
        after("nftables")?;
        fs::write("/run/left", "behind")?;
        after("run")?;
        vpn_exec::linux::mounts::mount_tmpfs("/run/lab".as_ref())?;
        after("mount")?;
        // It waits for the end of its input.
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn()?;
        after("program")?;
        child.kill()?;
        child.wait()?;
        for (section, changes) in found {
            let new = format!("+ {section}: ");
            assert!(changes.iter().any(|change| change.starts_with(&new)), "no {new:?} in {changes:#?}");
        }
        Ok(())
    });
}

/// Makes a tunnel as vpn-exec does, and sends requests through it.
fn a_tunnel_by_hand(lab: &Lab, endpoint: IpAddr) -> Result<()> {
    let mut config = lab.provider.customers_device();
    config.peers[0].endpoint = Some((endpoint, PROVIDER_PORT).into());
    let sockets = Sockets::bind(0, 0)?;
    let (inside, tun) = NetworkNamespace::create(|| {
        let wg0 = "wg0".parse().map_err(io::Error::other)?;
        let tun = lab::passing_tun(&wg0)?;
        let mut netlink = Netlink::open()?;
        let index = netlink.link_index(&wg0)?;
        let mut requests = vec![NetlinkRequest::set_mtu(index, "wg0", 1420), NetlinkRequest::set_up(index, "wg0")];
        requests.extend(TUNNEL_CLIENT.both().map(|address| NetlinkRequest::add_address(index, "wg0", address.into())));
        for everything in ["0.0.0.0/0", "::/0"] {
            let everything = everything.parse().map_err(io::Error::other)?;
            requests.push(NetlinkRequest::add_route(index, "wg0", everything, None));
        }
        netlink.execute(requests)?;
        Ok(tun)
    })?;
    let device = UserspaceDevice::start(&config, tun, sockets, || Ok(()))?;
    let through = |url: String| inside.run(|| get(&url));

    lab.capture.forget()?;
    assert_eq!(through(format!("http://{}/", WEB.ipv4))?, format!("{}\n", PROVIDER.ipv4));
    assert_eq!(through(format!("http://[{}]/", WEB.ipv6))?, format!("{}\n", PROVIDER.ipv6));
    for resolver in TUNNEL_RESOLVER.both() {
        assert_eq!(inside.run(|| lookup(resolver, "web.example", A, PATIENCE))?, [WEB.ipv4]);
    }
    assert_eq!(lab.tunnel_resolver.questions()[0].from, TUNNEL_CLIENT.ipv4);

    lab.provider.stop()?;
    let dead = |url: String| inside.run(|| lab::http::get(&url, SECOND));
    assert!(dead(format!("http://{}/", WEB.ipv4)).is_err(), "the provider is stopped");
    assert_eq!(lab.web.clients(), PROVIDER.both());
    assert_eq!(lab.capture.leaks()?, []);

    // A restarted provider has no session, so no packet passes before a new handshake.
    lab.provider.restart_after(Duration::from_millis(100));
    let deadline = Instant::now() + Duration::from_secs(10);
    while dead(format!("http://{}/", WEB.ipv4)).is_err() {
        assert!(Instant::now() < deadline, "no packet passes after the provider's restart");
        vpn_exec::wireguard::Device::initiate_handshake(&device, &lab.provider.public_key())?;
    }
    assert_eq!(lab.capture.leaks()?, []);
    Ok(())
}

#[test]
fn our_own_provider_works_over_ipv4() {
    lab::test(Peer::Ours, |lab| a_tunnel_by_hand(lab, PROVIDER.ipv4.into()));
}

#[test]
fn our_own_provider_works_over_ipv6() {
    lab::test(Peer::Ours, |lab| a_tunnel_by_hand(lab, PROVIDER.ipv6.into()));
}

#[test]
fn wireguard_go_works_as_the_provider() {
    lab::test(Peer::WireguardGo, |lab| a_tunnel_by_hand(lab, PROVIDER.ipv4.into()));
}

#[test]
fn the_providers_file_is_secret_and_complete() {
    use std::os::unix::fs::PermissionsExt;
    lab::test(Peer::Ours, |lab| {
        let path = lab.wg_quick_file(Reach::Name)?;
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path)?;
        assert!(text.contains("Endpoint = vpn.example:51820\n"), "{text}");
        assert!(lab.wg_quick_text(Reach::Ipv6).contains("Endpoint = [2001:db8:3::2]:51820\n"));
        assert!(lab.wg_quick_text(Reach::Ipv4).contains("Endpoint = 198.51.100.2:51820\n"));
        Ok(())
    });
}

#[test]
fn orphans_are_reaped_and_end_with_the_world() {
    lab::world::test(|| {
        // The shell ends at once. Its child's new parent must be init, which must reap it.
        let shell = Command::new("sh").args(["-c", "sleep 0.05 & echo $!; exit"]).output()?;
        let orphan: i32 = String::from_utf8(shell.stdout)?.trim().parse()?;
        let deadline = Instant::now() + 5 * SECOND;
        while fs::exists(format!("/proc/{orphan}"))? {
            assert!(Instant::now() < deadline, "the orphan {orphan} is a zombie");
            std::thread::sleep(Duration::from_millis(5));
        }
        // The kernel kills one that outlives this test, or the test would not end: it holds the test's output open.
        Command::new("sleep").arg("1000").spawn()?;
        Ok(())
    });
}

#[test]
#[should_panic(expected = "the test failed in its world")]
fn a_failure_in_a_world_is_a_failure() {
    lab::world::test(|| lab::bail!("this shall fail"));
}

#[test]
#[should_panic(expected = "nothing was tested")]
fn a_test_that_cannot_be_found_is_a_failure() {
    // The name of the thread is taken for the test's.
    let thread = std::thread::Builder::new().name("no_such_test".into()).spawn(|| lab::world::test(|| Ok(())));
    if let Err(panic) = thread.expect("a thread").join() {
        std::panic::resume_unwind(panic);
    }
}

/// Returns the names of environment variables of tests in a text.
fn variables_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_uppercase() || c == '_';
    let words =
        text.split(|c: char| !is_part(c)).filter(|word| word.starts_with("VPN_EXEC_") || word.starts_with("CHAOS_"));
    // A word that ends with an underscore is a family of names.
    words.filter(|word| !word.ends_with('_')).map(str::to_owned).collect()
}

#[test]
fn every_variable_of_tests_is_listed_and_documented() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed_text = fs::read_to_string(root.join("tests/lab/shared/variables.rs"))?;
    let listed: BTreeSet<String> =
        listed_text.lines().filter(|line| line.starts_with("pub const")).flat_map(variables_in).collect();

    // Constants that tests set for other processes need no line in the documentation.
    let for_people: BTreeSet<String> = listed_text
        .split("\n\n")
        .filter(|item| !item.contains("/// Set by "))
        .flat_map(|item| variables_in(item.lines().last().unwrap_or_default()))
        .collect();
    let documented = variables_in(&fs::read_to_string(root.join("CONTRIBUTING.md"))?);
    assert_eq!(for_people.difference(&documented).collect::<Vec<_>>(), Vec::<&String>::new(), "not in CONTRIBUTING.md");

    let mut unlisted = Vec::new();
    let mut directories = vec![root.join("tests"), root.join("benches"), root.join("examples")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                // The product's own variables are documented with the product.
                let found = variables_in(&fs::read_to_string(&path)?).into_iter();
                let unknown =
                    found.filter(|name| !listed.contains(name) && !PRODUCT_VARIABLES.contains(&name.as_str()));
                unlisted.extend(unknown.map(|name| format!("{}: {name}", path.display())));
            }
        }
    }
    assert_eq!(unlisted, Vec::<String>::new(), "not in variables.rs");
    Ok(())
}

/// The environment variables that vpn-exec itself reads or sets.
const PRODUCT_VARIABLES: [&str; 3] = ["VPN_EXEC_TUNNEL", "VPN_EXEC_CONFIG", "VPN_EXEC_COMPLETE"];

#[test]
fn a_pod_reaches_the_internet_the_neighbours_and_its_cluster() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        Pod::start_gateway_resolver(lab)?;
        pod.namespace.run(|| {
            assert_eq!(get(&format!("http://{}/", WEB.ipv4))?, format!("{}\n", HOST.ipv4));
            assert_eq!(get(&format!("http://[{}]/", WEB.ipv6))?, format!("{}\n", HOST.ipv6));
            assert_eq!(get(&format!("http://{}/", LAN.ipv4))?, "a page in the local network\n");
            assert_eq!(get(&format!("http://{}/", CLUSTER_SERVICE.ipv4))?, "a service of the cluster\n");
            assert_eq!(get(&format!("http://[{}]/", CLUSTER_SERVICE.ipv6))?, "a service of the cluster\n");
            for server in [POD_GATEWAY.both(), CLUSTER_RESOLVER.both(), ROUTER.both()].concat() {
                assert_eq!(lookup(server, "web.example", A, PATIENCE)?, [WEB.ipv4], "{server}");
            }
            let of_cluster = lookup(CLUSTER_RESOLVER.ipv4.into(), lab::pod::SERVICE_NAME, A, PATIENCE)?;
            assert_eq!(of_cluster, [CLUSTER_SERVICE.ipv4]);
            Ok(())
        })?;
        assert_eq!(lab.lan_page.clients(), [IpAddr::from(HOST_ON_LAN.ipv4)], "the host masquerades");
        // The capture sees them on the pod's cable.
        let sent = lab.capture.everything()?;
        let from_pod = sent.iter().filter_map(|packet| packet.flow.as_ref());
        let seen: BTreeSet<IpAddr> =
            from_pod.map(|flow| flow.source.ip()).filter(|ip| POD.both().contains(ip)).collect();
        assert_eq!(seen, BTreeSet::from(POD.both()));
        Ok(())
    });
}

#[test]
fn the_host_the_neighbours_and_the_internet_reach_a_pod() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let mut agent = lab::agent::Agent::start(&mut pod.application(["env"]))?.begun()?;
        agent.succeed("serve 80 page")?;
        for site in [&lab.host, &lab.web_site] {
            for address in POD.both() {
                let url = format!("http://{}/", std::net::SocketAddr::new(address, 80));
                assert_eq!(site.run(|| get(&url))?, "page", "{url}");
            }
        }
        agent.finish_well()?;
        Ok(())
    });
}

#[test]
fn a_pods_containers_have_only_the_privileges_of_real_ones() {
    lab::test(Peer::Ours, |lab| {
        let pod = Pod::start(lab)?;
        let show = "grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status; cat /etc/resolv.conf; \
                    echo 1 2>/dev/null >/proc/sys/net/ipv4/ip_forward || echo refused";
        let shown = |command: Command| lab::launcher::stdout(command);
        let resolv_conf = format!("nameserver {}\noptions timeout:1 attempts:2\n", POD_GATEWAY.ipv4);
        for (command, capabilities) in [
            (pod.sidecar(["sh", "-c", show]), "0000000000001000"),
            (pod.application(["sh", "-c", show]), "0000000000000000"),
        ] {
            let sets = format!("CapEff:\t{capabilities}\nCapBnd:\t{capabilities}\nNoNewPrivs:\t1\n");
            assert_eq!(shown(command)?, format!("{sets}{resolv_conf}refused\n"));
        }
        Ok(())
    });
}
