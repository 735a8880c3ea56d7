//! Programs without a display, from Debian's packages.

use anyhow::ensure;

use crate::support::*;

#[test]
fn tmux_runs_no_command_in_a_server_outside() {
    test_at_desk(|desk| {
        require("tmux")?;
        let started = run(desk.on_host(&["tmux", "new-session", "-d", "-s", "host", "sleep 1000"]))?;
        ensure!(started.status.success(), "{}", text_of(&started));
        let before = inode("/tmp/tmux-0/default")?;
        let said = desk.expect_refusal("tmux new-window \"REQUEST\"")?;
        ensure!(said.contains("tmux") && said.contains("--socket /tmp/tmux-0/default"), "{said}");
        ensure!(inode("/tmp/tmux-0/default")? == before, "the host's socket is another one");
        let sessions = run(desk.on_host(&["tmux", "list-sessions"]))?;
        ensure!(sessions.status.success(), "the host's server has ended: {}", said);
        Ok(())
    });
}

/// As the error's advice says.
#[test]
fn a_tmux_server_inside_works_for_all_programs_of_the_tunnel() {
    test_at_desk(|desk| {
        require("tmux")?;
        let script = "tmux -L own new-session -d 'readlink /proc/self/ns/net >/tmp/home/server; sleep 1000'; \
                      until [ -s /tmp/home/server ]; do sleep 0.01; done; \
                      tmux -L own new-window 'readlink /proc/self/ns/net >/tmp/home/window; sleep 1000'; \
                      until [ -s /tmp/home/window ]; do sleep 0.01; done; \
                      tmux -L own kill-server; readlink /proc/self/ns/net; cat server window";
        let output = run(desk.inside(&[], &["sh", "-c", script]))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines.len() == 3 && lines.iter().all(|line| *line == lines[0]), "{}", text_of(&output));
        ensure!(!text_of(&output).contains("outside the tunnel"), "{}", text_of(&output));
        Ok(())
    });
}

#[test]
fn screen_runs_no_command_in_a_session_outside() {
    test_at_desk(|desk| {
        require("screen")?;
        // Debian's screen is set-group-ID utmp, and needs another directory for its sockets without that.
        require_users()?;
        std::fs::create_dir_all("/run/screen")?;
        std::fs::set_permissions("/run/screen", std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
        let started = run(desk.on_host(&["screen", "-dmS", "host", "sleep", "1000"]))?;
        ensure!(started.status.success(), "{}", text_of(&started));
        lab::wait_until(PATIENCE, "screen has no session", || {
            let sessions = run(desk.on_host(&["screen", "-ls"]))?;
            Ok(String::from_utf8_lossy(&sessions.stdout).contains(".host"))
        })?;
        let said = desk.expect_refusal("screen -S host -X screen REQUEST")?;
        ensure!(said.contains("screen"), "{said}");
        let sessions = run(desk.on_host(&["screen", "-ls"]))?;
        ensure!(String::from_utf8_lossy(&sessions.stdout).contains(".host"), "the host's session is gone: {said}");
        Ok(())
    });
}

#[test]
fn emacsclient_evaluates_nothing_in_a_server_outside() {
    test_at_desk(|desk| {
        require("emacs")?;
        let _server = serve(desk.on_host(&["emacs", "-Q", "--fg-daemon"]))?;
        wait_for_file("/run/user/0/emacs/server")?;
        let before = inode("/run/user/0/emacs/server")?;
        let said = desk.expect_refusal("emacsclient --eval \"(call-process-shell-command \\\"REQUEST\\\")\"")?;
        ensure!(said.contains("emacs"), "{said}");
        ensure!(inode("/run/user/0/emacs/server")? == before, "the host's socket is another one");
        Ok(())
    });
}

/// A pretended ssh master, whose shared connection the client would use.
#[test]
fn ssh_uses_no_shared_connection_from_outside() {
    test_at_desk(|desk| {
        require("ssh")?;
        std::fs::create_dir_all("/tmp/home/.ssh")?;
        let master = lab::stand_in::StandIn::listen("/tmp/home/.ssh/master", lab::stand_in::Protocol::Any)?;
        let client = [
            "ssh",
            "-F",
            "none",
            "-o",
            "ControlPath=/tmp/home/.ssh/master",
            "-o",
            "ConnectTimeout=1",
            "-O",
            "check",
            "x",
        ];
        let output = run(desk.inside(&[], &client))?;
        ensure!(master.clients() == 0 && text_of(&output).contains("ControlPath=none"), "{}", text_of(&output));
        // The twin: with the socket opened, ssh uses it.
        let mut allowed = serve(desk.unguarded(&client))?;
        lab::wait_until(PATIENCE, "the twin did not ask the master", || Ok(master.clients() > 0))?;
        vpn_exec::linux::process::kill(allowed.id().cast_signed(), nix::sys::signal::Signal::SIGTERM)?;
        allowed.wait()?;
        Ok(())
    });
}

/// Looks up a key: gpg lets dirmngr query key servers.
fn dirmngr(desk: &Desk, socket: &str) -> anyhow::Result<()> {
    require("dirmngr")?;
    require("gpg-connect-agent")?;
    let started = run(desk.on_host(&["dirmngr", "--daemon"]))?;
    ensure!(started.status.success(), "{}", text_of(&started));
    wait_for_file(socket)?;
    let before = inode(socket)?;
    let ask = ["gpg-connect-agent", "--dirmngr", "getinfo pid", "/bye"];
    let pid = |output: &std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().find_map(|line| line.strip_prefix("D ").map(str::to_owned))
    };
    let outside = pid(&run(desk.on_host(&ask))?);
    ensure!(outside.is_some(), "dirmngr does not answer on the host");
    ensure!(pid(&run(desk.unguarded(&ask))?) == outside, "the twin must use the dirmngr outside");
    // Another dirmngr, inside, performs the request.
    let script = "gpg-connect-agent --dirmngr 'getinfo pid' /bye; gpg-connect-agent --dirmngr 'getinfo pid' /bye; \
                  gpg-connect-agent --dirmngr killdirmngr /bye";
    let output = run(desk.inside(&["--kill-orphans"], &["sh", "-c", script]))?;
    let inside = pid(&output);
    ensure!(inside.is_some() && inside != outside, "{}", text_of(&output));
    ensure!(inode(socket)? == before, "the host's socket was removed: {}", text_of(&output));
    ensure!(pid(&run(desk.on_host(&ask))?) == outside, "the host's own is another one");
    Ok(())
}

