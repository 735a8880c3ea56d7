//! Policy rules, tables of routes and marks, as a tunnel in a shared namespace uses them: ip(8), which shares no code
//! with vpn-exec, reads the same from the kernel, and packets go where they should.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::{Skip, world};
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::netlink::link::TargetNamespace;
use vpn_exec::linux::netlink::route::{Route, RouteKind};
use vpn_exec::linux::netlink::rule::{PolicyRule, Selector};
use vpn_exec::linux::netlink::{Netlink, NetlinkRequest};
use vpn_exec::linux::nftables::Nftables;
use vpn_exec::linux::{errno_of, sysctl};
use vpn_exec::ruleset::{Chain, Family, Hook, Interface, Match, Policy, Rule, Table};

/// The table of the tests, and a mark.
const TABLE: u32 = 30309;
const MARK: u32 = 0x7665;

/// The addresses of both ends of a link, the neighbor's second address, and an address beyond it.
const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 130);
const NEIGHBOR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 129);
const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const LINK_ADDRESSES: [(&str, &str); 2] = [("pod0", "192.0.2.130/30"), ("far0", "192.0.2.129/30")];

const PATIENCE: Duration = Duration::from_secs(5);

fn ip(arguments: &str) -> Result<String> {
    let output = match Command::new("ip").args(arguments.split_whitespace()).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Skip::error("ip is not installed", lab::variables::REQUIRE_PEERS));
        }
        other => other?,
    };
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

fn every_kind() -> Vec<PolicyRule> {
    let of = |family, nets: [&str; 4]| {
        let [address, inner, outer, any] = nets.map(net);
        let selectors = [
            (Selector::Mark(MARK), Route::MAIN),
            (Selector::From(address), Route::MAIN),
            (Selector::To(inner), TABLE),
            (Selector::To(outer), Route::MAIN),
            (Selector::From(any), 5),
            (Selector::Mark(1 << 31), u32::MAX),
            (Selector::NotByDefault, Route::MAIN),
            (Selector::All, TABLE),
        ];
        let rule = move |(priority, (selector, table))| PolicyRule { family, priority, selector, table };
        (30300..).zip(selectors).map(rule).collect::<Vec<_>>()
    };
    let ipv4 = of(Family::Ipv4, ["10.1.2.3/32", "10.64.0.0/24", "10.0.0.0/8", "192.0.2.128/25"]);
    [ipv4, of(Family::Ipv6, ["fd00::1/128", "fd64::/64", "fc00::/7", "2001:db8::/32"])].concat()
}

fn option_of(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "-4",
        Family::Ipv6 => "-6",
    }
}

fn listed_by_ip() -> Result<String> {
    Ok(ip("-4 rule list")? + &ip("-6 rule list")?)
}

/// Policy rules that ip(8) adds from the displayed text are those that vpn-exec adds, reads and removes.
#[test]
fn the_kernel_has_the_displayed_policy_rules() {
    world::test(|| {
        let mut netlink = Netlink::open()?;
        let (untouched, untouched_by_ip) = (netlink.policy_rules()?, listed_by_ip()?);
        let rules = every_kind();
        let add = || rules.iter().map(NetlinkRequest::add_rule).collect::<Vec<_>>();
        let delete = || rules.iter().map(NetlinkRequest::delete_rule).collect::<Vec<_>>();
        let ours = |netlink: &mut Netlink| {
            Ok::<_, anyhow::Error>(netlink.policy_rules()?.into_iter().filter(|it| !untouched.contains(it)))
        };
        netlink.execute(add())?;
        ensure!(ours(&mut netlink)?.eq(rules.iter().copied()), "{:?}", netlink.policy_rules()?);
        let told = listed_by_ip()?;
        netlink.execute(add())?;
        ensure!(listed_by_ip()? == told, "a rule is not added twice");
        netlink.execute(delete())?;
        ensure!(listed_by_ip()? == untouched_by_ip, "{}", listed_by_ip()?);
        netlink.execute(delete())?;

        for rule in &rules {
            ip(&format!("{} rule add {rule}", option_of(rule.family)))?;
        }
        ensure!(listed_by_ip()? == told, "told:\n{told}\ndisplayed:\n{}", listed_by_ip()?);
        ensure!(ours(&mut netlink)?.eq(rules.iter().copied()));
        netlink.execute(delete())?;

        // None of these is a rule of a single selector.
        for other in [
            "from 10.0.0.0/8 to 10.1.0.0/16 lookup 5",
            "iif lo lookup 5",
            "fwmark 1/0xff lookup 5",
            "not from 10.0.0.0/8 lookup 5",
            "uidrange 0-0 lookup 5",
            "to 10.0.0.0/8 dport 53 lookup 5",
            "from all unreachable",
            "from all lookup main suppress_prefixlength 8",
        ] {
            ip(&format!("rule add priority 30300 {other}"))?;
            ensure!(netlink.policy_rules()? == untouched, "{other}");
            ip(&format!("rule del priority 30300 {other}"))?;
        }
        Ok(())
    });
}

