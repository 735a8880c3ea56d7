//! Split DNS: which resolvers a domain may have, and who may ask them.

use vpn_exec::config::Config;
use vpn_exec::config::dns_for::{parse_dns_for, replace_domains};
use vpn_exec::plan::{Plan, PlanError, Side};

use super::world::{config, host, ips, ipv4, nets, planned, refused};

fn with(mut config: Config, networks: &[&str], domains: &[&str]) -> Config {
    config.local.networks = nets(networks);
    let domains: Vec<_> = domains.iter().map(|text| parse_dns_for(text).expect("a domain")).collect();
    replace_domains(&mut config.dns.domains, &domains);
    config
}

/// Returns the domains of a plan with the sides of their resolvers.
fn sides(plan: &Plan) -> Vec<(String, Vec<Side>)> {
    let forwarder = plan.dns.forwarder.as_ref().expect("a forwarder");
    let domain = |domain: &vpn_exec::plan::DomainPlan| {
        (domain.domain.to_string(), domain.resolvers.iter().map(|resolver| resolver.side).collect())
    };
    forwarder.domains.iter().map(domain).collect()
}

#[test]
fn a_plan_without_domains_has_no_forwarder() {
    let plan = planned(&ipv4(), &host());
    assert_eq!(plan.dns.forwarder, None);
    assert!(!serde_json::to_string(&plan).expect("JSON").contains("forwarder"));
    assert!(!plan.firewall.inside.to_string().contains("mark"), "{}", plan.firewall.inside);
}

#[test]
fn a_resolver_is_in_a_local_network_or_the_tunnels() {
    let plan = planned(
        &with(
            config(&["10.66.1.2/16"], &["10.64.0.1"], &["0.0.0.0/0", "10.128.0.0/9"]),
            &["192.168.1.0/24"],
            &[
                "home.arpa=192.168.1.1,192.168.1.2",
                "vpn.example=10.64.0.1",
                "a.example=10.66.0.9",
                "b.example=10.200.0.1",
            ],
        ),
        &host(),
    );
    let expected = [
        ("home.arpa", vec![Side::Local, Side::Local]),
        ("vpn.example", vec![Side::Tunnel]),
        ("a.example", vec![Side::Tunnel]),
        ("b.example", vec![Side::Tunnel]),
    ];
    assert_eq!(sides(&plan), expected.map(|(domain, sides)| (domain.to_owned(), sides)));
    assert!(plan.dns.resolv_conf.contains("nameserver 127.0.0.1\n"), "{}", plan.dns.resolv_conf);
    assert_eq!(plan.dns.resolv_conf.matches("nameserver").count(), 1);
    assert_eq!(plan.dns.servers, ips(&["10.64.0.1"]));
}

/// The tunnel routes the whole Internet, which makes no resolver the tunnel's.
#[test]
fn a_resolver_in_no_local_network_is_refused() {
    for (networks, address) in [
        (&[][..], "192.168.1.1"),
        (&["192.168.2.0/24"], "192.168.1.1"),
        (&["192.168.1.0/24"], "127.0.0.1"),
        (&["192.168.1.0/24"], "0.0.0.0"),
        (&["192.168.1.0/24"], "224.0.0.251"),
        (&["192.168.1.0/24"], "fd00::1"),
    ] {
        let errors = refused(&with(ipv4(), networks, &[&format!("home.arpa={address}")]), &host());
        let [error @ PlanError::ForeignResolver { .. }] = &errors[..] else { panic!("{address}: {errors:?}") };
        assert_eq!(
            error.to_string(),
            format!("cannot ask {address} for the names of home.arpa: it is in no local network")
        );
        assert!(error.advice().contains("--local"));
    }
}

#[test]
fn resolvers_of_a_domain_are_all_on_one_side() {
    let errors = refused(&with(ipv4(), &["192.168.1.0/24"], &["home.arpa=192.168.1.1,10.64.0.1"]), &host());
    assert!(matches!(&errors[..], [PlanError::ResolversOnBothSides { .. }]), "{errors:?}");
    // Of another domain they may be on the other.
    planned(&with(ipv4(), &["192.168.1.0/24"], &["home.arpa=192.168.1.1", "vpn.example=10.64.0.1"]), &host());
}

