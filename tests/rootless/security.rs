//! A program in a user's tunnel cannot give orders to its keeper, which is a process of the same user.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::{Lab, Peer};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{PATIENCE, User, output, serve};

/// Sends a request to a keeper and prints the answer: `client.py SOCKET REQUEST WAY`. The ways are `plain`; `proved`,
/// with the own user namespace as a proof; and `ended`, from a process that has ended since.
const CLIENT: &str = r#"
import array, json, os, socket, sys
path, request, way = sys.argv[1:]
keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if way == "ended":
    if os.fork():
        os.wait()
    else:
        keeper.connect(path)
        keeper.send(request.encode())
        os._exit(0)
    sys.exit()
keeper.connect(path)
if way == "proved":
    own = array.array("i", [os.open("/proc/self/ns/user", os.O_RDONLY)])
    keeper.sendmsg([b'"Outside"'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, own)])
keeper.send(request.encode())
answer = keeper.recv(8192)
print(answer.decode() or "closed", flush=True)
"#;

/// The orders, and how a keeper refuses them.
pub(super) const ORDERS: [&str; 7] = [
    r#""Join""#,
    r#""Stand""#,
    r#""Reload""#,
    r#"{"Down":{"force":true}}"#,
    r#""HandOver""#,
    r#"{"View":{"key":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]}}"#,
    r#"{"ViewServer":{"key":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]}}"#,
];
pub(super) const REFUSAL: &str = "a program in the tunnel, or in another namespace, may not request that";

/// A way to the user's tunnels that is not hidden inside.
pub(super) struct Door {
    place: tempfile::TempDir,
}

impl Door {
    pub(super) fn open(user: &User) -> Result<Self> {
        let place = tempfile::tempdir()?;
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
        fs::write(place.path().join("client.py"), CLIENT)?;
        let tunnels = place.path().join("tunnels");
        fs::create_dir(&tunnels)?;
        mount(Some(&user.runtime), &tunnels, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(Self { place })
    }

    fn script(&self) -> String {
        self.place.path().join("client.py").display().to_string()
    }

    pub(super) fn socket(&self, name: &str) -> String {
        self.place.path().join("tunnels/vpn-exec").join(name).join("socket").display().to_string()
    }

    /// Returns the words of a client.
    fn client(&self, name: &str, request: &str, way: &str) -> Vec<String> {
        ["/usr/bin/python3", &self.script(), &self.socket(name), request, way].map(str::to_owned).into()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.place.path().join("tunnels"));
    }
}

/// Runs a client inside, where the guard of unix sockets does not keep it from the socket.
fn inside(user: &User, name: &str, words: &[String]) -> Result<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    output(user.inside(name, &["--socket", "any"], &words))
}

#[test]
fn a_program_inside_gives_the_keeper_no_orders() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let door = Door::open(&user)?;
        output(user.up("mine"))?;
        let keeper = user.keeper("mine")?;
        let nest = ["unshare", "-Urn"].map(str::to_owned);
        for request in ORDERS {
            for way in ["plain", "proved"] {
                let client = door.client("mine", request, way);
                let answer = inside(&user, "mine", &client)?;
                ensure!(answer.contains(REFUSAL), "{way} {request}: {answer}");
                if user.id() != 0 {
                    // The user ID 0 cannot be nested without CAP_SETFCAP (user_namespaces(7)).
                    let answer = inside(&user, "mine", &[&nest[..], &client].concat())?;
                    ensure!(answer.contains(REFUSAL), "nested, {way} {request}: {answer}");
                }
            }
            inside(&user, "mine", &door.client("mine", request, "ended"))?;
            ensure!(user.keeper("mine")? == keeper, "{request} of a process that has ended");
        }
        let answer = inside(&user, "mine", &door.client("mine", r#""Report""#, "plain"))?;
        ensure!(answer == "\"Done\"\n", "{answer}");
        // The twins: a process outside may.
        for (request, expected) in [(ORDERS[0], "\"Welcome\""), (ORDERS[3], "\"Failed\"")] {
            let answer = outside(&user, &door.client("mine", request, "plain"))?;
            ensure!(answer.contains(REFUSAL), "without a proof: {answer}");
            let answer = outside(&user, &door.client("mine", request, "proved"))?;
            ensure!(answer.contains(expected), "{request} from outside: {answer}");
        }
        lab::wait_until(lab::patience(PATIENCE), "the tunnel is taken down", || Ok(!user.tunnels().exists()))
    });
}

fn outside(user: &User, words: &[String]) -> Result<String> {
    let mut command = user.command(Path::new(&words[0]));
    command.args(&words[1..]);
    output(command)
}

/// A keeper in the foreground, and its messages.
struct Foreground {
    keeper: Child,
    messages: std::io::Lines<BufReader<ChildStderr>>,
}

impl Foreground {
    fn start(user: &User, name: &str) -> Result<Self> {
        let mut command = user.up(name);
        let mut keeper = command.args(["--foreground", "-v"]).stderr(Stdio::piped()).spawn()?;
        let messages = BufReader::new(keeper.stderr.take().context("a pipe")?).lines();
        lab::wait_until(lab::patience(PATIENCE), "the tunnel is up", || {
            Ok(user.about(&["status", name]).stdout(Stdio::null()).stderr(Stdio::null()).status()?.success())
        })?;
        Ok(Self { keeper, messages })
    }

