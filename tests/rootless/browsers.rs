//! Browsers in an ordinary user's tunnel, with their sandboxes: the address that servers see, the resolvers that are
//! asked, and the addresses that WebRTC shows to a page. Each test has a twin without the tunnel, which shows the
//! host's.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::browsing::{BrowsedSite, PAGE_PORT, Report};
use lab::{HOST, HOST_ON_LAN, Lab, PROVIDER, Peer, Reach, variables};

use crate::desk::{DISPLAY, Desk, FILE, Running};
use crate::{failure, output};

/// The time in which a browser starts and opens a page.
const PATIENCE: Duration = Duration::from_secs(120);

/// The time that a test with two starts of a browser may take.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// Firefox's settings by which it makes no requests by itself, and does not replace its addresses by names of mDNS.
const PREFERENCES: [(&str, &str); 14] = [
    ("app.normandy.enabled", "false"),
    ("app.update.enabled", "false"),
    ("browser.aboutwelcome.enabled", "false"),
    ("browser.safebrowsing.update.enabled", "false"),
    ("browser.shell.checkDefaultBrowser", "false"),
    ("browser.startup.homepage_override.mstone", "\"ignore\""),
    ("browser.startup.page", "0"),
    ("datareporting.policy.dataSubmissionEnabled", "false"),
    ("extensions.update.enabled", "false"),
    ("media.peerconnection.ice.obfuscate_host_addresses", "false"),
    ("network.captive-portal-service.enabled", "false"),
    ("network.connectivity-service.enabled", "false"),
    ("services.settings.server", "\"http://127.0.0.1/\""),
    ("toolkit.telemetry.enabled", "false"),
];

/// The same for Chromium.
const CHROMIUM: [&str; 11] = [
    "chromium",
    "--headless=new",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--password-store=basic",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
];

/// The desk of a user who browses a page.
struct Browsing<'a> {
    lab: &'a Lab,
    site: BrowsedSite,
    desk: Desk,
}

impl<'a> Browsing<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let desk = Desk::new(&lab.wg_quick_text(Reach::Ipv4))?;
        desk.make_folder("firefox")?;
        desk.write("firefox/user.js", &preferences())?;
        Ok(Self { lab, site: BrowsedSite::start(&lab.web_site)?, desk })
    }

    /// Waits for the next report of the page.
    fn report(&self, earlier: usize) -> Result<Report> {
        let reported = || Ok(self.site.reports().len() > earlier);
        lab::wait_until(lab::patience(PATIENCE), "the browser has not reported", reported)?;
        self.site.reports().pop().context("a report")
    }

    /// Checks what a browser without the tunnel has shown, so that the checks of [`Self::expect_confined`] can fail.
    fn expect_exposed(&self, report: &Report) -> Result<()> {
        ensure!(HOST.both().contains(&report.client), "{report:?}");
        ensure!(report.addresses(None).contains(&HOST.ipv4.to_string()), "{report:?}");
        ensure!(asked_for_the_page(&self.lab.resolver), "the host's resolver was not asked");
        ensure!(!asked_for_the_page(&self.lab.tunnel_resolver), "the tunnel's resolver was asked");
        ensure!(!self.lab.capture.leaks()?.is_empty(), "no packet has left the host");
        Ok(())
    }

    /// Ends a browser outside, and forgets what it has sent, its last packets included. Returns the number of questions
    /// that the host's resolver has had.
    fn stop_twin(&self, twin: Running) -> Result<usize> {
        twin.stop()?;
        std::thread::sleep(std::time::Duration::from_millis(300));
        self.lab.capture.forget()?;
        Ok(self.lab.resolver.questions().len())
    }

    /// Checks what a browser in the tunnel has shown. `earlier` is the number of questions that the host's resolver had
    /// before.
    fn expect_confined(&self, report: &Report, earlier: usize) -> Result<()> {
        ensure!(PROVIDER.both().contains(&report.client), "the server saw {}", report.client);
        let seen = report.addresses(Some("srflx"));
        ensure!(seen.contains(&PROVIDER.ipv4.to_string()), "{report:?}");
        let own = PROVIDER.both().map(|address| address.to_string());
        ensure!(seen.iter().all(|address| own.contains(address)), "{report:?}");
        let all = report.addresses(None);
        let hosts = [HOST, HOST_ON_LAN].into_iter().flat_map(|place| place.both()).map(|address| address.to_string());
        ensure!(!hosts.into_iter().any(|host| all.contains(&host)), "{report:?}");
        ensure!(asked_for_the_page(&self.lab.tunnel_resolver), "the tunnel's resolver was not asked");
        let questions = self.lab.resolver.questions();
        ensure!(questions.len() == earlier, "the host's resolver was asked: {:?}", &questions[earlier..]);
        let leaks = self.lab.capture.leaks()?;
        ensure!(leaks.is_empty(), "{leaks:#?}");
        Ok(())
    }
}

