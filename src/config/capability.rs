//! The names and numbers of capabilities (capabilities(7)).

/// The names of the capabilities, indexed by number (`include/uapi/linux/capability.h` of Linux).
pub(super) const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Returns the number and the full name of a capability. Ignores letter case; the prefix `CAP_` is optional.
pub fn lookup(text: &str) -> Option<(u8, &'static str)> {
    let text = text.to_ascii_uppercase();
    let short = text.strip_prefix("CAP_").unwrap_or(&text);
    (0u8..).zip(CAPABILITIES).find(|(_, name)| name.strip_prefix("CAP_") == Some(short))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_matches_that_of_another_crate() {
        for (number, name) in (0u8..).zip(CAPABILITIES) {
            let capability: caps::Capability = name.parse().expect(name);
            assert_eq!(capability.index(), number, "{name}");
        }
    }
}
