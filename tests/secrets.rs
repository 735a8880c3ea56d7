//! A tunnel's keys are only in the provider's file and in the memory of vpn-exec's processes, which other processes of
//! the same user cannot inspect. They are not in arguments, environments, files, messages, plans, descriptors or the
//! program.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lab::agent::{self, report_of};
use lab::key_search::{Findings, PIECE, Pieces};
use lab::{Lab, Launcher, Peer, Reach, Skip, variables, vpn_exec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use vpn_exec::linux::mounts;
use vpn_exec::registry;

/// The time in which an action succeeds that works at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Returns a command line that runs the agent in a tunnel, where it looks for keys.
fn inspected(config: &Path, name: &str) -> Launcher {
    let launcher = Launcher::with_backend(config, "userspace").options(["-vvv", "--name", name, "--wait", "20"]);
    launcher.program(agent::task(&format!("inspect {name}")))
}

/// A running tunnel, and the findings of its program.
struct Running {
    child: Child,
    errors: std::thread::JoinHandle<Vec<u8>>,
    findings: Findings,
}

impl Running {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        // A thread reads, as the messages of -vvv do not fit into a pipe.
        let mut pipe = child.stderr.take().context("a piped output")?;
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            text
        });
        match report_of(&mut child) {
            Ok(Some(findings)) => Ok(Self { child, errors, findings }),
            other => {
                child.wait()?;
                bail!("{other:?}: {}", String::from_utf8_lossy(&errors.join().unwrap_or_default()))
            }
        }
    }

    /// Ends the tunnel, and returns its standard error.
    fn end(mut self) -> Result<Vec<u8>> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        self.child.wait()?;
        self.errors.join().map_err(|_| anyhow::anyhow!("the reader panicked"))
    }
}

/// Returns the pieces of the customer's keys, and the file with the keys.
fn pieces_and_file(lab: &Lab) -> Result<(Pieces, PathBuf)> {
    let text = lab.wg_quick_text(Reach::Ipv4);
    let value = |key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = ")).with_context(|| format!("no {key}"))
    };
    let pieces = Pieces::of_keys(&[value("PrivateKey")?, value("PresharedKey")?])?;
    pieces.write()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    // The search finds them where they are.
    assert_eq!(pieces.count_in(&fs::read(&file)?), 2 * (44 - PIECE + 1));
    Ok((pieces, file))
}

/// Mounts an empty `/tmp` for the world, which shows only this build if that is below `/tmp`.
fn own_tmp() -> Result<PathBuf> {
    let build = std::env::current_exe()?.ancestors().nth(2).context("a folder of this build")?.to_owned();
    let kept = Path::new("/run/lab/build");
    if build.starts_with("/tmp") {
        fs::create_dir(kept)?;
        rustix::mount::mount_bind_recursive(&build, kept)?;
    }
    rustix::mount::mount("lab-tmp", "/tmp", c"tmpfs", rustix::mount::MountFlags::NOSUID, Some(c"mode=1777"))?;
    if build.starts_with("/tmp") {
        fs::create_dir_all(&build)?;
        rustix::mount::mount_bind_recursive(kept, &build)?;
        mounts::detach(kept)?;
        fs::remove_dir(kept)?;
    }
    Ok(build)
}

/// Finds files with pieces of keys below a directory.
fn files_with(pieces: &Pieces, folder: &Path, except: &[&Path], found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if except.contains(&path.as_path()) {
            continue;
        }
        let Ok(status) = fs::symlink_metadata(&path) else { continue };
        if status.is_dir() {
            files_with(pieces, &path, except, found)?;
        } else if status.is_file() && pieces.count_in(&fs::read(&path).unwrap_or_default()) > 0 {
            found.push(path);
        }
    }
    Ok(())
}

