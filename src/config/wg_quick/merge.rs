//! What becomes of the `[Peer]` sections: those of one public key are one peer, and an allowed IP belongs to one peer, as
//! if the kernel had been told of one section after the other, which is what `wg setconf` does.

use std::collections::HashMap;
use std::ops::Range;

use ipnet::IpNet;

use super::lines::Line;
use crate::config::diagnostic::{Diagnostic, Diagnostics, Severity};
use crate::config::{Endpoint, Peer};
use crate::keys::{PresharedKey, PublicKey};

/// A `[Peer]` section, as written.
pub(super) struct PeerSection<'a> {
    /// Its heading.
    pub(super) heading: Line<'a>,
    /// Whether it has a `PublicKey` line, be it a wrong one, which was complained about.
    pub(super) meant_a_key: bool,
    pub(super) public_key: Option<PublicKey>,
    pub(super) preshared_key: Option<PresharedKey>,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) persistent_keepalive: Option<u16>,
    /// Whether its allowed IPs take the place of those that an earlier section gave the peer. So they do unless the last
    /// `AllowedIPs` line had an entry with `+` or `-` (parse_allowedips() of wireguard-tools).
    pub(super) replace: bool,
    /// The entries of `AllowedIPs`.
    allowed: Vec<Entry<'a>>,
}

struct Entry<'a> {
    remove: bool,
    net: IpNet,
    line: Line<'a>,
    columns: Range<usize>,
}

impl<'a> PeerSection<'a> {
    /// An empty one with this heading.
    pub(super) fn new(heading: Line<'a>) -> Self {
        Self {
            heading,
            meant_a_key: false,
            public_key: None,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replace: true,
            allowed: Vec::new(),
        }
    }

    /// Adds an entry of `AllowedIPs`.
    pub(super) fn allow(&mut self, remove: bool, signed: bool, net: IpNet, line: Line<'a>, columns: Range<usize>) {
        self.replace &= !signed;
        self.allowed.push(Entry { remove, net, line, columns });
    }
}

/// Who has an allowed IP: the peer's index, and the number of the entry that gave it.
type Owners = HashMap<IpNet, (usize, usize)>;

/// A peer in the making: its networks in order, with the numbers of their entries; those that it no longer owns are dead.
struct Draft {
    peer: Peer,
    networks: Vec<(IpNet, usize)>,
}

/// The peers that the sections make. `own` is the interface's own public key: the kernel passes over such a peer. All
/// sections have a public key.
pub(super) fn peers(sections: Vec<PeerSection<'_>>, own: Option<PublicKey>, found: &mut Diagnostics) -> Vec<Peer> {
    let mut drafts: Vec<Draft> = Vec::new();
    let mut by_key: HashMap<PublicKey, usize> = HashMap::new();
    let mut owners = Owners::new();
    let mut entries = 0;
    for section in sections {
        let Some(public_key) = section.public_key else { continue };
        if own == Some(public_key) {
            let label = "the interface's own public key; the peer's is another one";
            found.push(
                Diagnostic::warning("this peer is the interface itself, and is left out")
                    .at(section.heading.place(section.heading.columns()), label),
            );
            continue;
        }
        let index = *by_key.entry(public_key).or_insert_with(|| {
            drafts.push(Draft { peer: empty(public_key), networks: Vec::new() });
            drafts.len() - 1
        });
        let draft = &mut drafts[index];
        let peer = &mut draft.peer;
        if let Some(key) = section.preshared_key {
            // A zero key stands for none, also where an earlier section had one.
            peer.preshared_key = Some(key).filter(|key| !key.is_zero());
        }
        peer.endpoint = section.endpoint.or(peer.endpoint.take());
        if let Some(seconds) = section.persistent_keepalive {
            peer.persistent_keepalive = Some(seconds).filter(|seconds| *seconds > 0);
        }
        if section.replace && forget(&mut owners, draft, index) {
            let label = "an earlier section with the same public key had others";
            let message = "this section's `AllowedIPs` take the place of earlier ones";
            found.push(Diagnostic::warning(message).at(section.heading.place(section.heading.columns()), label));
        }
        for entry in section.allowed {
            let owner = owners.get(&entry.net).map(|(owner, _)| *owner);
            if entry.remove {
                if owner == Some(index) {
                    owners.remove(&entry.net);
                }
                continue;
            }
            if owner == Some(index) {
                continue;
            }
            if owner.is_some() && found.has_room(Severity::Warning) {
                let subject = format!("`{}`", entry.net);
                let warning = Diagnostic::warning(format!("{subject} is allowed for two peers"));
                let label = "a network has one peer; this later one gets it";
                found.push(warning.at(entry.line.place(entry.columns), label).grouped("allowed twice", subject));
            }
            owners.insert(entry.net, (index, entries));
            drafts[index].networks.push((entry.net, entries));
            entries += 1;
        }
    }
    drafts.into_iter().enumerate().map(|(index, draft)| finished(draft, index, &owners)).collect()
}

fn empty(public_key: PublicKey) -> Peer {
    Peer { public_key, preshared_key: None, allowed_ips: Vec::new(), endpoint: None, persistent_keepalive: None }
}

/// Takes all networks from a peer; whether it had any.
fn forget(owners: &mut Owners, draft: &mut Draft, index: usize) -> bool {
    let mut had = false;
    for (net, entry) in draft.networks.drain(..) {
        if owners.get(&net) == Some(&(index, entry)) {
            owners.remove(&net);
            had = true;
        }
    }
    had
}

fn finished(draft: Draft, index: usize, owners: &Owners) -> Peer {
    let living = draft.networks.into_iter().filter(|(net, entry)| owners.get(net) == Some(&(index, *entry)));
    Peer { allowed_ips: living.map(|(net, _)| net).collect(), ..draft.peer }
}
