//! What the program gets and what it does not: privileges, descriptors, identity, signals, the terminal, its own view of files;
//! and what its caller gets back. The tunnels here lead nowhere, and need not.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::world;

const FILE: &str = "\
[Interface]
PrivateKey = iGxYvNQ5eVwPrTzY3Qe5MHfNxGbKxFfQyM7zq2nX8Vc=
Address = 10.64.3.2/32, fc00:bbbb::3:2/128
DNS = 10.64.0.1, vpn.example

[Peer]
PublicKey = hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 127.0.0.1:9
";

/// How long anything may take that does not hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test in a world of its own with a file of a tunnel that leads nowhere.
fn test_with_file<F: FnOnce(PathBuf) -> Result<()>>(body: F) {
    world::test_as(std::any::type_name::<F>(), || {
        lab::require_tun()?;
        body(config_file()?)
    });
}

fn config_file() -> Result<PathBuf> {
    use std::os::unix::fs::OpenOptionsExt;

    let path = Path::new(world::FILES).join("nowhere.conf");
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?.write_all(FILE.as_bytes())?;
    Ok(path)
}

/// A command that runs `program` in a tunnel.
fn vpn_exec(config: &Path, options: &[&str], program: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
    command.arg("--config").arg(config).args(["--backend", "userspace"]).args(options).arg("--").args(program);
    command.stdin(Stdio::null());
    command
}

/// What a program that succeeds prints.
fn stdout_of(mut command: Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?} failed: {}", said(&output));
    Ok(String::from_utf8(output.stdout)?)
}

fn said(output: &Output) -> String {
    format!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A field of `/proc/self/status`.
fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).context(name.to_owned())?;
    Ok(line.split_once(':').map(|(_, value)| value.trim()).unwrap_or_default())
}

fn bits(status: &str, name: &str) -> Result<u64> {
    Ok(u64::from_str_radix(field(status, name)?, 16)?)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !condition()? {
        ensure!(begin.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn wait_for_end(child: &mut Child) -> Result<std::process::ExitStatus> {
    let mut status = None;
    wait_until("the end of vpn-exec", || {
        status = child.try_wait()?;
        Ok(status.is_some())
    })?;
    status.context("ended")
}

const CAP_NET_RAW: u64 = 1 << 13;

#[test]
fn the_program_has_no_privileges_and_no_way_to_any() {
    test_with_file(|config| {
        let status = stdout_of(vpn_exec(&config, &[], &["cat", "/proc/self/status"]))?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == 0, "{set} is {}", field(&status, set)?);
        }
        ensure!(field(&status, "NoNewPrivs")? == "1");
        // The twin: without vpn-exec there would have been some.
        let status = fs::read_to_string("/proc/self/status")?;
        ensure!(bits(&status, "CapEff")? != 0);
        Ok(())
    });
}

#[test]
fn root_keeps_what_was_asked_for_and_no_more() {
    test_with_file(|config| {
        let program = ["sh", "-c", "cat /proc/self/status"];
        let status = stdout_of(vpn_exec(&config, &["--keep-cap", "net_raw"], &program))?;
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            ensure!(bits(&status, set)? == CAP_NET_RAW, "{set} is {}", field(&status, set)?);
        }
        ensure!(bits(&status, "CapAmb")? == 0, "root needs no ambient capability");
        let status = stdout_of(vpn_exec(&config, &["--new-privs"], &["cat", "/proc/self/status"]))?;
        ensure!(field(&status, "NoNewPrivs")? == "0");
        ensure!(bits(&status, "CapBnd")? == 0, "a set-user-ID program would gain a user, but no capability");
        Ok(())
    });
}

#[test]
fn the_secure_bits_are_locked() {
    test_with_file(|config| {
        let report = probe(&config, &[], "secure-bits")?;
        // NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, all locked, and KEEP_CAPS locked off (linux/securebits.h).
        ensure!(report == "0xef", "{report}");
        Ok(())
    });
}

/// Runs this very executable as the program, in the function [`probe_inside`], and returns what it reports.
fn probe(config: &Path, options: &[&str], what: &str) -> Result<String> {
    let own = std::env::current_exe()?;
    let own = own.to_str().context("a path in UTF-8")?;
    let mut command = vpn_exec(config, options, &[own, "probe_inside", "--exact", "--ignored", "--nocapture"]);
    command.env("VPN_EXEC_TEST_PROBE", what);
    let output = stdout_of(command)?;
    let report = output.split("report: ").nth(1).with_context(|| format!("no report in {output}"))?;
    Ok(report.lines().next().unwrap_or_default().to_owned())
}