/// Returns files in /proc with arguments or environments that contain pieces of keys.
fn processes_with(pieces: &Pieces) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut read = 0;
    for entry in fs::read_dir("/proc")? {
        for name in ["cmdline", "environ", "comm"] {
            let path = entry.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?.path().join(name);
            let Ok(text) = fs::read(&path) else { continue };
            read += usize::from(!text.is_empty());
            if pieces.count_in(&text) > 0 {
                found.push(path);
            }
        }
    }
    // At least the test, init, the launcher, the keeper and the program have all three.
    ensure!(read >= 5 * 3, "only {read} could be read");
    Ok(found)
}

#[test]
fn no_argument_environment_file_or_message_contains_a_key() {
    lab::test(Peer::Ours, |lab| {
        let build = own_tmp()?;
        let (pieces, file) = pieces_and_file(lab)?;
        let running = Running::start(inspected(&file, "secrets").command())?;

        assert_eq!(processes_with(&pieces)?, Vec::<PathBuf>::new());
        let mut found = Vec::new();
        for folder in ["/run", "/tmp"] {
            files_with(&pieces, folder.as_ref(), &[&file, &build], &mut found)?;
        }
        assert_eq!(found, Vec::<PathBuf>::new());
        // The twins: the searches find keys that are there.
        fs::copy(&file, "/tmp/left")?;
        files_with(&pieces, "/tmp".as_ref(), &[&build], &mut found)?;
        assert_eq!(found, [Path::new("/tmp/left")]);
        let key = fs::read_to_string(&file)?.lines().find(|line| line.starts_with("PrivateKey")).map(str::to_owned);
        let mut with_key = Command::new("sleep").arg("1000").env("KEY", key.context("a key")?).spawn()?;
        // The kernel shows a new process's environment a little later.
        let environment = Path::new("/proc").join(with_key.id().to_string()).join("environ");
        lab::wait_until(lab::patience(PATIENCE), "it has no environment", || Ok(!fs::read(&environment)?.is_empty()))?;
        assert_eq!(processes_with(&pieces)?, [environment]);
        with_key.kill()?;
        with_key.wait()?;

        let errors = running.end()?;
        let text = String::from_utf8_lossy(&errors);
        assert!(text.contains("handshake") && text.contains("completed"), "-vvv says more than this: {text}");
        assert_eq!(pieces.count_in(&errors), 0, "{text}");
        Ok(())
    });
}

#[test]
fn the_program_cannot_reach_the_keys() {
    lab::test(Peer::Ours, |lab| {
        let (pieces, file) = pieces_and_file(lab)?;
        let running = Running::start(inspected(&file, "secrets").command())?;
        let findings = &running.findings;
        assert_eq!(findings.launcher, running.child.id().cast_signed());
        assert_eq!(findings.descriptors, Vec::<String>::new());
        assert_eq!(findings.opened, Vec::<String>::new());
        assert_eq!((findings.in_memory, findings.in_arguments), (0, 0));
        assert!(findings.in_memory_when_planted > 0, "the search finds nothing: {findings:?}");

        // The keeper's memory has the keys, which only a tracer such as this test can read. The launcher's has none.
        assert!(pieces.count_in_memory(&findings.keeper.to_string())? > 0, "the keeper's memory cannot be searched");
        assert_eq!(pieces.count_in_memory(&findings.launcher.to_string())?, 0, "the launcher still has pieces of keys");
        running.end()?;
        Ok(())
    });
}