/// Creates a link to a new namespace, with addresses. Returns the namespace and the link's index.
fn link_to_neighbor(netlink: &mut Netlink) -> Result<(NetworkNamespace, u32)> {
    let (neighbor, ()) = NetworkNamespace::create(|| Ok(()))?;
    let [ours, theirs] = LINK_ADDRESSES.map(|(name, address)| (name.parse(), net(address)));
    let (names, target) = ((ours.0?, theirs.0?), TargetNamespace::Other(std::os::fd::AsFd::as_fd(&neighbor)));
    netlink.execute_one(NetlinkRequest::add_veth(&names.0, &names.1, target))?;
    let set_up = |netlink: &mut Netlink, name: &vpn_exec::names::InterfaceName, address| {
        let index = netlink.link_index(name)?;
        netlink.execute(vec![
            NetlinkRequest::add_address(index, name.as_str(), address),
            NetlinkRequest::set_up(index, name.as_str()),
        ])?;
        Ok::<_, std::io::Error>(index)
    };
    neighbor.run(|| {
        let mut netlink = Netlink::open()?;
        let index = set_up(&mut netlink, &names.1, theirs.1)?;
        let lo = netlink.link("lo")?.map_or(1, |link| link.index);
        netlink.execute(vec![
            NetlinkRequest::set_up(lo, "lo"),
            NetlinkRequest::add_address(lo, "lo", IpAddr::from(FAR).into()),
        ])?;
        Ok(index)
    })?;
    let index = set_up(netlink, &names.0, ours.1)?;
    Ok((neighbor, index))
}

/// Returns the error number with which a datagram to an address is refused, or none if it is sent.
fn refused(to: impl Into<IpAddr>) -> Option<i32> {
    let to = SocketAddr::new(to.into(), 9);
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("a socket");
    socket.send_to(b"x", to).err().and_then(|error| errno_of(&error))
}

