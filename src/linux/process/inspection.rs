//! What `/proc` tells about processes: relatives, namespaces, command lines and sockets (proc(5)).

use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use crate::linux::namespace::NamespaceId;

/// Returns the fields of `/proc/PID/stat` after the name, starting with the state (proc_pid_stat(5)). `process` is a
/// process ID or `self`.
pub(in crate::linux) fn stat_fields(process: impl Display) -> io::Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name, in parentheses, may contain anything, so the fields begin after the last parenthesis.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(fields.split_ascii_whitespace().map(str::to_owned).collect())
}

/// Returns the children of the calling process, including zombies that it has not waited for.
///
/// # Errors
/// Fails if `/proc` cannot be read.
pub fn children() -> io::Result<BTreeSet<i32>> {
    let own = std::process::id();
    match fs::read_to_string(format!("/proc/self/task/{own}/children")) {
        Ok(list) => Ok(list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()),
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(all()?.into_iter().filter(|pid| parent_of(*pid) == i32::try_from(own).ok()).collect())
        }
        Err(error) => Err(error),
    }
}

/// Returns all processes of the PID namespace.
fn all() -> io::Result<Vec<i32>> {
    Ok(fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Returns the parent of a process, or none if there is no such process.
pub fn parent_of(pid: i32) -> Option<i32> {
    stat_fields(pid).ok()?.get(1)?.parse().ok()
}

/// Returns the processes in a network namespace, except the calling one. Processes of other users are found only with
/// CAP_SYS_PTRACE.
///
/// # Errors
/// Fails if `/proc` cannot be read.
pub fn in_namespace(namespace: NamespaceId) -> io::Result<Vec<i32>> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    Ok(all()?
        .into_iter()
        .filter(|pid| *pid != own && NamespaceId::of_process(*pid).is_ok_and(|of| of == namespace))
        .collect())
}

/// Returns all processes outside of the calling process's network namespace, grouped by theirs. Processes of other
/// users are found only with CAP_SYS_PTRACE.
///
/// # Errors
/// Fails if `/proc` cannot be read.
pub fn group_by_namespace() -> io::Result<HashMap<NamespaceId, Vec<i32>>> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let own = NamespaceId::of_process(own).ok();
    let mut found: HashMap<NamespaceId, Vec<i32>> = HashMap::new();
    for pid in all()? {
        if let Ok(namespace) = NamespaceId::of_process(pid)
            && Some(namespace) != own
        {
            found.entry(namespace).or_default().push(pid);
        }
    }
    Ok(found)
}

/// The user and the command line of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSummary {
    /// The effective user.
    pub user: Uid,
    /// The command line, or the name in brackets if the process has none.
    pub command: String,
}

/// Returns the summary of a process, or none if it has ended.
pub fn describe(pid: i32) -> Option<ProcessSummary> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    // The directory of a process that cannot be traced belongs to root, so its status is read instead.
    let status = fs::read_to_string(process.join("status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let user = Uid::from_raw(users.split_ascii_whitespace().nth(1)?.parse().ok()?);
    let command = fs::read(process.join("cmdline")).ok()?;
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let command = words.join(" ").trim_end().to_owned();
    let named = || fs::read_to_string(process.join("comm")).map(|name| format!("[{}]", name.trim_end()));
    Some(ProcessSummary { user, command: if command.is_empty() { named().ok()? } else { command } })
}

/// Returns the process that has a socket open, and its name. The socket is given by its inode number, as `/proc/PID/fd`
/// shows it. Processes of other users are found only with CAP_SYS_PTRACE.
pub fn socket_owner(inode: u32) -> Option<(i32, String)> {
    let link = format!("socket:[{inode}]");
    let has_open = |pid: &i32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok();
        let mut links = descriptors.into_iter().flatten().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.any(|found| found.as_os_str() == link.as_str())
    };
    let pid = all().ok()?.into_iter().find(has_open)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some((pid, name.trim_end().escape_debug().to_string()))
}

/// Returns whether a socket in the network namespace of any process is bound to a path.
pub fn is_socket_path_bound(path: &Path) -> bool {
    let mut seen = BTreeSet::new();
    let path = path.as_os_str().as_bytes();
    all().unwrap_or_default().into_iter().any(|pid| {
        let list = format!("/proc/{pid}/net/unix");
        // Each network namespace has an inode of its own for it. Unlike `ns/net`, it can be looked at without the right
        // to trace the process, which a process in a user namespace does not have outside of that.
        let is_new = fs::metadata(&list).is_ok_and(|found| seen.insert(found.ino()));
        let listed = is_new.then(|| fs::read(&list).ok()).flatten().unwrap_or_default();
        // The path is the last column (proc_pid_net(5)).
        listed.split(|byte| *byte == b'\n').any(|line| line.strip_suffix(path).is_some_and(|rest| rest.ends_with(b" ")))
    })
}

/// Returns the process that a thread belongs to.
pub fn process_of_thread(thread: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}
