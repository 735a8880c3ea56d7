//! The examples of the documents, run as they are written, in the lab. The lab adapts this: the files are in a folder
//! of the test's own, a web site that shows the caller's address is the lab's, and some programs are stand-ins.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{HOST, HOST_ON_LAN, Lab, PROVIDER, Peer, Reach, Skip, TUNNEL_CLIENT, WEB};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_exec::linux::namespace::NetworkNamespace;

use crate::pages::{page, root};

/// Distinguishes hanging from working. Some programs need seconds to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const THROUGH_A_FILE: &str = "vpn-exec mullvad.conf -- curl https://ifconfig.me";
const OUTSIDE: &str = "curl https://ifconfig.me";
const THROUGH_A_TUNNEL: &str = "sudo vpn-exec mullvad -- curl https://ifconfig.me";

const TORRENT_CLIENT: &str = "vpn-exec airvpn.conf --open 51413 -- qbittorrent";
const CHECK_PROFILE: &str = "sudo vpn-exec check airvpn";
const THROUGH_THE_PROFILE: &str = "sudo vpn-exec airvpn -- curl https://ifconfig.me";
const STATUS: &str = "vpn-exec status";
const DOWN: &str = "sudo vpn-exec down mullvad";
const PLAN_TUNNEL: &str = "vpn-exec plan mullvad";
const WEB_SERVER: &str = "vpn-exec mullvad.conf --publish 8080:80 -- python3 -m http.server 80";
const RELOAD: &str = "sudo vpn-exec reload mullvad";

/// The commands of the tutorial, in its order.
const TUTORIAL: [&str; 4] = [
    "vpn-exec check mullvad.conf",
    "vpn-exec plan mullvad.conf",
    "sudo vpn-exec up mullvad.conf",
    "vpn-exec status mullvad",
];

/// The commands of the page about leaks.
const UP_AND_WAIT: &str = "sudo vpn-exec up mullvad --wait 20";
const OVER_IPV6: &str = "sudo vpn-exec mullvad -- curl -6 https://ifconfig.me";
const RESOLVERS: &str = "sudo vpn-exec mullvad -- cat /etc/resolv.conf";
const LOOK_UP: &str = "sudo vpn-exec mullvad -- getent hosts example.org";
const ROUTES: &str = "sudo vpn-exec mullvad -- ip route";
const WITHOUT_PROVIDER: &str = "sudo vpn-exec mullvad -- curl --max-time 10 https://ifconfig.me";
const LIST: &str = "vpn-exec list";

/// The commands whose programs are stand-ins that print their arguments.
const STAND_INS: [&str; 6] = [
    "vpn-exec mullvad.conf -- firefox --no-remote -P vpn",
    "vpn-exec mullvad.conf -- chromium --user-data-dir=/home/me/.config/chromium-vpn",
    "sudo --preserve-env=GTK_THEME vpn-exec mullvad.conf -- firefox --no-remote -P vpn",
    "vpn-exec mullvad.conf --wait 20 -- wget --mirror https://example.org/",
    "vpn-exec mullvad.conf -- ./crawl --part 1 &",
    "vpn-exec proton.conf -- ./crawl --part 2 &",
];
const UP_FILE_AND_WAIT: &str = "sudo vpn-exec up mullvad.conf --wait 20";

/// All commands that tests here run.
pub(crate) const RUN: [&str; 29] = [
    THROUGH_A_FILE,
    OUTSIDE,
    THROUGH_A_TUNNEL,
    TORRENT_CLIENT,
    CHECK_PROFILE,
    THROUGH_THE_PROFILE,
    STATUS,
    DOWN,
    PLAN_TUNNEL,
    WEB_SERVER,
    RELOAD,
    TUTORIAL[0],
    TUTORIAL[1],
    TUTORIAL[2],
    TUTORIAL[3],
    UP_AND_WAIT,
    OVER_IPV6,
    RESOLVERS,
    LOOK_UP,
    ROUTES,
    WITHOUT_PROVIDER,
    LIST,
    STAND_INS[0],
    STAND_INS[1],
    STAND_INS[2],
    STAND_INS[3],
    STAND_INS[4],
    STAND_INS[5],
    UP_FILE_AND_WAIT,
];

