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

/// If the socket guard is killed, all connections fail, and the user gets a message.
#[test]
fn without_the_socket_guard_nothing_is_connected_to() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        // The socket guard is the one of the launcher's children whose only capability is CAP_SYS_PTRACE.
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
        let message =
            "the process that guards unix sockets was killed by signal 9: new connections of the program fail";
        ensure!(said(&output).matches(message).count() == 1, "{}", said(&output));
        // A guard that ends with its program is not worth a message.
        let output = run(desk.inside(&[], &["true"]))?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{}", said(&output));
        Ok(())
    });
}

/// A guard that fails at its start gives its own reason, and the program is not executed.
#[test]
fn a_guard_that_cannot_start_says_why() {
    test_at_desk(|desk| {
        for (guard, task) in vpn_exec::fault::GUARDS.into_iter().zip(["guard unix sockets", "filter the session bus"]) {
            let mut command = desk.inside(&[], &["echo", "executed"]);
            command.env("VPN_EXEC_TEST_FAIL", guard);
            command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/tmp/bus");
            let output = command.output()?;
            ensure!(output.status.code() == Some(125) && output.stdout.is_empty(), "{guard}: {}", said(&output));
            let reason = format!("cannot {task}: cannot continue {guard}: a test made it fail");
            ensure!(said(&output).contains(&reason), "{}", said(&output));
            ensure!(!said(&output).contains("Broken pipe"), "{}", said(&output));
        }
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

#[test]
fn the_plan_tells_what_listens_now_and_is_closed() {
    test_at_desk(|desk| {
        let _closed = StandIn::listen("/tmp/tmux-0/default", Tongue::None)?;
        let _open = StandIn::listen("/tmp/.X11-unix/X9", Tongue::None)?;
        let _resolver = StandIn::listen("/run/nscd/socket", Tongue::None)?;
        let plan = |options: &[&str]| {
            let mut command =
                desk.on_host(&[env!("CARGO_BIN_EXE_vpn-exec"), "plan", "--config", "/run/lab/nowhere.conf"]);
            command.args(options);
            run(command)
        };
        let text = said(&plan(&[])?);
        let pid = std::process::id();
        ensure!(text.contains("/tmp/tmux-0/default (outside-"), "{text}");
        ensure!(text.contains(&format!("pid {pid}) listens outside the tunnel now, and is closed")), "{text}");
        for open in ["X9", "nscd/socket"] {
            ensure!(!text.lines().any(|line| line.contains(open) && line.contains("listens")), "{open}: {text}");
        }
        ensure!(text.contains("/run/user/*/wayland-*"), "{text}");
        let text = said(&plan(&["--socket", "/tmp/tmux-0/*"])?);
        ensure!(!text.contains("listens outside the tunnel now"), "{text}");
        Ok(())
    });
}

/// As with `sudo` and `--user`: the socket guard is that user, and sees what that user sees.
#[test]
fn a_program_of_another_user_is_refused_as_well() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        require_users()?;
        fs::create_dir("/tmp/ann")?;
        std::os::unix::fs::chown("/tmp/ann", Some(1234), Some(1234))?;
        fs::set_permissions("/tmp/ann", std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let outside = StandIn::listen("/tmp/ann/x.sock", Tongue::None)?;
        let client = [PYTHON, "-c", CLIENT, "/tmp/ann/x.sock"];
        let output = run(desk.inside(&["--user", "1234"], &client))?;
        ensure!(output.stdout == b"Permission denied\n", "{}", said(&output));
        ensure!(said(&output).contains("--socket /tmp/ann/x.sock") && outside.callers() == 0, "{}", said(&output));
        let output = run(desk.inside(&["--user", "1234", "--socket", "/tmp/ann/x.sock"], &client))?;
        ensure!(output.stdout == b"connected\n", "{}", said(&output));
        Ok(())
    });
}

/// Programs of 32 bits call the same by other numbers, most of them by socketcall(2).
#[cfg(target_arch = "x86_64")]
#[test]
fn programs_of_32_bits_are_refused_as_well() {
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
        let _outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        fs::write("/tmp/home/client.s", SOURCE)?;
        for command in [
            &["as", "--32", "-o", "/tmp/home/client.o", "/tmp/home/client.s"][..],
            &["ld", "-m", "elf_i386", "-o", "/run/lab/client", "/tmp/home/client.o"],
        ] {
            let output = run(desk.on_host(command))?;
            ensure!(output.status.success(), "{}", said(&output));
        }
        // Connected by socketcall(2), so that connect(2) finds it connected: EISCONN is 106.
        let outside = run(desk.on_host(&["/run/lab/client"]))?;
        ensure!(outside.status.code() == Some(106), "{}", said(&outside));
        // EACCES is 13, for both.
        let inside = run(desk.inside(&[], &["/run/lab/client"]))?;
        ensure!(inside.status.code() == Some(13 ^ (13 << 4)), "{}", said(&inside));
        Ok(())
    });
}

