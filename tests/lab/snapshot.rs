//! The state of the host that vpn-exec must leave as it was. Tests take it before and after, and compare.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlink_packet_netfilter::nftables::{ChainMessage, NfTablesMessage, RuleMessage, SetMessage, TableMessage};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::rule::RuleMessage as PolicyMessage;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};

use crate::netlink;

/// Parameters that change by themselves.
const COUNTERS: [&str; 1] = ["/proc/sys/net/netfilter/nf_conntrack_count"];

/// The socket of the lab's provider, which is not part of the host.
const PROVIDERS: &str = "/run/wireguard/provider0.sock";

/// The line of vpn-exec's own processes.
const OWN_PROGRAM: &str = "program: vpn-exec";

/// The state of the host: links, addresses, routes of all tables, policy rules, mounts, kernel parameters of the
/// network, nftables, the tree `/run`, the resolver's files and the running programs, but no counters.
///
/// Read in the calling thread's network and mount namespace.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, usize>);

impl Snapshot {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// If a part of the state cannot be read.
    pub fn take() -> Result<Self> {
        let mut lines = Lines::default();
        lines.network().context("cannot read the state of the network")?;
        lines.firewall().context("cannot read the state of nftables")?;
        lines.mounts().context("cannot read the mounts")?;
        lines.tree("sysctl", Path::new("/proc/sys/net")).context("cannot read /proc/sys/net")?;
        lines.tree("run", Path::new("/run")).context("cannot read /run")?;
        for file in ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"] {
            lines.add("resolver", format_args!("{file} {:?}", fs::read_to_string(file).ok()));
        }
        lines.programs().context("cannot read the list of programs")?;
        Ok(Self(lines.0))
    }

    /// Returns the changes from this snapshot to a later one: a line with `-` for each removed thing, and one with `+`
    /// for each new thing. The end of a process of vpn-exec is no change: a keeper reports the end of its tunnel an
    /// instant before its own.
    pub fn changes_to(&self, later: &Self) -> Vec<String> {
        let more = |sign, here: &BTreeMap<String, usize>, there: &BTreeMap<String, usize>| {
            here.iter()
                .filter(|(line, count)| there.get(*line).is_none_or(|other| other < *count))
                .filter(|(line, _)| sign == '+' || *line != OWN_PROGRAM)
                .map(|(line, _)| format!("{sign} {line}"))
                .collect::<Vec<_>>()
        };
        [more('-', &self.0, &later.0), more('+', &later.0, &self.0)].concat()
    }

    /// Returns the changes from this snapshot to now. Waits for them to vanish for `usual`, on an ordinary machine: the
    /// kernel removes links some time after the last process has left their namespace.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn changes_within(&self, usual: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + crate::patience(usual);
        loop {
            let changes = self.changes_to(&Self::take()?);
            if changes.is_empty() || Instant::now() > deadline {
                return Ok(changes);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.keys().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// The state as lines, each with its number of occurrences.
#[derive(Default)]
struct Lines(BTreeMap<String, usize>);

impl Lines {
    fn add(&mut self, section: &str, what: impl fmt::Display) {
        *self.0.entry(format!("{section}: {what}")).or_default() += 1;
    }

    fn network(&mut self) -> Result<()> {
        let requests = [
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
            RouteNetlinkMessage::GetRule(PolicyMessage::default()),
        ];
        for request in requests {
            for message in netlink::dump(NETLINK_ROUTE, request)? {
                match message {
                    RouteNetlinkMessage::NewLink(mut message) => {
                        message.attributes.retain(is_lasting);
                        self.link(&message);
                    }
                    RouteNetlinkMessage::NewAddress(mut message) => {
                        message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::CacheInfo(_)));
                        self.add("address", format_args!("{message:?}"));
                    }
                    RouteNetlinkMessage::NewRoute(mut message) => {
                        message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
                        self.add("route", format_args!("{message:?}"));
                    }
                    other => self.add("rule", format_args!("{other:?}")),
                }
            }
        }
        Ok(())
    }

    /// Adds a line for each attribute, so that a change shows the attribute alone.
    fn link(&mut self, message: &LinkMessage) {
        let name = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        let name = name.unwrap_or_default();
        self.add("link", format_args!("{name} {:?}", message.header));
        for attribute in &message.attributes {
            self.add("link", format_args!("{name} {attribute:?}"));
        }
    }

    fn firewall(&mut self) -> Result<()> {
        let requests = [
            NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() }),
            NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }),
            NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() }),
            NfTablesMessage::GetSet(SetMessage { attributes: Vec::new() }),
        ];
        for request in requests {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
            let found = match netlink::dump(NETLINK_NETFILTER, NetfilterMessage::new(header, request)) {
                // The kernel has no nftables.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                found => found?,
            };
            for message in found {
                // Without the header's generation number, which also counts changes that were reverted.
                self.add("nftables", format_args!("{:?} {:?}", message.header.family, message.inner));
            }
        }
        Ok(())
    }

    /// Adds the mounts without the IDs of mounts and peer groups, which a mount uses up even if it was removed.
    fn mounts(&mut self) -> Result<()> {
        for line in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
            let fields = line.split(' ').skip(2).map(|field| {
                let (key, number) = field.split_once(':').unwrap_or((field, ""));
                if ["shared", "master", "propagate_from"].contains(&key) && number.parse::<u32>().is_ok() {
                    key
                } else {
                    field
                }
            });
            self.add("mount", fields.collect::<Vec<_>>().join(" "));
        }
        Ok(())
    }

    /// Adds every file below a directory: type, mode, owner and content.
    fn tree(&mut self, section: &str, directory: &Path) -> Result<()> {
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                // The parameters of an interface vanish with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.with_context(|| directory.display().to_string())?,
            };
            for entry in entries {
                let path = entry?.path();
                let Ok(status) = fs::symlink_metadata(&path) else { continue };
                let name = path.display().to_string();
                if COUNTERS.contains(&name.as_str()) || name == PROVIDERS {
                    continue;
                }
                let kind = status.file_type();
                let content = if kind.is_file() {
                    // Some parameters are write-only, others have no value yet.
                    fs::read_to_string(&path).map_or_else(|error| error.to_string(), |text| text.trim_end().to_owned())
                } else if kind.is_symlink() {
                    format!("-> {}", fs::read_link(&path)?.display())
                } else if kind.is_socket() {
                    "socket".to_owned()
                } else {
                    String::new()
                };
                let (mode, owner, group) = (status.mode(), status.uid(), status.gid());
                self.add(section, format_args!("{name} {mode:o} {owner}:{group} {content:?}"));
                if kind.is_dir() {
                    directories.push(path);
                }
            }
        }
        Ok(())
    }

    /// Adds the names of the processes in the PID namespace, except zombies, whose parents have yet to reap them.
    fn programs(&mut self) -> Result<()> {
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let Ok(status) = fs::read_to_string(path.join("status")) else { continue };
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map_or("", str::trim);
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
                && !field("State:").starts_with('Z')
            {
                self.add("program", field("Name:"));
            }
        }
        Ok(())
    }
}

/// Returns whether an attribute of a link is not a counter.
fn is_lasting(attribute: &LinkAttribute) -> bool {
    // AF_SPEC has counters, and parameters that are in /proc/sys/net, too.
    !matches!(
        attribute,
        LinkAttribute::Stats(_)
            | LinkAttribute::Stats64(_)
            | LinkAttribute::AfSpecUnspec(_)
            | LinkAttribute::CarrierChanges(_)
            | LinkAttribute::CarrierUpCount(_)
            | LinkAttribute::CarrierDownCount(_)
    )
}