/// The settings of Debian's transmission-daemon that decide who may use its page.
const TRANSMISSION: &str = r#"{
    "rpc-authentication-required": true, "rpc-username": "transmission", "rpc-password": "transmission",
    "rpc-port": 9091, "rpc-whitelist": "127.0.0.1", "rpc-whitelist-enabled": true,
    "peer-port": 51413, "dht-enabled": false, "lpd-enabled": false
}"#;

/// A folder with the files that the examples need, in which they are run.
struct Place(tempfile::TempDir);

impl Place {
    fn prepare(lab: &Lab) -> Result<Self> {
        let place = Self(tempfile::tempdir()?);
        for site in [&lab.resolver, &lab.tunnel_resolver] {
            // The documents show addresses of IPv4.
            site.set("ifconfig.me", &[WEB.ipv4.into()]);
            site.set("example.org", &[WEB.ipv4.into()]);
        }
        // The provider knows where the tunnel is, whether or not a program has sent something.
        let text = format!("{}PersistentKeepalive = 1\n", lab.wg_quick_text(Reach::Ipv4));
        place.write("mullvad.conf", &text, 0o600)?;
        place.write("proton.conf", &text, 0o600)?;
        place.write("airvpn.conf", &text, 0o600)?;
        fs::create_dir(place.path("bin"))?;
        // The lab's root has no sudo. Debian's Python, whatever else is in PATH.
        let sudo = "#!/bin/sh\ncase $1 in --*) shift ;; esac\nexec \"$@\"\n";
        place.write("bin/sudo", sudo, 0o755)?;
        symlink("/usr/bin/python3", place.path("bin/python3"))?;
        symlink(lab::launcher::binary(), place.path("bin/vpn-exec"))?;
        Ok(place)
    }

    /// Writes the profile that the torrent client's page shows.
    fn with_profile(self) -> Result<Self> {
        let guide = page("docs/how-to/torrent-client.md");
        let [profile] = guide.blocks("toml")[..] else {
            anyhow::bail!("{} has another number of profiles", guide.path)
        };
        let published = "/etc/wireguard/airvpn.conf";
        ensure!(profile.contains(published), "the profile names another file");
        fs::create_dir(self.path("vpn-exec"))?;
        // Other pages call the same profile mullvad.
        for name in ["airvpn", "mullvad"] {
            let profile = profile.replace(published, &self.path(&format!("{name}.conf")));
            self.write(&format!("vpn-exec/{name}.toml"), &profile, 0o644)?;
        }
        Ok(self)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(mode))?)
    }

    /// Returns a published command, run by a shell. The lab's page about the caller's address has no certificate.
    fn command(&self, line: &str) -> Result<Command> {
        let search = std::env::var_os("PATH").context("PATH")?;
        let search = std::iter::once(self.0.path().join("bin")).chain(std::env::split_paths(&search));
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("exec {}", line.trim_end_matches(" &").replace("https://", "http://")));
        command.current_dir(self.0.path()).env("PATH", std::env::join_paths(search)?);
        command.env("HOME", self.0.path()).env("XDG_CONFIG_HOME", self.0.path()).stdin(Stdio::null());
        Ok(command)
    }

    fn run(&self, line: &str) -> Result<Output> {
        Ok(self.command(line)?.output()?)
    }

    /// Runs a command that must succeed, and returns its output.
    fn works(&self, line: &str) -> Result<String> {
        let output = self.run(line)?;
        ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// Skips the test if a program of another package is not installed.
fn require(program: &str, package: &str) -> Result<()> {
    let found = std::env::var_os("PATH")
        .is_some_and(|search| std::env::split_paths(&search).any(|folder| folder.join(program).is_file()));
    if found {
        return Ok(());
    }
    let reason = format!("there is no {program} (Debian's package {package})");
    Err(Skip { reason, unless: "VPN_EXEC_REQUIRE_PEERS" }.into())
}

/// Terminates a command, and waits for its end.
fn end(mut child: Child) -> Result<()> {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
    child.wait()?;
    Ok(())
}

/// Returns the status line of a page.
fn status_of(from: &NetworkNamespace, to: SocketAddr, path: &str) -> Result<String> {
    // User and password of Debian's Transmission, in HTTP's Basic scheme (RFC 7617).
    const TRANSMISSION: &str = "Basic dHJhbnNtaXNzaW9uOnRyYW5zbWlzc2lvbg==";
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(lab::patience(PATIENCE)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {to}\r\nAuthorization: {TRANSMISSION}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    answer.lines().next().map(str::to_owned).context("an answer")
}

/// Waits until a page answers, and returns its status line.
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
        ensure!(place.works(THROUGH_A_FILE)?.trim() == PROVIDER.ipv4.to_string());
        ensure!(place.works(OUTSIDE)?.trim() == HOST.ipv4.to_string());
        Ok(())
    });
}

