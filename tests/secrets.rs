//! The keys of a tunnel are nowhere but in the provider's file and in the memory of vpn-exec's own processes, which nobody of
//! the same user can look into: not in arguments, environments, files, messages, plans or descriptors, and not in the program.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lab::{Lab, Peer, Reach, Skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid};
use serde::{Deserialize, Serialize};
use vpn_exec::linux::capabilities::{self, CapabilitySet};
use vpn_exec::linux::mounts;
use vpn_exec::registry;

/// How much of a key is too much: 16 characters of base64 or hexadecimal digits, or 16 bytes.
const WINDOW: usize = 16;

/// How long something may take that works.
const PATIENCE: Duration = Duration::from_secs(20);

/// What this executable is to do when vpn-exec runs it: see [`program`].
const TASK: &str = "VPN_EXEC_TEST_TASK";

/// Where the program finds what to look for: inverted, so that it does not find what it was given.
const INVERTED: &str = "/run/lab/inverted";

/// Every piece of the keys, in every form, that must be found nowhere.
struct Needles {
    /// All bytes inverted.
    inverted: HashSet<[u8; WINDOW]>,
    /// Whether a piece begins with these two bytes, inverted: nearly always not, which makes the search fast.
    begins: Vec<bool>,
}

impl Needles {
    fn of_keys(keys: &[&str]) -> Result<Self> {
        let mut inverted = HashSet::new();
        for key in keys {
            let bytes = STANDARD.decode(key)?;
            ensure!(bytes.len() == 32, "{key:?} is no key");
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let forms = [key.as_bytes().to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes(), bytes];
            for form in forms {
                for piece in form.windows(WINDOW) {
                    inverted.insert(std::array::from_fn(|at| !piece[at]));
                }
            }
        }
        Ok(Self::of_inverted(inverted))
    }

    /// The base64 texts alone, as the provider's file has them.
    fn of_texts(keys: &[&str]) -> Self {
        let pieces = keys.iter().flat_map(|key| key.as_bytes().windows(WINDOW));
        Self::of_inverted(pieces.map(|piece| std::array::from_fn(|at| !piece[at])).collect())
    }

    fn of_inverted(inverted: HashSet<[u8; WINDOW]>) -> Self {
        let mut begins = vec![false; 1 << 16];
        for piece in &inverted {
            begins[usize::from(u16::from_be_bytes([piece[0], piece[1]]))] = true;
        }
        Self { inverted, begins }
    }

    fn write(&self) -> Result<()> {
        Ok(fs::write(INVERTED, self.inverted.iter().flatten().copied().collect::<Vec<u8>>())?)
    }

    fn read() -> Result<Self> {
        let text = fs::read(INVERTED)?;
        Ok(Self::of_inverted(text.chunks_exact(WINDOW).filter_map(|piece| piece.try_into().ok()).collect()))
    }

    /// How many pieces are in some data. The searcher leaves no copy of what it finds.
    fn count_in(&self, data: &[u8]) -> usize {
        let is_piece = |window: &&[u8]| {
            self.begins[usize::from(u16::from_be_bytes([!window[0], !window[1]]))]
                && self.inverted.contains(&std::array::from_fn(|at| !window[at]))
        };
        data.windows(WINDOW).filter(is_piece).count()
    }
}

/// How many pieces of keys are in the memory of a process: in all of it that is not the mere content of a file.
fn count_in_memory(needles: &Needles, pid: &str) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut found = 0;
    for line in maps.lines() {
        // proc_pid_maps(5): range, permissions, offset, device, inode, path.
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [range, permissions, _, _, inode, ..] = fields[..] else { bail!("{line:?}") };
        if !permissions.starts_with('r') || (inode != "0" && !permissions.contains('w')) || line.ends_with("[vvar]") {
            continue;
        }
        let (begin, end) = range.split_once('-').context("a range")?;
        let (begin, end) = (u64::from_str_radix(begin, 16)?, u64::from_str_radix(end, 16)?);
        let mut bytes = vec![0; usize::try_from(end - begin)?];
        // What cannot be read (the kernel's own pages) cannot be read by anybody.
        if memory.read_exact_at(&mut bytes, begin).is_ok() {
            found += needles.count_in(&bytes);
        }
        bytes.fill(0);
    }
    Ok(found)
}

