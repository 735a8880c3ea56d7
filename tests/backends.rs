//! A program sees the same with both backends: interfaces, addresses, routes, kernel parameters, files and the results
//! of its acts. The exceptions are listed here with their reasons.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use lab::{LAN, Lab, Launcher, Peer, ROUTER, Reach, Skip, TUNNEL_RESOLVER, WEB, vpn_exec};
use vpn_exec::linux::namespace::{NameLookup, NetworkNamespace, look_up, path_of};
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};

/// The time in which an action succeeds that works at all.
const WORKS: Duration = Duration::from_secs(10);

/// The exceptions: the beginning of a line, and the reason.
const NAMED: [(&str, &str); 9] = [
    ("/sys/class/net/wg0/tun_flags ", "the file that a TUN has"),
    ("/sys/class/net/wg0/owner ", "the file that a TUN has"),
    ("/sys/class/net/wg0/group ", "the file that a TUN has"),
    ("/sys/class/net/wg0/uevent ", "names the driver"),
    ("/sys/class/net/wg0/name_assign_type ", "says whether a program chose the name, or does not exist"),
    ("/sys/class/net/wg0/queues/", "a TUN may have several queues"),
    ("/sys/class/net/wg0/tx_queue_len ", "a TUN queues packets for its process"),
    ("/sys/class/net/wg0/speed ", "a TUN always reports 10 Mbit/s"),
    ("/sys/class/net/wg0/duplex ", "a TUN always reports full duplex"),
];

/// The files to compare line by line.
const FILES: [&str; 12] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/proc/net/route",
    "/proc/net/ipv6_route",
    "/proc/net/if_inet6",
    "/proc/net/fib_trie",
    "/proc/net/igmp",
    "/proc/net/igmp6",
    "/proc/net/dev_mcast",
    "/proc/net/wireless",
    "/proc/net/vlan/config",
];

/// Returns the acts whose results are compared.
fn acts() -> Vec<String> {
    let mut acts: Vec<String> =
        ["links", "addresses", "routes", "new-network", "join /proc/1/ns/net"].map(String::from).into();
    acts.extend(["ipv4", "ipv6", "packet", "packets"].map(|family| format!("raw-socket {family}")));
    for device in ["wg0", "host0", "lo"] {
        acts.push(format!("set-mtu {device} 1300"));
        acts.push(format!("add-address {device} 192.0.2.40/32"));
        acts.push(format!("add-route {device} 198.51.100.64/26"));
    }
    for to in [WEB, LAN, ROUTER].into_iter().flat_map(lab::Addresses::both) {
        acts.push(format!("get http://{}/", SocketAddr::new(to, 80)));
        // An unused address, for which an ICMP error comes through the tunnel.
        acts.push(format!("get http://{}/", SocketAddr::new(to, 81)));
        for device in ["wg0", "host0"] {
            acts.push(format!("bound-send {device} {}", SocketAddr::new(to, 9)));
            acts.push(format!("bound-connect {device} {}", SocketAddr::new(to, 80)));
        }
        acts.push(format!("send {}", SocketAddr::new(to, 9)));
        acts.push(format!("unrouted-send {}", SocketAddr::new(to, 9)));
    }
    for to in
        ["224.0.0.251:5353", "255.255.255.255:9", "[ff02::fb]:5353", "127.0.0.1:9", "10.255.255.255:9", "240.0.0.1:9"]
    {
        acts.push(format!("send {to}"));
        acts.push(format!("bound-send wg0 {to}"));
    }
    for resolver in TUNNEL_RESOLVER.both().into_iter().chain(ROUTER.both()) {
        acts.push(format!("lookup {resolver} web.example"));
    }
    acts.push("resolve web.example".into());
    acts.push("resolve unknown.example".into());
    for to in WEB.both() {
        for size in [0, 1, 1300, 1372, 1373, 1392, 1393, 1420] {
            acts.push(format!("echo {} {size}", SocketAddr::new(to, 7)));
        }
    }
    acts
}

