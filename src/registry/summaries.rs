//! What the machine's tunnels have to know of each other's plans, in one file.
//!
//! A launcher reads the addresses and keys of all tunnels before it plans one. Their plans are large, and with a
//! hundred tunnels reading them took as long as the rest of a start. So the file `.plans` repeats what is needed of
//! each. It is a cache: an entry counts only while it has the inode number and the time of change of the plan that it
//! was made from, and a plan without a valid entry is read itself.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{PLAN, temporary};
use crate::keys::PublicKey;
use crate::names::TunnelName;
use crate::plan::{Plan, VethPlan};

/// The shared file that repeats parts of the plans.
pub(super) const PLANS_FILE: &str = ".plans";

/// The parts of a tunnel's plan that matter to other tunnels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanSummary {
    /// The link between the host and the namespace, if there is one.
    pub veth: Option<VethPlan>,
    /// The public key of the interface.
    pub public_key: Option<PublicKey>,
    /// The public keys of the peers.
    pub peers: Vec<PublicKey>,
}

impl From<Plan> for PlanSummary {
    fn from(plan: Plan) -> Self {
        let Plan { veth, wireguard, .. } = plan;
        let peers = wireguard.peers.into_iter().map(|peer| peer.public_key).collect();
        Self { veth, public_key: wireguard.public_key, peers }
    }
}

/// Identifies a version of a file: its inode number, and the time of its last change in seconds and nanoseconds. A plan
/// is replaced and never written to.
type Version = (u64, i64, i64);

/// An entry of the cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    version: Version,
    pub(super) summary: PlanSummary,
}

/// The summaries of some tunnels' plans.
pub(super) type Summaries = BTreeMap<TunnelName, Entry>;

/// Returns the summaries of the plans of some tunnels in the directory `base`, and whether the cache lacks any of them.
/// A plan that cannot be read is left out.
pub(super) fn read(base: &Path, names: Vec<TunnelName>) -> (Summaries, bool) {
    // Without a valid cache, all plans are read.
    let cached = fs::read(base.join(PLANS_FILE)).ok();
    let mut cached: Summaries = cached.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let mut is_stale = false;
    let mut found = Summaries::new();
    for name in names {
        let path = base.join(name.as_str()).join(PLAN);
        let Ok(version) = fs::symlink_metadata(&path).map(|metadata| version(&metadata)) else { continue };
        let valid = cached.remove(&name).filter(|entry| entry.version == version);
        is_stale |= valid.is_none();
        if let Some(entry) = valid.or_else(|| read_plan(&path).ok()) {
            found.insert(name, entry);
        }
    }
    // Entries of tunnels that have ended only go when others come.
    (found, is_stale)
}

/// Replaces the cache.
pub(super) fn write(base: &Path, summaries: &Summaries) -> io::Result<()> {
    let path = base.join(PLANS_FILE);
    let new = temporary(&path);
    // The plans cannot be read by other users either.
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(summaries)?)?;
    fs::rename(&new, &path)
}

fn read_plan(path: &Path) -> io::Result<Entry> {
    let mut file = File::open(path)?;
    let version = version(&file.metadata()?);
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let plan: Plan = serde_json::from_slice(&text)?;
    Ok(Entry { version, summary: plan.into() })
}

fn version(metadata: &fs::Metadata) -> Version {
    (metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::config::{Config, wg_quick};
    use crate::plan::{Facts, plan};

    const FILE: &str = "[Interface]\n\
        PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\nAddress = 10.64.0.2/32\n\
        [Peer]\nPublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\nAllowedIPs = 0.0.0.0/0\nEndpoint = 192.0.2.1:51820\n";

    /// Writes the plan of a tunnel, whose link has the given last byte in its addresses.
    fn write_plan(base: &Path, name: &str, byte: u8) {
        let directory = base.join(name);
        fs::create_dir_all(&directory).expect("a directory");
        let (wireguard, _) = wg_quick::parse("test", FILE.as_bytes()).expect("a file");
        let config = Config::new(name.parse().expect("a name"), wireguard);
        let mut plan = plan(&config, &Facts { last_capability: 40, ..Facts::default() }).expect("a plan");
        plan.veth.as_mut().expect("a link").host_ipv4 = Ipv4Addr::new(10, 0, 0, byte);
        let new = directory.join("plan.new");
        fs::write(&new, serde_json::to_vec(&plan).expect("JSON")).expect("a file");
        fs::rename(new, directory.join(PLAN)).expect("a plan");
    }

    fn hosts(base: &Path, names: &[&str]) -> (Vec<u8>, bool) {
        let names = names.iter().map(|name| name.parse().expect("a name")).collect();
        let (found, is_stale) = read(base, names);
        write(base, &found).expect("written");
        let bytes = found.values().filter_map(|entry| Some(entry.summary.veth.as_ref()?.host_ipv4.octets()[3]));
        (bytes.collect(), is_stale)
    }

    #[test]
    fn an_entry_counts_for_the_plan_that_it_was_made_from_alone() {
        let base = tempfile::tempdir().expect("a directory");
        let base = base.path();
        write_plan(base, "a", 2);
        write_plan(base, "b", 4);
        assert_eq!(hosts(base, &["a", "b"]), (vec![2, 4], true));
        assert_eq!(hosts(base, &["a", "b"]), (vec![2, 4], false));
        write_plan(base, "a", 6);
        write_plan(base, "c", 8);
        assert_eq!(hosts(base, &["a", "b", "c"]), (vec![6, 4, 8], true), "replaced, and new");
        fs::remove_dir_all(base.join("b")).expect("removed");
        assert_eq!(hosts(base, &["a", "b", "c"]), (vec![6, 8], false), "ended");
        write_plan(base, "b", 10);
        assert_eq!(hosts(base, &["a", "b", "c"]), (vec![6, 10, 8], true), "again under the same name");
        fs::write(base.join(PLANS_FILE), "{").expect("written");
        assert_eq!(hosts(base, &["a", "b", "c"]), (vec![6, 10, 8], true), "damaged");
    }
}
