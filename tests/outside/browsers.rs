//! Browsers that run on the host already with the same profile, on a virtual display.

use std::process::{Child, Command};

use anyhow::{Result, ensure};

use crate::support::*;

/// Starts a display for programs on the host and inside.
fn display(desk: &Desk) -> Result<Child> {
    require("Xvfb")?;
    let child = serve(desk.on_host(&["Xvfb", ":7", "-nolisten", "tcp"]))?;
    wait_for_file("/tmp/.X11-unix/X7")?;
    Ok(child)
}

fn on_display(mut command: Command) -> Command {
    command.env("DISPLAY", ":7");
    command
}

/// The options of a Chromium that makes no requests by itself.
const CHROMIUM: [&str; 10] = [
    "chromium",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--password-store=basic",
    "--user-data-dir=/tmp/home/profile",
];

#[test]
fn chromium_does_not_open_a_page_in_the_instance_outside() {
    test_at_desk(|desk| {
        require("chromium")?;
        let _display = display(desk)?;
        let page = |word: &str| format!("http://127.0.0.1:{}/{word}", desk.port);
        let (first, allowed, leak) = (page("first"), page("allowed"), page("leak"));
        let chromium = |page: &str| CHROMIUM.iter().copied().chain([page]).map(str::to_owned).collect::<Vec<_>>();
        let words = |page: &str| chromium(page);
        let host = words(&first);
        let host: Vec<&str> = host.iter().map(String::as_str).collect();
        let mut running = serve(on_display(desk.on_host(&host)))?;
        lab::wait_until(PATIENCE, "the host's browser opens no page", || Ok(desk.arrived("first")))?;
        let lock = std::fs::read_link("/tmp/home/profile/SingletonLock")?;

        let twin = words(&allowed);
        let twin: Vec<&str> = twin.iter().map(String::as_str).collect();
        run(on_display(desk.unguarded(&twin)))?;
        lab::wait_until(PATIENCE, "the twin did not open its page outside", || Ok(desk.arrived("allowed")))?;

        let inside = words(&leak);
        let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
        let output = run(on_display(desk.inside(&[], &inside)))?;
        ensure!(output.status.code() == Some(125), "{}", text_of(&output));
        let text = text_of(&output);
        let pid = running.id();
        ensure!(text.contains("already runs outside the tunnel") && text.contains("--user-data-dir=DIR"), "{text}");
        // The guard of a rootless tunnel may not look at processes outside of its user namespace.
        let who = if lab::tunnel::is_rootless() { "a browser".to_owned() } else { format!("(pid {pid})") };
        ensure!(text.contains(&who), "{text}");
        ensure!(!desk.arrived("leak"), "{text}");
        ensure!(running.try_wait()?.is_none(), "the host's browser has ended: {text}");
        ensure!(std::fs::read_link("/tmp/home/profile/SingletonLock")? == lock, "the profile's lock is another one");
        run(on_display(desk.on_host(&twin)))?;
        Ok(())
    });
}

/// Firefox looks for a running instance on the session bus, or on the display.
#[test]
fn firefox_does_not_open_a_page_in_the_instance_outside() {
    test_at_desk(|desk| {
        require("firefox-esr")?;
        desk.start_session_bus()?;
        let _display = display(desk)?;
        std::fs::create_dir("/tmp/home/profile")?;
        let quiet = [
            ("browser.shell.checkDefaultBrowser", "false"),
            ("datareporting.policy.dataSubmissionEnabled", "false"),
            ("browser.aboutwelcome.enabled", "false"),
            ("toolkit.telemetry.enabled", "false"),
            ("app.normandy.enabled", "false"),
            ("browser.startup.page", "0"),
            ("network.captive-portal-service.enabled", "false"),
            ("network.connectivity-service.enabled", "false"),
        ];
        let lines: String = quiet.iter().map(|(name, value)| format!("user_pref(\"{name}\", {value});\n")).collect();
        std::fs::write("/tmp/home/profile/user.js", lines)?;
        let page = |word: &str| format!("http://127.0.0.1:{}/{word}", desk.port);
        let firefox = |page: &str| ["firefox-esr", "--profile", "/tmp/home/profile", page].map(str::to_owned);
        let words = |page: &str| firefox(page).to_vec();
        let host = words(&page("first"));
        let host: Vec<&str> = host.iter().map(String::as_str).collect();
        let mut running = serve(on_display(desk.on_host(&host)))?;
        lab::wait_until(PATIENCE, "the host's browser opens no page", || Ok(desk.arrived("first")))?;

        let twin = words(&page("allowed"));
        let twin: Vec<&str> = twin.iter().map(String::as_str).collect();
        let output = run(on_display(desk.unguarded(&twin)))?;
        println!("twin: {}", text_of(&output));
        lab::wait_until(PATIENCE, "the twin did not open its page outside", || Ok(desk.arrived("allowed")))?;

        let inside = words(&page("leak"));
        let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
        let mut command = on_display(desk.inside(&["--kill-orphans"], &["timeout", "10"]));
        command.args(&inside);
        let output = run(command)?;
        println!("inside: {}", text_of(&output));
        ensure!(!desk.arrived("leak"), "{}", text_of(&output));
        ensure!(running.try_wait()?.is_none(), "the host's browser has ended");
        Ok(())
    });
}
