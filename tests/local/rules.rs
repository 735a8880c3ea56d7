//! The printed rules are those in the kernel: nft(8), which shares no code with vpn-exec, reads the text and lists the
//! kernel's.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use lab::world;
use vpn_exec::linux::namespace::NetworkNamespace;
use vpn_exec::linux::nftables::Nftables;
use vpn_exec::ruleset::{Chain, Family, Hook, Interface, Match, Policy, Rule, Table, Verdict};

use super::nft;

fn every_kind() -> Result<Table> {
    let named = |name: &str| Ok::<_, anyhow::Error>(Interface::Named(name.parse()?));
    let relay = |to: &str, port, by: &str| {
        let verdict = Verdict::RelayBy(by.parse()?);
        Ok::<_, anyhow::Error>(Rule { matches: vec![Match::Destination(to.parse()?), port], verdict })
    };
    let input = vec![
        Rule::accept([Match::From(Interface::Loopback)]),
        Rule::accept([Match::Replies]),
        Rule::accept([Match::From(named("wg0")?), Match::TcpPort(80..=80)]),
        Rule::drop([Match::From(named("fifteen-letters")?), Match::UdpPort(8000..=8010)]),
        Rule::accept([Match::From(named("host0")?), Match::Icmpv6(135), Match::HopLimit(255)]),
        Rule::accept([Match::Source("10.0.0.0/8".parse()?)]),
        Rule::drop([Match::From(named("wg0")?), Match::Of(Family::Ipv4)]),
        Rule::accept([Match::Of(Family::Ipv6), Match::Replies]),
        Rule::accept([Match::Source("192.0.2.7/32".parse()?), Match::TcpPort(0..=65535)]),
    ];
    let output = vec![
        Rule::accept([Match::To(Interface::Prefix("ve-".into())), Match::Destination("fc00::/7".parse()?)]),
        Rule::accept([Match::NotTo(Interface::Prefix("ve-".into())), Match::Destination("2001:db8::1/128".parse()?)]),
        Rule::drop([Match::NotTo(named("wg0")?), Match::Source("192.168.4.0/22".parse()?)]),
    ];
    let output = Chain::closed(Hook::Output, output);
    ensure!(output.rules.iter().filter(|rule| rule.verdict == Verdict::Reset).count() == 2, "{output}");
    let prerouting = vec![
        Rule::set_connection_mark(0x7665, [Match::NotFrom(named("wg0")?), Match::NewConnection]),
        Rule::accept([Match::NotFrom(Interface::Loopback), Match::ConnectionMark(1)]),
        Rule::accept([Match::OpensTcp, Match::NewConnection]),
        relay("192.168.7.0/24", Match::TcpPort(1..=65535), "127.0.0.1:4000")?,
        relay("fd07::/64", Match::UdpPort(53..=53), "[::1]:4000")?,
    ];
    let reroute = vec![Rule::set_mark(0x7665, [Match::ConnectionMark(0x7665), Match::ReplyDirection])];
    let output_nat = vec![
        Rule::redirect_to(5300, [Match::Destination("10.0.0.1/32".parse()?), Match::UdpPort(53..=53)]),
        Rule::redirect_to(53, [Match::TcpPort(53..=53), Match::Mark(u32::MAX)]),
    ];
    let hide = Rule {
        matches: vec![Match::Source("10.1.2.3/32".parse()?), Match::NotTo(named("wg0")?)],
        verdict: Verdict::Masquerade,
    };
    let chain = |hook, policy, rules| Chain { hook, policy, rules };
    Ok(Table {
        name: "one".into(),
        chains: vec![
            chain(Hook::Prerouting, Policy::Accept, prerouting),
            chain(Hook::Input, Policy::Drop, input),
            chain(Hook::Forward, Policy::Accept, vec![]),
            output,
            chain(Hook::Reroute, Policy::Accept, reroute),
            chain(Hook::OutputNat, Policy::Accept, output_nat),
            chain(Hook::Postrouting, Policy::Accept, vec![hide]),
        ],
    })
}

