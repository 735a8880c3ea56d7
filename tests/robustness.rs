//! Careless users, unusual machines and hostile programs: vpn-exec touches nothing of other programs, does not hang,
//! and does not fail open.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::world;
use vpn_exec::linux::local_socket::LocalListener;

/// The time after which a process is taken for hanging.
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes the configuration of a tunnel without a peer that answers.
fn config(address: &str, allowed: &str) -> Result<PathBuf> {
    use std::os::unix::fs::OpenOptionsExt;

    let path = Path::new(world::FILES).join("nowhere.conf");
    let text = format!(
        "[Interface]\nPrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=\nAddress = {address}\nDNS = 10.64.0.1\n\
         [Peer]\nPublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nAllowedIPs = {allowed}\nEndpoint = 127.0.0.1:9\n"
    );
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?.write_all(text.as_bytes())?;
    Ok(path)
}

/// Returns the beginning of a shell command that runs vpn-exec, without further options and the program.
fn vpn_exec() -> Result<String> {
    let config = config("10.64.3.2/32, fc00:bbbb::3:2/128", "0.0.0.0/0, ::/0")?;
    Ok(format!("{} --config {} --backend userspace", lab::launcher::binary().display(), config.display()))
}

fn bash(script: &str) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a shell script. Fails if it hangs.
fn run(script: &str) -> Result<Output> {
    let mut child = bash(script).spawn()?;
    wait_for(&mut child)?;
    Ok(child.wait_with_output()?)
}