#[test]
fn only_marked_questions_leave_to_local_resolvers_and_none_of_them_enters_the_tunnel() {
    let plan = planned(&with(ipv4(), &["192.168.1.0/24"], &["home.arpa=192.168.1.1"]), &host());
    let rules = plan.firewall.inside.to_string();
    let output = rules.split("chain output").nth(1).expect("a chain");
    let line = |text: &str| {
        output.lines().position(|line| line.contains(text)).unwrap_or_else(|| panic!("{text} is missing in {output}"))
    };
    assert!(line("oifname \"wg0\" meta mark 0x00007666 drop") < line("oifname \"wg0\" accept"), "{output}");
    for (transport, verdict) in [("udp", "drop"), ("tcp", "reject with tcp reset")] {
        let accepted = line(&format!("ip daddr 192.168.1.1 {transport} dport 53 meta mark 0x00007666 accept"));
        assert!(accepted < line(&format!("oifname \"host0\" {transport} dport 53 {verdict}")), "{output}");
    }
    let of_resolver: Vec<&str> = output.lines().filter(|line| line.contains("192.168.1.1 ")).collect();
    assert_eq!(of_resolver.len(), 2, "{of_resolver:#?}");
    assert!(!output.contains("dport 853 accept") && !output.contains("dport 853 meta"), "{output}");
    // The host cannot see the mark.
    let host = plan.firewall.host.expect("rules of the host").to_string();
    assert!(host.contains("ip daddr 192.168.1.1 udp dport 53 accept") && !host.contains("mark"), "{host}");
}

/// A program that could ask it directly could ask it about the names of a domain with another resolver.
#[test]
fn a_local_resolver_of_all_other_names_is_asked_by_the_forwarder_alone() {
    let mut config = with(ipv4(), &["192.168.1.1/32", "192.168.1.2/32"], &["home.arpa=192.168.1.2"]);
    config.dns.servers = Some(ips(&["192.168.1.1"]));
    let plan = planned(&config, &host());
    let rules = plan.firewall.inside.to_string();
    for server in ["192.168.1.1", "192.168.1.2"] {
        assert!(rules.contains(&format!("ip daddr {server} udp dport 53 meta mark 0x00007666 accept")), "{rules}");
        assert!(!rules.contains(&format!("ip daddr {server} udp dport 53 accept")), "{rules}");
    }
}

#[test]
fn a_search_domain_of_the_local_resolver_is_noted() {
    let note = |search: &str, options: &[&str]| {
        let mut config = with(ipv4(), &["192.168.1.0/24"], &["home.arpa=192.168.1.1", "vpn.example=10.64.0.1"]);
        config.dns.search = Some(vec![search.to_owned()]);
        config.dns.options = options.iter().map(|option| (*option).to_owned()).collect();
        planned(&config, &host()).notes.into_iter().find(|note| note.contains("search domain"))
    };
    let found = note("Home.arpa", &[]).expect("a note");
    assert!(found.contains("when a look-up fails") && found.contains("www.example.net.Home.arpa"), "{found}");
    let found = note("lab.home.arpa", &["edns0", "ndots:5"]).expect("a note");
    assert!(found.contains("names with fewer than 5 dots"), "{found}");
    assert_eq!(note("vpn.example", &["ndots:5"]), None, "its resolver is the tunnel's");
    assert_eq!(note("xhome.arpa", &[]), None);
}

#[test]
fn the_printed_plan_names_the_resolvers_of_each_domain() {
    let plan = planned(&with(ipv4(), &["192.168.1.0/24"], &["home.arpa=192.168.1.1,192.168.1.2"]), &host());
    let text = plan.to_string();
    assert!(text.contains("192.168.1.1, 192.168.1.2 (in a local network) for home.arpa and names below it"), "{text}");
    assert!(text.contains("10.64.0.1 for all other names"), "{text}");
}
