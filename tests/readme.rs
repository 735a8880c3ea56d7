//! The README's examples: each command is run as it is written, in the lab. What is adapted is named here: the files are in a folder of the
//! test's own, a web site that tells the caller's address is the lab's, and qbittorrent is the one without a window.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{HOST, HOST_ON_LAN, Lab, PROVIDER, Peer, Reach, Skip, TUNNEL_CLIENT, WEB};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::linux::namespace::NetworkNamespace;

const README: &str = include_str!("../README.md");

/// Tells hanging from working. Programs of others need seconds to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The commands of the first examples.
const FIRST: [&str; 2] =
    ["sudo vpn-exec --config mullvad.conf -- curl https://ifconfig.me", "curl https://ifconfig.me"];

/// The commands about a torrent client.
const TORRENT: [&str; 2] =
    ["sudo vpn-exec --config mullvad.conf --open 51413 -- qbittorrent", "sudo vpn-exec check --tunnel mullvad"];

/// The same, in the text.
const TORRENT_IN_TEXT: [&str; 2] = ["sudo vpn-exec --tunnel mullvad -- curl https://ifconfig.me", "vpn-exec status"];

/// The commands that put a daemon into a tunnel by systemd.
const SYSTEMD: [&str; 4] = [
    "sed 's:/usr/bin/:/usr/local/bin/:' units/vpn-exec@.service | sudo tee /etc/systemd/system/vpn-exec@.service",
    "sudo systemctl enable --now vpn-exec@mullvad",
    "sudo vpn-exec unit transmission-daemon --tunnel mullvad --install",
    "sudo systemctl restart transmission-daemon",
];

/// The settings of Debian's transmission-daemon that decide who may use its page.
const TRANSMISSION: &str = r#"{
    "rpc-authentication-required": true, "rpc-username": "transmission", "rpc-password": "transmission",
    "rpc-port": 9091, "rpc-whitelist": "127.0.0.1", "rpc-whitelist-enabled": true,
    "peer-port": 51413, "dht-enabled": false, "lpd-enabled": false
}"#;

/// A section of the README, up to the next of its kind.
fn section(heading: &str) -> &'static str {
    let (_, from) = README.split_once(&format!("\n## {heading}\n")).expect("the README has the section");
    from.split("\n## ").next().unwrap_or(from)
}

/// What is in the code blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let begin = format!("```{language}\n");
    text.split(begin.as_str()).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

/// The commands of the console, without the prompt and comments.
fn commands(text: &str) -> Vec<&str> {
    let lines = blocks(text, "console").into_iter().flat_map(str::lines);
    let commands = lines.filter_map(|line| line.strip_prefix("$ "));
    commands.map(|line| line.split("    #").next().unwrap_or(line).trim_end()).collect()
}

#[test]
fn all_commands_of_the_examples_are_known_here() {
    let (intro, _) = README.split_once("\n## ").expect("sections");
    let of_intro: Vec<&str> = commands(intro).into_iter().filter(|command| !command.starts_with("cargo ")).collect();
    assert_eq!(of_intro, FIRST);
    let torrent = section("A torrent client on Debian");
    assert_eq!(commands(torrent), TORRENT);
    for command in TORRENT_IN_TEXT {
        assert!(torrent.contains(&format!("`{command}`")), "{command}");
    }
    let in_text = torrent.split('`').skip(1).step_by(2).filter(|code| code.contains("vpn-exec ")).count();
    assert_eq!(in_text - blocks(torrent, "console").len(), TORRENT_IN_TEXT.len(), "a command in the text is new");
    assert_eq!(commands(section("With systemd")), SYSTEMD);
}

/// A folder with the files that the examples need, in which they are run.
struct Place(tempfile::TempDir);