    fn pid(&self) -> i32 {
        self.keeper.id().cast_signed()
    }

    /// Waits for a message with one of these words, and returns which it was.
    fn await_message(&mut self, words: &[&str]) -> Result<String> {
        for line in &mut self.messages {
            let line = line?;
            if words.iter().any(|word| line.contains(word)) {
                return Ok(line);
            }
        }
        anyhow::bail!("the keeper has ended")
    }

    fn end(mut self) -> Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?;
        ensure!(self.keeper.wait()?.success(), "the keeper failed");
        Ok(())
    }
}

/// A launcher with a program is in the user namespace of its tunnel. It proves that it was outside.
#[test]
fn all_launchers_join_the_successor_of_a_killed_or_replaced_keeper() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        let start = || Agent::start(&mut user.inside("mine", &[], &[]))?.begun();
        let mut agents = [start()?, start()?, start()?];
        for _ in 0..3 {
            user.replace_keeper("mine")?;
        }
        let mut replace = user.up("mine");
        replace.arg("--replace");
        output(replace)?;
        user.replace_keeper("mine")?;
        for agent in &mut agents {
            agent.succeed("pid")?;
        }
        for agent in agents {
            agent.finish_well()?;
        }
        output(user.about(&["down", "mine"])).map(drop)
    });
}

/// Only launchers know the plan for certain.
#[test]
fn a_tunnel_without_launchers_is_made_anew() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        let script = "(setsid sh -c 'echo $$; exec sleep 1000' &); exec cat";
        let mut command = user.inside("mine", &[], &["sh", "-c", script]);
        let mut launcher = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(launcher.stdout.take().context("a pipe")?).read_line(&mut line)?;
        let orphan: i32 = line.trim().parse()?;
        let keeper = user.keeper("mine")?;
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in [launcher.id().cast_signed(), keeper] {
                kill(Pid::from_raw(pid), signal)?;
            }
        }
        launcher.wait()?;
        ensure!(kill(Pid::from_raw(orphan), None).is_ok(), "the orphan has ended by itself");
        // A plan that was followed would be an error.
        fs::write(user.tunnels().join("mine/plan"), "{}")?;
        output(user.up("mine"))?;
        let state = fs::read_to_string(format!("/proc/{orphan}/stat")).unwrap_or_default();
        ensure!(state.is_empty() || state.contains(") Z "), "{state}");
        output(user.inside("mine", &[], &["true"]))?;
        output(user.about(&["down", "mine"])).map(drop)
    });
}

/// Makes a shell that the user may execute and not read, so that no process of the user can look into it.
fn unreadable_shell(place: &tempfile::TempDir) -> Result<String> {
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
    let file = place.path().join("unreadable");
    fs::copy("/bin/sh", &file)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o711))?;
    Ok(file.to_str().context("UTF-8")?.to_owned())
}

/// The keeper does not find it.
#[test]
fn a_process_that_cannot_be_looked_into_is_left_without_a_link() {
    lab::test(Peer::Ours, |lab: &Lab| {
        lab::require_users()?;
        let user = User::new(lab)?;
        let place = tempfile::tempdir()?;
        let shell = unreadable_shell(&place)?;
        let [ask, answer] = ["ask", "answer"].map(|name| user.runtime.join(name));
        let script = format!(
            "echo $$ >{answer}; while read _ <{ask}; do n=; while read name _; do n=\"$n $name\"; done </proc/net/dev; \
             echo $n >{answer}; done",
            ask = ask.display(),
            answer = answer.display()
        );
        let interfaces = |shell: &str| -> Result<(i32, String)> {
            output(user.up("mine"))?;
            let setup = "mkfifo $0 $1; setsid $2 -c \"$3\" >/dev/null 2>&1 & read pid <$1; echo $pid; read _";
            let words = [&ask.to_string_lossy(), &answer.to_string_lossy(), shell, &script];
            let mut command = user.inside("mine", &[], &[&["sh", "-c", setup][..], &words].concat());
            let mut launcher = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let mut line = String::new();
            BufReader::new(launcher.stdout.take().context("a pipe")?).read_line(&mut line)?;
            let pid = line.trim().parse()?;
            // A living launcher knows all of its program's processes.
            launcher.kill()?;
            launcher.wait()?;
            output(user.about(&["down", "--force", "mine"]))?;
            let mut seen = String::new();
            let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if !state.is_empty() && !state.contains(") Z ") {
                // The kernel removes them in its own time.
                lab::wait_until(lab::patience(PATIENCE), "it has a link", || {
                    fs::write(&ask, "now\n")?;
                    seen = fs::read_to_string(&answer)?;
                    Ok(!seen.contains("wg0") && !seen.contains("host0"))
                })?;
            }
            fs::remove_file(&ask)?;
            fs::remove_file(&answer)?;
            Ok((pid, seen))
        };
        let (pid, seen) = interfaces(&shell)?;
        ensure!(seen.trim().ends_with(" lo:"), "{seen:?}");
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        // The twin: an ordinary one is found and ended.
        let (_, seen) = interfaces("/bin/sh")?;
        ensure!(seen.is_empty(), "{seen:?}");
        Ok(())
    });
}

