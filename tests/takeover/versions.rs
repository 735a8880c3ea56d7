//! Version 0.1.0 and this one take tunnels over from each other, while a program's connection carries data.
//!
//! Skipped without the variable `VPN_EXEC_PREVIOUS`, which names the executable of version 0.1.0.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use lab::launcher::{previous_binary, run, vpn_exec_at};

use super::*;

/// The bytes that a connection carries in each stage: thousands of packets.
const MANY: u64 = 4 << 20;

/// The time after which a connection hangs. A peer refuses the handshakes of this version for 27 s after the last one
/// of version 0.1.0, and by then TCP sends again after as many seconds.
const STALL: Duration = Duration::from_secs(200);

/// The time limit of a test with such a wait.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// A connection to the echo server that carries data all the time.
struct Transfer {
    go_on: Arc<AtomicBool>,
    carried: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<()>>,
}

impl Transfer {
    fn start(mut stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(lab::patience(STALL)))?;
        stream.set_write_timeout(Some(lab::patience(STALL)))?;
        let (go_on, carried) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        let mut incoming = stream.try_clone()?;
        let wanted = Arc::clone(&go_on);
        let sender = std::thread::spawn(move || {
            let mut sent = 0;
            while wanted.load(Ordering::Relaxed) {
                let block = block(sent);
                stream.write_all(&block).context("cannot send")?;
                sent += block.len() as u64;
            }
            stream.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        let count = Arc::clone(&carried);
        let receiver = std::thread::spawn(move || {
            let mut buffer = block(0);
            let mut received = 0;
            loop {
                let length = incoming.read(&mut buffer).context("nothing is received")?;
                if length == 0 {
                    return Ok(());
                }
                let expected = (received..).map(byte).take(length);
                ensure!(expected.eq(buffer[..length].iter().copied()), "other bytes than were sent, after {received}");
                received += length as u64;
                count.store(received, Ordering::Relaxed);
            }
        });
        Ok(Self { go_on, carried, sender, receiver })
    }

    /// Waits until many more bytes have come back.
    fn continues(&self) -> Result<()> {
        let before = self.carried.load(Ordering::Relaxed);
        lab::wait_until(lab::patience(STALL), "the connection carries no more data", || {
            ensure!(!self.receiver.is_finished() && !self.sender.is_finished(), "the connection has ended");
            Ok(self.carried.load(Ordering::Relaxed) >= before + MANY)
        })
    }

    /// Ends the connection. All bytes must have come back.
    fn finish(self) -> Result<()> {
        self.go_on.store(false, Ordering::Relaxed);
        let panicked = |_| anyhow::anyhow!("a thread of the transfer has panicked");
        let sent = self.sender.join().map_err(panicked)??;
        self.receiver.join().map_err(panicked)??;
        ensure!(
            self.carried.load(Ordering::Relaxed) == sent,
            "{} of {sent} bytes came back",
            self.carried.load(Ordering::Relaxed)
        );
        Ok(())
    }
}

/// Returns the byte at a position, so that no two positions nearby have the same ones after them.
fn byte(position: u64) -> u8 {
    (position ^ (position >> 8) ^ (position >> 16)) as u8
}

fn block(position: u64) -> Vec<u8> {
    (position..position + 65_536).map(byte).collect()
}

fn executable_of(process: i32) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!("/proc/{process}/exe"))?)
}

/// A standing tunnel that two versions share.
struct Shared {
    file: String,
    versions: [PathBuf; 2],
}

impl Shared {
    fn new(lab: &Lab) -> Result<Self> {
        let versions = [lab::launcher::binary().to_owned(), previous_binary()?];
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        Ok(Self { file: file.to_str().context("a path in UTF-8")?.to_owned(), versions })
    }