impl Place {
    fn prepare(lab: &Lab) -> Result<Self> {
        let place = Self(tempfile::tempdir()?);
        for site in [&lab.resolver, &lab.tunnel_resolver] {
            // The README shows addresses of IPv4.
            site.set("ifconfig.me", &[WEB.ipv4.into()]);
        }
        // The provider knows where the tunnel is, whether or not a program has sent something.
        let text = format!("{}PersistentKeepalive = 1\n", lab.wg_quick_text(Reach::Ipv4));
        place.write("mullvad.conf", &text, 0o600)?;
        let [profile, ..] = blocks(section("A torrent client on Debian"), "toml")[..] else {
            anyhow::bail!("there is no profile")
        };
        let own_file = place.path("mullvad.conf");
        let of_readme = "/etc/wireguard/mullvad.conf";
        ensure!(profile.contains(of_readme), "the profile names another file");
        fs::create_dir(place.path("vpn-exec"))?;
        place.write("vpn-exec/mullvad.toml", &profile.replace(of_readme, &own_file), 0o644)?;
        // Commands that the examples begin with. The world's root is nobody's sudo.
        fs::create_dir(place.path("bin"))?;
        place.write("bin/sudo", "#!/bin/sh\nexec \"$@\"\n", 0o755)?;
        symlink(lab::launcher::binary(), place.path("bin/vpn-exec"))?;
        Ok(place)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(mode))?)
    }

    /// A command of the README's, by a shell. Its page about the caller's address is the lab's, which has no certificate.
    fn command(&self, line: &str) -> Result<Command> {
        let search = std::env::var_os("PATH").context("PATH")?;
        let search = std::iter::once(self.0.path().join("bin")).chain(std::env::split_paths(&search));
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("exec {}", line.replace("https://", "http://")));
        command.current_dir(self.0.path()).env("PATH", std::env::join_paths(search)?);
        command.env("HOME", self.0.path()).env("XDG_CONFIG_HOME", self.0.path()).stdin(Stdio::null());
        Ok(command)
    }

    fn run(&self, line: &str) -> Result<Output> {
        Ok(self.command(line)?.output()?)
    }

    /// What a command prints that succeeds.
    fn works(&self, line: &str) -> Result<String> {
        let output = self.run(line)?;
        ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// A program of somebody else's, which is skipped where it is not installed.
fn require(program: &str, package: &str) -> Result<()> {
    let found = std::env::var_os("PATH")
        .is_some_and(|search| std::env::split_paths(&search).any(|folder| folder.join(program).is_file()));
    if found {
        return Ok(());
    }
    let reason = format!("there is no {program} (Debian's package {package})");
    Err(Skip::error(reason, lab::variables::REQUIRE_PEERS))
}

/// Ends a command as a terminal's interrupt does.
fn end(mut child: Child) -> Result<()> {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
    child.wait()?;
    Ok(())
}

/// The status that a page answers with.
fn status_of(from: &NetworkNamespace, to: SocketAddr, path: &str) -> Result<String> {
    // Debian's own user and password of Transmission, as HTTP has it (RFC 7617).
    const TRANSMISSION: &str = "Basic dHJhbnNtaXNzaW9uOnRyYW5zbWlzc2lvbg==";
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {to}\r\nAuthorization: {TRANSMISSION}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    answer.lines().next().map(str::to_owned).context("an answer")
}

/// Waits until a page answers, and returns its status.
fn answered(from: &NetworkNamespace, to: SocketAddr, path: &str) -> Result<String> {
    let mut status = String::new();
    lab::wait_until(lab::patience(PATIENCE), &format!("{to} does not answer"), || {
        Ok(status_of(from, to, path).map(|said| status = said).is_ok())
    })?;
    Ok(status)
}

#[test]
fn the_first_examples_show_two_addresses() {
    lab::test(Peer::Ours, |lab| {
        require("curl", "curl")?;
        let place = Place::prepare(lab)?;
        ensure!(place.works(FIRST[0])?.trim() == PROVIDER.ipv4.to_string());
        ensure!(place.works(FIRST[1])?.trim() == HOST.ipv4.to_string());
        Ok(())
    });
}

/// `--publish 8080:80`, for the local network.
#[test]
fn a_web_server_at_port_80_is_reached_at_the_hosts_port_8080() {
    lab::test(Peer::Ours, |lab| {
        ensure!(
            README.contains("with `--publish 8080:80` so does the local network"),
            "the README has another example"
        );
        let place = Place::prepare(lab)?;
        // Where ports below 1024 are open to every program inside, this takes no capability.
        let first_port = "sudo vpn-exec --config mullvad.conf -- cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        let capability = match place.works(first_port)?.trim() {
            "0" => "",
            _ => "--keep-cap net_bind_service ",
        };
        let server = "/usr/bin/python3 -m http.server 80";
        let mut server =
            place.command(&format!("sudo vpn-exec --config mullvad.conf --publish 8080:80 {capability}-- {server}"))?;
        let server = server.stderr(Stdio::null()).spawn()?;
        for to in HOST_ON_LAN.both() {
            let status = answered(&lab.lan, SocketAddr::new(to, 8080), "/")?;
            ensure!(status.contains(" 200 "), "{status}");
        }
        end(server)
    });
}

