//! Merges the `[Peer]` sections: sections with the same public key are one peer, and an allowed IP belongs to one peer.
//!
//! The result is that of `wg setconf`, which passes one section after the other to the kernel.

use std::collections::HashMap;
use std::ops::Range;

use ipnet::IpNet;

use super::line::Line;
use crate::config::diagnostic::{Diagnostic, Diagnostics, Severity};
use crate::config::{Endpoint, Peer};
use crate::keys::{PresharedKey, PublicKey};

/// A `[Peer]` section as it is written.
pub(super) struct PeerSection<'a> {
    /// The heading.
    pub(super) heading: Line<'a>,
    /// Whether there is a `PublicKey` line. An invalid one is an error already.
    pub(super) has_public_key_line: bool,
    pub(super) public_key: Option<PublicKey>,
    pub(super) preshared_key: Option<PresharedKey>,
    pub(super) endpoint: Option<Endpoint>,
    pub(super) persistent_keepalive: Option<u16>,
    /// Whether its allowed IPs replace those of earlier sections of the same peer. They do unless the last `AllowedIPs`
    /// line has an entry with `+` or `-` (parse_allowedips() of wireguard-tools).
    pub(super) replaces: bool,
    /// The entries of `AllowedIPs`.
    allowed: Vec<AllowedIpEntry<'a>>,
}

/// An entry of `AllowedIPs` with its location.
struct AllowedIpEntry<'a> {
    remove: bool,
    net: IpNet,
    line: Line<'a>,
    columns: Range<usize>,
}

impl<'a> PeerSection<'a> {
    /// Creates an empty section with this heading.
    pub(super) fn new(heading: Line<'a>) -> Self {
        Self {
            heading,
            has_public_key_line: false,
            public_key: None,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replaces: true,
            allowed: Vec::new(),
        }
    }

    /// Adds an entry of `AllowedIPs`.
    pub(super) fn allow(&mut self, remove: bool, signed: bool, net: IpNet, line: Line<'a>, columns: Range<usize>) {
        self.replaces &= !signed;
        self.allowed.push(AllowedIpEntry { remove, net, line, columns });
    }
}

/// The owner of each allowed IP: the peer's index, and the number of the entry that assigned it.
type Owners = HashMap<IpNet, (usize, usize)>;

/// A peer during the merge, with its allowed IPs in order and the numbers of their entries. An allowed IP that has
/// another owner by now does not count.
struct MergedPeer {
    peer: Peer,
    networks: Vec<(IpNet, usize)>,
}

/// Merges the sections. Skips those without a public key, which the caller has reported.
///
/// `own_key` is the public key of the interface. The kernel ignores a peer with this key.
pub(super) fn merge_peers(
    sections: Vec<PeerSection<'_>>,
    own_key: Option<PublicKey>,
    found: &mut Diagnostics,
) -> Vec<Peer> {
    let mut merged: Vec<MergedPeer> = Vec::new();
    let mut by_key: HashMap<PublicKey, usize> = HashMap::new();
    let mut owners = Owners::new();
    let mut entries = 0;
    for section in sections {
        let Some(public_key) = section.public_key else { continue };
        if own_key == Some(public_key) {
            let label = "the interface has the same public key; the peer needs its own";
            found.push(
                Diagnostic::warning("this peer is the interface itself and is ignored")
                    .at(section.heading.location(section.heading.columns()), label),
            );
            continue;
        }
        let index = *by_key.entry(public_key).or_insert_with(|| {
            merged.push(MergedPeer { peer: empty_peer(public_key), networks: Vec::new() });
            merged.len() - 1
        });
        let current = &mut merged[index];
        let peer = &mut current.peer;
        if let Some(key) = section.preshared_key {
            // A key of zeros means "no key", and also removes that of an earlier section.
            peer.preshared_key = Some(key).filter(|key| !key.is_zero());
        }
        peer.endpoint = section.endpoint.or(peer.endpoint.take());
        if let Some(seconds) = section.persistent_keepalive {
            peer.persistent_keepalive = Some(seconds).filter(|seconds| *seconds > 0);
        }
        if section.replaces && remove_networks(&mut owners, current, index) {
            let label = "an earlier section has the same public key and other allowed IPs";
            let message = "the `AllowedIPs` of this section replace those of an earlier one";
            found.push(Diagnostic::warning(message).at(section.heading.location(section.heading.columns()), label));
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
                let label = "a network belongs to one peer: the later one gets it";
                found.push(warning.at(entry.line.location(entry.columns), label).grouped("allowed twice", subject));
            }
            owners.insert(entry.net, (index, entries));
            merged[index].networks.push((entry.net, entries));
            entries += 1;
        }
    }
    merged.into_iter().enumerate().map(|(index, peer)| finish(peer, index, &owners)).collect()
}

fn empty_peer(public_key: PublicKey) -> Peer {
    Peer { public_key, preshared_key: None, allowed_ips: Vec::new(), endpoint: None, persistent_keepalive: None }
}

/// Removes all allowed IPs of a peer. Returns whether it had any.
fn remove_networks(owners: &mut Owners, peer: &mut MergedPeer, index: usize) -> bool {
    let mut had_any = false;
    for (net, entry) in peer.networks.drain(..) {
        if owners.get(&net) == Some(&(index, entry)) {
            owners.remove(&net);
            had_any = true;
        }
    }
    had_any
}

/// Returns the peer with the allowed IPs that it still owns.
fn finish(merged: MergedPeer, index: usize, owners: &Owners) -> Peer {
    let owned = merged.networks.into_iter().filter(|(net, entry)| owners.get(net) == Some(&(index, *entry)));
    Peer { allowed_ips: owned.map(|(net, _)| net).collect(), ..merged.peer }
}