#[test]
fn rings_of_system_calls_are_not_available() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let program = "import ctypes,os; libc=ctypes.CDLL(None, use_errno=True)\n\
                       print(libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0, os.strerror(ctypes.get_errno()))";
        let client = [PYTHON, "-c", program];
        let output = run(desk.inside(&[], &client))?;
        ensure!(output.stdout == b"False Function not implemented\n", "{}", said(&output));
        let free = run(desk.inside(&["--socket", "any"], &client))?;
        let host = run(desk.on_host(&client))?;
        ensure!(free.stdout == host.stdout, "{} and {}", said(&free), said(&host));
        Ok(())
    });
}

/// A listener in the network namespace of another tunnel: to the program it is as far outside as the host's.
#[test]
fn a_socket_of_another_tunnel_is_not_taken_for_an_abandoned_one() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        let server = "import socket,time\ns=socket.socket(socket.AF_UNIX); s.bind('/tmp/home/other'); s.listen(9)\n\
                      print('listens', flush=True); time.sleep(1000)";
        let mut command = desk.inside(&["--name", "other"], &[PYTHON, "-c", server]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
        let pipe = child.stdout.take().expect("a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(pipe), &mut String::new())?;
        let output = run(desk.inside(&[], &[PYTHON, "-c", CLIENT, "/tmp/home/other"]))?;
        ensure!(output.stdout == b"Permission denied\n" && said(&output).contains("outside"), "{}", said(&output));
        vpn_exec::linux::process::kill(child.id().cast_signed(), nix::sys::signal::Signal::SIGTERM)?;
        child.wait()?;
        Ok(())
    });
}

/// In a sandbox of the program's own, a link leads where the sandbox sees it lead.
#[test]
fn a_relative_path_is_looked_up_in_the_sandbox_that_it_is_in() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        require("bwrap")?;
        require_users()?;
        fs::set_permissions("/tmp/home", std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let outside = StandIn::listen("/tmp/home/x.sock", Tongue::None)?;
        std::os::unix::fs::symlink("/media/x.sock", "/tmp/home/link")?;
        let view = ["--dev-bind", "/", "/", "--tmpfs", "/media", "--bind", "/tmp/home", "/media", "--chdir", "/media"];
        for path in ["link", "./link", "x.sock", "../media/link", "/proc/self/cwd/link"] {
            let sandbox = [&["bwrap"][..], &view, &[PYTHON, "-c", CLIENT, path]].concat();
            let output = run(desk.inside(&["--user", "1234"], &sandbox))?;
            ensure!(output.stdout == b"Permission denied\n", "{path}: {}", said(&output));
        }
        ensure!(outside.callers() == 0);
        Ok(())
    });
}

/// Numbers of files are small in memory, and the same in several file systems.
#[test]
fn a_socket_inside_with_the_same_number_and_name_opens_no_other() {
    test_at_desk(|desk| {
        require(PYTHON)?;
        for directory in ["/tmp/one", "/tmp/two"] {
            fs::create_dir(directory)?;
            vpn_exec::linux::mounts::mount_tmpfs(directory.as_ref())?;
        }
        let outside = StandIn::listen("/tmp/one/bus", Tongue::None)?;
        let script = format!(
            "import socket\ns=socket.socket(socket.AF_UNIX); s.bind('/tmp/two/bus'); s.listen(1)\n{}",
            CLIENT.replace("sys.argv[1]", "'/tmp/one/bus'")
        );
        let output = run(desk.inside(&[], &[PYTHON, "-c", &script]))?;
        ensure!(inode("/tmp/one/bus")? == inode("/tmp/two/bus")?, "the numbers differ");
        ensure!(output.stdout == b"Permission denied\n" && outside.callers() == 0, "{}", said(&output));
        Ok(())
    });
}
