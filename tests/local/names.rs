//! Names are not asked of anybody local but of a resolver that was named.

use anyhow::{bail, ensure};
use lab::agent::Echo;
use lab::dns::DnsServer;
use lab::{Addresses, PRIVATE_LAN, Peer, WEB};

use super::{WORKS, finish, inside, local_networks, reachable};

#[test]
fn no_resolver_of_the_local_network_hears_of_any() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let neighbours = DnsServer::start(&lab.lan, PRIVATE_LAN)?;
        neighbours.set("web.example", &WEB.both());
        let mut agent = inside(lab, local_networks())?;
        for address in PRIVATE_LAN.both() {
            agent.fail(&format!("lookup {address} web.example"))?;
        }
        finish(agent)?;
        ensure!(neighbours.questions().is_empty(), "{:?}", neighbours.questions());

        // One that is configured, and meant by itself, is asked.
        let named: Vec<String> = reachable(PRIVATE_LAN).iter().map(|address| address.to_string()).collect();
        let all = |option| named.iter().flat_map(move |address| [option, address.as_str()]).collect::<Vec<_>>();
        let mut agent = inside(lab, &[all("--dns"), all("--local")].concat())?;
        for address in &named {
            agent.succeed(&format!("lookup {address} web.example"))?;
        }
        finish(agent)?;
        ensure!(neighbours.questions().len() == named.len(), "{:?}", neighbours.questions());
        // In a wider network it is found in the tunnel instead, as that routes everything.
        let mut agent = inside(lab, &[&all("--dns")[..], local_networks()].concat())?;
        for address in &named {
            agent.fail(&format!("lookup {address} web.example"))?;
        }
        finish(agent)?;
        ensure!(neighbours.questions().len() == named.len(), "{:?}", neighbours.questions());
        Ok(())
    });
}

/// A resolver of the host's that listens on its address on the link.
#[test]
fn nor_does_one_of_the_host() {
    lab::test(Peer::Ours, |lab| {
        let mut agent = inside(lab, &[])?;
        let addresses = agent.succeed("resolve host.internal")?;
        let Some((ipv4, ipv6)) = addresses.split_once(' ') else { bail!("one of each family: {addresses}") };
        let hosts = DnsServer::start(&lab.host, Addresses { ipv4: ipv4.parse()?, ipv6: ipv6.parse()? })?;
        hosts.set("web.example", &WEB.both());
        for address in [ipv4, ipv6] {
            agent.fail(&format!("lookup {address} web.example"))?;
        }
        ensure!(hosts.questions().is_empty(), "{:?}", hosts.questions());
        // It hears who asks, and the host is reached otherwise.
        lab::dns::lookup(ipv4.parse()?, "web.example", lab::dns::RecordType::A, WORKS)?;
        ensure!(hosts.questions().len() == 1);
        let _echo = Echo::start(&lab.host, 7)?;
        agent.succeed(&format!("echo {ipv4}:7 10"))?;
        finish(agent)?;
        Ok(())
    });
}
