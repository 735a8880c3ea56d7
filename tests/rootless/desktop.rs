//! What a desktop program of an ordinary user reaches: display, sound, the session bus with portals, and sandboxes of
//! its own.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use lab::stand_in::{Protocol, StandIn};
use lab::{Lab, Peer, Reach, launcher, variables};

use crate::desk::{Desk, FILE, RUNTIME, Running};
use crate::{output, run};

const PYTHON: &str = "/usr/bin/python3";

/// Connects to sockets, and prints the outcomes. A path that begins with `@` is an abstract address.
const CLIENT: &str = "import socket,sys\n\
for path in sys.argv[1:]:\n\
\x20 s=socket.socket(socket.AF_UNIX)\n\
\x20 try: s.connect(path.replace('@','\\0')); print('connected')\n\
\x20 except OSError as e: print(e.strerror)";

/// The services of a desktop.
const SERVICES: &str = include_str!("../bus/service.py");

const BUS: &str = "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN\" \
    \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\">\n\
    <busconfig><type>session</type><listen>unix:path=/run/user/1000/bus</listen>\
    <policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/>\
    <allow own=\"*\"/></policy></busconfig>\n";

fn test_at_desk<F: FnOnce(&Desk) -> Result<()>>(programs: &[&str], body: F) {
    lab::test(Peer::Ours, |lab: &Lab| {
        for program in programs {
            lab::require_program(program, variables::REQUIRE_PROGRAMS)?;
        }
        body(&Desk::new(&lab.wg_quick_text(Reach::Ipv4))?)
    });
}

/// X11's abstract socket is the host's network namespace's, so programs use the one with a path.
#[test]
fn display_and_sound_are_reached() {
    test_at_desk(&["Xvfb", PYTHON], |desk| {
        let _display = desk.start_display()?;
        desk.make_folder("/run/user/1000/pulse")?;
        let names = ["wayland-0", "pulse/native", "pipewire-0", "pipewire-0-manager"];
        let open = names.map(|name| format!("{RUNTIME}/{name}"));
        let closed = format!("{RUNTIME}/other");
        let servers: Vec<StandIn> =
            open.iter().chain([&closed]).map(|path| StandIn::listen(path, Protocol::None)).collect::<Result<_>>()?;
        let display = "/tmp/.X11-unix/X8";
        let paths = open.iter().map(String::as_str).chain([display, "@/tmp/.X11-unix/X8", closed.as_str()]);
        let words: Vec<&str> = [PYTHON, "-c", CLIENT].into_iter().chain(paths).collect();
        let expected = [&["connected"; 5][..], &["Connection refused", "Permission denied"]].concat().join("\n");
        let seen = output(desk.inside(&words)?)?;
        ensure!(seen.trim() == expected, "{seen}");
        ensure!(servers.last().is_some_and(|server| server.clients() == 0), "the closed socket was reached");
        // The twin reaches them all.
        let seen = output(desk.command(&words)?)?;
        ensure!(seen.lines().all(|line| line == "connected") && seen.lines().count() == 7, "{seen}");
        Ok(())
    });
}

#[test]
fn portals_that_act_for_the_desktop_are_reached_and_others_are_not() {
    test_at_desk(&["dbus-daemon", "gdbus", PYTHON], |desk| {
        if !Path::new("/usr/lib/python3/dist-packages/gi").exists() {
            return Err(lab::Skip::error("python3-gi is not installed", variables::REQUIRE_PROGRAMS));
        }
        desk.write("bus.conf", BUS)?;
        desk.write("service.py", SERVICES)?;
        let _bus = Running::start(desk.command(&["dbus-daemon", "--config-file=/tmp/home/bus.conf", "--nofork"])?)?;
        desk.wait_for("/run/user/1000/bus")?;
        let mut services = desk.command(&[PYTHON, "/tmp/home/service.py", "/tmp/home/log"])?;
        let mut services = services.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(services.stdout.take().context("a pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the services do not start");

        let portal = |member: &'static str, argument: &'static str| {
            let to = ["gdbus", "call", "--timeout", "20", "--session", "-d", "org.freedesktop.portal.Desktop"];
            [&to[..], &["-o", "/org/freedesktop/portal/desktop", "-m", member, argument]].concat()
        };
        let read = portal("org.freedesktop.portal.Settings.Read", "colour");
        let seen = output(desk.inside(&read)?)?;
        ensure!(seen == "('colour',)\n", "{seen}");
        let open = portal("org.freedesktop.portal.OpenURI.OpenURI", "http://example.org/");
        let refused = run(&mut desk.inside(&open)?)?;
        let text = launcher::text_of(&refused);
        ensure!(!refused.status.success() && text.contains("outside the tunnel"), "{text}");
        ensure!(!std::fs::read_to_string("/tmp/home/log")?.contains("OpenURI"), "the portal opened the address");
        // The twin.
        output(desk.command(&open)?)?;
        ensure!(std::fs::read_to_string("/tmp/home/log")?.contains("OpenURI"), "the twin's address was not opened");
        Ok(())
    });
}

/// A socket of another tunnel is not taken for a stale file: a browser would take over the profile of the instance
/// there.
#[test]
fn a_socket_of_another_tunnel_is_closed() {
    test_at_desk(&[PYTHON], |desk| {
        let server = "import socket,time\ns=socket.socket(socket.AF_UNIX); s.bind('/tmp/home/other'); s.listen(9)\n\
                      print('listens', flush=True); time.sleep(1000)";
        let file = std::fs::read_to_string(FILE)?;
        desk.write("other.conf", &file)?;
        let mut other = desk.vpn_exec(&["--config", "/tmp/home/other.conf", "--", PYTHON, "-c", server])?;
        let mut other = other.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(other.stdout.take().context("a pipe")?).read_line(&mut line)?;
        ensure!(line == "listens\n", "{line}");
        let seen = output(desk.inside(&[PYTHON, "-c", CLIENT, "/tmp/home/other"])?)?;
        ensure!(seen == "Permission denied\n", "{seen}");
        Ok(())
    });
}

/// As flatpak and Steam do. A socket has another path in the sandbox, which opens it no more than the first one.
#[test]
fn bubblewraps_sandboxes_work_inside() {
    test_at_desk(&["bwrap", PYTHON], |desk| {
        let _outside = StandIn::listen("/tmp/home/shared/x.sock", Protocol::None)?;
        let view = ["--dev-bind", "/", "/", "--tmpfs", "/media", "--bind", "/tmp/home/shared", "/media"];
        let bwrap = [&["bwrap", "--unshare-pid"][..], &view].concat();
        let words = [&bwrap[..], &[PYTHON, "-c", CLIENT, "/media/x.sock"]].concat();
        let seen = output(desk.inside(&words)?)?;
        ensure!(seen == "Permission denied\n", "{seen}");
        let seen = output(desk.command(&words)?)?;
        ensure!(seen == "connected\n", "{seen}");
        let words = [&bwrap[..], &["readlink", "/proc/self/ns/net"]].concat();
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let seen = output(desk.inside(&words)?)?;
        ensure!(seen.starts_with("net:") && seen.trim() != own.to_string_lossy(), "{seen}");
        Ok(())
    });
}