#[test]
fn gnupg_starts_a_dirmngr_of_its_own_inside() {
    test_at_desk(|desk| {
        // gpg-agent remains the user's.
        run(desk.on_host(&["gpg-connect-agent", "/bye"]))?;
        dirmngr(desk, "/run/user/0/gnupg/S.dirmngr")?;
        let ask = ["gpg-connect-agent", "--no-autostart", "getinfo pid", "/bye"];
        let outside = run(desk.on_host(&ask))?;
        let inside = run(desk.inside(&[], &ask))?;
        ensure!(outside.stdout == inside.stdout, "{} and {}", text_of(&outside), text_of(&inside));
        Ok(())
    });
}

/// As for users without a login session, whose sockets are in the home directory.
#[test]
fn gnupg_starts_a_dirmngr_of_its_own_without_a_runtime_directory() {
    test_at_desk(|desk| {
        lab::tunnel::needs_root("GnuPG finds the directory in which rootless tunnels have their files")?;
        std::fs::remove_dir_all("/run/user")?;
        std::fs::create_dir("/tmp/home/.gnupg")?;
        std::fs::set_permissions("/tmp/home/.gnupg", std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        dirmngr(desk, "/tmp/home/.gnupg/S.dirmngr")
    });
}

#[test]
fn bubblewrap_sandboxes_work_inside() {
    test_at_desk(|desk| {
        lab::tunnel::needs_root("another user for the program")?;
        require("bwrap")?;
        require_users()?;
        if has_one_user() {
            return Ok(());
        }
        std::fs::set_permissions("/tmp/home", std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let _outside = lab::stand_in::StandIn::listen("/tmp/home/x.sock", lab::stand_in::Protocol::None)?;
        let client = "import socket; s=socket.socket(socket.AF_UNIX)\n\
                      try: s.connect('/media/x.sock'); print('connected')\n\
                      except OSError as e: print(e.strerror)";
        // The same socket by another path, in the sandbox's mount namespace.
        let view = ["--dev-bind", "/", "/", "--tmpfs", "/media", "--bind", "/tmp/home", "/media"];
        let sandbox = [&["bwrap", "--unshare-pid"][..], &view, &["/usr/bin/python3", "-c", client]].concat();
        let output = run(desk.inside(&["--user", "1234"], &sandbox))?;
        ensure!(output.stdout == b"Permission denied\n", "{}", text_of(&output));
        Ok(())
    });
}

/// A second instance of qBittorrent passes its downloads to the first one.
#[test]
fn qbittorrent_adds_no_download_to_the_instance_outside() {
    test_at_desk(|desk| {
        require("qbittorrent-nox")?;
        let settings = "/tmp/home/profile/qBittorrent/config";
        std::fs::create_dir_all(settings)?;
        let text = "[LegalNotice]\nAccepted=true\n[Preferences]\nWebUI\\Port=18080\nWebUI\\Address=127.0.0.1\n";
        std::fs::write(format!("{settings}/qBittorrent.conf"), text)?;
        let client = ["qbittorrent-nox", "--profile=/tmp/home/profile"];
        let mut running = serve(desk.on_host(&client))?;
        lab::wait_until(PATIENCE, "qBittorrent does not run", || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", 18080)).is_ok())
        })?;
        let with = |word: &str| format!("http://127.0.0.1:{}/{word}.torrent", desk.port);
        run(desk.unguarded(&[client[0], client[1], &with("allowed")]))?;
        lab::wait_until(PATIENCE, "the twin did not add its download outside", || Ok(desk.arrived("allowed")))?;
        // The refused instance may run inside.
        let script = format!("timeout 5 {} {} {}", client[0], client[1], with("leak"));
        let output = run(desk.inside(&["--kill-orphans"], &["sh", "-c", &script]))?;
        ensure!(!desk.arrived("leak"), "{}", text_of(&output));
        ensure!(text_of(&output).contains("outside the tunnel"), "{}", text_of(&output));
        ensure!(running.try_wait()?.is_none(), "the host's one has ended: {}", text_of(&output));
        Ok(())
    });
}

/// Container engines and package managers execute requests outside.
#[test]
fn the_error_about_an_engines_socket_names_the_engine() {
    test_at_desk(|desk| {
        let python = "/usr/bin/python3";
        require(python)?;
        let client = "import socket,sys\nfor path in sys.argv[1:]:\n\x20 try: socket.socket(socket.AF_UNIX).connect(path)\n\x20 except OSError: pass\n\x20 else: print('reached', path)";
        let engines = [
            ("/run/docker.sock", "images"),
            ("/run/podman/podman.sock", "images"),
            ("/run/containerd/containerd.sock", "images"),
            ("/run/snapd.socket", "downloads"),
            ("/run/libvirt/libvirt-sock", "machines"),
        ];
        let mut listeners = Vec::new();
        let mut command = vec![python, "-c", client];
        for (path, _) in engines {
            listeners.push(lab::stand_in::StandIn::listen(path, lab::stand_in::Protocol::None)?);
            command.push(path);
        }
        let output = run(desk.inside(&[], &command))?;
        let text = text_of(&output);
        for (path, word) in engines {
            let line = text.lines().find(|line| line.contains(path)).unwrap_or_default();
            ensure!(line.contains(word) && line.contains("outside"), "{path}: {text}");
        }
        ensure!(output.stdout.is_empty() && listeners.iter().all(|listener| listener.clients() == 0), "{text}");
        Ok(())
    });
}

/// With GNUPGHOME set: gpg-agent remains the user's, dirmngr does not.
#[test]
fn gnupg_with_another_home_starts_a_dirmngr_of_its_own_inside() {
    test_at_desk(|desk| {
        lab::tunnel::needs_root("GnuPG finds the directory in which rootless tunnels have their files")?;
        require("dirmngr")?;
        require("gpg-connect-agent")?;
        for (runtime, home) in [(true, "/tmp/home/keys"), (false, "/tmp/home/others")] {
            if !runtime {
                std::fs::remove_dir_all("/run/user")?;
            }
            std::fs::create_dir(home)?;
            std::fs::set_permissions(home, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
            let with_home = |mut command: std::process::Command| {
                command.env("GNUPGHOME", home);
                run(command)
            };
            let ask =
                "gpg-connect-agent --no-autostart 'getinfo pid' /bye; gpg-connect-agent --dirmngr 'getinfo pid' /bye";
            run(desk.on_host(&["env", &format!("GNUPGHOME={home}"), "gpg-connect-agent", "/bye"]))?;
            with_home(desk.on_host(&["dirmngr", "--daemon"]))?;
            let pids = |output: &std::process::Output| {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.lines().filter_map(|line| line.strip_prefix("D ").map(str::to_owned)).collect::<Vec<_>>()
            };
            let outside = pids(&with_home(desk.on_host(&["sh", "-c", ask]))?);
            let output = with_home(desk.inside(&["--kill-orphans"], &["sh", "-c", ask]))?;
            let inside = pids(&output);
            ensure!(outside.len() == 2 && inside.len() == 2, "{outside:?}: {}", text_of(&output));
            ensure!(outside[0] == inside[0] && outside[1] != inside[1], "{outside:?} and {inside:?}");
            ensure!(pids(&with_home(desk.on_host(&["sh", "-c", ask]))?) == outside, "the host's are others now");
        }
        Ok(())
    });
}
