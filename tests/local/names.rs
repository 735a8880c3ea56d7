//! DNS goes to no local resolver, except to one that is configured.

use anyhow::{bail, ensure};
use lab::agent::Echo;
use lab::dns::DnsServer;
use lab::{Addresses, PRIVATE_LAN, Peer, WEB};

use super::{WORKS, finish, inside, local_networks, reachable};

#[test]
fn no_question_reaches_a_resolver_in_the_local_network() {
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

        // A resolver that is configured, and opened by its own address.
        let named: Vec<String> = reachable(PRIVATE_LAN).iter().map(|address| address.to_string()).collect();
        let all = |option| named.iter().flat_map(move |address| [option, address.as_str()]).collect::<Vec<_>>();
        let mut agent = inside(lab, &[all("--dns"), all("--local")].concat())?;
        for address in &named {
            agent.succeed(&format!("lookup {address} web.example"))?;
        }
        finish(agent)?;
        ensure!(neighbours.questions().len() == named.len(), "{:?}", neighbours.questions());
        // In a wider opened network, the tunnel takes precedence for it, as it routes everything.
        let mut agent = inside(lab, &[&all("--dns")[..], local_networks()].concat())?;
        for address in &named {
            agent.fail(&format!("lookup {address} web.example"))?;
        }
        finish(agent)?;
        ensure!(neighbours.questions().len() == named.len(), "{:?}", neighbours.questions());
        Ok(())
    });
}

/// The host's resolver listens on its address on the veth.
#[test]
fn no_question_reaches_a_resolver_of_the_host() {
    lab::test(Peer::Ours, |lab| {
        lab::tunnel::needs_root("a rootless tunnel has no link to the host")?;
        let mut agent = inside(lab, &[])?;
        let addresses = agent.succeed("resolve host.internal")?;
        let Some((ipv4, ipv6)) = addresses.split_once(' ') else { bail!("one of each family: {addresses}") };
        let hosts = DnsServer::start(&lab.host, Addresses { ipv4: ipv4.parse()?, ipv6: ipv6.parse()? })?;
        hosts.set("web.example", &WEB.both());
        for address in [ipv4, ipv6] {
            agent.fail(&format!("lookup {address} web.example"))?;
            // At once, so that a program tries the next resolver.
            let at = if address == ipv4 { format!("{address}:53") } else { format!("[{address}]:53") };
            let error = agent.fail(&format!("get http://{at}/"))?;
            ensure!(error == "ECONNREFUSED", "{error}");
        }
        ensure!(hosts.questions().is_empty(), "{:?}", hosts.questions());
        // The resolver works, and the program reaches other ports of the host.
        lab::dns::lookup(ipv4.parse()?, "web.example", lab::dns::RecordType::A, WORKS)?;
        ensure!(hosts.questions().len() == 1);
        let _echo = Echo::start(&lab.host, 7)?;
        agent.succeed(&format!("echo {ipv4}:7 10"))?;
        finish(agent)?;
        Ok(())
    });
}