/// What [`probe`] runs inside. By itself it does nothing.
#[test]
#[ignore = "this is the program that other tests run in a tunnel"]
fn probe_inside() {
    let Ok(what) = std::env::var("VPN_EXEC_TEST_PROBE") else { return };
    let report = match what.as_str() {
        "secure-bits" => format!("{:#x}", rustix::thread::capabilities_secure_bits().expect("readable").bits()),
        other => panic!("there is no probe {other}"),
    };
    println!("report: {report}");
}

/// The permitted and the effective capabilities of all threads of a process, each once.
fn capabilities_of(pid: u32) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let sets = (bits(&status, "CapPrm")?, bits(&status, "CapEff")?);
        if !found.contains(&sets) {
            found.push(sets);
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[test]
fn each_process_may_do_what_its_next_step_takes() {
    const KILL: u64 = 1 << 5;
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_PTRACE: u64 = 1 << 19;
    const SYS_ADMIN: u64 = 1 << 21;
    test_with_file(|config| {
        let mut child =
            vpn_exec(&config, &[], &["sh", "-c", "echo up; exec sleep 1000"]).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        let state = vpn_exec::tunnel::state::read(&"nowhere".parse()?)?.context("a state")?;
        let all = KILL | NET_ADMIN | SYS_PTRACE | SYS_ADMIN;
        ensure!(capabilities_of(child.id())? == [(all, KILL)], "{:x?}", capabilities_of(child.id())?);
        // The thread of the data path, and the one that watches the tunnel.
        let keeper = capabilities_of(state.keeper)?;
        ensure!(keeper == [(0, 0), (all, NET_ADMIN)], "{keeper:x?}");
        let keeper = fs::read_to_string(format!("/proc/{}/status", state.keeper))?;
        ensure!(bits(&keeper, "CapBnd")? == 0, "{keeper}");
        kill(child.id(), "TERM")?;
        wait_for_end(&mut child)?;
        Ok(())
    });
}

#[test]
fn what_is_used_instead_of_the_kernels_wireguard_is_said() {
    test_with_file(|config| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
        command.arg("-v").arg("--config").arg(&config).args(["--backend", "auto", "--", "true"]).stdin(Stdio::null());
        let output = command.output()?;
        ensure!(output.status.success(), "{}", said(&output));
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        let kernel = words.contains("using the kernel's WireGuard");
        let embedded = words.contains("using the embedded WireGuard instead");
        ensure!(kernel != embedded, "one of them, and it is said: {words}");
        Ok(())
    });
}

#[test]
fn the_hosts_own_idea_of_host_internal_does_not_count() {
    test_with_file(|config| {
        let before = fs::read_to_string("/etc/hosts")?;
        fs::write("/etc/hosts", format!("203.0.113.99 host.internal\n{before}"))?;
        let text = stdout_of(vpn_exec(&config, &[], &["getent", "ahostsv4", "host.internal"]))?;
        ensure!(text.starts_with("10."), "{text}");
        Ok(())
    });
}

#[test]
fn a_state_that_nobody_wrote_is_named_and_left_alone() {
    test_with_file(|config| {
        fs::create_dir_all("/run/vpn-exec/nowhere")?;
        fs::write("/run/vpn-exec/nowhere/state", "garbage")?;
        let output = vpn_exec(&config, &[], &["true"]).output()?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(125), "{words}");
        ensure!(words.contains("/run/vpn-exec/nowhere/state") && words.contains("remove the file"), "{words}");
        ensure!(fs::read_to_string("/run/vpn-exec/nowhere/state")? == "garbage");
        Ok(())
    });
}

#[test]
fn a_terminals_signals_reach_what_the_program_left_behind() {
    test_with_file(|config| {
        // A shell has what runs in its background ignore what the terminal sends, and that is inherited.
        let script = "setsid env --default-signal=INT sh -c 'trap \"echo heard; exit\" INT; echo \"le\"ft; while :; do sleep 0.1; done' & exit 3";
        let config = config.to_str().context("UTF-8")?;
        let command =
            [env!("CARGO_BIN_EXE_vpn-exec"), "--config", config, "--backend", "userspace", "--", "sh", "-c", script];
        let (mut terminal, mut child) = Terminal::start(&command)?;
        terminal.expect("left")?;
        std::thread::sleep(Duration::from_millis(300));
        terminal.send("\x03")?;
        terminal.expect("heard")?;
        ensure!(wait_for_end(&mut child)?.code() == Some(3));
        Ok(())
    });
}