/// What the program found out.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    launcher: i32,
    keeper: i32,
    /// Its descriptors beyond the standard ones, and where they lead.
    descriptors: Vec<String>,
    /// What it could open of vpn-exec's own processes.
    opened: Vec<String>,
    /// Pieces of keys in its own memory.
    in_memory: usize,
    /// The same after it has put one there.
    in_memory_when_planted: usize,
    /// Pieces in its arguments and its environment.
    in_arguments: usize,
}

/// What runs in the tunnel, or in its place. As a test of its own it has nothing to do.
#[test]
fn program() {
    let Ok(task) = std::env::var(TASK) else { return };
    let (task, argument) = task.split_once(' ').unwrap_or((&task, ""));
    match task {
        "look" => {
            println!("\nsaid: {}", serde_json::to_string(&look(argument).expect("a look around")).expect("plain data"));
            std::thread::sleep(std::time::Duration::from_secs(1000));
        }
        "spy" => {
            let pids: Vec<i32> = argument.split(' ').map(|pid| pid.parse().expect("a number")).collect();
            capabilities::limit(CapabilitySet::empty(), CapabilitySet::empty()).expect("capabilities can be dropped");
            let opened: Vec<String> = pids.into_iter().flat_map(open_all_of).collect();
            println!("\nsaid: {}", serde_json::to_string(&opened).expect("plain data"));
        }
        "become" => become_user(argument.parse().expect("a number")).expect("another user"),
        other => panic!("what is {other:?}?"),
    }
    std::process::exit(0);
}

fn look(name: &str) -> Result<Report> {
    let needles = Needles::read()?;
    let keeper = registry::read(&name.parse()?)?.context("a state")?.keeper.cast_signed();
    let launcher = nix::unistd::getppid().as_raw();
    let mut descriptors = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let target = fs::read_link(&path)?.display().to_string();
        let is_standard = ["0", "1", "2"].iter().any(|number| path.ends_with(number));
        if !is_standard && !target.ends_with("/fd") {
            descriptors.push(target);
        }
    }
    let in_arguments = ["/proc/self/cmdline", "/proc/self/environ"].map(fs::read);
    let in_arguments = in_arguments.into_iter().map(|text| Ok(needles.count_in(&text?))).sum::<Result<usize>>()?;
    let in_memory = count_in_memory(&needles, "self")?;
    let planted: Vec<u8> = needles.inverted.iter().next().context("a piece")?.iter().map(|byte| !byte).collect();
    let in_memory_when_planted = count_in_memory(&needles, "self")?;
    drop(std::hint::black_box(planted));
    let opened = [launcher, keeper].into_iter().flat_map(open_all_of).collect();
    Ok(Report { launcher, keeper, descriptors, opened, in_memory, in_memory_when_planted, in_arguments })
}

/// Tries all ways into a process, and says which were open.
fn open_all_of(pid: i32) -> Vec<String> {
    let mut opened: Vec<String> = ["mem", "environ", "maps", "smaps", "auxv", "pagemap", "stack", "syscall", "io"]
        .iter()
        .map(|name| format!("/proc/{pid}/{name}"))
        // Nothing is mapped at the address 0 where memory begins to be read, but to have it open is enough.
        .filter(|path| fs::File::open(path).is_ok_and(|mut file| path.ends_with("/mem") || file.read(&mut [0]).is_ok()))
        .collect();
    // Root may list descriptors by being root, but not see where they lead.
    opened.extend((0..64).map(|number| format!("/proc/{pid}/fd/{number}")).find(|link| fs::read_link(link).is_ok()));
    let Some(number) = rustix::process::Pid::from_raw(pid) else { return opened };
    if let Ok(process) = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()) {
        let stolen = (0..64).find(|descriptor| {
            rustix::process::pidfd_getfd(&process, *descriptor, rustix::process::PidfdGetfdFlags::empty()).is_ok()
        });
        opened.extend(stolen.map(|descriptor| format!("descriptor {descriptor} of {pid}")));
    }
    opened
}

/// Goes on, as another user who keeps all capabilities, with what is in `VPN_EXEC_TEST_THEN`.
fn become_user(user: u32) -> Result<()> {
    let (all, last) = (capabilities::permitted()?, capabilities::last()?);
    capabilities::keep_across_user_change()?;
    nix::unistd::setresgid(Gid::from_raw(user), Gid::from_raw(user), Gid::from_raw(user))?;
    nix::unistd::setresuid(Uid::from_raw(user), Uid::from_raw(user), Uid::from_raw(user))?;
    capabilities::set(all, all)?;
    capabilities::make_ambient(all, last)?;
    let command: Vec<String> = serde_json::from_str(&std::env::var("VPN_EXEC_TEST_THEN")?)?;
    let error =
        Command::new(&command[0]).args(&command[1..]).env(TASK, std::env::var("VPN_EXEC_TEST_TASK_THEN")?).exec();
    bail!("cannot go on with {}: {error}", command[0])
}

