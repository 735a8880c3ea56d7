//! Providers' files with obfuscation options and in a home directory, with a plain WireGuard server at the other end.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Launcher, PROVIDER, Peer, Reach, WEB};

/// The time in which something succeeds that works.
const WORKS: Duration = Duration::from_secs(60);

/// Requires that the web server sees the provider's address. Returns vpn-exec's messages.
fn reach_the_web(launcher: Launcher) -> Result<String> {
    let mut agent = launcher.start_agent()?.begun()?;
    let seen = agent.succeed_within(WORKS, &format!("get http://{}/", SocketAddr::new(WEB.ipv4.into(), 80)))?;
    ensure!(seen == PROVIDER.ipv4.to_string(), "the web sees {seen}");
    agent.finish_well()
}

#[test]
fn obfuscation_that_changes_nothing_works_with_a_plain_server() {
    lab::test(Peer::Ours, |lab| {
        let keys =
            "Jc = 4\nJmin = 40\nJmax = 70\nS1 = 0\nS2 = 0\nH1 = 1\nH2 = 2\nH3 = 3\nH4 = 4\nI1 = <b 0xc0ff>\nMTU =";
        let text = lab.wg_quick_text(Reach::Ipv4).replace("[Interface]", &format!("[Interface]\n{keys}"));
        // With the line ends of Windows and of old Macs.
        for text in [text.replace('\n', "\r\n"), text.replace('\n', "\r")] {
            let messages = reach_the_web(Launcher::new(lab.file(&text)?).options(["--wait", "60"]))?;
            ensure!(messages.matches("ignored `Jc`, `Jmin`").count() == 1, "{messages}");
            ensure!(messages.matches("`MTU` (line 12) has no value").count() == 1, "{messages}");
        }
        Ok(())
    });
}

#[test]
fn a_profile_finds_the_providers_file_in_a_home() {
    lab::test(Peer::Ours, |lab| {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let home = file.parent().context("a folder")?;
        let profiles = home.join(".config/vpn-exec");
        std::fs::create_dir_all(&profiles)?;
        let name = file.file_name().and_then(|name| name.to_str()).context("a name")?;
        std::fs::write(profiles.join("own.toml"), format!("wireguard = \"~/{name}\"\nwait = 60\n"))?;
        let launcher = Launcher::with_tunnel("own").options(["--backend", lab::backend()]);
        let launcher = launcher.env("HOME", home).env_remove("XDG_CONFIG_HOME").env_remove("SUDO_UID");
        reach_the_web(launcher.current_dir("/")).map(drop)
    });
}