#[test]
fn another_user_has_its_own_identity_and_what_it_keeps() {
    test_with_file(|config| {
        if !has_other_users()? {
            return Ok(());
        }
        let options = ["--user", "4321", "--group", "8765", "--keep-cap", "CAP_NET_RAW"];
        let status = stdout_of(vpn_exec(&config, &options, &["cat", "/proc/self/status"]))?;
        ensure!(field(&status, "Uid")? == "4321\t4321\t4321\t4321");
        ensure!(field(&status, "Gid")? == "8765\t8765\t8765\t8765");
        ensure!(field(&status, "Groups")? == "8765", "no group of the caller's stays");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == CAP_NET_RAW, "{set} is {}", field(&status, set)?);
        }
        let status = stdout_of(vpn_exec(&config, &["--user", "4321"], &["cat", "/proc/self/status"]))?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(bits(&status, set)? == 0, "{set} is {}", field(&status, set)?);
        }
        Ok(())
    });
}

#[test]
fn under_sudo_the_program_is_its_caller() {
    test_with_file(|config| {
        if !has_other_users()? {
            return Ok(());
        }
        let mut command = vpn_exec(&config, &[], &["sh", "-c", "id -u; id -g; echo $HOME; echo ${SUDO_UID-none}"]);
        let nobody = rustix::process::getuid();
        command.env("SUDO_UID", "65534").env("SUDO_USER", "nobody").env("HOME", "/root");
        let text = stdout_of(command)?;
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[0] == "65534" && lines[3] == "none", "{nobody:?}: {text}");
        ensure!(lines[2] != "/root", "HOME is the caller's: {text}");
        let mut command = vpn_exec(&config, &["--user", "0"], &["id", "-u"]);
        command.env("SUDO_UID", "65534");
        ensure!(stdout_of(command)? == "0\n", "--user goes before sudo");
        Ok(())
    });
}

/// Whether the world has users other than root: it has only if an administrator made it.
fn has_other_users() -> Result<bool> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let has = map.split_ascii_whitespace().nth(2).is_some_and(|count| count != "1");
    if !has {
        println!("skipped: the world of an ordinary user has no other users");
    }
    Ok(has)
}

#[test]
fn only_the_standard_descriptors_and_those_of_listen_fds_pass_on() {
    test_with_file(|config| {
        // Which descriptors of the program lead to the file that its callers have open.
        let list = "ls -l /proc/$$/fd | sed -n 's|.* \\([0-9]*\\) -> .*/nowhere.conf|\\1|p' | tr '\\n' ' '";
        let inherit = |setup: &str| -> Result<(String, String)> {
            let vpn_exec = env!("CARGO_BIN_EXE_vpn-exec");
            let config = config.display();
            let script = format!(
                "exec 3<{config} 4<{config} 7<{config}; {setup} exec {vpn_exec} --config {config} --backend userspace -- \
                 sh -c 'if [ \"$LISTEN_PID\" = $$ ]; then echo mine; else echo \"$LISTEN_PID\"; fi; eval \"$LIST\"'"
            );
            let mut command = Command::new("bash");
            command.args(["-c", &script]).env("LIST", list).stdin(Stdio::null());
            let text = stdout_of(command)?;
            let (listen, descriptors) = text.split_once('\n').context("two lines")?;
            Ok((listen.to_owned(), descriptors.trim_end().to_owned()))
        };
        let pair = |listen: &str, descriptors: &str| (listen.to_owned(), descriptors.to_owned());
        ensure!(inherit("")? == pair("", ""));
        let passed = inherit("LISTEN_FDS=2 LISTEN_PID=$$")?;
        ensure!(passed == pair("mine", "3 4"), "{passed:?}");
        let others = inherit("LISTEN_FDS=2 LISTEN_PID=1")?;
        ensure!(others == pair("1", ""), "they are somebody else's: {others:?}");
        Ok(())
    });
}

