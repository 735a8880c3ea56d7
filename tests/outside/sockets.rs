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

/// A connection to a socket inside goes on, and so does one to an abstract name, which belongs to a network namespace.
#[test]
fn sockets_inside_are_open_to_every_program_of_the_tunnel() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let server = "import socket,sys,time\n\
                      s=socket.socket(socket.AF_UNIX); s.bind('/tmp/home/inside'); s.listen(9)\n\
                      d=socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); d.bind('/tmp/home/datagrams')\n\
                      print('listens', flush=True); time.sleep(1000)";
        let mut command = desk.inside(&[], &[PYTHON, "-c", server]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
        let mut line = String::new();
        let pipe = child.stdout.take().expect("a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(pipe), &mut line)?;
        ensure!(line == "listens\n", "{line}");
        for (path, kind) in [("/tmp/home/inside", "SOCK_STREAM"), ("/tmp/home/datagrams", "SOCK_DGRAM")] {
            let output = run(desk.inside(&[], &[PYTHON, "-c", CLIENT, path, kind]))?;
            ensure!(output.stdout == b"connected\n", "{path}: {}", said(&output));
        }
        vpn_exec::linux::process::kill(child.id().cast_signed(), nix::sys::signal::Signal::SIGTERM)?;
        child.wait()?;
        Ok(())
    });
}

#[test]
fn datagrams_to_a_socket_of_the_hosts_are_refused() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let receiver = std::os::unix::net::UnixDatagram::bind("/tmp/home/datagrams")?;
        receiver.set_read_timeout(Some(std::time::Duration::from_millis(300)))?;
        let client = "import socket; s=socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
                      try: s.sendto(b'x', '/tmp/home/datagrams'); print('sent')\n\
                      except OSError as e: print(e.strerror)";
        let output = run(desk.unguarded(&[PYTHON, "-c", client]))?;
        ensure!(output.stdout == b"sent\n" && receiver.recv(&mut [0; 9]).is_ok(), "{}", said(&output));
        let output = run(desk.inside(&[], &[PYTHON, "-c", client]))?;
        ensure!(output.stdout == b"Permission denied\n", "{}", said(&output));
        ensure!(receiver.recv(&mut [0; 9]).is_err(), "it arrived");
        Ok(())
    });
}

#[test]
fn what_was_refused_is_counted() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let _outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        let script = format!(
            "for n in 1 2 3; do {PYTHON} -c \"$0\" /tmp/home/x.sock; done; sleep 1.5; {} status nowhere",
            env!("CARGO_BIN_EXE_vpn-exec")
        );
        let output = run(desk.inside(&[], &["sh", "-c", &script, CLIENT]))?;
        let text = said(&output);
        ensure!(text.split_whitespace().collect::<Vec<_>>().join(" ").contains("refused 3 connections"), "{text}");
        ensure!(text.matches("--socket").count() == 1, "it is said once: {text}");
        Ok(())
    });
}

/// If the gate is killed, all is closed.
#[test]
fn without_the_gate_nothing_is_connected_to() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        // The gate is the one of the launcher's children that is no parent, has the capability to look into others alone, and waits.
        let kill = "import os,re,signal,time\n\
                    def field(p,n): return re.search(n+r':\\s*(\\S+)', open(f'/proc/{p}/status').read()).group(1)\n\
                    me=os.getppid()\n\
                    for p in open(f'/proc/{me}/task/{me}/children').read().split():\n\
                    \x20 if field(p,'CapPrm') == '0000000000080000': os.kill(int(p), signal.SIGKILL); print('killed')\n\
                    time.sleep(.3)\n";
        let program = format!("{kill}{}", CLIENT.replace("sys.argv[1]", "'/tmp/home/x.sock'"));
        let output = run(desk.inside(&[], &[PYTHON, "-c", &program]))?;
        ensure!(output.stdout == b"killed\nFunction not implemented\n", "{}", said(&output));
        ensure!(outside.callers() == 0);
        Ok(())
    });
}

/// The program's processes may be threads, may have no memory to be read, and may ask wrongly.
#[test]
fn calls_that_make_no_sense_fail_as_always() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let program = "import ctypes,os\n\
                       libc=ctypes.CDLL(None, use_errno=True)\n\
                       s=libc.socket(1,1,0)\n\
                       for address,length in [(0,110),(8,110),(0,0),(0,-1)]:\n\
                       \x20 print(libc.connect(s,ctypes.c_void_p(address),length), os.strerror(ctypes.get_errno()))\n\
                       buffer=ctypes.create_string_buffer(b'\\1\\0/no/such',9)\n\
                       print(libc.connect(s,buffer,9), os.strerror(ctypes.get_errno()))\n\
                       print(libc.connect(99,buffer,9), os.strerror(ctypes.get_errno()))\n";
        let inside = run(desk.inside(&[], &[PYTHON, "-c", program]))?;
        let outside = run(desk.on_host(&[PYTHON, "-c", program]))?;
        ensure!(
            inside.stdout == outside.stdout && !inside.stdout.is_empty(),
            "{} and {}",
            said(&inside),
            said(&outside)
        );
        Ok(())
    });
}
