//! A process that listens at the place of a keeper's socket: another user's, or a program in the tunnel.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Peer, variables};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::security::{Door, ORDERS, REFUSAL};
use crate::{User, failure, output};

/// Takes the place of a keeper's socket, lets one client talk until its first request, and keeps all descriptors that
/// it passes. Then tries each of them as a proof to the keeper, before each order, and each socket as a way to the
/// keeper. Prints what the keeper answers: `thief.py SOCKET ORDERS…`.
const THIEF: &str = r#"
import array, os, socket, stat, sys
path, orders = sys.argv[1], sys.argv[2:]
kept = path + ".kept"
os.rename(path, kept)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(path)
listener.listen()
print("ready", flush=True)
client = listener.accept()[0]
caught, message = [], b'"Outside"'
while message == b'"Outside"':
    message, passed = socket.recv_fds(client, 8192, 8)[:2]
    caught += passed
os.rename(kept, path)
print("caught", len(caught), "with", message.decode(), flush=True)
own = os.open("/proc/self/ns/user", os.O_RDONLY)
for order in orders:
    for proof in caught + [own]:
        keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper.settimeout(60)
        keeper.connect(path)
        socket.send_fds(keeper, [b'"Outside"'], [proof])
        keeper.send(order.encode())
        print("answer", keeper.recv(8192).decode(), flush=True)
for way in [client.fileno()] + caught:
    if stat.S_ISSOCK(os.fstat(way).st_mode):
        try:
            socket.socket(fileno=os.dup(way)).connect(path)
            print("connected", way, flush=True)
        except OSError as error:
            print("not connected", error.errno, flush=True)
"#;

/// Starts a script that listens at a socket. Returns it, with its output after the line that says so.
fn start(mut command: Command) -> Result<(Child, BufReader<ChildStdout>)> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("a pipe")?);
    let mut line = String::new();
    output.read_line(&mut line)?;
    ensure!(line == "ready\n", "{line:?}");
    Ok((child, output))
}

/// Has a program inside take the place of the keeper's socket while a client outside asks for a reload. Returns what
/// the program prints afterwards.
fn steal(user: &User, orders: &[&str]) -> Result<Vec<String>> {
    let door = Door::open(user)?;
    let socket = door.socket("mine");
    let words = [&["/usr/bin/python3", "-c", THIEF, &socket][..], orders].concat();
    let (mut thief, printed) = start(user.inside("mine", &["--socket", "any"], &words))?;
    let mut victim = user.vpn_exec(&["reload"]);
    victim.arg(&user.file).args(["--name", "mine"]);
    let mut victim = victim.stderr(Stdio::null()).spawn()?;
    let printed = printed.lines().collect::<std::io::Result<_>>()?;
    victim.wait()?;
    ensure!(thief.wait()?.success(), "the thief failed: {printed:?}");
    Ok(printed)
}

/// A client passes descriptors to the process that listens. None of them lets a program inside give orders.
#[test]
fn a_program_that_takes_the_place_of_the_socket_gains_no_orders() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        let keeper = user.keeper("mine")?;
        let printed = steal(&user, &ORDERS)?;
        let (answers, others): (Vec<_>, Vec<_>) = printed.iter().partition(|line| line.starts_with("answer "));
        ensure!(others[0].contains("with \"Reload\""), "the client was not caught: {others:?}");
        ensure!(others.iter().any(|line| line.starts_with("not connected")), "{others:?}");
        ensure!(!others.iter().any(|line| line.starts_with("connected")), "{others:?}");
        ensure!(answers.len() > ORDERS.len(), "no descriptor was tried: {printed:?}");
        ensure!(answers.iter().all(|answer| answer.contains(REFUSAL)), "{answers:?}");
        ensure!(user.keeper("mine")? == keeper, "the keeper was replaced");
        output(user.about(&["down", "mine"])).map(drop)
    });
}

/// The twin: a keeper that does not look at the network namespace of its clients obeys.
#[test]
fn the_keeper_would_obey_if_it_did_not_look_where_the_client_is() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let mut up = user.up("mine");
        up.env(variables::BREAK, "client-namespace");
        output(up)?;
        let printed = steal(&user, &ORDERS[..1])?;
        let obeyed = printed.iter().filter(|line| line.starts_with("answer \"Welcome\"")).count();
        ensure!(obeyed == 1, "{printed:?}");
        ensure!(printed.iter().filter(|line| line.contains(REFUSAL)).count() > 1, "{printed:?}");
        output(user.about(&["down", "--force", "mine"])).map(drop)
    });
}

/// Answers one request to join, and passes the network namespace of a process: `keeper.py SOCKET PID`.
const FORGER: &str = r#"
import array, os, socket, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
client = listener.accept()[0]
while client.recv(8192) != b'"Join"':
    pass
client.send(b'"Welcome"')
namespace = array.array("i", [os.open(f"/proc/{sys.argv[2]}/ns/net", os.O_RDONLY)])
client.sendmsg([b'"Named"'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, namespace)])
client.recv(8192)
"#;

/// Another program of the user can take the place of a keeper. A namespace that a program inside could have made is not
/// entered.
#[test]
fn a_launcher_enters_no_namespace_that_a_program_inside_could_have_made() {
    lab::test(Peer::Ours, |lab: &Lab| {
        lab::require_users()?;
        let user = User::new(lab)?;
        let tunnel = user.tunnels().join("mine");
        output(user.up("mine"))?;
        kill(Pid::from_raw(user.keeper("mine")?), Signal::SIGKILL)?;
        for (unshare, expected) in [
            ("unshare -Ur unshare -Urn", "cannot enter the tunnel's user namespace"),
            // The twin: it is entered, and something else is missing.
            ("unshare -Urn", "its keeper did not pass its plan"),
        ] {
            let script = format!(
                "rm {tunnel}/socket; {unshare} sh -c 'echo $$; exec sleep 1000' | {{ read pid; \
                 exec /usr/bin/python3 -c \"$0\" {tunnel}/socket $pid; }}",
                tunnel = tunnel.display()
            );
            let mut command = user.command(Path::new("/bin/sh"));
            command.args(["-c", &script, FORGER]);
            let (mut forger, _) = start(command)?;
            let message = failure(user.about(&["--tunnel", "mine", "--", "true"]))?;
            ensure!(message.contains(expected), "{unshare}: {message}");
            forger.kill()?;
            forger.wait()?;
        }
        Ok(())
    });
}

/// In a directory that others may write to, another user could make the socket.
#[test]
fn a_socket_of_another_user_is_not_talked_to() {
    lab::test(Peer::Ours, |lab: &Lab| {
        lab::require_users()?;
        let user = User::new(lab)?;
        output(user.up("mine"))?;
        kill(Pid::from_raw(user.keeper("mine")?), Signal::SIGKILL)?;
        let socket = user.tunnels().join("mine/socket");
        fs::remove_file(&socket)?;
        let mut command = Command::new("sh");
        let script = "umask 0; exec /usr/bin/python3 -c \"$0\" \"$@\"";
        command.args(["-c", script, FORGER]).arg(&socket).arg(std::process::id().to_string());
        let (mut forger, _) = start(command)?;
        let message = failure(user.about(&["--tunnel", "mine", "--", "true"]))?;
        ensure!(message.contains("the tunnel's socket is that of the user 0"), "{message}");
        forger.kill()?;
        forger.wait()?;
        Ok(())
    });
}