#[test]
fn the_exit_status_is_the_programs() {
    test_with_file(|config| {
        for (program, code) in [
            (&["true"][..], 0),
            (&["sh", "-c", "exit 7"], 7),
            (&["sh", "-c", "exit 255"], 255),
            (&["/etc/passwd"], 126),
            (&["/nonexistent/program"], 127),
            (&["no-such-program-anywhere"], 127),
        ] {
            let output = vpn_exec(&config, &[], program).output()?;
            ensure!(output.status.code() == Some(code), "{program:?}: {}", said(&output));
        }
        for signal in [1, 2, 6, 9, 13, 15] {
            let output = vpn_exec(&config, &[], &["sh", "-c", &format!("kill -{signal} $$")]).output()?;
            ensure!(output.status.signal() == Some(signal), "{signal}: {}", said(&output));
        }
        Ok(())
    });
}

#[test]
fn signals_reach_the_program() {
    test_with_file(|config| {
        for signal in ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH"] {
            let script = format!("trap 'echo got; exit 3' {signal}; echo ready; while :; do sleep 0.05; done");
            let mut child = vpn_exec(&config, &[], &["sh", "-c", &script]).stdout(Stdio::piped()).spawn()?;
            let mut output = BufReader::new(child.stdout.take().context("piped")?);
            let mut line = String::new();
            output.read_line(&mut line)?;
            ensure!(line == "ready\n", "{line}");
            kill(child.id(), signal)?;
            let status = wait_for_end(&mut child)?;
            let mut rest = String::new();
            output.read_to_string(&mut rest)?;
            ensure!((rest.as_str(), status.code()) == ("got\n", Some(3)), "{signal}: {rest} {status}");
        }
        Ok(())
    });
}

#[test]
fn inherited_dispositions_and_the_mask_are_as_they_came() {
    test_with_file(|config| {
        let mut command = Command::new("sh");
        let script = format!(
            "trap '' HUP USR2; exec {} --config {} --backend userspace -- cat /proc/self/status",
            env!("CARGO_BIN_EXE_vpn-exec"),
            config.display()
        );
        command.args(["-c", &script]).stdin(Stdio::null());
        let status = stdout_of(command)?;
        let (hup, usr2) = (1 << 0, 1 << 11);
        // The C library's own signals, 32 and 33, are as the test itself was started with.
        let standard = (1 << 31) - 1;
        ensure!(bits(&status, "SigIgn")? & standard == hup | usr2, "{}", field(&status, "SigIgn")?);
        ensure!(bits(&status, "SigBlk")? == 0, "{}", field(&status, "SigBlk")?);
        Ok(())
    });
}

#[test]
fn the_program_ends_with_vpn_exec() {
    test_with_file(|config| {
        let mut child =
            vpn_exec(&config, &[], &["sh", "-c", "echo $$; exec sleep 1000"]).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        let program = PathBuf::from(format!("/proc/{}/cmdline", line.trim()));
        // The keeper would end the program, too. It is kept from that, so this is the kernel's own doing.
        let state = vpn_exec::tunnel::state::read(&"nowhere".parse()?)?.context("a state")?;
        let keeper = state.keeper;
        kill(keeper, "STOP")?;
        child.kill()?;
        child.wait()?;
        wait_until("the end of the program", || Ok(!fs::read(&program).is_ok_and(|text| !text.is_empty())))?;
        kill(keeper, "CONT")?;
        wait_until("the end of the tunnel", || Ok(!Path::new("/run/vpn-exec").exists()))
    });
}

#[test]
fn orphans_keep_the_tunnel_until_they_end() {
    test_with_file(|config| {
        // The orphan has a session of its own, and looks at the tunnel after its parent has ended.
        let script = "setsid sh -c 'sleep 0.6; cat /sys/class/net/wg0/mtu; echo late' & exit 4";
        let output = vpn_exec(&config, &[], &["sh", "-c", script]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.code() == Some(4), "{}", said(&output));
        ensure!(text.ends_with("late\n") && text.lines().count() == 2, "{}", said(&output));

        let begin = Instant::now();
        let output = vpn_exec(&config, &["--kill-orphans"], &["sh", "-c", "setsid sleep 1000 & exit 5"]).output()?;
        ensure!(output.status.code() == Some(5), "{}", said(&output));
        ensure!(begin.elapsed() < PATIENCE);
        Ok(())
    });
}