#[test]
fn the_tutorial_keeps_a_tunnel_up_and_takes_it_down() {
    lab::test(Peer::Ours, |lab| {
        require("curl", "curl")?;
        let place = Place::prepare(lab)?;
        let [check, plan, up, status] = TUTORIAL;
        ensure!(place.works(check)?.trim() == "mullvad: the configuration is valid");
        ensure!(place.works(plan)?.contains("wg0"));
        place.works(up)?;
        ensure!(place.works(THROUGH_A_TUNNEL)?.trim() == PROVIDER.ipv4.to_string());
        ensure!(place.works(status)?.contains("mullvad"));
        place.works(DOWN)?;
        ensure!(!place.works(LIST)?.contains("mullvad"));
        Ok(())
    });
}

/// The kill switch as the guide shows it; `tests/leaks/` has the proof.
#[test]
fn the_guide_about_leaks_shows_what_it_says() {
    lab::test(Peer::Ours, |lab| {
        require("curl", "curl")?;
        require("ip", "iproute2")?;
        let place = Place::prepare(lab)?.with_profile()?;
        place.works(UP_AND_WAIT)?;
        place.works(RELOAD)?;
        ensure!(place.works(THROUGH_A_TUNNEL)?.trim() == PROVIDER.ipv4.to_string());
        // It fails where the tunnel has no IPv6.
        let over_ipv6 = String::from_utf8(place.run(OVER_IPV6)?.stdout)?;
        ensure!(over_ipv6.trim() != HOST.ipv6.to_string(), "{over_ipv6}");
        ensure!(place.works(RESOLVERS)?.contains("nameserver "));
        ensure!(place.works(LOOK_UP)?.contains(&WEB.ipv4.to_string()));
        let asked =
            |questions: Vec<lab::dns::Question>| questions.iter().any(|question| question.name == "example.org");
        ensure!(asked(lab.tunnel_resolver.questions()) && !asked(lab.resolver.questions()), "a DNS leak");
        let routes = place.works(ROUTES)?;
        let defaults: Vec<&str> = routes.lines().filter(|line| line.starts_with("default ")).collect();
        ensure!(defaults.len() == 1 && defaults[0].contains("wg0"), "{routes}");
        ensure!(place.works(PLAN_TUNNEL)?.contains("wg0"));
        lab.provider.stop()?;
        let without = place.run(WITHOUT_PROVIDER)?;
        ensure!(!without.status.success() && without.stdout.is_empty(), "{}", String::from_utf8_lossy(&without.stdout));
        place.works(DOWN)?;
        ensure!(!place.works(LIST)?.contains("mullvad"));
        Ok(())
    });
}

#[test]
fn the_guides_run_their_programs() {
    lab::test(Peer::Ours, |lab| {
        let place = Place::prepare(lab)?;
        let echo = "#!/bin/sh\necho \"${0##*/} $*\"\n";
        for program in ["bin/firefox", "bin/chromium", "bin/wget", "crawl"] {
            place.write(program, echo, 0o755)?;
        }
        for command in STAND_INS {
            let (_, program) = command.split_once(" -- ").context("a program")?;
            let expected = program.trim_start_matches("./").trim_end_matches(" &").replace("https://", "http://");
            let printed = place.works(command)?;
            ensure!(printed.trim() == expected, "{command}: {printed}");
        }
        place.works(UP_FILE_AND_WAIT)?;
        place.works(DOWN).map(drop)
    });
}

