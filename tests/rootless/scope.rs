//! Where an ordinary user's tunnels have their files: `$XDG_RUNTIME_DIR` as it is, is not, or is changed; and those of
//! root with `--rootless`.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use lab::{Lab, Peer, Reach, Snapshot, launcher};
use rustix::mount::MountFlags;

use crate::{PATIENCE, User, failure, output};

/// Sets or removes the variable in a command.
fn with(mut command: Command, runtime: Option<&Path>) -> Command {
    match runtime {
        Some(runtime) => command.env("XDG_RUNTIME_DIR", runtime),
        None => command.env_remove("XDG_RUNTIME_DIR"),
    };
    command
}

/// Takes a tunnel up, finds it by each command, and takes it down. Its files must be below `directory` meanwhile.
fn life(user: &User, runtime: Option<&Path>, directory: &Path) -> Result<()> {
    let before = Snapshot::take()?;
    output(with(user.up("mine"), runtime))?;
    ensure!(directory.join("mine/state").exists(), "no files below {}", directory.display());
    let mode = fs::metadata(directory)?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "{} has the mode {mode:o}", directory.display());
    let status = output(with(user.about(&["status", "mine"]), runtime))?;
    ensure!(status.contains("without a name"), "{status}");
    let list = output(with(user.about(&["list"]), runtime))?;
    ensure!(list.contains("mine"), "{list}");
    // A program that joins does not see the files.
    let script = format!("id -u; ls -A {} 2>/dev/null | wc -l", directory.display());
    let seen = output(with(user.inside("mine", &[], &["sh", "-c", &script]), runtime))?;
    ensure!(seen == format!("{}\n0\n", user.id()), "{seen}");
    output(with(user.about(&["down", "mine"]), runtime))?;
    ensure!(!directory.exists(), "{} is left", directory.display());
    let changes = before.changes_within(PATIENCE)?;
    ensure!(changes.is_empty(), "the host has changed: {changes:#?}");
    Ok(())
}

/// Gives the test a `/tmp` of its own.
fn own_tmp() -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(rustix::mount::mount("lab-tmp", "/tmp", c"tmpfs", flags, Some(c"mode=1777"))?)
}

/// Joining takes capabilities over the machine's namespaces.
#[test]
fn the_machines_tunnel_is_not_joined_without_root() {
    lab::test(Peer::Ours, |lab: &Lab| {
        if !lab::world::has_users()? {
            lab::skipped("this world has no user without privileges in it");
            return Ok(());
        }
        let user = User::new(lab)?;
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let up = Command::new(launcher::binary()).arg("up").arg(file).args(["--name", "shared"]).status()?;
        ensure!(up.success(), "up: {up}");
        let refused = failure(user.about(&["--tunnel", "shared", "--", "true"]))?;
        ensure!(refused.contains("the tunnel shared is the machine's") && refused.contains("sudo"), "{refused}");
        let list = output(user.about(&["list"]))?;
        ensure!(list.contains("shared"), "{list}");
        let down = Command::new(launcher::binary()).args(["down", "shared"]).status()?;
        ensure!(down.success(), "down: {down}");
        Ok(())
    });
}

/// After su(1) or in cron(8), the variable is not set.
#[test]
fn without_the_variable_the_usual_directory_is_used() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let usual = PathBuf::from(format!("/run/user/{}", user.id()));
        fs::DirBuilder::new().mode(0o700).create(&usual)?;
        chown(&usual, Some(user.id()), Some(user.id()))?;
        life(&user, None, &usual.join("vpn-exec"))?;
        // A relative path is as good as none.
        life(&user, Some(Path::new("run")), &usual.join("vpn-exec"))
    });
}

#[test]
fn without_any_runtime_directory_another_is_used() {
    lab::test(Peer::Ours, |lab: &Lab| {
        own_tmp()?;
        let user = User::new(lab)?;
        let directory = match user.id() {
            0 => PathBuf::from("/run/vpn-exec-rootless"),
            id => PathBuf::from(format!("/tmp/vpn-exec-{id}")),
        };
        life(&user, None, &directory)?;
        // Another user was faster.
        fs::DirBuilder::new().mode(0o777).create(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
        let message = failure(with(user.inside("mine", &[], &["true"]), None))?;
        ensure!(message.contains("is not a directory of this user alone"), "{message}");
        ensure!(fs::read_dir(&directory)?.next().is_none(), "something is in {}", directory.display());
        Ok(())
    });
}

#[test]
fn a_wrong_runtime_directory_is_refused_and_named() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let refused = |runtime: &Path, words: &[&str]| -> Result<()> {
            let before = Snapshot::take()?;
            for command in [user.inside("mine", &[], &["true"]), user.up("mine")] {
                let message = failure(with(command, Some(runtime)))?;
                ensure!(message.lines().count() == 2, "{message}");
                for word in words.iter().chain(&["XDG_RUNTIME_DIR must name a directory of yours"]) {
                    ensure!(message.contains(word), "{word:?} is not in {message}");
                }
            }
            let changes = before.changes_within(PATIENCE)?;
            ensure!(changes.is_empty(), "{changes:#?}");
            Ok(())
        };
        refused(Path::new("/run/user/none"), &["/run/user/none/vpn-exec/mine", "No such file"])?;
        let open = Path::new("/run/user/open");
        fs::DirBuilder::new().create(open)?;
        chown(open, Some(user.id()), Some(user.id()))?;
        fs::set_permissions(open, fs::Permissions::from_mode(0o777))?;
        refused(open, &["/run/user/open belongs to another user, or others may write to it"])?;
        if user.is_other {
            let roots = Path::new("/run/user/roots");
            fs::DirBuilder::new().mode(0o755).create(roots)?;
            refused(roots, &["/run/user/roots belongs to another user"])?;
        }
        Ok(())
    });
}

