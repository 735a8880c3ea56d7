//! Providers' files as people have them, with a plain WireGuard server at the other end.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, launcher};
use lab::{PROVIDER, Peer, Reach, WEB};

const VPN_EXEC: &str = env!("CARGO_BIN_EXE_vpn-exec");

/// How long something may take that works.
const WORKS: Duration = Duration::from_secs(60);

#[test]
#[ignore = "the program that the other tests run"]
fn agent() {
    lab::agent::serve();
}

/// Whether the web sees the provider's address, and what vpn-exec says meanwhile.
fn reaches_the_web(command: Command) -> Result<String> {
    let mut agent = Agent::start(Some(command))?.begun()?;
    let seen = agent.succeed_within(WORKS, &format!("get http://{}/", SocketAddr::new(WEB.ipv4.into(), 80)))?;
    ensure!(seen == PROVIDER.ipv4.to_string(), "the web sees {seen}");
    let (status, said) = agent.finish()?;
    ensure!(status.success(), "{status}: {said}");
    Ok(said)
}

#[test]
fn obfuscation_that_changes_nothing_works_with_a_plain_server() {
    lab::test(Peer::Ours, |lab| {
        let keys =
            "Jc = 4\nJmin = 40\nJmax = 70\nS1 = 0\nS2 = 0\nH1 = 1\nH2 = 2\nH3 = 3\nH4 = 4\nI1 = <b 0xc0ff>\nMTU =";
        let text = lab.wg_quick_text(Reach::Ipv4).replace("[Interface]", &format!("[Interface]\n{keys}"));
        // As an old Mac's editor saves it, too.
        for text in [text.replace('\n', "\r\n"), text.replace('\n', "\r")] {
            let said = reaches_the_web(launcher(VPN_EXEC, &lab.file(&text)?, &["--wait", "60"]))?;
            ensure!(said.matches("ignored `Jc`, `Jmin`").count() == 1, "{said}");
            ensure!(said.matches("`MTU` (line 12) has no value").count() == 1, "{said}");
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
        let mut command = Command::new(VPN_EXEC);
        command.args(["--tunnel", "own", "--backend", lab::backend(), "--"]);
        command.env("HOME", home).env_remove("XDG_CONFIG_HOME").env_remove("SUDO_UID").current_dir("/");
        reaches_the_web(command)?;
        Ok(())
    });
}