/// `--publish 8080:80`, for the local network.
#[test]
fn a_web_server_at_port_80_is_reached_at_the_hosts_port_8080() {
    lab::test(Peer::Ours, |lab| {
        ensure!(page("README.md").text.contains("`--publish 8080:80`"), "the README has another example");
        let place = Place::prepare(lab)?;
        // Where ports below 1024 are open to every program inside, this needs no capability.
        let first_port = "vpn-exec mullvad.conf -- cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        let command = match place.works(first_port)?.trim() {
            "0" => WEB_SERVER.to_owned(),
            _ => WEB_SERVER.replace(" -- ", " --keep-cap net_bind_service -- "),
        };
        let server = place.command(&command)?.stderr(Stdio::null()).spawn()?;
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
        let mut client = place.command(TORRENT_CLIENT)?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
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
        let place = Place::prepare(lab)?.with_profile()?;
        ensure!(place.works(CHECK_PROFILE)?.trim() == "airvpn: the configuration is valid");
        // As `systemctl enable --now vpn-exec@airvpn` does.
        place.works("vpn-exec up airvpn")?;
        let address = place.works(THROUGH_THE_PROFILE)?;
        ensure!(address.trim() == PROVIDER.ipv4.to_string(), "{address}");
        let status = place.works(STATUS)?;
        ensure!(status.contains("airvpn") && status.contains("up"), "{status}");

        fs::create_dir(place.path("transmission"))?;
        place.write("transmission/settings.json", TRANSMISSION, 0o600)?;
        let daemon = "vpn-exec airvpn -- transmission-daemon --foreground --config-dir transmission";
        let daemon = place.command(daemon)?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let at = |address: IpAddr, port| SocketAddr::new(address, port);
        // 409: the client lacks the session ID that this answer carries. 403: the client is not on the whitelist.
        // While the daemon starts, its loopback may refuse a connection an instant before its other addresses take it.
        lab::wait_until(lab::patience(PATIENCE), "the page does not know the host", || {
            let page = answered(&lab.host, at(Ipv4Addr::LOCALHOST.into(), 9091), "/transmission/rpc")?;
            Ok(page.contains(" 409 "))
        })?;
        place.works("vpn-exec reload airvpn --publish 9092:9091")?;
        // A port that is published for all does not lead to the program's loopback.
        for (from, to) in [(&lab.lan, HOST_ON_LAN.ipv4.into()), (&lab.host, IpAddr::from(Ipv4Addr::LOCALHOST))] {
            let page = answered(from, at(to, 9092), "/transmission/rpc")?;
            ensure!(page.contains(" 403 "), "{to}: {page}");
        }
        ensure!(
            status_of(&lab.lan, at(HOST_ON_LAN.ipv4.into(), 9091), "/").is_err(),
            "this port is for the host alone"
        );
        end(daemon)?;
        place.works("vpn-exec down airvpn").map(drop)
    });
}

/// As far as this goes without systemd: the unit's text, and the drop-in of Debian's service. `tests/vm/` has the rest.
#[test]
fn the_commands_for_systemd_make_a_unit_and_a_drop_in() {
    lab::test(Peer::Ours, |lab| {
        let place = Place::prepare(lab)?;
        symlink(root().join("units"), place.path("units"))?;
        let guide = page("docs/how-to/systemd.md");
        let published = |word: &str| {
            let command = guide.commands().into_iter().find(|command| command.contains(word)).map(str::to_owned);
            command.with_context(|| format!("{} has no command with {word}", guide.path))
        };
        let adapt = published(" | sudo tee ")?;
        let (adapt, _) = adapt.split_once(" | ").context("a pipe")?;
        let unit = place.works(adapt)?;
        let commands: Vec<&str> = unit.lines().filter_map(|line| line.strip_prefix("Exec")).collect();
        ensure!(commands.len() >= 3, "{unit}");
        for command in commands {
            let (_, command) = command.split_once('=').context("a value")?;
            ensure!(command.starts_with("/usr/local/bin/vpn-exec "), "{command}");
        }
        let install = published(" --install")?;
        let drop_in = place.works(install.trim_end_matches(" --install"))?;
        ensure!(drop_in.contains("NetworkNamespacePath=/run/netns/mullvad"), "{drop_in}");
        Ok(())
    });
}