fn wait_for(child: &mut Child) -> Result<ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begin.elapsed() > PATIENCE {
            child.kill()?;
            anyhow::bail!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn said(output: &Output) -> String {
    format!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn ensure_nothing_left() -> Result<()> {
    for path in ["/run/vpn-exec", "/run/netns"] {
        ensure!(!Path::new(path).exists(), "{path} is left behind");
    }
    Ok(())
}

/// Runs a test in a world of its own.
fn test<F: FnOnce() -> Result<()>>(body: F) {
    world::test(|| {
        lab::require_tun()?;
        body()
    });
}

#[test]
fn reclaiming_kills_no_process_in_a_namespace_with_a_reused_inode() {
    test(|| {
        // A keeper was killed before its namespace had a name. Another namespace got its inode.
        let mut innocent = Command::new("unshare").args(["--net", "sleep", "60"]).spawn()?;
        let own = fs::metadata("/proc/self/ns/net")?.ino();
        let path = format!("/proc/{}/ns/net", innocent.id());
        lab::wait_until(PATIENCE, "it has no namespace of its own", || Ok(fs::metadata(&path)?.ino() != own))?;
        let namespace = fs::metadata(&path)?;
        let (device, inode) = (namespace.dev(), namespace.ino());
        fs::create_dir_all("/run/vpn-exec/nowhere")?;
        fs::create_dir_all("/run/netns")?;
        let mark = format!("vpn-exec:nowhere:{}", "0".repeat(32));
        fs::write("/run/netns/nowhere", &mark)?;
        let state = format!(
            r#"{{"mark":"{mark}","namespace":{{"device":{device},"inode":{inode}}},"keeper":4194304,"made":null,"standing":false,"holders":[]}}"#
        );
        fs::write("/run/vpn-exec/nowhere/state", state)?;
        let output = run(&format!("{} -- true", vpn_exec()?))?;
        ensure!(output.status.success(), "what was left is reclaimed: {}", said(&output));
        ensure!(innocent.try_wait()?.is_none(), "a stranger was killed");
        innocent.kill()?;
        innocent.wait()?;
        Ok(())
    });
}

#[test]
fn allowed_ips_may_contain_the_network_of_an_address() {
    test(|| {
        for (address, allowed) in [
            ("10.0.0.2/24", "10.0.0.0/24"),
            ("10.0.0.2/31, fd00::2/64", "10.0.0.2/31, 10.0.0.0/8, fd00::/64"),
            ("10.0.0.2/24, 10.0.0.3/24, 10.0.0.2/24", "10.0.0.0/24, 0.0.0.0/0"),
            ("10.0.0.2/0, fd00::2/0", "0.0.0.0/0, ::/0"),
        ] {
            vpn_exec()?;
            let config = config(address, allowed)?;
            let binary = lab::launcher::binary().display();
            let script = format!("{binary} --config {} --backend userspace -- true", config.display());
            let output = run(&script)?;
            ensure!(output.status.success(), "{address} with {allowed}: {}", said(&output));
        }
        Ok(())
    });
}

#[test]
fn a_listen_port_below_1024_works() {
    test(|| {
        vpn_exec()?;
        let config = config("10.0.0.2/32", "0.0.0.0/0")?;
        let text = fs::read_to_string(&config)?.replace("DNS =", "ListenPort = 443\nDNS =");
        fs::write(&config, text)?;
        let script =
            format!("{} --config {} --backend userspace -- true", lab::launcher::binary().display(), config.display());
        let output = run(&script)?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok(())
    });
}

#[test]
fn a_signal_ends_the_wait_for_a_handshake() {
    test(|| {
        for signal in ["INT", "TERM", "HUP"] {
            let mut waiting = bash(&format!("exec {} --wait 60 -- echo started", vpn_exec()?)).spawn()?;
            std::thread::sleep(Duration::from_millis(300));
            run(&format!("kill -{signal} {}", waiting.id()))?;
            let begin = Instant::now();
            let status = wait_for(&mut waiting)?;
            ensure!(begin.elapsed() < PATIENCE, "SIG{signal} took {:?}", begin.elapsed());
            let number = nix::sys::signal::Signal::from_str_name(signal)?;
            ensure!(status.signal() == Some(number), "it ends by SIG{signal}: {status}");
            ensure!(waiting.wait_with_output()?.stdout.is_empty(), "the program was not started");
            ensure_nothing_left()?;
        }
        // A signal that vpn-exec was started to ignore stays ignored.
        let script = format!("trap '' HUP; exec {} --wait 1 -- true", vpn_exec()?);
        let mut waiting = bash(&script).spawn()?;
        // By then, the shell has executed vpn-exec.
        let comm = format!("/proc/{}/comm", waiting.id());
        lab::wait_until(PATIENCE, "the shell executes nothing", || {
            Ok(fs::read_to_string(&comm)?.starts_with("vpn-exec"))
        })?;
        run(&format!("kill -HUP {}", waiting.id()))?;
        ensure!(wait_for(&mut waiting)?.code() == Some(125), "an ignored SIGHUP has ended the wait");
        Ok(())
    });
}

/// Signal numbers by the names that shells use.
trait ByName: Sized {
    fn from_str_name(name: &str) -> Result<i32>;
}

impl ByName for nix::sys::signal::Signal {
    fn from_str_name(name: &str) -> Result<i32> {
        Ok(format!("SIG{name}").parse::<Self>()? as i32)
    }
}

#[test]
fn an_ignored_sigchld_does_not_disturb_and_is_inherited_by_the_program() {
    test(|| {
        let output = run(&format!("trap '' CHLD; exec {} -- sed -n 's/^SigIgn:\t//p' /proc/self/status", vpn_exec()?))?;
        ensure!(output.status.success(), "{}", said(&output));
        let ignored = u64::from_str_radix(String::from_utf8(output.stdout)?.trim(), 16)?;
        ensure!(ignored & (1 << 16) != 0, "SIGCHLD, number 17, is as it was: {ignored:x}");
        Ok(())
    });
}

#[test]
fn a_program_killed_by_a_real_time_signal_has_the_usual_status() {
    test(|| {
        let mut child = bash(&format!("exec {} -- sh -c 'kill -40 $$'", vpn_exec()?)).spawn()?;
        let status = wait_for(&mut child)?;
        ensure!(status.signal() == Some(40), "{status}");
        let script = format!(
            "{} -- bash -c '(setsid sh -c \"sleep 0.1; kill -40 \\$\\$\" &); sleep 0.5; echo lives'",
            vpn_exec()?
        );
        let output = run(&script)?;
        ensure!(output.status.success() && output.stdout == b"lives\n", "{}", said(&output));
        ensure_nothing_left()
    });
}

#[test]
fn children_from_before_exec_are_not_taken_for_orphans() {
    test(|| {
        for option in ["", "--kill-orphans"] {
            let script = format!("sleep 60 >/dev/null 2>&1 & echo $!; exec {} {option} -- true", vpn_exec()?);
            let output = run(&script)?;
            ensure!(output.status.success(), "{}", said(&output));
            let stranger = String::from_utf8(output.stdout)?;
            let stranger = stranger.trim();
            ensure!(Path::new("/proc").join(stranger).join("exe").exists(), "a stranger was killed");
            run(&format!("kill -9 {stranger}"))?;
        }
        Ok(())
    });
}

#[test]
fn the_invalid_user_id_minus_one_is_refused() {
    test(|| {
        for options in ["--user 4294967295 --group 0", "--user 4294967295", "--group 4294967295"] {
            let output = run(&format!("{} {options} -- id", vpn_exec()?))?;
            ensure!(output.status.code() == Some(125) && output.stdout.is_empty(), "{options}: {}", said(&output));
        }
        for caller in ["4294967295", "$'\\xff'", "''", "abc"] {
            let output = run(&format!("SUDO_UID={caller} {} -- id", vpn_exec()?))?;
            ensure!(output.status.code() == Some(125) && output.stdout.is_empty(), "{caller}: {}", said(&output));
        }
        Ok(())
    });
}

#[test]
fn a_strict_umask_does_not_hide_files_from_the_program() {
    test(|| {
        let script = format!("umask 077; {} -- stat -c %a /etc/resolv.conf /etc/hosts /etc/nsswitch.conf", vpn_exec()?);
        let output = run(&script)?;
        ensure!(output.stdout == b"644\n644\n644\n", "{}", said(&output));
        Ok(())
    });
}

#[test]
fn listen_fds_that_are_not_open_are_refused() {
    test(|| {
        let output = run(&format!("LISTEN_PID=$$ LISTEN_FDS=6 exec {} -- true", vpn_exec()?))?;
        ensure!(output.status.code() == Some(125), "{}", said(&output));
        ensure!(said(&output).contains("LISTEN_FDS is 6, but the descriptor 3 is not open"), "{}", said(&output));
        ensure_nothing_left()
    });
}

#[test]
fn an_ordinary_user_cannot_lock_a_tunnel() {
    test(|| {
        use std::os::unix::fs::PermissionsExt;

        let mut child = bash(&format!("umask 022; exec {} -- sleep 60", vpn_exec()?)).spawn()?;
        let (base, own) = (Path::new("/run/vpn-exec"), Path::new("/run/vpn-exec/nowhere"));
        lab::wait_until(PATIENCE, "no state", || Ok(own.join("state").exists()))?;
        for directory in [base, own] {
            let mode = fs::metadata(directory)?.permissions().mode() & 0o777;
            ensure!(mode == 0o711, "{} has mode {mode:o}: who can read it can lock it", directory.display());
        }
        let mode = fs::metadata(own.join("state"))?.permissions().mode() & 0o777;
        ensure!(mode == 0o644, "the state has mode {mode:o}, and anybody may read it");
        // Every user can lock iproute2's directory.
        let mut holder = Command::new("flock").args(["/run/netns", "sleep", "60"]).process_group(0).spawn()?;
        std::thread::sleep(Duration::from_millis(200));
        let begin = Instant::now();
        let output = run(&format!("{} --name other -- true", vpn_exec()?))?;
        ensure!(output.status.success(), "{}", said(&output));
        ensure!(begin.elapsed() < PATIENCE, "it waits for a lock that anybody can hold");
        // A process that uses the directory when the last tunnel ends keeps it, so it must have ended before.
        run(&format!("kill -- -{}", holder.id()))?;
        holder.wait()?;
        std::thread::sleep(Duration::from_millis(200));
        run(&format!("kill {}", child.id()))?;
        wait_for(&mut child)?;
        ensure_nothing_left()
    });
}

#[test]
fn an_unprivileged_user_is_advised_to_use_sudo() {
    test(|| {
        let program = Path::new(world::FILES).join("vpn-exec");
        fs::copy(lab::launcher::binary(), &program)?;
        let (program, config) = (program.display(), config("10.64.3.2/32", "0.0.0.0/0")?);
        let config = config.display();
        ensure!(run(&format!("{program} up {config} --backend userspace"))?.status.success());
        let told = |script: &str, what: &str| {
            let output = run(script)?;
            let text = said(&output);
            ensure!(
                output.status.code() == Some(125) && text.contains(what) && text.contains("sudo"),
                "{script}: {text}"
            );
            Ok(())
        };
        let bare = "setpriv --bounding-set=-all --inh-caps=-all";
        for arguments in [format!("--config {config} -- true"), format!("up {config}")] {
            // Root, but without a capability: neither way is open.
            told(&format!("{bare} {program} {arguments}"), "root needs the capability CAP_SETFCAP")?;
            // Under sudo the program is never root's.
            told(&format!("SUDO_UID=1000 {bare} {program} {arguments}"), "would be root's")?;
        }
        // Which tunnels exist is known to every user.
        let other = run(&format!("{bare} {program} down other"))?;
        ensure!(!other.status.success() && said(&other).contains("no tunnel other"), "{}", said(&other));
        let nobody = format!("{bare} --reuid 65534 --regid 65534 --clear-groups {program}");
        // Only root's world has other users.
        if run(&format!("{nobody} --version"))?.status.success() {
            told(&format!("{nobody} down nowhere"), "only root")?;
            told(&format!("{nobody} check --config {config}"), "Permission denied")?;
            let output = run(&format!("{nobody} list"))?;
            ensure!(output.status.success() && said(&output).contains("nowhere"), "{}", said(&output));
        }
        ensure!(run(&format!("{program} down nowhere"))?.status.success());
        ensure_nothing_left()
    });
}

#[test]
fn a_lack_of_descriptors_leaves_nothing_behind() {
    test(|| {
        // With fewer, not even the directory of the tunnel's name can be read for its removal.
        for limit in 6..=20 {
            run(&format!("ulimit -n {limit}; exec {} -- true", vpn_exec()?))?;
            ensure_nothing_left().with_context(|| format!("with {limit} descriptors"))?;
        }
        Ok(())
    });
}

#[test]
fn closing_the_terminal_ends_the_program() {
    test(|| {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        // The terminal emulator runs vpn-exec itself, so no shell forwards SIGHUP.
        let script = format!("exec setsid --ctty {} -- sh -c 'sleep 60; :' <{name} >{name} 2>&1", vpn_exec()?);
        let mut child = bash(&script).spawn()?;
        lab::wait_until(PATIENCE, "no state", || Ok(Path::new("/run/vpn-exec/nowhere/state").exists()))?;
        std::thread::sleep(Duration::from_millis(500));
        drop(master);
        let status = wait_for(&mut child)?;
        ensure!(status.signal() == Some(1), "{status}");
        ensure_nothing_left()
    });
}

#[test]
fn a_program_with_raw_packets_gets_no_ipv6_forwarded_by_the_host() {
    test(|| {
        // Linux forwards IPv6 from all interfaces or none, so the veth's host end must not accept IPv6 at all.
        for (option, disabled) in [("", "0"), ("--keep-cap net_raw", "1")] {
            let script = format!("{} {option} -- sleep 60", vpn_exec()?);
            let mut child = bash(&format!("exec {script}")).spawn()?;
            let parameter = Path::new("/proc/sys/net/ipv6/conf/ve-nowhere/disable_ipv6");
            let begin = Instant::now();
            while !fs::read_to_string(parameter).is_ok_and(|value| value.trim() == disabled) {
                ensure!(begin.elapsed() < PATIENCE, "{option}: {:?}", fs::read_to_string(parameter));
                std::thread::sleep(Duration::from_millis(5));
            }
            run(&format!("kill {}", child.id()))?;
            wait_for(&mut child)?;
        }
        Ok(())
    });
}

/// Collects the names in JSON at any depth, except below `but`.
fn names_in(value: &serde_json::Value, but: &str, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Array(elements) => elements.iter().for_each(|element| names_in(element, but, found)),
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                found.push(name.clone());
                if name != but {
                    names_in(value, but, found);
                }
            }
        }
        _ => {}
    }
}