    fn command(version: &Path, arguments: &[&str]) -> Result<String> {
        let output = run(vpn_exec_at(version, arguments))?;
        ensure!(output.status.success(), "{} {arguments:?}: {}", version.display(), text_of(&output));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Has a version make the tunnel, or take it over.
    fn up(&self, version: &Path, options: &[&str]) -> Result<()> {
        let up = ["up", &self.file, "--name", NAME, "--backend", lab::backend()];
        Self::command(version, &[&up, options].concat())?;
        let executable = executable_of(keeper()?)?;
        ensure!(executable == version, "the keeper is {}", executable.display());
        Ok(())
    }

    /// Both versions run programs inside, which have the tunnel's resolver.
    fn runs_programs(&self) -> Result<()> {
        for version in &self.versions {
            let resolver = Self::command(version, &["--tunnel", NAME, "--", "cat", "/etc/resolv.conf"])?;
            ensure!(resolver.contains(&lab::TUNNEL_RESOLVER.ipv4.to_string()), "{}: {resolver}", version.display());
            Self::command(version, &["status", NAME])?;
        }
        Ok(())
    }

    /// Starts a program by each version, both of which stay inside.
    fn start_programs(&self) -> Result<Vec<Child>> {
        let start = |version: &PathBuf| vpn_exec_at(version, ["--tunnel", NAME, "--", "sleep", "1000"]).spawn();
        let programs = self.versions.iter().map(start).collect::<std::io::Result<Vec<_>>>()?;
        lab::wait_until(lab::patience(PATIENCE), "the programs are not inside", || Ok(status()?.programs.len() == 2))?;
        Ok(programs)
    }
}

/// The tunnel passes from one version to the next by `up --replace`.
fn pass_on(lab: &Lab, order: [usize; 3]) -> Result<()> {
    let shared = Shared::new(lab)?;
    let [first, ref next @ ..] = order.map(|number| shared.versions[number].as_path());
    let callers = echo(lab)?;
    shared.up(first, &["--wait", "20"])?;
    let mut programs = shared.start_programs()?;
    let transfer = Transfer::start(connect()?)?;
    transfer.continues().context("at first")?;
    for version in next {
        shared.up(version, &["--replace"])?;
        transfer.continues().with_context(|| format!("after {} took over", version.display()))?;
        shared.runs_programs()?;
    }
    transfer.finish()?;
    assert_eq!(callers.recv_timeout(lab::patience(PATIENCE))?, PROVIDER.ipv4);
    assert!(callers.try_recv().is_err(), "it was one connection all the time");
    assert_eq!(lab.capture.leaks()?, []);
    for program in &mut programs {
        assert!(program.try_wait()?.is_none(), "the programs go on");
        kill(Pid::from_raw(program.id().cast_signed()), Signal::SIGTERM)?;
        program.wait()?;
    }
    // A rootless tunnel has ended with the programs.
    if !lab::tunnel::is_rootless() {
        Shared::command(first, &["down", NAME])?;
    }
    Ok(())
}

/// The keeper of version 0.1.0 is killed. The launcher of this one, whose program is inside, starts the successor.
fn take_over_from_a_killed_one(lab: &Lab) -> Result<()> {
    let shared = Shared::new(lab)?;
    let [successor, killed] = shared.versions.each_ref().map(PathBuf::as_path);
    let _callers = echo(lab)?;
    shared.up(killed, &["--wait", "20"])?;
    let mut program = vpn_exec_at(successor, ["--tunnel", NAME, "--", "sleep", "1000"]).spawn()?;
    lab::wait_until(lab::patience(PATIENCE), "the program is not inside", || Ok(status()?.programs.len() == 1))?;
    let transfer = Transfer::start(connect()?)?;
    transfer.continues().context("at first")?;
    let former = keeper()?;
    kill(Pid::from_raw(former), Signal::SIGKILL)?;
    lab::wait_until(lab::patience(PATIENCE), "no keeper follows", || {
        // The state of a killed keeper's tunnel is that of its successor as soon as this has adopted it.
        let living = keeper()?;
        Ok(living != former && executable_of(living)? == successor)
    })?;
    transfer.continues().context("after a successor")?;
    transfer.finish()?;
    assert_eq!(lab.capture.leaks()?, []);
    assert!(program.try_wait()?.is_none(), "the program goes on");
    kill(Pid::from_raw(program.id().cast_signed()), Signal::SIGTERM)?;
    program.wait()?;
    Ok(())
}

#[test]
fn this_version_follows_a_killed_keeper_of_version_0_1_0() {
    lab::test_within(TIME_LIMIT, Peer::Ours, take_over_from_a_killed_one);
}

#[test]
fn version_0_1_0_replaces_this_one_and_is_replaced() {
    lab::test_within(TIME_LIMIT, Peer::Ours, |lab| pass_on(lab, [0, 1, 0]));
}

#[test]
fn this_version_replaces_version_0_1_0_and_is_replaced() {
    lab::test_within(TIME_LIMIT, Peer::Ours, |lab| pass_on(lab, [1, 0, 1]));
}
