//! The rule, with stand-ins.

use std::fs;

use anyhow::ensure;
use lab::stand_in::{StandIn, Tongue};

use crate::support::*;

/// Connects to a path, and says how that ends.
const CLIENT: &str = "import socket,sys\n\
s=socket.socket(socket.AF_UNIX, getattr(socket, sys.argv[2]) if len(sys.argv) > 2 else socket.SOCK_STREAM)\n\
try: s.connect(sys.argv[1]); print('connected')\n\
except OSError as e: print(e.strerror)";

const PYTHON: &str = "/usr/bin/python3";

#[test]
fn a_socket_of_the_hosts_is_closed_unless_it_is_opened() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        let connect = |options: &[&str]| run(desk.inside(options, &[PYTHON, "-c", CLIENT, "/tmp/home/x.sock"]));
        let output = connect(&[])?;
        ensure!(output.stdout == b"Permission denied\n", "{}", said(&output));
        ensure!(said(&output).contains("--socket /tmp/home/x.sock"), "{}", said(&output));
        ensure!(outside.callers() == 0);
        for option in ["/tmp/home/x.sock", "/tmp/home/*", "any"] {
            let output = connect(&["--socket", option])?;
            ensure!(output.stdout == b"connected\n", "{option}: {}", said(&output));
        }
        // What is left of one that has ended is refused as always, so that a program may start its own.
        drop(std::os::unix::net::UnixListener::bind("/tmp/home/stale")?);
        let output = run(desk.inside(&[], &[PYTHON, "-c", CLIENT, "/tmp/home/stale"]))?;
        ensure!(output.stdout == b"Connection refused\n" && output.stderr.is_empty(), "{}", said(&output));
        Ok(())
    });
}

#[test]
fn every_name_of_a_socket_leads_to_the_same_answer() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let _outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        std::os::unix::fs::symlink("/tmp/home/x.sock", "/tmp/link")?;
        fs::create_dir("/tmp/bound")?;
        vpn_exec::linux::mounts::bind("/tmp/home".as_ref(), "/tmp/bound".as_ref())?;
        fs::hard_link("/tmp/home/x.sock", "/tmp/hard")?;
        for path in [
            "x.sock",
            "../home/x.sock",
            "/tmp/link",
            "/tmp/bound/x.sock",
            "/tmp/hard",
            "/proc/self/cwd/x.sock",
            "/proc/self/root/tmp/home/x.sock",
            "/proc/thread-self/cwd/x.sock",
        ] {
            let output = run(desk.inside(&[], &[PYTHON, "-c", CLIENT, path]))?;
            ensure!(output.stdout == b"Permission denied\n", "{path}: {}", said(&output));
        }
        Ok(())
    });
}