const ARGUMENTS: [&str; 4] = ["program", "--exact", "--nocapture", "--test-threads=1"];

fn this_with(task: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(ARGUMENTS).env(TASK, task);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// `vpn-exec` with a program that looks around.
fn vpn_exec(config: &Path, name: &str) -> Result<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
    command.args(["-vvv", "--backend", "userspace", "--name", name, "--wait", "20", "--config"]).arg(config);
    command.arg("--").arg(std::env::current_exe()?).args(ARGUMENTS).env(TASK, format!("look {name}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// What a process of this executable says.
fn said<T: for<'a> Deserialize<'a>>(child: &mut Child) -> Result<T> {
    for line in BufReader::new(child.stdout.take().context("a piped output")?).lines() {
        if let Some(said) = line?.strip_prefix("said: ") {
            return Ok(serde_json::from_str(said)?);
        }
    }
    bail!("it says nothing")
}

/// A running tunnel, and what its program has found out.
struct Running {
    child: Child,
    errors: std::thread::JoinHandle<Vec<u8>>,
    report: Report,
}

impl Running {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command.spawn()?;
        // -vvv says more than fits into a pipe.
        let mut pipe = child.stderr.take().context("a piped output")?;
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            text
        });
        match said(&mut child) {
            Ok(report) => Ok(Self { child, errors, report }),
            Err(error) => {
                child.wait()?;
                bail!("{error:#}: {}", String::from_utf8_lossy(&errors.join().unwrap_or_default()))
            }
        }
    }

    /// Ends it, and returns all that it has said on standard error.
    fn end(mut self) -> Result<Vec<u8>> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        self.child.wait()?;
        self.errors.join().map_err(|_| anyhow::anyhow!("the reader panicked"))
    }
}

/// The keys of the customer, and the file that holds them.
fn needles_and_file(lab: &Lab) -> Result<(Needles, PathBuf)> {
    let text = lab.wg_quick_text(Reach::Ipv4);
    let value = |key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = ")).with_context(|| format!("no {key}"))
    };
    let needles = Needles::of_keys(&[value("PrivateKey")?, value("PresharedKey")?])?;
    needles.write()?;
    let file = lab.wg_quick_file(Reach::Ipv4)?;
    // The judge finds them where they are.
    assert_eq!(needles.count_in(&fs::read(&file)?), 2 * (44 - WINDOW + 1));
    Ok((needles, file))
}

/// Gives the world a `/tmp` of its own, in which only this build is shown, if that is where it is.
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

/// The files below a folder in which pieces of keys are.
fn files_with(needles: &Needles, folder: &Path, except: &[&Path], found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if except.contains(&path.as_path()) {
            continue;
        }
        let Ok(status) = fs::symlink_metadata(&path) else { continue };
        if status.is_dir() {
            files_with(needles, &path, except, found)?;
        } else if status.is_file() && needles.count_in(&fs::read(&path).unwrap_or_default()) > 0 {
            found.push(path);
        }
    }
    Ok(())
}

/// The arguments and environments of processes in which pieces of keys are.
fn processes_with(needles: &Needles) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut read = 0;
    for entry in fs::read_dir("/proc")? {
        for name in ["cmdline", "environ", "comm"] {
            let path = entry.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?.path().join(name);
            let Ok(text) = fs::read(&path) else { continue };
            read += usize::from(!text.is_empty());
            if needles.count_in(&text) > 0 {
                found.push(path);
            }
        }
    }
    // This one, init, the launcher, the keeper and the program, at least, have all three.
    ensure!(read >= 5 * 3, "only {read} could be read");
    Ok(found)
}

