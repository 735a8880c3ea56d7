//! What a program sees of its surroundings, as the agent reports it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use vpn_exec::linux::netlink::Netlink;

use super::variables;

/// The surroundings of a process.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Surroundings {
    /// Its process ID.
    pub pid: i32,
    /// The hook as which it runs, if it is one: see [`variables::HOOK`].
    pub hook: String,
    /// The inode of its network namespace.
    pub namespace: u64,
    /// The interfaces in that namespace, and whether they are up.
    pub interfaces: Vec<(String, bool)>,
    /// The capability sets in `/proc/self/status`: name and bits.
    pub capabilities: Vec<(String, u64)>,
    /// The number and the target of each open descriptor.
    pub descriptors: Vec<(i32, String)>,
}

impl Surroundings {
    /// Returns those of the calling process.
    ///
    /// # Errors
    /// If one of them cannot be read.
    pub fn now() -> io::Result<Self> {
        let mut interfaces = Netlink::open()?.links()?;
        interfaces.sort_by(|one, other| one.name.cmp(&other.name));
        let status = fs::read_to_string("/proc/self/status")?;
        let capabilities = status.lines().filter(|line| line.starts_with("Cap")).filter_map(|line| {
            let (name, number) = line.split_once(':')?;
            Some((name.to_owned(), u64::from_str_radix(number.trim(), 16).ok()?))
        });
        let descriptors = fs::read_dir("/proc/self/fd")?.filter_map(|entry| {
            let path = entry.ok()?.path();
            let target = fs::read_link(&path).ok()?.display().to_string();
            // The directory that is being read has a descriptor, too.
            let number = path.file_name()?.to_str()?.parse().ok()?;
            (!target.ends_with("/fd")).then_some((number, target))
        });
        Ok(Self {
            pid: std::process::id().cast_signed(),
            hook: std::env::var(variables::HOOK).unwrap_or_default(),
            namespace: fs::metadata("/proc/self/ns/net")?.ino(),
            interfaces: interfaces.into_iter().map(|link| (link.name, link.up)).collect(),
            capabilities: capabilities.collect(),
            descriptors: descriptors.collect(),
        })
    }
}
