//! The part of a tunnel's plan that matters to other tunnels.

use serde::Deserialize;

use crate::keys::PublicKey;
use crate::names::TunnelName;
use crate::plan::{Plan, VethPlan};

/// What a tunnel has chosen and no other tunnel may use, read from its plan.
///
/// A launcher reads those of all tunnels. To decode the rest of each plan takes several times as long.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Reservation {
    /// The tunnel's name.
    pub name: TunnelName,
    /// Its link to the host.
    pub veth: Option<VethPlan>,
    wireguard: Keys,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Keys {
    #[serde(default)]
    public_key: Option<PublicKey>,
    peers: Vec<Peer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Peer {
    public_key: PublicKey,
}

impl Reservation {
    /// Returns whether a plan has the tunnel's private key and one of its peers.
    pub fn has_keys_of(&self, plan: &Plan) -> bool {
        let own = |key| plan.wireguard.peers.iter().any(|peer| peer.public_key == key);
        self.wireguard.public_key.is_some()
            && self.wireguard.public_key == plan.wireguard.public_key
            && self.wireguard.peers.iter().any(|peer| own(peer.public_key))
    }
}