#[test]
fn keys_are_in_no_argument_environment_file_or_message() {
    lab::test(Peer::Ours, |lab| {
        let build = own_tmp()?;
        let (needles, file) = needles_and_file(lab)?;
        let running = Running::start(vpn_exec(&file, "secrets")?)?;

        assert_eq!(processes_with(&needles)?, Vec::<PathBuf>::new());
        let mut found = Vec::new();
        for folder in ["/run", "/tmp"] {
            files_with(&needles, folder.as_ref(), &[&file, &build], &mut found)?;
        }
        assert_eq!(found, Vec::<PathBuf>::new());
        // The judges can find somebody guilty.
        fs::copy(&file, "/tmp/left")?;
        files_with(&needles, "/tmp".as_ref(), &[&build], &mut found)?;
        assert_eq!(found, [Path::new("/tmp/left")]);
        let key = fs::read_to_string(&file)?.lines().find(|line| line.starts_with("PrivateKey")).map(str::to_owned);
        let mut guilty = Command::new("sleep").arg("1000").env("KEY", key.context("a key")?).spawn()?;
        // It has begun before the kernel shows its environment.
        let environment = Path::new("/proc").join(guilty.id().to_string()).join("environ");
        lab::wait_until(lab::patience(PATIENCE), "it has no environment", || Ok(!fs::read(&environment)?.is_empty()))?;
        assert_eq!(processes_with(&needles)?, [environment]);
        guilty.kill()?;
        guilty.wait()?;

        let errors = running.end()?;
        let text = String::from_utf8_lossy(&errors);
        assert!(text.contains("handshake") && text.contains("completed"), "-vvv says more than this: {text}");
        assert_eq!(needles.count_in(&errors), 0, "{text}");
        Ok(())
    });
}

#[test]
fn the_program_has_no_way_to_the_keys() {
    lab::test(Peer::Ours, |lab| {
        let (needles, file) = needles_and_file(lab)?;
        let running = Running::start(vpn_exec(&file, "secrets")?)?;
        let report = &running.report;
        assert_eq!(report.launcher, running.child.id().cast_signed());
        assert_eq!(report.descriptors, Vec::<String>::new());
        assert_eq!(report.opened, Vec::<String>::new());
        assert_eq!((report.in_memory, report.in_arguments), (0, 0));
        assert!(report.in_memory_when_planted > 0, "the judge is blind: {report:?}");

        // The keeper has them, where only who may trace it, as this test may, can look. The launcher has them no more.
        assert!(count_in_memory(&needles, &report.keeper.to_string())? > 0, "the keeper's memory cannot be searched");
        assert_eq!(
            count_in_memory(&needles, &report.launcher.to_string())?,
            0,
            "the launcher still has pieces of keys"
        );
        running.end()?;
        Ok(())
    });
}