/// A table's routes are used for its rule's packets, and its last route refuses them when the others are gone.
#[test]
fn a_table_ends_with_a_route_that_refuses() {
    world::test(|| {
        let mut netlink = Netlink::open()?;
        let (_neighbor, index) = link_to_neighbor(&mut netlink)?;
        let defaults = [net("0.0.0.0/0"), net("::/0")];
        let rule = |family| PolicyRule { family, priority: 30309, selector: Selector::All, table: TABLE };
        let far6: IpAddr = "2001:db8::7".parse()?;
        let mut requests: Vec<_> =
            [Family::Ipv4, Family::Ipv6].iter().map(|it| NetlinkRequest::add_rule(&rule(*it))).collect();
        let last = |it: &IpNet| NetlinkRequest::add_unreachable_route(TABLE, *it, u32::MAX);
        requests.extend(defaults.iter().map(last));
        netlink.execute(requests)?;
        let refusals = netlink.execute(defaults.iter().map(last).collect()).expect_err("they exist");
        ensure!(refusals.raw_os_error() == Some(libc::EEXIST));
        netlink.execute(defaults.iter().map(|it| last(it).or_exists()).collect())?;
        ensure!(refused(FAR) == Some(libc::EHOSTUNREACH), "{:?}", refused(FAR));
        ensure!(refused(far6) == Some(libc::EHOSTUNREACH), "{:?}", refused(far6));
        ensure!(
            ip(&format!("route list table {TABLE}"))?.trim() == "unreachable default proto static metric 4294967295"
        );

        let through = |it: &IpNet| NetlinkRequest::add_route_in(TABLE, index, "pod0", *it);
        netlink.execute(defaults.iter().map(through).collect())?;
        let routes = netlink.routes_of(TABLE)?;
        let of_kind = |kind| routes.iter().filter(move |it| it.kind == kind).collect::<Vec<_>>();
        ensure!(of_kind(RouteKind::Unicast).iter().map(|it| it.destination).eq(defaults), "{routes:?}");
        ensure!(of_kind(RouteKind::Unicast).iter().all(|it| it.interface == Some(index)), "{routes:?}");
        ensure!(of_kind(RouteKind::Unreachable).iter().map(|it| it.destination).eq(defaults), "{routes:?}");
        ensure!(of_kind(RouteKind::Unreachable).iter().all(|it| it.metric == u32::MAX), "{routes:?}");
        ensure!(netlink.route_to(FAR.into())?.interface == Some(index));
        ensure!(refused(FAR).is_none() && refused(far6).is_none(), "the routes by the link come first");

        // Each is removed alone, and the main table's route is another one.
        let elsewhere = net("203.0.113.0/24");
        netlink.execute(vec![
            NetlinkRequest::add_route(index, "pod0", elsewhere, None),
            NetlinkRequest::add_route_in(TABLE, index, "pod0", elsewhere),
            NetlinkRequest::delete_route_in(TABLE, index, "pod0", elsewhere),
            NetlinkRequest::delete_route_in(TABLE, index, "pod0", elsewhere),
        ])?;
        ensure!(netlink.routes_of(Route::MAIN)?.iter().any(|it| it.destination == elsewhere));
        ensure!(netlink.routes_of(TABLE)?.len() == 4);
        netlink.execute_one(NetlinkRequest::delete_link(index, "pod0"))?;
        ensure!(refused(FAR) == Some(libc::EHOSTUNREACH) && refused(far6) == Some(libc::EHOSTUNREACH));
        let remove = |it: &IpNet| NetlinkRequest::delete_unreachable_route(TABLE, *it, u32::MAX);
        netlink.execute(defaults.iter().chain(&defaults).map(remove).collect())?;
        ensure!(netlink.routes_of(TABLE)?.is_empty());
        Ok(())
    });
}

/// Where all packets have a route into a tunnel, replies to connections from outside leave by the mark that their
/// connection has. They need the other route all the same: without any, the kernel does not ask the packet rules.
#[test]
fn replies_leave_by_the_mark_of_their_connection() {
    world::test(|| {
        let mut netlink = Netlink::open()?;
        let (neighbor, index) = link_to_neighbor(&mut netlink)?;
        let all = |priority, selector, table| PolicyRule { family: Family::Ipv4, priority, selector, table };
        netlink.execute(vec![
            NetlinkRequest::add_route(index, "pod0", net("0.0.0.0/0"), Some(NEIGHBOR.into())),
            // The loopback interface stands for a tunnel.
            NetlinkRequest::add_route_in(TABLE, 1, "lo", net("0.0.0.0/0")),
            NetlinkRequest::add_unreachable_route(TABLE, net("0.0.0.0/0"), u32::MAX),
            NetlinkRequest::add_rule(&all(30300, Selector::Mark(MARK), Route::MAIN)),
            NetlinkRequest::add_rule(&all(30309, Selector::All, TABLE)),
        ])?;
        ensure!(netlink.route_of_marked(FAR.into(), MARK)?.interface == Some(index));
        ensure!(netlink.route_to(FAR.into())?.interface == Some(1));
        // Strict source checks would need `src_valid_mark`, as the table's routes do not lead to the sources.
        sysctl::set("net/ipv4/conf/all/rp_filter", "0")?;
        sysctl::set("net/ipv4/conf/pod0/rp_filter", "0")?;

        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080))?;
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(b"!"));
            }
        });
        let mark = |rule_of_output: bool| -> Result<Table> {
            let not_lo = || Match::NotFrom(Interface::Loopback);
            let chain = |hook, rules| Chain { hook, policy: Policy::Accept, rules };
            let reply = [Match::ConnectionMark(MARK), Match::ReplyDirection];
            Ok(Table {
                name: "marks".into(),
                chains: vec![
                    chain(Hook::Prerouting, vec![Rule::set_connection_mark(MARK, [not_lo(), Match::NewConnection])]),
                    chain(Hook::Reroute, if rule_of_output { vec![Rule::set_mark(MARK, reply)] } else { vec![] }),
                ],
            })
        };
        let mut rules = Nftables::open()?;
        let talk = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect_timeout(&(OURS, 8080).into(), Duration::from_secs(1))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut answer = [0];
            stream.read_exact(&mut answer)
        };
        rules.create(&mark(false)?, "")?;
        neighbor.run(|| Ok(talk().is_err()))?.then_some(()).context("a reply left without the mark")?;
        rules.replace(&mark(true)?, "")?;
        neighbor.run(talk).context("a reply to a connection from outside")?;
        netlink.execute_one(NetlinkRequest::delete_route_in(TABLE, 1, "lo", net("0.0.0.0/0")))?;
        neighbor.run(|| Ok(talk().is_err()))?.then_some(()).context("a reply left without any route")?;
        Ok(())
    });
}

