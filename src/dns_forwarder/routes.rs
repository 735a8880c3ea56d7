//! Which resolvers a question is sent to.

use crate::plan::{ForwarderPlan, ResolverPlan};

/// The resolvers of each domain.
#[derive(Clone, Debug)]
pub struct Routes {
    domains: Vec<DomainRoute>,
    others: Vec<ResolverPlan>,
}

#[derive(Clone, Debug)]
struct DomainRoute {
    /// The labels from the top-level domain down, in lower case.
    labels: Vec<Vec<u8>>,
    resolvers: Vec<ResolverPlan>,
}

impl Routes {
    /// Creates the routes of a plan.
    pub fn new(plan: &ForwarderPlan) -> Self {
        let domains = plan.domains.iter().map(|domain| DomainRoute {
            labels: domain.domain.labels().rev().map(|label| label.as_bytes().to_vec()).collect(),
            resolvers: domain.resolvers.clone(),
        });
        Self { domains: domains.collect(), others: plan.others.clone() }
    }

    /// Returns the resolvers of a name, whose labels begin with the most specific one: those of the longest domain that
    /// contains it, else those of all other names. Labels are compared as a whole, without regard to letter case.
    pub fn resolvers<'a>(&self, name: impl DoubleEndedIterator<Item = &'a [u8]>) -> &[ResolverPlan] {
        let name: Vec<&[u8]> = name.rev().collect();
        let contains = |domain: &&DomainRoute| {
            name.len() >= domain.labels.len()
                && name.iter().zip(&domain.labels).all(|(label, own)| label.eq_ignore_ascii_case(own))
        };
        let longest = self.domains.iter().filter(contains).max_by_key(|domain| domain.labels.len());
        longest.map_or(&self.others, |domain| &domain.resolvers)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::config::Domain;
    use crate::plan::{DomainPlan, Side};

    fn resolver(last: u8, side: Side) -> ResolverPlan {
        ResolverPlan { address: IpAddr::from(Ipv4Addr::new(10, 0, 0, last)), side }
    }

    fn routes(domains: &[&str]) -> Routes {
        let domain = |(index, domain): (usize, &&str)| DomainPlan {
            domain: Domain::try_from((*domain).to_owned()).expect("a domain"),
            resolvers: vec![resolver(u8::try_from(index + 1).expect("few domains"), Side::Local)],
        };
        let domains = domains.iter().enumerate().map(domain).collect();
        Routes::new(&ForwarderPlan { domains, others: vec![resolver(0, Side::Tunnel)], port: 0 })
    }

    /// Returns the number of the domain that a name is in, 0 for none.
    fn number(routes: &Routes, name: &str) -> u8 {
        let labels = name.split('.').filter(|label| !label.is_empty()).map(str::as_bytes);
        match routes.resolvers(labels.collect::<Vec<_>>().into_iter()) {
            [ResolverPlan { address: IpAddr::V4(address), .. }] => address.octets()[3],
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn the_longest_domain_wins_at_label_boundaries() {
        let routes = routes(&["local", "cluster.local", "43.10.in-addr.arpa"]);
        for (name, expected) in [
            ("local", 1),
            ("printer.local", 1),
            ("cluster.local", 2),
            ("CLUSTER.Local", 2),
            ("web.default.svc.cluster.local", 2),
            ("xcluster.local", 1),
            ("cluster.local.example", 0),
            ("local.example", 0),
            ("xlocal", 0),
            ("web.example", 0),
            ("", 0),
            ("10.0.43.10.in-addr.arpa", 3),
            ("143.10.in-addr.arpa", 0),
            ("10.in-addr.arpa", 0),
        ] {
            assert_eq!(number(&routes, name), expected, "{name:?}");
        }
    }

    #[test]
    fn labels_are_compared_as_bytes() {
        let routes = routes(&["cluster.local"]);
        let side = |labels: &[&[u8]]| routes.resolvers(labels.iter().copied())[0].side;
        assert_eq!(side(&[b"a", b"cluster", b"local"]), Side::Local);
        // One label with a dot is not two labels.
        assert_eq!(side(&[b"a", b"cluster.local"]), Side::Tunnel);
        assert_eq!(side(&[b"cluster", b"local", b""]), Side::Tunnel);
        assert_eq!(side(&[b"cluster", b"local\0"]), Side::Tunnel);
        // The Kelvin sign is a K only in Unicode.
        assert_eq!(side(&["\u{212a}luster".as_bytes(), b"local"]), Side::Tunnel);
        assert_eq!(side(&[b"\xff\0.", b"CLUSTER", b"LOCAL"]), Side::Local);
    }

    proptest! {
        #[test]
        fn a_name_is_local_exactly_if_it_ends_with_the_domain(
            before in proptest::collection::vec("[a-zA-Z0-9.\\x00\\xff-]{1,9}", 0..5),
            spelling in "(?i)cluster",
            cut in 0_usize..3,
        ) {
            let routes = routes(&["cluster.local"]);
            let end = [spelling.as_bytes(), b"LOCAL"];
            let labels: Vec<&[u8]> =
                before.iter().map(String::as_bytes).chain(end[..2 - cut.min(2)].iter().copied()).collect();
            let is_inside = labels.len() >= 2
                && labels[labels.len() - 2].eq_ignore_ascii_case(b"cluster")
                && labels[labels.len() - 1].eq_ignore_ascii_case(b"local");
            let side = routes.resolvers(labels.into_iter())[0].side;
            prop_assert_eq!(side == Side::Local, is_inside);
        }
    }
}