#[test]
fn every_field_of_json_output_is_documented() {
    test(|| {
        let path = config("10.64.3.2/32, fc00:bbbb::3:2/128", "0.0.0.0/0, ::/0")?;
        let text = fs::read_to_string(&path)?.replace("DNS = 10.64.0.1", "DNS = 10.64.0.1, example.com\nPostUp = true");
        fs::write(&path, text)?;
        let (program, path) = (lab::launcher::binary().display(), path.display());
        let ports = "--publish 8080:80,proxy-protocol=v2 --open 51413 --host-port 5432 --backend userspace";
        let json = |script: &str| -> Result<serde_json::Value> {
            let output = run(script)?;
            ensure!(output.status.success(), "{script}: {}", said(&output));
            Ok(serde_json::from_slice(&output.stdout)?)
        };
        let plan = json(&format!("{program} plan --json --config {path} {ports}"))?;
        ensure!(run(&format!("{program} up {path} {ports}"))?.status.success());
        let inside = bash(&format!("{program} --tunnel nowhere -- sh -c 'echo; exec sleep 60'")).spawn();
        let mut inside = inside?;
        std::io::Read::read_exact(inside.stdout.as_mut().context("an output")?, &mut [0])?;
        let status = json(&format!("{program} status nowhere --json"))?;
        let list = json(&format!("{program} list --json"))?;
        ensure!(list.as_array().is_some_and(|tunnels| tunnels.len() == 1), "{list}");
        ensure!(run(&format!("{program} down nowhere --force"))?.status.success());
        inside.wait()?;

        let documented = include_str!("../docs/reference/json.md");
        for (value, some) in [(&plan, "persistent_keepalive"), (&status, "command"), (&list, "proxy_protocol")] {
            let mut names = Vec::new();
            names_in(value, "firewall", &mut names);
            ensure!(names.iter().any(|name| name == some), "{some} is missing in {value}");
            let missing: Vec<_> = names.iter().filter(|name| !documented.contains(&format!("`{name}`"))).collect();
            ensure!(missing.is_empty(), "not in docs/reference/json.md: {missing:?}");
        }
        Ok(())
    });
}