#[test]
fn a_changed_variable_leads_to_other_tunnels() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let other = Path::new("/run/user/other");
        fs::DirBuilder::new().mode(0o700).create(other)?;
        chown(other, Some(user.id()), Some(user.id()))?;
        output(user.up("mine"))?;
        for command in ["status", "down"] {
            let message = failure(with(user.about(&[command, "mine"]), Some(other)))?;
            ensure!(message.contains("there is no tunnel mine"), "{command}: {message}");
        }
        ensure!(output(with(user.about(&["list"]), Some(other)))? == "no tunnel is up\n");
        ensure!(fs::read_dir(other)?.next().is_none(), "a question has made files");
        // Both can have the same name.
        output(with(user.up("mine"), Some(other)))?;
        let namespace =
            |runtime: &Path| output(with(user.inside("mine", &[], &["readlink", "/proc/self/ns/net"]), Some(runtime)));
        ensure!(namespace(&user.runtime)? != namespace(other)?, "it is the same tunnel");
        output(with(user.about(&["down", "mine"]), Some(other)))?;
        output(user.about(&["status", "mine"]))?;
        output(user.about(&["down", "mine"]))?;
        Ok(())
    });
}

/// With `--rootless`, root's program has root's ID, but no capability.
#[test]
fn root_may_do_without_privileges() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let file = lab.wg_quick_file(lab::Reach::Ipv4)?;
        let root = User { is_other: false, runtime: "/run/user/0".into(), file };
        life(&root, None, Path::new("/run/vpn-exec-rootless"))?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&root.runtime)?;
        life(&root, Some(&root.runtime), &root.tunnels())?;
        let script = "id -u; grep -E '^(Cap|NoNewPrivs)' /proc/self/status";
        let seen = output(root.inside("mine", &[], &["sh", "-c", script]))?;
        let mut lines = seen.lines();
        ensure!(lines.next() == Some("0"), "{seen}");
        for line in lines {
            let value = line.split_whitespace().last().unwrap_or_default();
            ensure!(value == "0000000000000000" || line == "NoNewPrivs:\t1", "{seen}");
        }
        // A tunnel of the machine with the same name is another one, and goes first.
        output(root.up("mine"))?;
        let text = root.file.to_string_lossy();
        output({
            let mut command = Command::new(launcher::binary());
            command.args(["up", &text, "--name", "mine", "--backend", "userspace"]);
            command
        })?;
        let list = output(root.about(&["list"]))?;
        ensure!(list.matches("mine").count() >= 2, "{list}");
        for what in ["/run/netns/mine", "without a name"] {
            let status = output(root.about(&["status", "mine"]))?;
            ensure!(status.contains(what), "{what}: {status}");
            output(root.about(&["down", "mine"]))?;
        }
        Ok(())
    });
}

#[test]
fn a_missing_or_closed_tun_device_has_a_remedy() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        rustix::mount::mount("lab-no-tun", "/dev/net", c"tmpfs", MountFlags::empty(), Some(c"mode=0755"))?;
        let refused = |remedy: &str| -> Result<()> {
            let message = failure(user.inside("mine", &[], &["true"]))?;
            ensure!(message.lines().count() == 2, "{message}");
            ensure!(message.contains("/dev/net/tun") && message.contains(remedy), "{message}");
            ensure!(!user.tunnels().exists(), "something is left");
            Ok(())
        };
        refused("as root: `modprobe tun`")?;
        if user.is_other {
            // No device can be made in a user namespace, but a file's mode is checked first.
            fs::write("/dev/net/tun", "")?;
            fs::set_permissions("/dev/net/tun", fs::Permissions::from_mode(0o600))?;
            refused("`chmod 0666 /dev/net/tun` as root")?;
        }
        Ok(())
    });
}
