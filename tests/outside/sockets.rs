//! The rule for unix sockets, with simple servers.

use std::fs;
use std::process::Stdio;

use anyhow::ensure;
use lab::stand_in::{Protocol, StandIn};
use lab::variables;

use crate::support::*;

/// Connects to a path, and prints the result.
const CLIENT: &str = "import socket,sys\n\
s=socket.socket(socket.AF_UNIX, getattr(socket, sys.argv[2]) if len(sys.argv) > 2 else socket.SOCK_STREAM)\n\
try: s.connect(sys.argv[1]); print('connected')\n\
except OSError as e: print(e.strerror)";

const PYTHON: &str = "/usr/bin/python3";

#[test]
fn a_socket_of_a_process_outside_is_closed_without_its_option() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let outside = StandIn::listen("/tmp/home/x.sock", Protocol::None)?;
        let connect = |options: &[&str]| run(desk.inside(options, &[PYTHON, "-c", CLIENT, "/tmp/home/x.sock"]));
        let output = connect(&[])?;
        ensure!(output.stdout == b"Permission denied\n", "{}", text_of(&output));
        ensure!(text_of(&output).contains("--socket /tmp/home/x.sock"), "{}", text_of(&output));
        ensure!(outside.clients() == 0);
        for option in ["/tmp/home/x.sock", "/tmp/home/*", "any"] {
            let output = connect(&["--socket", option])?;
            ensure!(output.stdout == b"connected\n", "{option}: {}", text_of(&output));
        }
        // A socket without a server gives the usual error, so that a program may start its own server.
        drop(std::os::unix::net::UnixListener::bind("/tmp/home/stale")?);
        let output = run(desk.inside(&[], &[PYTHON, "-c", CLIENT, "/tmp/home/stale"]))?;
        ensure!(output.stdout == b"Connection refused\n" && output.stderr.is_empty(), "{}", text_of(&output));
        Ok(())
    });
}

#[test]
fn a_socket_is_closed_by_every_path_to_it() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let _outside = StandIn::listen("/tmp/home/x.sock", Protocol::None)?;
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
            ensure!(output.stdout == b"Permission denied\n", "{path}: {}", text_of(&output));
        }
        Ok(())
    });
}

/// Sockets of processes inside, and abstract addresses, which belong to the network namespace.
#[test]
fn sockets_of_processes_inside_are_open() {
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
            ensure!(output.stdout == b"connected\n", "{path}: {}", text_of(&output));
        }
        vpn_exec::linux::process::kill(child.id().cast_signed(), nix::sys::signal::Signal::SIGTERM)?;
        child.wait()?;
        Ok(())
    });
}

#[test]
fn datagrams_to_a_socket_of_a_process_outside_are_refused() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let receiver = std::os::unix::net::UnixDatagram::bind("/tmp/home/datagrams")?;
        receiver.set_read_timeout(Some(std::time::Duration::from_millis(300)))?;
        let client = "import socket; s=socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
                      try: s.sendto(b'x', '/tmp/home/datagrams'); print('sent')\n\
                      except OSError as e: print(e.strerror)";
        let output = run(desk.unguarded(&[PYTHON, "-c", client]))?;
        ensure!(output.stdout == b"sent\n" && receiver.recv(&mut [0; 9]).is_ok(), "{}", text_of(&output));
        let output = run(desk.inside(&[], &[PYTHON, "-c", client]))?;
        ensure!(output.stdout == b"Permission denied\n", "{}", text_of(&output));
        ensure!(receiver.recv(&mut [0; 9]).is_err(), "it arrived");
        Ok(())
    });
}

