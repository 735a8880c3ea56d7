//! What an ordinary user's tunnel cannot have, and what a system must allow.

use anyhow::{Result, ensure};
use lab::{Lab, Peer, Reach, Snapshot};
use vpn_exec::linux::sysctl;

use crate::{PATIENCE, User, failure};

/// Requires that a command line fails with these words, and leaves the host as it was.
fn refused(user: &User, options: &[&str], words: &[&str]) -> Result<()> {
    let before = Snapshot::take()?;
    let message = failure(user.inside("mine", options, &["true"]))?;
    for word in words {
        ensure!(message.contains(word), "{options:?}: {word:?} is not in {message}");
    }
    ensure!(!user.tunnels().exists(), "{options:?}: something is left");
    let changes = before.changes_within(PATIENCE)?;
    ensure!(changes.is_empty(), "{options:?}: {changes:#?}");
    Ok(())
}

#[test]
fn what_needs_root_is_refused_with_the_reason() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        refused(&user, &["--backend", "kernel"], &["the kernel's WireGuard needs root", "--backend userspace"])?;
        refused(&user, &["--user", "1"], &["another user or group", "sudo"])?;
        for capability in ["SYS_ADMIN", "net_admin", "CAP_SYS_PTRACE"] {
            refused(&user, &["--keep-cap", capability], &["needs root", "the tunnel's own namespaces", "sudo"])?;
        }
        refused(&user, &["--publish", "80:80"], &["port 80", "net.ipv4.ip_unprivileged_port_start"])?;
        Ok(())
    });
}

#[test]
fn marks_and_hooks_of_the_file_are_refused() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let text = lab.wg_quick_text(Reach::Ipv4);
        let text = text.replacen("[Interface]\n", "[Interface]\nFwMark = 7\nPostUp = true\n", 1);
        let user = User::with_file(&text)?;
        refused(&user, &["--allow-hooks"], &["FwMark needs root", "PostUp needs root"])
    });
}

/// Other systems forbid it by other parameters, which this kernel may not have.
#[test]
fn a_system_without_user_namespaces_gets_the_remedy() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        // The world's user namespace has these limits.
        for kind in ["user", "net"] {
            let parameter = format!("user/max_{kind}_namespaces");
            let allowed = sysctl::get(&parameter)?;
            sysctl::set(&parameter, "0")?;
            let remedy = format!("sysctl user.max_{kind}_namespaces=15000");
            refused(&user, &[], &["cannot make a user namespace", &remedy])?;
            sysctl::set(&parameter, &allowed)?;
        }
        Ok(())
    });
}

/// In /tmp, any user can make a directory of the name first.
#[test]
fn a_directory_of_another_kind_is_not_used() {
    lab::test(Peer::Ours, |lab: &Lab| {
        use std::os::unix::fs::PermissionsExt;

        let user = User::new(lab)?;
        std::fs::create_dir(user.tunnels())?;
        std::fs::set_permissions(user.tunnels(), std::fs::Permissions::from_mode(0o777))?;
        let message = failure(user.inside("mine", &[], &["true"]))?;
        ensure!(message.contains("is not a directory of this user alone"), "{message}");
        Ok(())
    });
}