/// A keeper needs the keys in binary. No process keeps their base64 text after it was read and handed over.
#[test]
fn no_process_keeps_the_base64_text_of_a_key() {
    lab::test(Peer::Ours, |lab| {
        let (all, file) = pieces_and_file(lab)?;
        let text = lab.wg_quick_text(Reach::Ipv4);
        let keys: Vec<&str> = ["PrivateKey = ", "PresharedKey = "]
            .iter()
            .filter_map(|key| text.lines().find_map(|line| line.strip_prefix(key)))
            .collect();
        ensure!(keys.len() == 2, "{} keys", keys.len());
        let texts = Pieces::of_texts(&keys);
        let searched = |what: &str, pid: i32| -> Result<()> {
            ensure!(all.count_in_memory(&pid.to_string())? > 0, "{what}: its memory cannot be searched");
            let found = texts.count_in_memory(&pid.to_string())?;
            ensure!(found == 0, "{what}: {found} pieces of the texts of keys are left");
            Ok(())
        };

        let running = Running::start(inspected(&file, "secrets").command())?;
        searched("the keeper of a program", running.findings.keeper)?;
        running.end()?;

        let up = |more: &[&str]| {
            let mut command = vpn_exec(["up"]);
            command.arg(&file).args(["--backend", "userspace", "--name", "standing"]).args(more);
            command
        };
        let keeper =
            || -> Result<i32> { Ok(registry::read(&"standing".parse()?)?.context("a state")?.keeper.cast_signed()) };
        ensure!(up(&["--wait", "20"]).status()?.success());
        searched("the keeper of a standing tunnel", keeper()?)?;

        // Another keeper replaces the first one, and reloads the file after SIGHUP.
        let replaced = keeper()?;
        let mut child = up(&["--foreground", "--replace"]).spawn()?;
        let is_there = || Ok(keeper()? != replaced && registry::socket_of(&"standing".parse()?).exists());
        lab::wait_until(lab::patience(PATIENCE), "no keeper in the foreground", is_there)?;
        let asked = |word: &str| vpn_exec([word, "standing"]).output();
        // A keeper that answers runs.
        ensure!(asked("status")?.status.success());
        searched("a keeper in the foreground", keeper()?)?;
        kill(Pid::from_raw(keeper()?), Signal::SIGHUP)?;
        ensure!(asked("status")?.status.success());
        searched("a keeper in the foreground that has read its file again", keeper()?)?;
        ensure!(asked("down")?.status.success());
        child.wait()?;
        Ok(())
    });
}

/// A process of an ordinary user can be inspected, and dumps core, if that user owns its files in /proc (proc(5)). So
/// an ordinary user with the necessary capabilities runs vpn-exec here.
#[test]
fn vpn_execs_processes_cannot_be_inspected_by_their_own_user() {
    const USER: u32 = 1000;
    lab::test(Peer::Ours, |lab| {
        lab::require_users()?;
        if fs::metadata(vpn_exec::linux::tun::DEVICE)?.mode() & 0o6 != 0o6 {
            let reason = format!("ordinary users cannot open {}", vpn_exec::linux::tun::DEVICE);
            return Err(Skip::error(reason, variables::REQUIRE_TUN));
        }
        let (_, file) = pieces_and_file(lab)?;
        let runtime = Path::new(lab::tunnel::RUNTIME_DIRECTORY);
        for path in [file.as_path(), Path::new("/run"), runtime].into_iter().filter(|path| path.exists()) {
            nix::unistd::chown(path, Some(Uid::from_raw(USER)), None)?;
        }
        let mut command = agent::task_on_host(&format!("as-user {USER}"));
        command.args(inspected(&file, "secrets").words());
        let running = Running::start(command)?;
        let (launcher, keeper) = (running.findings.launcher, running.findings.keeper);
        assert_eq!(running.findings.opened, Vec::<String>::new());

        let user_of = |pid: i32| -> Result<String> {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("a user")?;
            Ok(line.split_ascii_whitespace().next().context("a user")?.to_owned())
        };
        for pid in [launcher, keeper] {
            assert_eq!(user_of(pid)?, USER.to_string());
            assert_eq!(fs::metadata(format!("/proc/{pid}/status"))?.uid(), 0, "process {pid} can be inspected");
        }
        // The twin: the user owns the files of an ordinary process.
        let mut ordinary = Command::new("sleep").arg("1000").uid(USER).gid(USER).spawn()?;
        assert_eq!(fs::metadata(format!("/proc/{}/status", ordinary.id()))?.uid(), USER);

        let spy = |pids: String| -> Result<Vec<String>> {
            let mut command = agent::task_on_host(&format!("open {pids}"));
            let mut child = command.uid(USER).gid(USER).stdout(Stdio::piped()).spawn()?;
            let opened = report_of(&mut child)?.context("a report")?;
            child.wait()?;
            Ok(opened)
        };
        assert_eq!(spy(format!("{launcher} {keeper}"))?, Vec::<String>::new());
        let of_ordinary = spy(ordinary.id().to_string())?;
        for way in ["mem", "environ", "/fd/", "descriptor"] {
            assert!(of_ordinary.iter().any(|opened| opened.contains(way)), "{way} is closed anyway: {of_ordinary:?}");
        }
        ordinary.kill()?;
        ordinary.wait()?;
        running.end()?;
        Ok(())
    });
}

