//! `vpn-exec cdi`: prints the file by which container engines know tunnels as devices.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::print_raw;
use crate::cli::CdiArgs;
use crate::container::cdi::{TunnelDevice, is_device_name, specification};
use crate::failure::{Doing, Failure};
use crate::linux::netlink::Netlink;
use crate::lookup;
use crate::names::TunnelName;
use crate::plan::shared_namespace::SharedNamespaceFacts;
use crate::plan::{self, DnsPlan};
use crate::request;
use crate::tunnel::facts;

pub(super) fn run(arguments: &CdiArgs) -> Result<ExitCode, Failure> {
    let program = std::env::current_exe().doing("find the path of vpn-exec")?;
    let mut tunnels = Vec::new();
    for (name, is_asked_for) in names(arguments)? {
        match device(&name, &arguments.resolv_conf_dir) {
            Ok(device) => tunnels.push(device),
            Err(failure) if is_asked_for => return Err(failure),
            // One profile that is invalid does not keep the others from being listed.
            Err(failure) => tracing::warn!("leaving out {name}: {failure}"),
        }
    }
    let text =
        specification(&program, &tunnels).map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
    print_raw(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the tunnels to list, and whether the user has asked for each of them.
fn names(arguments: &CdiArgs) -> Result<Vec<(TunnelName, bool)>, Failure> {
    if !arguments.names.is_empty() {
        return Ok(arguments.names.iter().map(|name| (name.clone(), true)).collect());
    }
    // One that cannot be read is kept: the warning about it says more.
    let is_listed = |name: &TunnelName| request::is_for_containers(name).unwrap_or(true);
    let listed: Vec<TunnelName> = lookup::machine_profiles().into_iter().filter(is_listed).collect();
    if listed.is_empty() {
        return Err(Failure::new(format!("no profile in {} is for containers", lookup::PROFILES))
            .advise("add the line `containers = true` to a profile, above the first table"));
    }
    Ok(listed.into_iter().map(|name| (name, false)).collect())
}

/// Returns a tunnel as a device. Writes the file that its containers see as `/etc/resolv.conf`, which must exist before
/// they are created.
fn device(name: &TunnelName, directory: &Path) -> Result<TunnelDevice, Failure> {
    if !is_device_name(name) {
        return Err(Failure::new(format!("{name} is not a valid name of a CDI device"))
            .advise("choose a name of letters, digits, and `_`, `-` and `.` between them"));
    }
    let request = request::load_for_container(name)?;
    let mut host = Netlink::open().doing("open a netlink socket")?;
    let underlay = facts::read(&mut host, &request.config).doing("read the host's network configuration")?;
    let facts = SharedNamespaceFacts { underlay, ..SharedNamespaceFacts::default() };
    let dns = plan::plan_in_container(&request.config, &facts)?.dns;
    let path = (!dns.servers.is_empty()).then(|| directory.join(format!("{name}.resolv.conf")));
    match &path {
        Some(path) => write(path, &dns).doing(format!("write {}", path.display()))?,
        None => tracing::warn!("{name} has no DNS server: its containers keep the resolvers of their engine"),
    }
    Ok(TunnelDevice { name: name.clone(), resolv_conf: path })
}

fn write(path: &PathBuf, dns: &DnsPlan) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    // A container that is being created mounts the former file or this one.
    let new = path.with_extension("conf.new");
    fs::write(&new, &dns.resolv_conf)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o644))?;
    fs::rename(new, path)
}
