//! The identity of all that a view is made from.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::super::{Program, view};
use crate::lease::ViewKey;
use crate::linux::namespace::NamespaceId;
use crate::registry::{HOSTS, NSSWITCH_CONF};

/// The resource limits that could end the server of a launcher, or keep it from its work.
const LIMITS: [Resource; 6] =
    [Resource::As, Resource::Cpu, Resource::Data, Resource::Fsize, Resource::Nofile, Resource::Stack];

/// Returns the key of a program's view: the same key means the same view. A template is used only where the launcher's
/// mounts, its root directory, the files that are copied by their contents, and the plan are those that it was made
/// from. The server itself watches the mounts of the namespace.
///
/// The server is a process in the control group of the first launcher, and has its limits. So only launchers of the
/// same control group and with the same limits share it: the end of a unit affects only its own programs.
pub(super) fn of(program: &Program) -> io::Result<ViewKey> {
    let version = env!("CARGO_PKG_VERSION");
    let namespace = NamespaceId::of(fs::File::open("/proc/self/ns/mnt")?)?;
    let identity = |path: &Path| {
        let found = fs::symlink_metadata(path).ok()?;
        Some((found.dev(), found.ino(), found.created().ok()))
    };
    let contents = |path: &str| {
        let found = fs::metadata(path).ok()?;
        Some((found.size(), found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()))
    };
    let places: Vec<_> =
        ["/", "/proc", "/var"].into_iter().chain(view::COVERED).chain([HOSTS, NSSWITCH_CONF]).collect();
    let places: Vec<_> = places.into_iter().map(|path| identity(path.as_ref())).collect();
    let files = [HOSTS, NSSWITCH_CONF].map(contents);
    let resolv_conf = (&program.resolv_conf, identity(&program.resolv_conf));
    let plan = (&program.names, &program.hidden, &program.emptied, &program.staging, &program.tunnel);
    let limits = LIMITS.map(|resource| {
        let limit = getrlimit(resource);
        (limit.current, limit.maximum)
    });
    let group = fs::read("/proc/self/cgroup")?;
    let text = format!("{:?}", (version, namespace, places, files, resolv_conf, plan, limits, group));
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref().try_into().map_err(io::Error::other)
}