#[test]
fn the_files_that_tell_of_names_are_the_tunnels() {
    test_with_file(|config| {
        let script = "cat /etc/resolv.conf; echo ---; cat /etc/hosts; echo ---; cat /etc/nsswitch.conf; echo ---; \
                      ls /sys/class/net | tr '\\n' ' '; echo; echo x 2>&- >/etc/resolv.conf && echo written; true";
        let before = fs::read_to_string("/etc/resolv.conf")?;
        let text = stdout_of(vpn_exec(&config, &[], &["sh", "-c", script]))?;
        let parts: Vec<&str> = text.split("---\n").collect();
        let servers: Vec<&str> = parts[0].lines().filter(|line| line.starts_with("nameserver")).collect();
        ensure!(servers == ["nameserver 10.64.0.1"], "{text}");
        ensure!(parts[0].contains("search vpn.example"), "{text}");
        ensure!(parts[1].contains("127.0.0.1 localhost"), "the host's own lines stay: {text}");
        ensure!(parts[1].lines().filter(|line| line.ends_with(" host.internal")).count() == 2, "{text}");
        ensure!(parts[2].lines().filter(|line| line.starts_with("hosts:")).eq(["hosts: files dns"]), "{text}");
        ensure!(parts[3].lines().eq(["host0 lo wg0 "]), "{text}");
        ensure!(fs::read_to_string("/etc/resolv.conf")? == before, "the host's own is as it was");
        Ok(())
    });
}

#[test]
fn a_host_without_resolv_conf_is_served_too() {
    test_with_file(|config| {
        // A layer in memory over the world's /etc, in which files can be missing.
        let layer = Path::new("/run/lab/layer");
        fs::create_dir(layer)?;
        vpn_exec::linux::mounts::memory(layer)?;
        if let Err(error) = vpn_exec::linux::mounts::overlay(Path::new("/etc"), layer) {
            println!("skipped: no overlayfs here: {error}");
            return Ok(());
        }
        for dangling in [false, true] {
            fs::remove_file("/etc/resolv.conf")?;
            if dangling {
                std::os::unix::fs::symlink("../run/nowhere/resolv.conf", "/etc/resolv.conf")?;
            }
            let text = stdout_of(vpn_exec(&config, &[], &["cat", "/etc/resolv.conf", "/etc/hosts"]))?;
            ensure!(text.contains("nameserver 10.64.0.1") && text.contains("host.internal"), "{text}");
            ensure!(!Path::new("/etc/resolv.conf").exists(), "the host's own is as it was");
            if !dangling {
                fs::write("/etc/resolv.conf", "")?;
            }
        }
        Ok(())
    });
}

#[test]
fn working_directory_and_umask_stay() {
    test_with_file(|config| {
        let mut command = Command::new("sh");
        let script = format!(
            "umask 031; cd /usr/lib; exec {} --config {} --backend userspace -- sh -c 'pwd; umask'",
            env!("CARGO_BIN_EXE_vpn-exec"),
            config.display()
        );
        command.args(["-c", &script]).stdin(Stdio::null());
        ensure!(stdout_of(command)? == "/usr/lib\n0031\n");
        Ok(())
    });
}

#[test]
fn a_strict_umask_hides_nothing_from_the_program() {
    test_with_file(|config| {
        let mut command = Command::new("sh");
        let script = format!(
            "umask 077; exec {} --config {} --backend userspace -- stat -c %a /etc/resolv.conf /etc/hosts /run/vpn-exec",
            env!("CARGO_BIN_EXE_vpn-exec"),
            config.display()
        );
        command.args(["-c", &script]).stdin(Stdio::null());
        ensure!(stdout_of(command)? == "644\n644\n711\n");
        Ok(())
    });
}

#[test]
fn a_large_hosts_file_is_shown_whole() {
    test_with_file(|config| {
        let before = fs::read_to_string("/etc/hosts")?;
        let many: String = (0..100_000).map(|number| format!("0.0.0.0 advertisement-{number}.example\n")).collect();
        fs::write("/etc/hosts", before + &many)?;
        let text = stdout_of(vpn_exec(&config, &[], &["cat", "/etc/hosts"]))?;
        ensure!(
            text.lines().next().is_some_and(|first| first.ends_with(" host.internal")),
            "ours come first, and count"
        );
        ensure!(text.ends_with("advertisement-99999.example\n"));
        Ok(())
    });
}

fn kill(pid: u32, signal: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).status()?;
    ensure!(status.success());
    Ok(())
}