fn preferences() -> String {
    PREFERENCES.iter().map(|(name, value)| format!("user_pref(\"{name}\", {value});\n")).collect()
}

fn asked_for_the_page(server: &lab::dns::DnsServer) -> bool {
    server.questions().iter().any(|question| question.name == "web.example")
}

fn page() -> String {
    format!("http://web.example:{PAGE_PORT}/")
}

/// Returns the process IDs of programs with a word in their command line.
fn processes(word: &str) -> Result<Vec<u32>> {
    let all = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let has = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // A process that was forked by another of its browser has one argument with them all.
        line.split(|byte| [0, b' '].contains(byte)).any(|argument| argument == word.as_bytes())
    };
    Ok(all.filter(has).collect())
}

/// Returns the namespaces of a browser's sandbox: those of its processes for pages that are not the browser's own.
/// `word` is in the command lines of these processes.
fn sandbox(browser: &str, profile: &str, word: &str) -> Result<BTreeSet<&'static str>> {
    let is_browser = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path.ends_with(browser));
    let main = processes(profile)?.into_iter().filter(is_browser).min().context("there is no browser")?;
    const KINDS: [&str; 3] = ["user", "pid", "net"];
    // None of a process that has ended meanwhile.
    let namespaces = |pid: u32| {
        let links = KINDS.iter().map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")));
        links.collect::<std::io::Result<Vec<_>>>().ok()
    };
    let own = namespaces(main).context("the browser has ended")?;
    let pages: Vec<_> = processes(word)?.into_iter().filter(is_browser).filter_map(namespaces).collect();
    ensure!(!pages.is_empty(), "there is no process of a page");
    let differs = |at: &usize| pages.iter().all(|page| page[*at] != own[*at]);
    Ok((0..KINDS.len()).filter(differs).map(|at| KINDS[at]).collect())
}

/// Waits until a browser's sandbox has these namespaces. A process that has just begun is not in it yet.
fn expect_sandbox(browser: &str, profile: &str, word: &str, expected: &[&str]) -> Result<()> {
    let what = format!("the sandbox of {browser} lacks one of {expected:?}");
    lab::wait_until(lab::patience(PATIENCE), &what, || {
        Ok(sandbox(browser, profile, word).is_ok_and(|found| expected.iter().all(|kind| found.contains(kind))))
    })
}

#[test]
fn chromium_shows_the_tunnels_addresses_only() {
    lab::test_within(TIME_LIMIT, Peer::Ours, |lab: &Lab| {
        lab::require_program("chromium", variables::REQUIRE_PROGRAMS)?;
        let browsing = Browsing::new(lab)?;
        let desk = &browsing.desk;
        let page = page();
        let words = |profile| [&CHROMIUM[..], &[profile, &page]].concat();
        let profile = "--user-data-dir=/tmp/home/twin";
        let twin = Running::start(desk.command(&[&words(profile)[..], &["--no-sandbox"]].concat())?)?;
        browsing.expect_exposed(&browsing.report(0)?)?;
        ensure!(sandbox("chromium", profile, "--type=renderer")?.is_empty(), "the twin has a sandbox");
        let earlier = browsing.stop_twin(twin)?;

        let profile = "--user-data-dir=/tmp/home/inside";
        let running = Running::start(desk.inside(&words(profile))?)?;
        browsing.expect_confined(&browsing.report(1)?, earlier)?;
        expect_sandbox("chromium", profile, "--type=renderer", &["net", "pid", "user"])?;
        running.stop()
    });
}