/// A keeper needs the keys themselves. Their text in the provider's file is read and handed over, and then no process
/// holds it.
#[test]
fn no_process_keeps_the_text_of_a_key() {
    lab::test(Peer::Ours, |lab| {
        let (all, file) = needles_and_file(lab)?;
        let text = lab.wg_quick_text(Reach::Ipv4);
        let keys: Vec<&str> = ["PrivateKey = ", "PresharedKey = "]
            .iter()
            .filter_map(|key| text.lines().find_map(|line| line.strip_prefix(key)))
            .collect();
        ensure!(keys.len() == 2, "{} keys", keys.len());
        let texts = Needles::of_texts(&keys);
        let searched = |what: &str, pid: i32| -> Result<()> {
            ensure!(count_in_memory(&all, &pid.to_string())? > 0, "{what}: its memory cannot be searched");
            let found = count_in_memory(&texts, &pid.to_string())?;
            ensure!(found == 0, "{what}: {found} pieces of the texts of keys are left");
            Ok(())
        };

        let running = Running::start(vpn_exec(&file, "secrets")?)?;
        searched("the keeper of a program", running.report.keeper)?;
        running.end()?;

        let up = |more: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
            command.arg("up").arg(&file).args(["--backend", "userspace", "--name", "standing"]).args(more);
            command.stdin(Stdio::null());
            command
        };
        let keeper =
            || -> Result<i32> { Ok(registry::read(&"standing".parse()?)?.context("a state")?.keeper.cast_signed()) };
        ensure!(up(&["--wait", "20"]).status()?.success());
        searched("the keeper of a standing tunnel", keeper()?)?;

        // It replaces the other one, and reads the file once more when it is told to.
        let replaced = keeper()?;
        let mut child = up(&["--foreground", "--replace"]).spawn()?;
        let is_there = || Ok(keeper()? != replaced && registry::socket_of(&"standing".parse()?).exists());
        lab::wait_until(lab::patience(PATIENCE), "no keeper in the foreground", is_there)?;
        let asked = |word: &str| Command::new(env!("CARGO_BIN_EXE_vpn-exec")).args([word, "standing"]).output();
        // Whoever is answered is served by a keeper that has begun.
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

/// The owner of a file in /proc tells whether a process can be inspected, and dumps core (proc(5)), if its user is not root.
/// So vpn-exec is run by an ordinary user who has the capabilities that it needs.
#[test]
fn our_processes_cannot_be_inspected_by_their_own_user() {
    const USER: u32 = 1000;
    lab::test(Peer::Ours, |lab| {
        if fs::read_to_string("/proc/self/uid_map")?.split_ascii_whitespace().nth(2) == Some("1") {
            return Err(Skip {
                reason: "an ordinary user has no second user to run it as".into(),
                unless: "VPN_EXEC_REQUIRE_USERS",
            }
            .into());
        }
        if fs::metadata(vpn_exec::linux::tun::DEVICE)?.mode() & 0o6 != 0o6 {
            let reason = format!("{} is not for everybody", vpn_exec::linux::tun::DEVICE);
            return Err(Skip { reason, unless: "VPN_EXEC_REQUIRE_TUN" }.into());
        }
        let (_, file) = needles_and_file(lab)?;
        for path in [file.as_path(), Path::new("/run")] {
            nix::unistd::chown(path, Some(Uid::from_raw(USER)), None)?;
        }
        let inner = vpn_exec(&file, "secrets")?;
        let words: Vec<&str> = std::iter::once(inner.get_program())
            .chain(inner.get_args())
            .map(|word| word.to_str().context("not UTF-8"))
            .collect::<Result<_>>()?;
        let mut command = this_with(&format!("become {USER}"))?;
        command
            .env("VPN_EXEC_TEST_THEN", serde_json::to_string(&words)?)
            .env("VPN_EXEC_TEST_TASK_THEN", "look secrets");
        let running = Running::start(command)?;
        let (launcher, keeper) = (running.report.launcher, running.report.keeper);
        assert_eq!(running.report.opened, Vec::<String>::new());

        let user_of = |pid: i32| -> Result<String> {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("a user")?;
            Ok(line.split_ascii_whitespace().next().context("a user")?.to_owned())
        };
        for pid in [launcher, keeper] {
            assert_eq!(user_of(pid)?, USER.to_string());
            assert_eq!(fs::metadata(format!("/proc/{pid}/status"))?.uid(), 0, "process {pid} can be inspected");
        }
        // The judge can find somebody guilty: of an ordinary process of that user all of that is the user's.
        let mut ordinary = Command::new("sleep").arg("1000").uid(USER).gid(USER).spawn()?;
        assert_eq!(fs::metadata(format!("/proc/{}/status", ordinary.id()))?.uid(), USER);

        let spy = |pids: String| -> Result<Vec<String>> {
            let mut child = this_with(&format!("spy {pids}"))?.uid(USER).gid(USER).spawn()?;
            let opened = said(&mut child)?;
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
fn plans_and_checks_tell_no_key() {
    lab::test(Peer::Ours, |lab| {
        let (needles, file) = needles_and_file(lab)?;
        for arguments in [&["plan"] as &[&str], &["plan", "--json"], &["check"], &["plan", "--json", "--allow-hooks"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
            let output = command.arg("-vvv").args(arguments).arg("--config").arg(&file).output()?;
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            assert_eq!(
                needles.count_in(&output.stdout) + needles.count_in(&output.stderr),
                0,
                "{arguments:?}: {output:?}"
            );
        }
        Ok(())
    });
}

#[test]
fn messages_about_mangled_keys_tell_no_key() {
    lab::test(Peer::Ours, |lab| {
        let (needles, file) = needles_and_file(lab)?;
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
                // In place: it stays a secret of its owner's.
                fs::write(&file, text.replacen(line, &mangled, 1))?;
                for arguments in [&["check"] as &[&str], &["plan", "--json"], &[]] {
                    let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
                    command.arg("-vvv").args(arguments).arg("--config").arg(&file);
                    if arguments.is_empty() {
                        command.args(["--backend", "userspace", "--", "true"]);
                    }
                    let output = command.stdin(Stdio::null()).output()?;
                    let found = needles.count_in(&output.stdout) + needles.count_in(&output.stderr);
                    let shown = String::from_utf8_lossy(&output.stderr);
                    assert_eq!(found, 0, "{mangled:?} with {arguments:?} is told: {shown}");
                    refused += usize::from(output.status.code() == Some(125));
                }
            }
        }
        // Nearly all of them are wrong, and told.
        assert!(refused > 100, "{refused}");
        Ok(())
    });
}