/// Returns whether a terminal would interpret a character, or show nothing for it.
fn is_unsafe(c: char) -> bool {
    (c.is_control() && c != '\n') || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}')
}

#[test]
fn foreign_text_reaches_the_terminal_only_escaped() {
    test(|| {
        let program = lab::launcher::binary().display();
        let path = config("10.64.3.2/32", "0.0.0.0/0")?;
        ensure!(run(&format!("{program} up {} --backend userspace", path.display()))?.status.success());
        // Sets the title, clears the screen in two ways, changes the writing direction, and begins a line like
        // vpn-exec's own.
        let name = "$'\\e]0;owned\\a\\e[2J\\u009b2J\\u202e\\nvpn-exec: all is well'";
        let mut inside = bash(&format!(
            "export LC_ALL=C.UTF-8; {program} --tunnel nowhere -- bash -c \"echo; exec -a \\\"\\$NAME\\\" sleep 60\""
        ));
        let evil = String::from_utf8(run(&format!("LC_ALL=C.UTF-8; printf %s {name}"))?.stdout)?;
        ensure!(evil.chars().filter(|c| is_unsafe(*c)).count() == 5, "{evil:?}");
        let mut inside = inside.env("NAME", &evil).spawn()?;
        std::io::Read::read_exact(inside.stdout.as_mut().context("an output")?, &mut [0])?;
        let is_named = || {
            let output = run(&format!("{program} status nowhere"))?;
            Ok(said(&output).contains("all is well"))
        };
        lab::wait_until(PATIENCE, "the program has not its name", is_named)?;
        let evil_file = format!("{}/$'a\\e[2Jb'.conf", world::FILES);
        let broken = format!("{}/broken.conf", world::FILES);
        fs::write(&broken, "[Interface]\n\x1b[2J\u{9b}2J = \u{202e}\n")?;
        let commands = [
            ("down nowhere".to_owned(), "all is well"),
            ("status nowhere".to_owned(), "all is well"),
            ("status nowhere --json".to_owned(), "all is well"),
            ("list --json".to_owned(), "all is well"),
            (format!("check --config {evil_file}"), "u{1b}"),
            (format!("--log json check --config {evil_file}"), "u001b"),
            (format!("--log journal check --config {evil_file}"), "u{1b}"),
            (format!("check --config {broken}"), "broken.conf"),
            ("$'\\e[2Jx' --no-such".to_owned(), "u{1b}"),
        ];
        for (arguments, expected) in commands {
            let output = run(&format!("{program} {arguments}"))?;
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8(text)?;
            ensure!(text.contains(expected), "{arguments}: {text:?}");
            ensure!(!text.chars().any(is_unsafe), "{arguments}: {text:?}");
            ensure!(!text.lines().any(|line| line == "vpn-exec: all is well"), "{arguments}: {text:?}");
        }
        // JSON output has the text unchanged.
        let json = run(&format!("{program} status nowhere --json"))?.stdout;
        let json: serde_json::Value = serde_json::from_slice(&json)?;
        let command = json["programs"][0]["command"].as_str().context("a command")?;
        ensure!(command.starts_with(&evil), "{command:?}");
        ensure!(run(&format!("{program} down nowhere --force"))?.status.success());
        inside.wait()?;
        ensure_nothing_left()
    });
}