#[test]
fn a_torrent_client_is_reached_at_the_port_that_the_provider_forwards() {
    lab::test(Peer::Ours, |lab| {
        require("qbittorrent-nox", "qbittorrent-nox")?;
        let place = Place::prepare(lab)?;
        fs::create_dir(place.path("qBittorrent"))?;
        let settings = "[LegalNotice]\nAccepted=true\n[BitTorrent]\nSession\\Port=51413\nSession\\DHTEnabled=true\n\
                        [Preferences]\nWebUI\\Enabled=false\n";
        place.write("qBittorrent/qBittorrent.conf", settings, 0o600)?;
        let nox = "#!/bin/sh\nexec qbittorrent-nox --torrenting-port=51413\n";
        place.write("bin/qbittorrent", nox, 0o755)?;
        let mut client = place.command(TORRENT[0])?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let address = SocketAddr::new(TUNNEL_CLIENT.ipv4.into(), 51413);
        let connect = || Ok(TcpStream::connect_timeout(&address, Duration::from_millis(500)));
        lab::wait_until(lab::patience(PATIENCE), "the client is not reached", || {
            Ok(lab.provider.site().run(connect)?.is_ok())
        })?;
        // One that has hardly begun hangs after SIGTERM now and then. With its launcher it ends at once.
        client.kill()?;
        client.wait()?;
        Ok(())
    });
}

#[test]
fn debians_transmission_answers_at_its_page_and_others_do_not_reach_it() {
    lab::test(Peer::Ours, |lab| {
        require("transmission-daemon", "transmission-daemon")?;
        require("curl", "curl")?;
        let place = Place::prepare(lab)?;
        ensure!(place.works(TORRENT[1])?.trim() == "mullvad: a tunnel can be made");
        // What `systemctl enable --now vpn-exec@mullvad` does.
        place.works("vpn-exec up mullvad")?;
        let address = place.works(TORRENT_IN_TEXT[0])?;
        ensure!(address.trim() == PROVIDER.ipv4.to_string(), "{address}");
        let status = place.works(TORRENT_IN_TEXT[1])?;
        ensure!(status.contains("mullvad") && status.contains("up"), "{status}");

        fs::create_dir(place.path("transmission"))?;
        place.write("transmission/settings.json", TRANSMISSION, 0o600)?;
        let daemon = "vpn-exec --tunnel mullvad -- transmission-daemon --foreground --config-dir transmission";
        let daemon = place.command(daemon)?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let at = |address: IpAddr, port| SocketAddr::new(address, port);
        // 409: it wants to know the session that its own first answer tells. 403 is for those whom it does not let in.
        let page = answered(&lab.host, at(Ipv4Addr::LOCALHOST.into(), 9091), "/transmission/rpc")?;
        ensure!(page.contains(" 409 "), "{page}");
        place.works("vpn-exec reload mullvad --publish 9092:9091")?;
        // Who comes by a port that is published for all is a stranger, and stays one.
        for (from, to) in [(&lab.lan, HOST_ON_LAN.ipv4.into()), (&lab.host, IpAddr::from(Ipv4Addr::LOCALHOST))] {
            let page = answered(from, at(to, 9092), "/transmission/rpc")?;
            ensure!(page.contains(" 403 "), "{to}: {page}");
        }
        ensure!(status_of(&lab.lan, at(HOST_ON_LAN.ipv4.into(), 9091), "/").is_err(), "it is for the host alone");
        end(daemon)?;
        place.works("vpn-exec down mullvad").map(drop)
    });
}

/// As far as this goes without systemd: the unit's text, and the drop-in of Debian's service.
#[test]
fn the_commands_for_systemd_make_a_unit_and_a_drop_in() {
    lab::test(Peer::Ours, |lab| {
        let place = Place::prepare(lab)?;
        let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("units");
        symlink(units, place.path("units"))?;
        let (unit, _) = SYSTEMD[0].split_once(" | sudo tee ").context("the command writes a file")?;
        let unit = place.works(unit)?;
        let commands: Vec<&str> = unit.lines().filter_map(|line| line.strip_prefix("Exec")).collect();
        ensure!(commands.len() >= 3, "{unit}");
        for command in commands {
            let (_, command) = command.split_once('=').context("a value")?;
            ensure!(command.starts_with("/usr/local/bin/vpn-exec "), "{command}");
        }
        let drop_in = place.works(SYSTEMD[2].strip_suffix(" --install").context("it is installed")?)?;
        ensure!(drop_in.contains("NetworkNamespacePath=/run/netns/mullvad"), "{drop_in}");
        Ok(())
    });
}
