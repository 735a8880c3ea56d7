//! Real programs and libraries.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{patience, wait_until};
use vpn_exec::bus::message::{Endian, MessageKind};
use vpn_exec::bus::{BusPolicy, BusRefusal};

use crate::desktop::{BUS, FILTER, ask, call, call_of_bus, client, fail, file, run, said, send};
use crate::raw::Raw;
use crate::{test, test_with};

const PATIENCE: Duration = Duration::from_secs(30);
const PYTHON: &str = "/usr/bin/python3";

const NOTIFICATIONS: &str = "org.freedesktop.Notifications";
const NOTIFICATIONS_PATH: &str = "/org/freedesktop/Notifications";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const PORTAL: &str = "org.freedesktop.portal.Desktop";
const PORTAL_PATH: &str = "/org/freedesktop/portal/desktop";

fn app<'a>(whereabouts: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    let mut command = vec![PYTHON, "/run/lab/app.py", "/run/lab/opened", whereabouts];
    command.extend(arguments);
    command
}

/// A running program. Dropping it ends the program.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // timeout(1) forwards the signal.
        let _ = vpn_exec::linux::process::kill(self.0.id().cast_signed(), nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn opened() -> String {
    fs::read_to_string(file("opened")).unwrap_or_default()
}

/// Starts the single-instance program, and waits until it runs.
fn hold(address: &str, whereabouts: &str) -> Result<Running> {
    let running = Running(client(address, &app(whereabouts, &["hold", "/first"])).spawn()?);
    let line = format!("{whereabouts} opens file:///first\n");
    wait_until(patience(PATIENCE), "the program does not start", || Ok(opened().contains(&line)))?;
    Ok(running)
}

#[test]
fn a_single_instance_program_that_runs_outside_starts_inside() {
    test(|_| {
        let _outside = hold(BUS, "outside")?;
        ask(FILTER, &app("inside", &["http://example.org/a"]))?;
        ensure!(opened().ends_with("inside opens http://example.org/a\n"), "{}", opened());
        // The twin: without the filter, the instance outside takes over.
        ask(BUS, &app("inside", &["http://example.org/b"]))?;
        ensure!(opened().ends_with("outside opens http://example.org/b\n"), "{}", opened());
        Ok(())
    });
}

#[test]
fn a_second_instance_inside_finds_the_first_one_inside() {
    test(|desktop| {
        let _outside = hold(BUS, "outside")?;
        let _first = hold(FILTER, "first")?;
        ask(FILTER, &app("second", &["http://example.org/a"]))?;
        ensure!(opened().ends_with("first opens http://example.org/a\n"), "{}", opened());
        // gdbus and busctl find it, too.
        let owner = ask(FILTER, &call_of_bus("org.freedesktop.DBus.GetNameOwner", &["net.example.App"]))?;
        ensure!(owner.starts_with("(':1."), "{owner}");
        let names = ask(FILTER, &call_of_bus("org.freedesktop.DBus.ListNames", &[]))?;
        ensure!(names.contains("net.example.App") && names.contains(NOTIFICATIONS), "{names}");
        ensure!(!names.contains(SYSTEMD), "{names}");
        ensure!(ask(BUS, &call_of_bus("org.freedesktop.DBus.ListNames", &[]))?.contains(SYSTEMD), "without a filter");
        ask(FILTER, &call("net.example.App", "/net/example/App", "org.freedesktop.DBus.Peer.Ping", &[]))?;
        ensure!(desktop.refusals().is_empty(), "{:?}", desktop.refusals());
        Ok(())
    });
}

#[test]
fn notifications_work() {
    test(|desktop| {
        ask(FILTER, &["notify-send", "hello"])?;
        ensure!(desktop.calls()?.contains("org.freedesktop.Notifications.Notify"), "it does not arrive");
        ensure!(desktop.refusals().is_empty(), "{:?}", desktop.refusals());
        Ok(())
    });
}

#[test]
fn clients_of_other_libraries_connect() {
    test(|desktop| {
        let to = format!("--dest={NOTIFICATIONS}");
        let reply = ask(
            FILTER,
            &[
                "dbus-send",
                "--session",
                "--print-reply",
                &to,
                NOTIFICATIONS_PATH,
                "org.freedesktop.Notifications.GetServerInformation",
            ],
        )?;
        ensure!(reply.contains("string \"1.2\""), "{reply}");
        // It sends the whole authentication and its first message at once.
        if Path::new("/usr/bin/busctl").exists() {
            let address = format!("--address={FILTER}");
            let call =
                ["busctl", &address, "call", NOTIFICATIONS, NOTIFICATIONS_PATH, NOTIFICATIONS, "GetCapabilities"];
            let reply = ask(FILTER, &call)?;
            ensure!(reply == "as 0\n", "{reply}");
            let list = ask(FILTER, &["busctl", &address, "--acquired", "list"])?;
            ensure!(list.contains(NOTIFICATIONS) && !list.contains(SYSTEMD), "{list}");
        }
        // It does not wait for a reply.
        let member = "org.freedesktop.Notifications.GetCapabilities";
        desktop.calls()?;
        ask(FILTER, &["dbus-send", "--session", "--type=method_call", &to, NOTIFICATIONS_PATH, member])?;
        let mut seen = String::new();
        wait_until(patience(PATIENCE), "the message is lost", || {
            seen += &desktop.calls()?;
            Ok(seen.contains("GetCapabilities"))
        })
    });
}

#[test]
fn the_service_manager_cannot_be_called() {
    test(|desktop| {
        let run_unit = send(SYSTEMD, SYSTEMD_PATH, "org.freedesktop.systemd1.Manager.StartTransientUnit");
        let run_unit: Vec<&str> = run_unit.iter().map(String::as_str).collect();
        let text = fail(FILTER, &run_unit)?;
        ensure!(text.contains("org.freedesktop.DBus.Error.ServiceUnknown"), "{text}");
        let refusal = BusRefusal::Name { name: SYSTEMD.into(), member: "StartTransientUnit".into() };
        ensure!(text.contains(&format!("vpn-exec: {refusal}")), "{text}");
        ensure!(desktop.refusals().contains(&refusal), "{:?}", desktop.refusals());
        ensure!(desktop.calls()?.is_empty(), "it was reached");
        ask(BUS, &run_unit)?;
        ensure!(desktop.calls()?.contains("StartTransientUnit"), "without a filter");
        Ok(())
    });
}

#[test]
fn the_service_manager_cannot_be_called_by_its_unique_name() {
    test(|desktop| {
        let owner = call_of_bus("org.freedesktop.DBus.GetNameOwner", &[SYSTEMD]);
        let text = ask(BUS, &owner)?;
        let unique = text.split('\'').nth(1).context("a number")?;
        ensure!(fail(FILTER, &owner)?.contains("NameHasNoOwner"), "it is known");
        // The process has names that may be called, but not with this interface.
        let run_unit = call(unique, SYSTEMD_PATH, "org.freedesktop.systemd1.Manager.StartTransientUnit", &[]);
        ensure!(fail(FILTER, &run_unit)?.contains("AccessDenied"), "it is another error");
        let shell = call(NOTIFICATIONS, NOTIFICATIONS_PATH, "org.example.Shell.Run", &[]);
        ensure!(fail(FILTER, &shell)?.contains("AccessDenied"), "it is another error");
        ensure!(desktop.calls()?.is_empty(), "it was reached");
        ask(FILTER, &call(unique, NOTIFICATIONS_PATH, "org.freedesktop.Notifications.GetCapabilities", &[]))?;
        ask(BUS, &run_unit)?;
        ask(BUS, &shell)?;
        ensure!(desktop.calls()?.contains("org.example.Shell.Run"), "without a filter");
        // A unique name without a known owner.
        let stranger = Raw::connect(BUS, Endian::Little)?;
        let ping = call(&stranger.unique, "/", "org.freedesktop.DBus.Peer.Ping", &[]);
        ensure!(fail(FILTER, &ping)?.contains("NameHasNoOwner"), "it is another error");
        Ok(())
    });
}

#[test]
fn portals_that_act_outside_cannot_be_called() {
    test(|desktop| {
        let open = call(PORTAL, PORTAL_PATH, "org.freedesktop.portal.OpenURI.OpenURI", &["http://example.org/"]);
        let read = call(PORTAL, PORTAL_PATH, "org.freedesktop.portal.Settings.Read", &["colour"]);
        let text = fail(FILTER, &open)?;
        ensure!(
            text.contains("AccessDenied") && text.contains("(--dbus-talk org.freedesktop.portal.Desktop allows it)"),
            "{text}"
        );
        ensure!(desktop.calls()?.is_empty(), "it was reached");
        ensure!(ask(FILTER, &read)? == "('colour',)\n", "the settings are read");
        let version =
            |interface| call(PORTAL, PORTAL_PATH, "org.freedesktop.DBus.Properties.Get", &[interface, "version"]);
        ask(FILTER, &version("org.freedesktop.portal.Settings"))?;
        fail(FILTER, &version("org.freedesktop.portal.OpenURI"))?;
        ask(BUS, &version("org.freedesktop.portal.OpenURI"))?;
        ask(BUS, &open)?;
        ensure!(desktop.calls()?.contains("OpenURI"), "without a filter");
        Ok(())
    });
}

#[test]
fn unlisted_services_are_not_started() {
    test(|desktop| {
        let start = |name| call_of_bus("org.freedesktop.DBus.StartServiceByName", &[name, "0"]);
        let fetch = call("net.example.Fetcher", "/", "a.b.C", &[]);
        ensure!(fail(FILTER, &start("net.example.Fetcher"))?.contains("ServiceUnknown"), "it is another error");
        ensure!(fail(FILTER, &fetch)?.contains("ServiceUnknown"), "it is another error");
        let listed = ask(FILTER, &call_of_bus("org.freedesktop.DBus.ListActivatableNames", &[]))?;
        ensure!(listed.contains("org.freedesktop.secrets") && !listed.contains("net.example.Fetcher"), "{listed}");
        // The bus starts a listed service. This one ends without taking its name, which is an error.
        fail(FILTER, &start("org.freedesktop.secrets"))?;
        let started = || fs::read_to_string(file("started"));
        ensure!(started()? == "org.freedesktop.secrets\n", "{}", started()?);
        ensure!(
            desktop.refusals().contains(&BusRefusal::Activation { name: "net.example.Fetcher".into() }),
            "not told"
        );
        fail(BUS, &start("net.example.Fetcher"))?;
        ensure!(started()?.ends_with("net.example.Fetcher\n"), "without a filter");
        Ok(())
    });
}

#[test]
fn only_listed_methods_of_the_bus_can_be_called() {
    test(|desktop| {
        let update = call_of_bus("org.freedesktop.DBus.UpdateActivationEnvironment", &["{'A':'b'}"]);
        let monitor = call_of_bus("org.freedesktop.DBus.Monitoring.BecomeMonitor", &["@as []", "0"]);
        let listen = call_of_bus("org.freedesktop.DBus.AddMatch", &["type='method_call', eavesdrop ='true'"]);
        for (refused, name) in [(&update, "UpdateActivationEnvironment"), (&monitor, "BecomeMonitor"), (&listen, "")] {
            let text = fail(FILTER, refused)?;
            ensure!(text.contains("AccessDenied") && text.contains("--dbus session allows it"), "{name}: {text}");
        }
        let refused = desktop.refusals();
        ensure!(refused.contains(&BusRefusal::Eavesdropping), "{refused:?}");
        for allowed in [&update, &listen] {
            ask(BUS, allowed)?;
        }
        // A name without an owner is not refused: the program would not find it outside, either.
        let before = desktop.refused();
        let text = fail(FILTER, &call("net.example.Nowhere", "/", "a.b.C", &[]))?;
        ensure!(text.contains("ServiceUnknown") && desktop.refused() == before, "{text}");
        fail(FILTER, &call_of_bus("org.freedesktop.DBus.StartServiceByName", &["net.example.Nowhere", "0"]))?;
        ensure!(desktop.refused() == before, "{:?}", desktop.refusals());
        // BecomeMonitor succeeds without the filter, so that gdbus gets no reply and fails.
        let text = said(&run(BUS, &monitor)?);
        ensure!(!text.contains("AccessDenied"), "without a filter: {text}");
        for (method, arguments) in
            [("GetId", &[][..]), ("NameHasOwner", &[NOTIFICATIONS]), ("GetConnectionUnixUser", &[NOTIFICATIONS])]
        {
            ask(FILTER, &call_of_bus(&format!("org.freedesktop.DBus.{method}"), arguments))?;
        }
        ask(FILTER, &call_of_bus("org.freedesktop.DBus.Introspectable.Introspect", &[]))?;
        ask(FILTER, &call_of_bus("org.freedesktop.DBus.Properties.Get", &["org.freedesktop.DBus", "Features"]))?;
        fail(FILTER, &call_of_bus("org.freedesktop.DBus.ReloadConfig", &[]))?;
        ensure!(ask(FILTER, &call_of_bus("org.freedesktop.DBus.NameHasOwner", &[SYSTEMD]))? == "(false,)\n", "it has");
        ensure!(ask(BUS, &call_of_bus("org.freedesktop.DBus.NameHasOwner", &[SYSTEMD]))? == "(true,)\n", "without");
        Ok(())
    });
}

#[test]
fn an_option_opens_a_name() {
    let policy = BusPolicy::default_desktop().with_talk([SYSTEMD.parse().expect("a name")]);
    test_with(policy, |desktop| {
        ask(FILTER, &call(SYSTEMD, SYSTEMD_PATH, "org.freedesktop.systemd1.Manager.StartTransientUnit", &[]))?;
        ensure!(desktop.calls()?.contains("StartTransientUnit"), "it does not arrive");
        // Its owner outside keeps it.
        let mut client = Raw::connect(FILTER, Endian::Little)?;
        ensure!(client.request(SYSTEMD, 4)? == 3, "it is granted");
        Ok(())
    });
}

#[test]
fn a_media_player_inside_is_controlled_from_outside() {
    test(|desktop| {
        let name = "org.mpris.MediaPlayer2.test";
        let mut player = Raw::connect(FILTER, Endian::Little)?;
        let number = player.unique.clone();
        let next = |to: &str| {
            let command = send(to, "/org/mpris/MediaPlayer2", "org.mpris.MediaPlayer2.Player.Next");
            client(BUS, &command.iter().map(String::as_str).collect::<Vec<_>>())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
        };
        // A program without a name outside cannot be called, and the caller gets an error.
        let text = said(&next(&number)?.wait_with_output()?);
        ensure!(text.contains("AccessDenied") && text.contains("vpn-exec"), "{text}");
        ensure!(player.request(name, 4)? == 1, "the name is free");
        for to in [name, number.as_str()] {
            let caller = next(to)?;
            let called = player.receive_until(|message| message.header.kind == MessageKind::Call)?;
            ensure!(called.header.member.as_deref() == Some("Next"), "another call");
            player.answer(&called, "done")?;
            let text = said(&caller.wait_with_output()?);
            ensure!(text.contains("string \"done\""), "{text}");
        }
        // It cannot take the name of another player outside.
        let mut outside = Raw::connect(BUS, Endian::Little)?;
        outside.request("org.mpris.MediaPlayer2.outside", 4)?;
        let open = call(
            "org.mpris.MediaPlayer2.outside",
            "/org/mpris/MediaPlayer2",
            "org.mpris.MediaPlayer2.Player.OpenUri",
            &["x"],
        );
        ensure!(fail(FILTER, &open)?.contains("ServiceUnknown"), "it is another error");
        ensure!(!desktop.refusals().is_empty(), "nothing is told");
        // The twin: without the filter, a program without a name can be called.
        let mut bare = Raw::connect(BUS, Endian::Little)?;
        let caller = next(&bare.unique.clone())?;
        let called = bare.receive_until(|message| message.header.kind == MessageKind::Call)?;
        bare.answer(&called, "done")?;
        ensure!(said(&caller.wait_with_output()?).contains("string \"done\""), "without a filter");
        Ok(())
    });
}