/// A query to any address arrives at a port of the namespace itself, and the answer comes from the queried address.
#[test]
fn a_redirected_datagram_stays_in_the_namespace() {
    world::test(|| {
        let mut netlink = Netlink::open()?;
        let (_neighbor, index) = link_to_neighbor(&mut netlink)?;
        netlink.execute_one(NetlinkRequest::add_route(index, "pod0", net("0.0.0.0/0"), Some(NEIGHBOR.into())))?;
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 5300))?;
        let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(PATIENCE))?;
        }
        let redirect = Rule::redirect_to(5300, [Match::Destination(IpAddr::from(FAR).into()), Match::UdpPort(53..=53)]);
        let chain = Chain { hook: Hook::OutputNat, policy: Policy::Accept, rules: vec![redirect] };
        Nftables::open()?.create(&Table { name: "redirect".into(), chains: vec![chain] }, "")?;
        client.send_to(b"query", (FAR, 53))?;
        let mut buffer = [0; 16];
        let (length, from) = server.recv_from(&mut buffer).context("the redirected query")?;
        ensure!(&buffer[..length] == b"query");
        server.send_to(b"answer", from)?;
        let (length, from) = client.recv_from(&mut buffer).context("the answer")?;
        ensure!(&buffer[..length] == b"answer" && from == (FAR, 53).into(), "{from}");
        Ok(())
    });
}

/// Netlink tells of the switch that /proc/sys shows.
#[test]
fn disabled_ipv6_is_detected() {
    world::test(|| {
        let mut netlink = Netlink::open()?;
        let (_neighbor, _) = link_to_neighbor(&mut netlink)?;
        ensure!(!netlink.is_ipv6_disabled("pod0")?);
        sysctl::set("net/ipv6/conf/pod0/disable_ipv6", "1")?;
        ensure!(netlink.is_ipv6_disabled("pod0")? && !netlink.is_ipv6_disabled("lo")?);
        sysctl::set("net/ipv6/conf/pod0/disable_ipv6", "0")?;
        ensure!(!netlink.is_ipv6_disabled("pod0")?);
        // The kernel removes IPv6 from an interface whose MTU is too small for it (RFC 8200 section 5).
        let index = netlink.link("pod0")?.context("the interface")?.index;
        netlink.execute_one(NetlinkRequest::set_mtu(index, "pod0", 1000))?;
        ensure!(netlink.is_ipv6_disabled("pod0")?);
        let missing = netlink.is_ipv6_disabled("none0").expect_err("no such interface");
        ensure!(missing.raw_os_error() == Some(libc::ENODEV), "{missing}");
        Ok(())
    });
}