/// As a second click on its launcher entry does. Both are in the same tunnel.
#[test]
fn a_second_start_of_chromium_opens_its_page_in_the_first() {
    lab::test_within(TIME_LIMIT, Peer::Ours, |lab: &Lab| {
        for program in ["chromium", "Xvfb"] {
            lab::require_program(program, variables::REQUIRE_PROGRAMS)?;
        }
        let browsing = Browsing::new(lab)?;
        let desk = &browsing.desk;
        let page = page();
        let words: Vec<&str> = CHROMIUM.into_iter().filter(|word| *word != "--headless=new").collect();
        let words = [&words[..], &["--user-data-dir=/tmp/home/inside", &page]].concat();
        let _display = desk.start_display()?;
        let start = || -> Result<std::process::Command> {
            let mut command = desk.inside(&words)?;
            command.env("DISPLAY", DISPLAY);
            Ok(command)
        };
        let first = Running::start(start()?)?;
        browsing.expect_confined(&browsing.report(0)?, 0)?;
        let said = output(start()?)?;
        ensure!(said.contains("existing browser session"), "{said}");
        browsing.expect_confined(&browsing.report(1)?, 0)?;
        first.stop()
    });
}

#[test]
fn firefox_shows_the_tunnels_addresses_only() {
    lab::test_within(TIME_LIMIT, Peer::Ours, |lab: &Lab| {
        lab::require_program("firefox-esr", variables::REQUIRE_PROGRAMS)?;
        let browsing = Browsing::new(lab)?;
        let desk = &browsing.desk;
        let page = page();
        let words = ["firefox-esr", "--headless", "--no-remote", "--profile", "/tmp/home/firefox", &page];
        let mut twin = desk.command(&words)?;
        twin.env("MOZ_DISABLE_CONTENT_SANDBOX", "1");
        let twin = Running::start(twin)?;
        browsing.expect_exposed(&browsing.report(0)?)?;
        ensure!(sandbox("firefox-esr", words[4], "tab")?.is_empty(), "the twin has a sandbox");
        let earlier = browsing.stop_twin(twin)?;

        let running = Running::start(desk.inside(&words)?)?;
        browsing.expect_confined(&browsing.report(1)?, earlier)?;
        expect_sandbox("firefox-esr", words[4], "tab", &["net", "user"])?;
        running.stop()
    });
}

/// The entry is started as a desktop does it.
#[test]
fn a_launcher_entry_starts_a_browser_inside() {
    lab::test_within(TIME_LIMIT, Peer::Ours, |lab: &Lab| {
        for program in ["firefox-esr", "gio", "desktop-file-validate", "Xvfb"] {
            lab::require_program(program, variables::REQUIRE_PROGRAMS)?;
        }
        let browsing = Browsing::new(lab)?;
        let desk = &browsing.desk;
        let profile_of = |rest: &str| format!("wireguard = \"{FILE}\"\n{rest}");
        desk.write(".config/vpn-exec/browsed.toml", &profile_of(""))?;
        let entry = "/tmp/home/.local/share/applications/vpn-exec-browsed-firefox-esr.desktop";
        let said = output(desk.vpn_exec(&["desktop", "firefox-esr", "--tunnel", "browsed"])?)?;
        ensure!(said == format!("wrote {entry}\n"), "{said}");
        output(desk.command(&["desktop-file-validate", entry])?)?;

        let profile = Path::new("/tmp/home/.local/share/vpn-exec/browsed/firefox-esr");
        desk.write(".local/share/vpn-exec/browsed/firefox-esr/user.js", &preferences())?;
        let earlier = lab.resolver.questions().len();
        let _display = desk.start_display()?;
        let mut launch = desk.command(&["gio", "launch", entry, &page()])?;
        let status = launch.env("DISPLAY", DISPLAY).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        ensure!(status.success(), "{status}");
        browsing.expect_confined(&browsing.report(0)?, earlier)?;
        ensure!(profile.join("prefs.js").exists(), "the browser has another profile");
        output(desk.vpn_exec(&["down", "--force", "browsed"])?)?;

        let said = output(desk.vpn_exec(&["desktop", "firefox-esr", "--tunnel", "browsed", "--remove"])?)?;
        ensure!(said == format!("removed {entry}\n") && !Path::new(entry).exists(), "{said}");
        ensure!(profile.join("prefs.js").exists(), "the profile is gone");

        // A tunnel that this user cannot make.
        desk.write(".config/vpn-exec/roots.toml", &profile_of("backend = \"kernel\"\n"))?;
        let refusal = failure(desk.vpn_exec(&["desktop", "firefox-esr", "--tunnel", "roots"])?)?;
        ensure!(
            refusal.contains("kernel")
                && !Path::new(entry).with_file_name("vpn-exec-roots-firefox-esr.desktop").exists(),
            "{refusal}"
        );
        Ok(())
    });
}