/// A terminal, and what appears on it.
struct Terminal {
    master: File,
    seen: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    /// Starts a command whose controlling terminal this is, as the leader of its session.
    fn start(command: &[&str]) -> Result<(Self, Child)> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        let slave = || -> Result<OwnedFd> { Ok(OpenOptions::new().read(true).write(true).open(&name)?.into()) };
        let mut setsid = Command::new("setsid");
        setsid.args(["--ctty", "--wait"]).args(command).env("PS1", "$ ").env("TERM", "dumb");
        let child = setsid.stdin(slave()?).stdout(slave()?).stderr(slave()?).spawn()?;
        let master = File::from(master);
        let mut reader = master.try_clone()?;
        let (sender, seen) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok((Self { master, seen, text: String::new() }, child))
    }

    fn send(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Waits for a text that was not seen before.
    fn expect(&mut self, text: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            if let Some(at) = self.text.find(text) {
                self.text.drain(..at + text.len());
                return Ok(());
            }
            let left = PATIENCE.saturating_sub(begin.elapsed());
            match self.seen.recv_timeout(left) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => bail!("{text:?} does not appear; there is: {:?}", self.text),
            }
        }
    }
}

#[test]
fn ctrl_c_is_delivered_once() {
    test_with_file(|config| {
        let script = "trap 'echo interrupted' INT; trap 'exit 6' TERM; echo ready; while :; do sleep 0.1; done";
        let config = config.to_str().context("UTF-8")?;
        let binary = env!("CARGO_BIN_EXE_vpn-exec");
        let command = [binary, "--config", config, "--backend", "userspace", "--", "sh", "-c", script];
        let (mut terminal, mut child) = Terminal::start(&command)?;
        terminal.expect("ready")?;
        terminal.send("\x03")?;
        terminal.expect("interrupted")?;
        std::thread::sleep(Duration::from_millis(500));
        terminal.send("\x1c")?; // Ctrl-\ ends the shell by SIGQUIT, and so vpn-exec.
        let status = wait_for_end(&mut child)?;
        ensure!(status.code() == Some(131) || status.signal() == Some(3), "{status}");
        let mut again = String::new();
        while let Ok(bytes) = terminal.seen.try_recv() {
            again.push_str(&String::from_utf8_lossy(&bytes));
        }
        ensure!(!again.contains("interrupted") && !terminal.text.contains("interrupted"), "twice: {again}");
        Ok(())
    });
}

#[test]
fn job_control_works() {
    test_with_file(|config| {
        let (mut terminal, mut child) = Terminal::start(&["bash", "--norc", "--noprofile", "-i"])?;
        let binary = env!("CARGO_BIN_EXE_vpn-exec");
        let line = format!(
            "{binary} --config {} --backend userspace -- sh -c 'echo \"rea\"dy; read word; echo got $word'; echo \"en\"ded $?\n",
            config.display()
        );
        terminal.send(&line)?;
        terminal.expect("ready")?;
        terminal.send("\x1a")?;
        terminal.expect("Stopped")?;
        terminal.send("echo \"she\"ll\n")?;
        terminal.expect("shell")?;
        terminal.send("fg\n")?;
        // The shell says what it takes to the foreground before it does so.
        terminal.expect("read word")?;
        std::thread::sleep(Duration::from_millis(300));
        terminal.send("hello\n")?;
        terminal.expect("got hello")?;
        terminal.send("exit 0\n")?;
        ensure!(wait_for_end(&mut child)?.success());
        Ok(())
    });
}

#[test]
fn pipelines_in_a_terminal_work() {
    test_with_file(|config| {
        let (mut terminal, mut child) = Terminal::start(&["bash", "--norc", "--noprofile", "-i"])?;
        let binary = env!("CARGO_BIN_EXE_vpn-exec");
        // What reads from the terminal is the last part of the pipeline: it must be in the foreground.
        let line = format!(
            "{binary} --config {} --backend userspace -- sh -c 'echo data' | {{ read a; read b </dev/tty; echo \"bo\"th $a $b; }}\n",
            config.display()
        );
        terminal.send(&line)?;
        std::thread::sleep(Duration::from_millis(300));
        terminal.send("typed\n")?;
        terminal.expect("both data typed")?;
        terminal.send("exit 0\n")?;
        ensure!(wait_for_end(&mut child)?.success());
        Ok(())
    });
}