/// Users without a relation to the tunnel.
const STRANGER: u32 = 65534;
const OTHER_STRANGER: u32 = 65533;

/// A world with several users, and a copy of vpn-exec that all can execute.
struct Users {
    program: PathBuf,
}

impl Users {
    /// # Errors
    /// [`lab::Skip`] in the world of an ordinary user, which has no other users.
    fn new() -> Result<Self> {
        if fs::read_to_string("/proc/self/uid_map")?.split_ascii_whitespace().nth(2) == Some("1") {
            let reason = "an ordinary user has no second user";
            return Err(lab::Skip::error(reason, lab::variables::REQUIRE_USERS));
        }
        let program = Path::new(world::FILES).join("vpn-exec");
        fs::copy(lab::launcher::binary(), &program)?;
        Ok(Self { program })
    }

    /// Starts root's tunnel, whose keeper lacks some protections.
    fn up(&self, broken: &str) -> Result<()> {
        let path = config("10.64.3.2/32", "0.0.0.0/0")?;
        let up = format!("VPN_EXEC_TEST_BREAK={broken} {} up {}", self.program.display(), path.display());
        let output = run(&format!("{up} --backend userspace"))?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok(())
    }

    /// Returns the tunnel's state as `vpn-exec list` shows it to a user.
    fn state_for(&self, user: u32) -> Result<String> {
        let output = run(&format!("{} {} status nowhere --json", as_user(user), self.program.display()))?;
        let status: serde_json::Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("as {user}: {}", said(&output)))?;
        Ok(status["state"].as_str().context("a state")?.to_owned())
    }

    fn down(&self) -> Result<()> {
        let output = run(&format!("{} down nowhere --force", self.program.display()))?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok(())
    }
}

