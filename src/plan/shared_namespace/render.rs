//! Prints the plan of an attached tunnel as text: the same facts as its JSON, in the order in which they take effect.

use std::fmt::{self, Display, Formatter};

use super::{MARK, Placement, SharedNamespacePlan, TABLE, TableRoute};
use crate::plan::render::{Escaped, backend, forwarder, notes, row, rows, rules, wireguard};
use crate::ruleset::Family;

impl Display for SharedNamespacePlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "Tunnel {}", self.name)?;
        let (namespace, encrypted) = match &self.placement {
            Placement::Attached { .. } => {
                ("this one".to_owned(), format!("leave this namespace with the mark {MARK:#x}"))
            }
            Placement::Container => ("that of a container".to_owned(), "leave the host's namespace".to_owned()),
        };
        row(f, "namespace", namespace)?;
        row(f, "encrypted", encrypted)?;
        backend(self.backend, f)?;
        if let Placement::Attached { endpoints, resolvers, .. } = &self.placement {
            rows(f, "endpoints", endpoints)?;
            if !resolvers.is_empty() {
                rows(f, "looked up by", resolvers)?;
            }
        }
        rows(f, "local networks", &self.local_networks)?;
        if !self.open.is_empty() {
            rows(f, "open ports", &self.open)?;
        }
        rules("Packet rules", &self.rules, f)?;
        writeln!(f, "\nPolicy rules")?;
        for rule in &self.routing_rules {
            let family = if rule.family == Family::Ipv4 { "IPv4" } else { "IPv6" };
            row(f, family, rule)?;
        }
        writeln!(f, "\nRoutes of the table {TABLE}")?;
        for route in &self.routes {
            match route {
                TableRoute::Unreachable(net) => writeln!(f, "  unreachable {net} metric {}", u32::MAX)?,
                TableRoute::Tunnel(net) => writeln!(f, "  {net} dev {}", self.wireguard.interface)?,
            }
        }
        wireguard(&self.wireguard, f)?;
        writeln!(f, "\nName resolution (DNS)")?;
        forwarder(&self.dns, f)?;
        writeln!(f, "  /etc/resolv.conf")?;
        for line in self.dns.resolv_conf.lines() {
            writeln!(f, "    {}", Escaped(line))?;
        }
        notes(&self.notes, f)
    }
}