#[test]
fn refused_connections_are_counted() {
    test_at_desk(|desk| {
        lab::tunnel::needs_root("the program of a rootless tunnel cannot query its keeper")?;
        require(PYTHON)?;
        let _outside = StandIn::listen("/tmp/home/x.sock", Protocol::None)?;
        let script = format!("for n in 1 2 3; do {PYTHON} -c \"$0\" /tmp/home/x.sock; done; exec cat");
        let mut command = desk.inside(&[], &["sh", "-c", &script, CLIENT]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let binary = lab::launcher::binary().to_string_lossy();
        let mut status = String::new();
        let is_counted = || {
            status = text_of(&run(desk.on_host(&[&binary, "status", "nowhere"]))?);
            Ok(status.split_whitespace().collect::<Vec<_>>().join(" ").contains("refused 3 connections"))
        };
        let counted = lab::wait_until(PATIENCE, "they are not counted", is_counted);
        drop(child.stdin.take());
        let text = text_of(&child.wait_with_output()?);
        ensure!(counted.is_ok(), "{status}: {text}");
        ensure!(text.matches("--socket").count() == 1, "it is said once: {text}");
        Ok(())
    });
}

/// If the socket guard is killed, all connections fail, and the user gets a message.
#[test]
fn without_the_socket_guard_no_connection_is_made() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let outside = StandIn::listen("/tmp/home/x.sock", Protocol::None)?;
        // The socket guard is the launcher's child whose only capability is CAP_SYS_PTRACE.
        let kill = "import os,re,signal,time\n\
                    def field(p,n): return re.search(n+r':\\s*(\\S+)', open(f'/proc/{p}/status').read()).group(1)\n\
                    me=os.getppid()\n\
                    for p in open(f'/proc/{me}/task/{me}/children').read().split():\n\
                    \x20 if field(p,'CapPrm') == '0000000000080000': os.kill(int(p), signal.SIGKILL); print('killed')\n\
                    time.sleep(.3)\n";
        let program = format!("{kill}{}", CLIENT.replace("sys.argv[1]", "'/tmp/home/x.sock'"));
        let output = run(desk.inside(&[], &[PYTHON, "-c", &program]))?;
        ensure!(output.stdout == b"killed\nFunction not implemented\n", "{}", text_of(&output));
        ensure!(outside.clients() == 0);
        let message =
            "the process that guards unix sockets was killed by signal 9: new connections of the program fail";
        ensure!(text_of(&output).matches(message).count() == 1, "{}", text_of(&output));
        // A guard that ends with its program is not worth a message.
        let output = run(desk.inside(&[], &["true"]))?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{}", text_of(&output));
        Ok(())
    });
}

/// A guard that fails at its start gives its own reason, and the program is not executed.
#[test]
fn a_guard_that_cannot_start_says_why() {
    test_at_desk(|desk| {
        for (guard, task) in vpn_exec::fault::GUARDS.into_iter().zip(["guard unix sockets", "filter the session bus"]) {
            let mut command = desk.inside(&[], &["echo", "executed"]);
            command.env(variables::FAIL, guard);
            command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/tmp/bus");
            let output = command.output()?;
            ensure!(output.status.code() == Some(125) && output.stdout.is_empty(), "{guard}: {}", text_of(&output));
            let reason = format!("cannot {task}: cannot continue {guard}: a test made it fail");
            ensure!(text_of(&output).contains(&reason), "{}", text_of(&output));
            ensure!(!text_of(&output).contains("Broken pipe"), "{}", text_of(&output));
        }
        Ok(())
    });
}

/// Calls from threads, with unreadable memory, and with invalid arguments.
#[test]
fn invalid_calls_fail_with_their_usual_errors() {
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
            text_of(&inside),
            text_of(&outside)
        );
        Ok(())
    });
}