fn as_user(user: u32) -> String {
    match user {
        0 => String::new(),
        user => format!("setpriv --bounding-set=-all --inh-caps=-all --reuid {user} --regid {user} --clear-groups"),
    }
}

/// Starts a Python script as a user, and returns it with the first word that it prints.
fn attack(user: u32, script: &str, arguments: &str) -> Result<(Attack, String)> {
    let path = Path::new(world::FILES).join("attack.py");
    fs::write(&path, script)?;
    let mut child = bash(&format!("exec {} /usr/bin/python3 {} {arguments}", as_user(user), path.display()))
        .stderr(Stdio::inherit())
        .spawn()?;
    let mut attack = Attack { lines: std::io::BufReader::new(child.stdout.take().context("an output")?), child };
    let word = attack.word()?;
    Ok((attack, word))
}

struct Attack {
    child: Child,
    lines: std::io::BufReader<std::process::ChildStdout>,
}

impl Attack {
    /// Waits for the next word that it prints.
    fn word(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(std::io::BufRead::read_line(&mut self.lines, &mut line)? > 0, "the attack has ended");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Passes sockets to a keeper whose last close takes 1000 seconds, with a message each. Prints the number that the
/// kernel refused, and then that the keeper has closed all connections.
const LINGERING: &str = r#"
import array, socket, struct, sys, threading, time
path, message, count = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])

