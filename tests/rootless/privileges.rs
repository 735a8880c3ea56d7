//! What a program of an ordinary user's tunnel is, sees and cannot do.

use std::fs;
use std::path::Path;

use anyhow::ensure;
use lab::agent::Agent;
use lab::{Lab, PROVIDER, Peer, Snapshot, WEB};
use nix::mount::{MsFlags, mount};

use crate::{PATIENCE, User, output};

#[test]
fn a_program_leaves_by_the_tunnel_and_the_host_is_untouched() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let before = Snapshot::take()?;
        let mut agent = Agent::start(&mut user.inside("mine", &["--wait", "20"], &[]))?.begun()?;
        let seen = agent.succeed_within(PATIENCE, &format!("get http://{}/", WEB.ipv4))?;
        ensure!(seen == PROVIDER.ipv4.to_string(), "the server saw {seen}");
        agent.finish_well()?;
        ensure!(!user.tunnels().exists(), "the tunnel's files are left");
        let changes = before.changes_within(PATIENCE)?;
        ensure!(changes.is_empty(), "the host has changed: {changes:#?}");
        let leaks = lab.capture.leaks()?;
        ensure!(leaks.is_empty(), "{leaks:#?}");
        Ok(())
    });
}

#[test]
fn a_program_is_its_user_without_capabilities() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let status = output(user.inside("mine", &[], &["cat", "/proc/self/status"]))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim_start_matches(':').split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let id = user.id().to_string();
        ensure!(field("Uid") == vec![id; 4], "{status}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(field(set) == ["0000000000000000"], "{set}: {status}");
        }
        ensure!(field("NoNewPrivs") == ["1"], "{status}");
        Ok(())
    });
}

/// Ordinary programs expect both. A file capability of ping has no effect in a user namespace of one user.
#[test]
fn a_program_may_ping_and_listen_on_every_port() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let said = output(user.inside("mine", &[], &["ping", "-c", "1", "-W", "20", "127.0.0.1"]))?;
        ensure!(said.contains(" 0% packet loss"), "{said}");
        let bind = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 80)); s.listen(); print('listens')";
        let said = output(user.inside("mine", &[], &["/usr/bin/python3", "-c", bind]))?;
        ensure!(said.trim() == "listens", "{said}");
        Ok(())
    });
}

/// The namespace has no name, and the program does not see the files by which it could give its keeper orders.
#[test]
fn the_namespace_has_no_name_and_the_tunnels_files_are_hidden() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let script = "ls -A \"$XDG_RUNTIME_DIR/vpn-exec\" | wc -l; ls /run/netns 2>/dev/null | wc -l; \
                      readlink /proc/self/ns/user; readlink /proc/self/ns/net";
        let seen = output(user.inside("mine", &[], &["sh", "-c", script]))?;
        let lines: Vec<&str> = seen.lines().collect();
        ensure!(lines[..2] == ["0", "0"], "{seen}");
        // Those of a login with another environment. A file of that name does no harm.
        let other = format!("/tmp/vpn-exec-{}", user.id());
        if user.id() != 0 {
            mount(Some("tmp"), "/tmp", Some("tmpfs"), MsFlags::empty(), Some("mode=1777"))?;
            fs::create_dir_all(Path::new(&other).join("theirs"))?;
            let seen = output(user.inside("mine", &[], &["ls", "-A", &other]))?;
            ensure!(seen.is_empty(), "{seen}");
            fs::remove_dir_all(&other)?;
            fs::write(&other, "a file")?;
            output(user.inside("mine", &[], &["true"]))?;
        }
        for (line, kind) in [(lines[2], "user"), (lines[3], "net")] {
            let own = fs::read_link(format!("/proc/self/ns/{kind}"))?;
            ensure!(own.to_string_lossy() != line, "the {kind} namespace is the host's");
        }
        Ok(())
    });
}