#[test]
fn the_plan_lists_listening_sockets_that_will_be_closed() {
    test_at_desk(|desk| {
        let _closed = StandIn::listen("/tmp/tmux-0/default", Protocol::None)?;
        let _open = StandIn::listen("/tmp/.X11-unix/X9", Protocol::None)?;
        let _resolver = StandIn::listen("/run/nscd/socket", Protocol::None)?;
        let plan = |options: &[&str]| {
            let mut command = desk.on_host(&[
                &lab::launcher::binary().to_string_lossy(),
                "plan",
                "--config",
                "/run/lab/nowhere.conf",
            ]);
            command.args(options);
            run(command)
        };
        let text = text_of(&plan(&[])?);
        let pid = std::process::id();
        ensure!(text.contains("/tmp/tmux-0/default (outside-"), "{text}");
        ensure!(text.contains(&format!("pid {pid}) listens outside the tunnel now, and is closed")), "{text}");
        for open in ["X9", "nscd/socket"] {
            ensure!(!text.lines().any(|line| line.contains(open) && line.contains("listens")), "{open}: {text}");
        }
        ensure!(text.contains("/run/user/*/wayland-*"), "{text}");
        let text = text_of(&plan(&["--socket", "/tmp/tmux-0/*"])?);
        ensure!(!text.contains("listens outside the tunnel now"), "{text}");
        Ok(())
    });
}

/// With `sudo` and `--user`, the socket guard runs as that user.
#[test]
fn sockets_outside_are_closed_to_a_program_of_another_user() {
    test_at_desk(|desk| {
        lab::tunnel::needs_root("another user for the program")?;
        require(PYTHON)?;
        require_users()?;
        if has_one_user() {
            return Ok(());
        }
        fs::create_dir("/tmp/ann")?;
        std::os::unix::fs::chown("/tmp/ann", Some(1234), Some(1234))?;
        fs::set_permissions("/tmp/ann", std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let outside = StandIn::listen("/tmp/ann/x.sock", Protocol::None)?;
        let client = [PYTHON, "-c", CLIENT, "/tmp/ann/x.sock"];
        let output = run(desk.inside(&["--user", "1234"], &client))?;
        ensure!(output.stdout == b"Permission denied\n", "{}", text_of(&output));
        ensure!(
            text_of(&output).contains("--socket /tmp/ann/x.sock") && outside.clients() == 0,
            "{}",
            text_of(&output)
        );
        let output = run(desk.inside(&["--user", "1234", "--socket", "/tmp/ann/x.sock"], &client))?;
        ensure!(output.stdout == b"connected\n", "{}", text_of(&output));
        Ok(())
    });
}

/// 32-bit programs use other system call numbers, most of them socketcall(2).
#[cfg(target_arch = "x86_64")]
#[test]
fn sockets_outside_are_closed_to_32_bit_programs() {
    const SOURCE: &str = r#"
        .globl _start
        .section .data
        address: .short 1
                 .asciz "/tmp/home/x.sock"
        end:
        arguments: .long 0, address, end - address
        pair: .long 1, 1, 0
        .text
        _start: mov $102, %eax
                mov $1, %ebx
                mov $pair, %ecx
                int $0x80
                mov %eax, arguments
                mov %eax, %esi
                mov $102, %eax
                mov $3, %ebx
                mov $arguments, %ecx
                int $0x80
                mov %eax, %edi
                mov $362, %eax
                mov %esi, %ebx
                mov $address, %ecx
                mov $end - address, %edx
                int $0x80
                neg %eax
                neg %edi
                shl $4, %edi
                xor %edi, %eax
                mov %eax, %ebx
                mov $1, %eax
                int $0x80
    "#;
    test_at_desk(|desk| {
        for tool in ["as", "ld"] {
            require(tool)?;
        }
        let _outside = StandIn::listen("/tmp/home/x.sock", Protocol::None)?;
        fs::write("/tmp/home/client.s", SOURCE)?;
        for command in [
            &["as", "--32", "-o", "/tmp/home/client.o", "/tmp/home/client.s"][..],
            &["ld", "-m", "elf_i386", "-o", "/run/lab/client", "/tmp/home/client.o"],
        ] {
            let output = run(desk.on_host(command))?;
            ensure!(output.status.success(), "{}", text_of(&output));
        }
        // socketcall(2) has connected the socket, so connect(2) fails with EISCONN, 106.
        let outside = run(desk.on_host(&["/run/lab/client"]))?;
        ensure!(outside.status.code() == Some(106), "{}", text_of(&outside));
        // Both fail with EACCES, 13.
        let inside = run(desk.inside(&[], &["/run/lab/client"]))?;
        ensure!(inside.status.code() == Some(13 ^ (13 << 4)), "{}", text_of(&inside));
        Ok(())
    });
}

#[test]
fn io_uring_is_not_available() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let program = "import ctypes,os; libc=ctypes.CDLL(None, use_errno=True)\n\
                       print(libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0, os.strerror(ctypes.get_errno()))";
        let client = [PYTHON, "-c", program];
        let output = run(desk.inside(&[], &client))?;
        ensure!(output.stdout == b"False Function not implemented\n", "{}", text_of(&output));
        let free = run(desk.inside(&["--socket", "any"], &client))?;
        let host = run(desk.on_host(&client))?;
        ensure!(free.stdout == host.stdout, "{} and {}", text_of(&free), text_of(&host));
        Ok(())
    });
}