/// In a namespace of its own: a table that vpn-exec loads, and one that nft loads from the printed text.
#[test]
fn the_kernel_has_the_printed_rules() {
    world::test(|| {
        let site = NetworkNamespace::current()?;
        let table = every_kind()?;
        let mut rules = Nftables::open()?;
        rules.create(&table, "a comment")?;
        ensure!(rules.comment("one")?.as_deref() == Some("a comment"));
        nft(&site, &[&Table { name: "two".into(), ..table.clone() }.to_string()])?;
        let told = nft(&site, &["-s", "list", "table", "inet", "one"])?;
        let printed = nft(&site, &["-s", "list", "table", "inet", "two"])?;
        let told = told.replace("\tcomment \"a comment\"\n", "").replace("table inet one", "table inet two");
        ensure!(told == printed, "told:\n{told}\nprinted:\n{printed}");

        // A table is created, replaced and removed as a whole.
        let taken = rules.create(&table, "again").expect_err("the table exists");
        ensure!(taken.kind() == std::io::ErrorKind::AlreadyExists, "{taken}");
        let smaller = Table { chains: table.chains[2..3].to_vec(), ..table };
        rules.replace(&smaller, "replaced")?;
        ensure!(rules.comment("one")?.as_deref() == Some("replaced"));
        let listed = nft(&site, &["list", "table", "inet", "one"])?;
        ensure!(listed.contains("forward") && !listed.contains("input"), "{listed}");
        ensure!(rules.comment("two")?.is_none(), "it has none");
        rules.delete("one")?;
        let gone = rules.comment("one").expect_err("it is gone");
        ensure!(gone.kind() == std::io::ErrorKind::NotFound, "{gone}");
        Ok(())
    });
}

/// A refused transaction has no effect, not even by its valid part.
#[test]
fn a_refused_table_changes_nothing() {
    world::test(|| {
        let mut rules = Nftables::open()?;
        let mut table = every_kind()?;
        table.chains.push(Chain { hook: Hook::Input, ..table.chains[6].clone() });
        ensure!(rules.create(&table, "").is_err(), "masquerading on input must be refused");
        ensure!(rules.comment("one").is_err(), "it is not there");
        table.chains.pop();
        rules.create(&table, "")?;
        Ok(())
    });
}

/// Sends packets that a table drops, and replaces the table by itself, `times` or until a packet passes. Returns
/// whether one has.
fn comes_through(table: &Table, times: usize) -> Result<bool> {
    let mut rules = Nftables::open()?;
    rules.create(table, "")?;
    let heard = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    heard.set_nonblocking(true)?;
    let (to, is_over) = (heard.local_addr()?, AtomicBool::new(false));
    let comes = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
                while !is_over.load(Ordering::Relaxed) {
                    let _ = socket.send_to(b"through", to);
                }
            });
        }
        let mut replaced = (0..times).map(|_| {
            rules.replace(table, "")?;
            Ok(heard.recv(&mut [0; 16]).is_ok())
        });
        let comes = replaced.find(|came| !matches!(came, Ok(false))).unwrap_or(Ok(false));
        is_over.store(true, Ordering::Relaxed);
        comes
    });
    rules.delete(&table.name)?;
    comes
}

/// The kernel applies new rules at once, but a new chain's policy a moment later.
#[test]
fn a_table_that_is_replaced_drops_without_a_gap() {
    world::test(|| {
        // Objects before the chain in the table prolong the moment.
        let input: Vec<Rule> = (1..700).map(|port| Rule::accept([Match::UdpPort(port..=port)])).collect();
        let output = || vec![Rule::accept([Match::TcpPort(1..=1)])];
        let table = |output| Table {
            name: "closed".into(),
            chains: vec![Chain { hook: Hook::Input, policy: Policy::Accept, rules: input.clone() }, output],
        };
        ensure!(!comes_through(&table(Chain::closed(Hook::Output, output())), 50)?);
        let by_policy = Chain { hook: Hook::Output, policy: Policy::Drop, rules: output() };
        ensure!(comes_through(&table(by_policy), 1000)?, "the twin, which relies on the policy");
        Ok(())
    });
}
