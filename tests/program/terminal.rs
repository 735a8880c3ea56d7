//! A program at a terminal: Ctrl-C, job control, pipelines.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::support::*;

#[test]
fn a_terminals_signals_reach_what_the_program_left_behind() {
    test_with_file(|config| {
        // A shell has what runs in its background ignore what the terminal sends, and that is inherited.
        let script = "setsid env --default-signal=INT sh -c 'trap \"echo heard; exit\" INT; echo \"le\"ft; while :; do sleep 0.1; done' & exit 3";
        let config = config.to_str().context("UTF-8")?;
        let command =
            [env!("CARGO_BIN_EXE_vpn-exec"), "--config", config, "--backend", lab::backend(), "--", "sh", "-c", script];
        let (mut terminal, mut child) = Terminal::start(&command)?;
        terminal.expect("left")?;
        // Until vpn-exec knows that the program has ended, a signal is the program's.
        std::thread::sleep(Duration::from_secs(1));
        terminal.send("\x03")?;
        terminal.expect("heard")?;
        ensure!(wait_for_end(&mut child)?.code() == Some(3));
        Ok(())
    });
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
        let command = [binary, "--config", config, "--backend", lab::backend(), "--", "sh", "-c", script];
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
            "{binary} --config {} --backend userspace -- sh -c 'echo data' | {{ read a; echo \"rea\"dy; read b </dev/tty; echo \"bo\"th $a $b; }}\n",
            config.display()
        );
        terminal.send(&line)?;
        terminal.expect("ready")?;
        terminal.send("typed\n")?;
        terminal.expect("both data typed")?;
        terminal.send("exit 0\n")?;
        ensure!(wait_for_end(&mut child)?.success());
        Ok(())
    });
}