/// A server in another tunnel's network namespace is outside, too.
#[test]
fn a_socket_of_a_process_in_another_tunnel_is_closed() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let server = "import socket,time\ns=socket.socket(socket.AF_UNIX); s.bind('/tmp/home/other'); s.listen(9)\n\
                      print('listens', flush=True); time.sleep(1000)";
        let mut command = desk.inside(&["--name", "other"], &[PYTHON, "-c", server]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
        let pipe = child.stdout.take().expect("a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(pipe), &mut String::new())?;
        let output = run(desk.inside(&[], &[PYTHON, "-c", CLIENT, "/tmp/home/other"]))?;
        let text = text_of(&output);
        ensure!(output.stdout == b"Permission denied\n" && text.contains("outside"), "{text}");
        vpn_exec::linux::process::kill(child.id().cast_signed(), nix::sys::signal::Signal::SIGTERM)?;
        child.wait()?;
        Ok(())
    });
}

/// In the program's own sandbox, links resolve in the sandbox's mount namespace.
#[test]
fn paths_are_resolved_in_the_callers_sandbox() {
    test_at_desk(|desk| {
        lab::tunnel::needs_root("another user for the program")?;
        require(PYTHON)?;
        require("bwrap")?;
        require_users()?;
        if has_one_user() {
            return Ok(());
        }
        fs::set_permissions("/tmp/home", std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let outside = StandIn::listen("/tmp/home/x.sock", Protocol::None)?;
        std::os::unix::fs::symlink("/media/x.sock", "/tmp/home/link")?;
        let view = ["--dev-bind", "/", "/", "--tmpfs", "/media", "--bind", "/tmp/home", "/media", "--chdir", "/media"];
        for path in ["link", "./link", "x.sock", "../media/link", "/proc/self/cwd/link"] {
            let sandbox = [&["bwrap"][..], &view, &[PYTHON, "-c", CLIENT, path]].concat();
            let output = run(desk.inside(&["--user", "1234"], &sandbox))?;
            ensure!(output.stdout == b"Permission denied\n", "{path}: {}", text_of(&output));
        }
        ensure!(outside.clients() == 0);
        Ok(())
    });
}

/// Inodes on tmpfs are small numbers, and may be equal in two file systems.
#[test]
fn a_socket_inside_with_the_same_inode_and_name_opens_no_other() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        for directory in ["/tmp/one", "/tmp/two"] {
            fs::create_dir(directory)?;
            vpn_exec::linux::mounts::mount_tmpfs(directory.as_ref())?;
        }
        let outside = StandIn::listen("/tmp/one/bus", Protocol::None)?;
        let script = format!(
            "import socket\ns=socket.socket(socket.AF_UNIX); s.bind('/tmp/two/bus'); s.listen(1)\n{}",
            CLIENT.replace("sys.argv[1]", "'/tmp/one/bus'")
        );
        let output = run(desk.inside(&[], &[PYTHON, "-c", &script]))?;
        ensure!(inode("/tmp/one/bus")? == inode("/tmp/two/bus")?, "the numbers differ");
        ensure!(output.stdout == b"Permission denied\n" && outside.clients() == 0, "{}", text_of(&output));
        Ok(())
    });
}