def lingering():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    client = socket.socket()
    client.connect(listener.getsockname())
    client.setblocking(False)
    try:
        while True:
            client.send(b"x" * 65536)
    except BlockingIOError:
        pass
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
    return client, listener

connections, kept, refused = [], [], 0
for _ in range(count):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    client, listener = lingering()
    passed = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [client.fileno()]))
    try:
        connection.sendmsg([message], [passed])
        # Where the keeper was faster, this is the last close.
        threading.Thread(target=client.close, daemon=True).start()
    except PermissionError:
        refused += 1
        kept.append(client)
        connection.send(message)
    connections.append(connection)
    kept.append(listener)
print(refused, flush=True)
for connection in connections:
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    connection.close()
print("closed", flush=True)
time.sleep(1000)
"#;

/// The messages with the sockets: a valid request, and an invalid one.
const MESSAGES: [&str; 2] = [r#"'"Report"'"#, "nonsense"];

/// Attacks a keeper by sockets whose close takes as long as the attacker likes. `broken` names protections that it
/// lacks.
fn keeper_under_attack(broken: &str) -> Result<()> {
    const COUNT: usize = 24;

    let users = Users::new()?;
    let can_refuse = LocalListener::bind(&Path::new(world::FILES).join("own"), 0o600)?.refuse_descriptors()?;
    for message in MESSAGES {
        users.up(broken)?;
        let attack_once = || attack(STRANGER, LINGERING, &format!("/run/vpn-exec/nowhere/public {message} {COUNT}"));
        let (mut first, refused) = attack_once()?;
        let refused: usize = refused.parse()?;
        // The kernel refuses all of them or, without SO_PASSRIGHTS, none.
        let expected = if broken.is_empty() && can_refuse { COUNT } else { 0 };
        ensure!(refused == expected, "{refused} are refused with {broken:?}");
        ensure!(first.word()? == "closed");
        ensure!(users.state_for(0)? == "connecting", "the keeper is frozen");
        ensure!(users.state_for(OTHER_STRANGER)? == "connecting", "the keeper answers root alone");
        // Connections that wait at its socket when it ends are closed, too.
        let (_second, _) = attack_once()?;
        users.down()?;
    }
    ensure_nothing_left()
}

#[test]
fn a_keeper_is_not_blocked_by_descriptors_of_another_user() {
    test(|| keeper_under_attack(""));
}

#[test]
fn a_keeper_is_not_blocked_even_if_the_kernel_cannot_refuse_descriptors() {
    test(|| keeper_under_attack("passrights"));
}

/// The twin: a keeper that closes the descriptors on its main thread does not answer.
#[test]
fn a_keeper_without_protections_is_blocked_by_descriptors() {
    test(|| {
        let users = Users::new()?;
        users.up("passrights,apart")?;
        let arguments = format!("/run/vpn-exec/nowhere/public {} 1", MESSAGES[0]);
        // On a busy machine, a single attack may be over before the keeper has closed its descriptors.
        let mut attacks = Vec::new();
        lab::wait_until(PATIENCE, "the keeper is not frozen", || {
            let (attack, refused) = attack(STRANGER, LINGERING, &arguments)?;
            ensure!(refused == "0");
            attacks.push(attack);
            Ok(users.state_for(0)? == "failed")
        })
    });
}

/// Holds as many connections as possible, and replaces those that are closed.
const IDLE: &str = r#"
import select, socket, sys
path, count = sys.argv[1], int(sys.argv[2])
poll, held = select.poll(), {}
while True:
    while len(held) < count:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(path)
        held[connection.fileno()] = connection
        poll.register(connection, select.POLLIN)
        if len(held) == count:
            print("full", flush=True)
    for descriptor, _ in poll.poll():
        poll.unregister(descriptor)
        held.pop(descriptor).close()
"#;

#[test]
fn a_user_with_many_connections_does_not_disturb_other_users() {
    test(|| {
        let users = Users::new()?;
        users.up("")?;
        ensure!(fs::metadata("/run/vpn-exec/nowhere/socket")?.mode() & 0o777 == 0o600);
        let (_idle, word) = attack(STRANGER, IDLE, "/run/vpn-exec/nowhere/public 200")?;
        ensure!(word == "full");
        // The attacker's own requests are refused, and the tunnel stays up.
        let is_busy = || {
            let state = users.state_for(STRANGER)?;
            ensure!(["connecting", "busy"].contains(&&*state), "it is told {state}");
            Ok(state == "busy")
        };
        lab::wait_until(PATIENCE, "a user with 200 connections is served", is_busy)?;
        for _ in 0..20 {
            for user in [0, OTHER_STRANGER] {
                let state = users.state_for(user)?;
                ensure!(state == "connecting", "user {user} is told {state}");
            }
        }
        users.down()?;
        ensure_nothing_left()
    });
}

/// A pipe without a reader for now.
struct Paused {
    reader: std::io::PipeReader,
    writer: std::io::PipeWriter,
}

impl Paused {
    fn new() -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        Ok(Self { reader, writer })
    }

    /// Fills the pipe without changing the blocking mode of other descriptors: this one has its own open file
    /// description.
    fn fill(&self) -> Result<()> {
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::OpenOptionsExt;

        let path = format!("/proc/self/fd/{}", self.writer.as_raw_fd());
        let mut own = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        for size in [4096, 1] {
            loop {
                match own.write(&vec![b'x'; size]) {
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Reads until a text has come.
    fn await_text(&mut self, wanted: &str) -> Result<()> {
        let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
        while !seen.windows(wanted.len()).any(|window| window == wanted.as_bytes()) {
            let length = std::io::Read::read(&mut self.reader, &mut piece)?;
            ensure!(length > 0, "{wanted:?} is not said");
            seen.extend_from_slice(&piece[..length]);
        }
        Ok(())
    }
}

fn keeper_of_nowhere() -> Result<u32> {
    let state: serde_json::Value = serde_json::from_str(&fs::read_to_string("/run/vpn-exec/nowhere/state")?)?;
    Ok(u32::try_from(state["keeper"].as_u64().context("a keeper")?)?)
}

#[test]
fn a_keeper_does_not_wait_for_the_reader_of_its_messages() {
    test(|| {
        let program = lab::launcher::binary().display();
        let is_served = || Ok(said(&run(&format!("{program} status nowhere"))?).contains("connecting"));
        let path = config("10.64.3.2/32", "0.0.0.0/0")?;
        let in_foreground = format!("exec {program} -v up --foreground {} --backend userspace", path.display());
        let of_program = format!("exec {} -- sleep 60", vpn_exec()?);
        // The messages after SIGHUP, which requests a reload.
        for (script, answer) in [(in_foreground, "is unchanged"), (of_program, "cannot read its configuration again")] {
            let mut paused = Paused::new()?;
            let mut child = bash(&script).stderr(paused.writer.try_clone()?).spawn()?;
            lab::wait_until(PATIENCE, "there is no tunnel", is_served)?;
            paused.fill()?;
            let keeper = keeper_of_nowhere()?;
            for _ in 0..10 {
                run(&format!("kill -HUP {keeper}"))?;
                ensure!(is_served()?, "{script}: the keeper waits for the reader of its messages");
            }
            // Messages that fit into the pipe are read later.
            paused.await_text(answer)?;
            paused.fill()?;
            let output = run(&format!("{program} down nowhere --force"))?;
            ensure!(output.status.success(), "{}", said(&output));
            // The launcher, in contrast, may wait for its reader.
            drop(paused);
            wait_for(&mut child)?;
            ensure_nothing_left()?;
        }
        Ok(())
    });
}