#[test]
fn plans_and_checks_contain_no_key() {
    lab::test(Peer::Ours, |lab| {
        let (pieces, file) = pieces_and_file(lab)?;
        for arguments in [&["plan"] as &[&str], &["plan", "--json"], &["check"], &["plan", "--json", "--allow-hooks"]] {
            let output = vpn_exec(["-vvv"]).args(arguments).arg("--config").arg(&file).output()?;
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            assert_eq!(
                pieces.count_in(&output.stdout) + pieces.count_in(&output.stderr),
                0,
                "{arguments:?}: {output:?}"
            );
        }
        Ok(())
    });
}

#[test]
fn errors_about_mangled_keys_contain_no_key() {
    lab::test(Peer::Ours, |lab| {
        let (pieces, file) = pieces_and_file(lab)?;
        let text = fs::read_to_string(&file)?;
        let mut refused = 0;
        for key in ["PrivateKey", "PresharedKey"] {
            let line = text.lines().find(|line| line.starts_with(key)).context("a key's line")?;
            let value = line.split_once(" = ").context("a value")?.1;
            let hex: String = STANDARD.decode(value)?.iter().map(|byte| format!("{byte:02x}")).collect();
            let mangled = [
                format!("{key} = {}", &value[..43]),
                format!("{key} = {}", &value[1..]),
                format!("{key} = {value}="),
                format!("{key} = {value}{value}"),
                format!("{key} = {} {}", &value[..20], &value[20..]),
                format!("{key} = !{}", &value[1..]),
                format!("{key} = \"{value}\""),
                format!("{key} = '{value}'"),
                format!("{key} = {hex}"),
                format!("{key} = 0x{}", hex.to_uppercase()),
                format!("{key} = {value} # {value}"),
                format!("{key} {value}"),
                format!("{key}: {value}"),
                format!("{key}{value}"),
                format!("{key}\t{value}"),
                format!("{key} = = {value}"),
                format!("Privatekye = {value}"),
                format!("Presharedkye = {value}"),
                format!("private_key = {value}"),
                format!("Private Key = {value}"),
                format!("{key} = \u{feff}{value}"),
                format!("{key} = {}ö", &value[..43]),
                format!("{line}\n{line}"),
                format!("[{value}]"),
                value.to_owned(),
                format!("{value} = 1"),
            ];
            for mangled in mangled {
                // Written in place, which keeps the file's mode.
                fs::write(&file, text.replacen(line, &mangled, 1))?;
                for arguments in [&["check"] as &[&str], &["plan", "--json"], &[]] {
                    let mut command = vpn_exec(["-vvv"]);
                    command.args(arguments).arg("--config").arg(&file);
                    if arguments.is_empty() {
                        command.args(["--backend", "userspace", "--", "true"]);
                    }
                    let output = command.output()?;
                    let found = pieces.count_in(&output.stdout) + pieces.count_in(&output.stderr);
                    let shown = String::from_utf8_lossy(&output.stderr);
                    assert_eq!(found, 0, "{mangled:?} with {arguments:?} is told: {shown}");
                    refused += usize::from(output.status.code() == Some(125));
                }
            }
        }
        // Nearly all of them are invalid, and refused.
        assert!(refused > 100, "{refused}");
        Ok(())
    });
}
