//! The session bus inside: it starts no service outside, and desktop programs work.

use anyhow::ensure;

use crate::support::*;

/// Calls a method of a service that the bus would start.
const ACTIVATE: &str = "gdbus call --timeout 5 --session -d net.example.Fetcher -o / -m a.b.C";

#[test]
fn a_program_starts_no_service_outside() {
    test_at_desk(|desk| {
        require("gdbus")?;
        desk.start_session_bus()?;
        let call = ["sh", "-c", ACTIVATE];
        let output = run(desk.inside(&[], &call))?;
        ensure!(!output.status.success() && text_of(&output).contains("outside the tunnel"), "{}", text_of(&output));
        ensure!(text_of(&output).contains("--dbus-talk net.example.Fetcher"), "{}", text_of(&output));
        ensure!(!desk.arrived("activated"));
        // Also not by another address of the same bus.
        for address in ["unix:path=/run/user/0/bus", "unix:path=/proc/self/root/run/user/0/bus"] {
            let output =
                run(desk.inside(&[], &["env", &format!("DBUS_SESSION_BUS_ADDRESS={address}"), "sh", "-c", ACTIVATE]))?;
            ensure!(text_of(&output).contains("--dbus session"), "{address}: {}", text_of(&output));
        }
        let output = run(desk.inside(&["--dbus", "none"], &["sh", "-c", "echo \"[$DBUS_SESSION_BUS_ADDRESS]\""]))?;
        ensure!(output.stdout == b"[]\n", "{}", text_of(&output));
        ensure!(!desk.arrived("activated"));

        run(desk.unguarded(&call))?;
        lab::wait_until(PATIENCE, "the twin's service was not started", || Ok(desk.arrived("activated")))
    });
}

/// A rootless program is of the user and in the user namespace of vpn-exec's own processes, some of which see the
/// host's files.
#[test]
fn no_process_leads_a_rootless_program_to_the_hosts_files() {
    test_at_desk(|desk| {
        if !lab::tunnel::is_rootless() {
            return Ok(());
        }
        require("gdbus")?;
        desk.start_session_bus()?;
        let script = "gdbus call --timeout 20 --session -d org.freedesktop.DBus -o / \
                      -m org.freedesktop.DBus.GetId >&2 || exit 1; own=$(stat -c %d:%i /run); \
                      for process in /proc/[0-9]*; do there=$(stat -c %d:%i $process/root/run 2>&-) \
                      && [ $there != $own ] && cat $process/cmdline; done; true";
        let output = run(desk.inside(&[], &["sh", "-c", script]))?;
        ensure!(output.status.success() && output.stdout.is_empty(), "{}", text_of(&output));
        Ok(())
    });
}

#[test]
fn an_option_opens_a_service_on_the_session_bus() {
    test_at_desk(|desk| opened(desk, &["--dbus-talk", "net.example.Fetcher"]));
}

#[test]
fn an_option_opens_the_whole_session_bus() {
    test_at_desk(|desk| opened(desk, &["--dbus", "session"]));
}

fn opened(desk: &Desk, options: &[&str]) -> anyhow::Result<()> {
    require("gdbus")?;
    desk.start_session_bus()?;
    run(desk.inside(options, &["sh", "-c", ACTIVATE]))?;
    lab::wait_until(PATIENCE, "the service was not started", || Ok(desk.arrived("activated")))
}

/// A second instance of a GLib application opens its files in the first one.
const APPLICATION: &str = "import sys,os,subprocess\n\
from gi.repository import Gio\n\
a=Gio.Application(application_id='net.example.App',flags=Gio.ApplicationFlags.HANDLES_OPEN)\n\
def opened(a,files,n,hint):\n\
\x20 print('opened in', os.readlink('/proc/self/ns/net'), flush=True)\n\
\x20 subprocess.run(['bash','-c','echo '+files[0].get_basename()+' >/dev/tcp/127.0.0.1/'+os.environ['PORT']])\n\
a.connect('open',opened); a.connect('activate',lambda a: None)\n\
if sys.argv[1]=='host': a.hold()\n\
sys.exit(a.run([sys.argv[0]]+sys.argv[2:]))";

#[test]
fn a_single_instance_application_also_runs_inside() {
    test_at_desk(|desk| {
        require("/usr/bin/python3")?;
        desk.start_session_bus()?;
        let port = desk.port.to_string();
        let with_port = |mut command: std::process::Command| {
            command.env("PORT", &port);
            command
        };
        let check = run(desk.on_host(&["/usr/bin/python3", "-c", "from gi.repository import Gio"]))?;
        if !check.status.success() {
            let reason = "python3-gi is not installed";
            return Err(lab::Skip::error(reason, lab::variables::REQUIRE_PROGRAMS));
        }
        let application = |role: &'static str, file: &'static str| ["/usr/bin/python3", "-c", APPLICATION, role, file];
        let mut running = serve(with_port(desk.on_host(&application("host", "/tmp/first"))))?;
        lab::wait_until(PATIENCE, "the host's application opens nothing", || Ok(desk.arrived("first")))?;
        run(with_port(desk.unguarded(&application("inside", "/tmp/allowed"))))?;
        lab::wait_until(PATIENCE, "the twin did not open its file outside", || Ok(desk.arrived("allowed")))?;
        let output = run(with_port(desk.inside(&[], &application("inside", "/tmp/leak"))))?;
        let host = std::fs::read_link("/proc/self/ns/net")?;
        let text = text_of(&output);
        ensure!(text.contains("opened in net:") && !text.contains(&host.display().to_string()), "{text}");
        ensure!(!desk.arrived("leak") && running.try_wait()?.is_none(), "{text}");
        Ok(())
    });
}