/// The program may have changed the file.
#[test]
fn a_program_inside_has_the_keeper_read_no_file_again() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let place = tempfile::tempdir()?;
        let unreadable = unreadable_shell(&place)?;
        let mut keeper = Foreground::start(&user, "mine")?;
        let outcomes = ["ignoring SIGHUP", "the configuration", "changed"];
        let pid = keeper.pid().to_string();
        // The shells wait, so that they are alive when the keeper looks.
        let signal = format!("kill -HUP {pid}; sleep 0.3; read _");
        let forge = format!(
            "import ctypes, struct; info = struct.pack('iiiiII', 1, 0, -1, 0, {own}, 0) + bytes(128 - 24); \
             assert ctypes.CDLL(None).syscall(129, {pid}, 1, info) == 0",
            own = std::process::id()
        );
        let mut attempts = vec![
            vec!["sh", "-c", &signal],
            vec![&unreadable, "-c", &signal],
            vec!["sh", "-c", &signal[..signal.find(';').unwrap_or_default()]],
        ];
        if cfg!(target_arch = "x86_64") {
            attempts.push(vec!["/usr/bin/python3", "-c", &forge]);
        }
        if user.id() != 0 {
            attempts.push(vec!["unshare", "-Urn", "sh", "-c", &signal]);
        }
        for attempt in attempts {
            let mut command: Command = user.inside("mine", &[], &attempt);
            let mut program = command.stdin(Stdio::piped()).spawn()?;
            let message = keeper.await_message(&outcomes)?;
            ensure!(message.contains(outcomes[0]), "{attempt:?}: {message}");
            drop(program.stdin.take());
            program.wait()?;
        }
        // The twin: this process is outside.
        kill(Pid::from_raw(keeper.pid()), Signal::SIGHUP)?;
        let message = keeper.await_message(&outcomes)?;
        ensure!(message.contains("the configuration is unchanged"), "{message}");
        keeper.end()
    });
}

/// Starts an agent in a tunnel with a port of the host, and the service at that port and at another one.
fn start_with_host_port(user: &User) -> Result<Agent> {
    for port in [OPENED, PLANTED] {
        serve(Ipv4Addr::LOCALHOST.into(), port)?;
    }
    Agent::start(&mut user.inside("mine", &["--host-port", &OPENED.to_string()], &[]))?.begun()
}

const OPENED: u16 = 18_002;
const PLANTED: u16 = 18_001;

fn get(port: u16) -> String {
    format!("get http://host.internal:{port}/")
}

/// Any program of the user can replace the files. The successor would do what the plan says, on the host.
#[test]
fn the_successor_of_a_killed_keeper_follows_no_plan_from_the_disk() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let mut agent = start_with_host_port(&user)?;
        let plan = user.tunnels().join("mine/plan");
        let planted = fs::read_to_string(&plan)?.replace(&OPENED.to_string(), &PLANTED.to_string());
        for text in [&planted[..], "{}"] {
            fs::write(&plan, text)?;
            user.replace_keeper("mine")?;
            ensure!(agent.succeed_within(PATIENCE, &get(OPENED))? == "the host");
            ensure!(agent.fail(&get(PLANTED))? == "ECONNREFUSED");
        }
        // One that joins gets the plan from the keeper as well.
        output(user.inside("mine", &["--host-port", &OPENED.to_string()], &["true"]))?;
        agent.finish_well().map(drop)
    });
}

/// The successor of the next keeper has the plan after the reload.
#[test]
fn a_reload_changes_the_plan_that_a_successor_follows() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let mut agent = start_with_host_port(&user)?;
        let mut reload = user.vpn_exec(&["reload"]);
        reload.arg(&user.file).args(["--name", "mine", "--host-port", &PLANTED.to_string()]);
        output(reload)?;
        for _ in 0..2 {
            ensure!(agent.succeed_within(PATIENCE, &get(PLANTED))? == "the host");
            ensure!(agent.fail(&get(OPENED))? == "ECONNREFUSED");
            user.replace_keeper("mine")?;
        }
        agent.finish_well().map(drop)
    });
}

#[test]
fn a_state_of_another_namespace_is_not_taken_over() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let agent = Agent::start(&mut user.inside("mine", &[], &[]))?.begun()?;
        let file = user.tunnels().join("mine/state");
        let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
        state["namespace"]["inode"] = fs::metadata("/proc/self/ns/net")?.ino().into();
        fs::write(&file, state.to_string())?;
        kill(Pid::from_raw(user.keeper("mine")?), Signal::SIGKILL)?;
        let (status, errors) = agent.end()?;
        ensure!(!status.success(), "the tunnel was taken over");
        ensure!(errors.contains("its state on the disk is that of another tunnel"), "{errors}");
        Ok(())
    });
}