/// Returns all that a program sees: each line of a file and each act, with the content or the result.
fn seen(lab: &Lab, backend: &str) -> Result<BTreeMap<String, String>> {
    let launcher = Launcher::with_backend(lab.wg_quick_file(Reach::Ipv4)?, backend);
    let mut agent = launcher.options(["--name", "alike", "--wait", "60"]).start_agent()?.begun()?;
    agent.succeed_within(WORKS, &format!("get http://{}/", SocketAddr::new(WEB.ipv4.into(), 80)))?;
    let mut all = BTreeMap::new();
    let mut note = |what: String, outcome: Result<String, String>| match outcome {
        Ok(text) => {
            let text = text.replace("\\n", "\n").replace("\\t", " ");
            for (number, line) in text.lines().enumerate() {
                let (key, value) = match line.split_once(' ') {
                    Some((path, value)) if line.starts_with('/') => (format!("{path} "), value),
                    _ => (format!("{what}, line {}", number + 1), line),
                };
                all.insert(key, value.to_owned());
            }
        }
        Err(error) => drop(all.insert(what, format!("error {error}"))),
    };
    for path in FILES {
        let text = agent.act(&format!("read {path}"))?;
        // The kernel lists these in the order of its hash tables.
        let is_table = ["/proc/net/if_inet6", "/proc/net/ipv6_route"].contains(&path);
        note(path.into(), text.map(|text| if is_table { sorted(&text) } else { text }));
    }
    for directory in ["/proc/sys/net", "/sys/class/net/wg0", "/sys/class/net/lo", "/sys/class/net/host0"] {
        // Over the veth.
        note(directory.into(), agent.act(&format!("tree {directory}/"))?);
    }
    note("names".into(), Ok(sorted(&agent.succeed("run find /run -not -path /run/lab/*")?)));
    let status = agent.succeed("read /proc/self/status")?;
    let lasting = ["Cap", "NoNewPrivs", "Seccomp", "Groups", "Uid", "Gid"];
    for line in status.split("\\n").filter(|line| lasting.iter().any(|name| line.starts_with(name))) {
        note(format!("status {line}"), Ok("there".into()));
    }
    for act in acts() {
        let outcome = agent.act(&act)?;
        note(act, outcome);
    }
    // Traffic counters. The bytes of a packet depend on the layer at which the interface counts, so packets are
    // compared.
    for path in ["/sys/class/net/wg0/statistics/rx_packets", "/sys/class/net/wg0/statistics/tx_packets"] {
        let count: u64 = agent.succeed(&format!("read {path}"))?.trim_end_matches("\\n").parse()?;
        note(format!("{path}, more than 10"), Ok((count > 10).to_string()));
    }
    // New connections after the provider has stopped.
    lab.provider.stop()?;
    for to in WEB.both() {
        for act in ["get http://ADDRESS:80/", "send ADDRESS:9", "bound-connect wg0 ADDRESS:80"] {
            let address = SocketAddr::new(to, 0).to_string();
            let act = act.replace("ADDRESS", address.trim_end_matches(":0"));
            let outcome = agent.act(&act)?;
            note(format!("without a provider, {act}"), outcome);
        }
    }
    lab.provider.restart()?;
    let (status, complaints) = agent.finish()?;
    ensure!(status.success(), "{status}: {complaints}");
    Ok(all)
}

/// Returns the lines of an answer in order.
fn sorted(text: &str) -> String {
    let mut lines: Vec<&str> = text.split("\\n").collect();
    lines.sort_unstable();
    lines.join("\\n")
}

/// Requires the kernel's WireGuard.
///
/// # Errors
/// [`Skip`] if the kernel has none.
fn require_kernel() -> Result<()> {
    let made = NetworkNamespace::create(|| {
        let name = "wg0".parse().map_err(io::Error::other)?;
        Ok(Netlink::open()?.execute_one(NetlinkRequest::add_wireguard(&name, TargetNamespace::Current))?)
    });
    match made {
        Ok(_) => Ok(()),
        Err(error) => {
            let reason = format!("this kernel has no WireGuard: {error}");
            Err(Skip::error(reason, lab::variables::REQUIRE_KERNEL_WIREGUARD))
        }
    }
}

#[test]
fn a_program_sees_the_same_with_both_backends() {
    lab::test(Peer::Ours, |lab| {
        require_kernel()?;
        let _echo = lab::agent::Echo::start(&lab.web_site, 7)?;
        let (kernel, embedded) = (seen(lab, "kernel")?, seen(lab, "userspace")?);
        // Both lists have contents at all.
        ensure!(kernel.len() > 500 && embedded.len() > 500, "{} and {} things were seen", kernel.len(), embedded.len());
        let names: std::collections::BTreeSet<&String> = kernel.keys().chain(embedded.keys()).collect();
        let differences: Vec<String> = names
            .into_iter()
            .filter(|name| kernel.get(*name) != embedded.get(*name))
            .filter(|name| !NAMED.iter().any(|(begin, _)| name.starts_with(begin)))
            .map(|name| {
                format!("{name}: {:?} with the kernel's, {:?} with the embedded", kernel.get(name), embedded.get(name))
            })
            .collect();
        ensure!(differences.is_empty(), "{differences:#?}");
        Ok(())
    });
}

/// The kernel applies a device's attributes one by one, and keeps those before a refused one.
#[test]
fn a_refused_port_leaves_the_kernels_device_unchanged() {
    lab::test(Peer::Ours, |lab| {
        require_kernel()?;
        let run = |arguments: &[&str]| lab::launcher::run(vpn_exec(arguments));
        let text = lab.wg_quick_text(Reach::Ipv4);
        let before = lab.file(&text)?.display().to_string();
        let after = text.replace("[Peer]", "ListenPort = 40124\nFwMark = 7\n[Peer]");
        let after = lab.file(&after)?.display().to_string();
        let options = ["--name", "alike", "--backend", "kernel"];
        let up = run(&[&["up", &before], &options[..]].concat())?;
        ensure!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        let NameLookup::Namespace(inside) = look_up(&path_of("alike"))? else { bail!("there is a namespace") };
        let mark = || -> Result<String> {
            let output = inside.run(|| Command::new("wg").args(["show", "wg0", "fwmark"]).output())?;
            Ok(String::from_utf8(output.stdout)?.trim().to_owned())
        };
        let holders = [UdpSocket::bind("0.0.0.0:40124")?, UdpSocket::bind("[::1]:40124")?];
        let reload = [&["reload", &after], &options[..]].concat();
        let refused = run(&reload)?;
        ensure!(!refused.status.success(), "{}", String::from_utf8_lossy(&refused.stdout));
        ensure!(mark()? == "off", "the mark was set: {}", mark()?);
        drop(holders);
        let applied = run(&reload)?;
        ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        ensure!(mark()? == "0x7", "{}", mark()?);
        let down = run(&["down", "alike"])?;
        ensure!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
        Ok(())
    });
}
