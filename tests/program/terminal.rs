//! A program at a terminal: Ctrl-C, job control, pipelines.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::Launcher;

use crate::support::*;

#[test]
fn ctrl_c_reaches_processes_that_the_program_left_behind() {
    test_with_file(|config| {
        // A shell lets its background jobs ignore the terminal's signals, which their children inherit.
        let script = "setsid env --default-signal=INT sh -c 'trap \"echo heard; exit\" INT; echo \"le\"ft; while :; do sleep 0.1; done' & exit 3";
        let words = Launcher::new(&config).program(["sh", "-c", script]).words();
        let (mut terminal, mut child) = Terminal::start(&words)?;
        terminal.expect("left")?;
        // vpn-exec leaves signals to the program until it knows that the program has ended.
        std::thread::sleep(Duration::from_secs(1));
        terminal.send("\x03")?;
        terminal.expect("heard")?;
        ensure!(wait_for_end(&mut child)?.code() == Some(3));
        Ok(())
    });
}

/// A terminal and its output.
struct Terminal {
    master: File,
    seen: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
    /// The output before the text that was expected last.
    passed: String,
}

impl Terminal {
    /// Starts a command as a session leader with a new controlling terminal.
    fn start(words: &[impl AsRef<OsStr>]) -> Result<(Self, Child)> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        let slave = || -> Result<OwnedFd> { Ok(OpenOptions::new().read(true).write(true).open(&name)?.into()) };
        let mut setsid = Command::new("setsid");
        setsid.args(["--ctty", "--wait"]).args(words).env("PS1", "$ ").env("TERM", "dumb");
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
        Ok((Self { master, seen, text: String::new(), passed: String::new() }, child))
    }

    fn send(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Waits for a text in new output, and returns the output before it.
    fn until(&mut self, text: &str) -> Result<String> {
        self.expect(text)?;
        Ok(std::mem::take(&mut self.passed))
    }

    /// Returns whether new output contains a text.
    fn try_expect(&mut self, text: &str) -> bool {
        while let Ok(bytes) = self.seen.recv_timeout(Duration::from_millis(50)) {
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        self.text.find(text).map(|at| self.text.drain(..at + text.len())).is_some()
    }

    /// Waits for a text in new output.
    fn expect(&mut self, text: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            if let Some(at) = self.text.find(text) {
                self.passed = self.text.drain(..at + text.len()).take(at).collect();
                return Ok(());
            }
            let left = PATIENCE.saturating_sub(begin.elapsed());
            match self.seen.recv_timeout(left) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => bail!("no {text:?} in {:?}", self.text),
            }
        }
    }
}

#[test]
fn ctrl_c_is_delivered_once() {
    test_with_file(|config| {
        let script = "trap 'echo interrupted' INT; trap 'exit 6' TERM; echo ready; while :; do sleep 0.1; done";
        let words = Launcher::new(&config).program(["sh", "-c", script]).words();
        let (mut terminal, mut child) = Terminal::start(&words)?;
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
fn ctrl_z_stops_the_job_and_fg_continues_it() {
    test_with_file(|config| {
        let (mut terminal, mut child) = Terminal::start(&["bash", "--norc", "--noprofile", "-i"])?;
        let script = "echo \"rea\"dy; read word; echo got $word";
        let line = Launcher::new(&config).program(["sh", "-c", script]).line();
        terminal.send(&format!("{line}; echo \"en\"ded $?\n"))?;
        terminal.expect("ready")?;
        terminal.send("\x1a")?;
        terminal.expect("Stopped")?;
        terminal.send("echo \"she\"ll\n")?;
        terminal.expect("shell")?;
        terminal.send("fg\n")?;
        // The shell prints the job before it takes it to the foreground.
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
fn the_last_part_of_a_pipeline_reads_from_the_terminal() {
    test_with_file(|config| {
        let (mut terminal, mut child) = Terminal::start(&["bash", "--norc", "--noprofile", "-i"])?;
        let line = Launcher::new(&config).program(["sh", "-c", "echo data"]).line();
        // The last part of the pipeline reads from the terminal, so it must be in the foreground.
        terminal.send(&format!("{line} | {{ read a; echo \"rea\"dy; read b </dev/tty; echo \"bo\"th $a $b; }}\n"))?;
        terminal.expect("ready")?;
        terminal.send("typed\n")?;
        terminal.expect("both data typed")?;
        terminal.send("exit 0\n")?;
        ensure!(wait_for_end(&mut child)?.success());
        Ok(())
    });
}

impl Terminal {
    /// Returns the terminal's modes in stty(1)'s own format.
    fn modes(&self) -> Result<String> {
        use std::os::fd::AsFd;

        stdout({
            let mut stty = Command::new("stty");
            stty.arg("-g");
            stty.stdin(File::from(self.master.as_fd().try_clone_to_owned()?));
            stty
        })
    }

    fn set_size(&self, rows: u16, columns: u16) -> Result<()> {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(&self.master, size)?)
    }
}

/// Starts an interactive shell at a terminal. Returns also a command line that runs a script in a tunnel.
fn shell_and_line(config: &std::path::Path, options: &[&str], script: &str) -> Result<(Terminal, Child, String)> {
    let (terminal, child) = Terminal::start(&["bash", "--norc", "--noprofile", "-i"])?;
    Ok((terminal, child, Launcher::new(config).options(options).program(["sh", "-c", script]).line()))
}

/// Ends the shell once it shows its prompt.
fn leave(mut terminal: Terminal, mut shell: Child) -> Result<()> {
    wait_until("a prompt", || {
        // Keys that are typed before vpn-exec has ended go to the program.
        terminal.send("\n")?;
        Ok(terminal.try_expect("$ "))
    })?;
    terminal.send("exit 0\n")?;
    ensure!(wait_for_end(&mut shell)?.success());
    Ok(())
}

/// Prints the owner and the name of a script's terminal, and whether it is also the controlling one.
const WHOSE: &str = "stat -L -c \"is %u\" /proc/self/fd/0; tty; (echo \"al\"so here >/dev/tty) && echo \"sa\"id";

#[test]
fn a_program_of_another_user_has_a_terminal_of_its_own() {
    test_with_file(|config| {
        lab::tunnel::needs_root("another user for the program")?;
        lab::require_users()?;
        let (mut terminal, shell, line) = shell_and_line(&config, &["--user", "4321"], WHOSE)?;
        terminal.send("echo \"bef\"ore; tty\n")?;
        terminal.expect("before")?;
        terminal.expect("/dev/pts/")?;
        let at = terminal.until("\r")?;
        terminal.send(&format!("{line}\n"))?;
        terminal.expect("is 4321")?;
        terminal.expect("/dev/pts/")?;
        ensure!(terminal.until("\r")? != at, "it is root's");
        terminal.expect("also here")?;
        terminal.expect("said")?;
        leave(terminal, shell)
    });
}

#[test]
fn under_sudo_a_program_keeps_the_callers_terminal() {
    test_with_file(|config| {
        lab::tunnel::needs_root("vpn-exec under sudo")?;
        lab::require_users()?;
        let (mut terminal, shell, line) = shell_and_line(&config, &[], WHOSE)?;
        // The caller owns the terminal, as after a login.
        terminal.send("chown 65534 $(tty); echo \"bef\"ore; tty\n")?;
        terminal.expect("before")?;
        terminal.expect("/dev/pts/")?;
        let at = terminal.until("\r")?;
        terminal.send(&format!("SUDO_UID=65534 SUDO_USER=nobody {line}\n"))?;
        terminal.expect("is 65534")?;
        terminal.expect("/dev/pts/")?;
        ensure!(terminal.until("\r")? == at, "it is another one");
        terminal.expect("said")?;
        // --pty replaces it all the same.
        let line = line.replace(" '--' ", " --pty -- ");
        terminal.send(&format!("SUDO_UID=65534 SUDO_USER=nobody {line}\n"))?;
        terminal.expect("is 65534")?;
        terminal.expect("/dev/pts/")?;
        ensure!(terminal.until("\r")? != at, "--pty");
        terminal.expect("said")?;
        leave(terminal, shell)
    });
}

#[test]
fn a_program_of_another_user_cannot_open_the_callers_terminal() {
    test_with_file(|config| {
        lab::require_users()?;
        let script = "exec </dev/null >/run/lab/said 2>&1; stat -L -c %t:%T /dev/tty; (tput lines </dev/tty >/dev/tty) && echo own; ps -o tty= $$";
        let (mut terminal, shell, line) = shell_and_line(&config, &["--user", "4321"], script)?;
        std::fs::write("/run/lab/said", "")?;
        std::fs::set_permissions("/run/lab/said", std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        terminal.send("echo \"at\" $(ps -o tty= $$)\n")?;
        terminal.expect("at pts/")?;
        let at = terminal.until("\r")?;
        terminal.send(&format!("{line} </dev/null >/dev/null 2>&1; echo \"en\"ded\n"))?;
        terminal.expect("ended")?;
        let said = std::fs::read_to_string("/run/lab/said")?;
        ensure!(!said.contains(&format!("pts/{at}\n")), "{said}");
        leave(terminal, shell)
    });
}

#[test]
fn a_terminal_of_its_own_behaves_as_the_callers() {
    test_with_file(|config| {
        let script = "stty size; trap \"stty size\" WINCH; echo \"rea\"dy; \
            while :; do read word || continue; [ \"$word\" = end ] && exit 7; echo \"got\"-$word; done";
        let (mut terminal, shell, line) = shell_and_line(&config, &["--pty"], script)?;
        terminal.set_size(33, 44)?;
        terminal.send(&format!("{line}\n"))?;
        terminal.expect("33 44")?;
        terminal.expect("ready")?;
        // Typed keys are edited, echoed once and read by the program.
        terminal.send("wrx\x7f\x7f\x7fword\n")?;
        terminal.expect("got-word")?;
        terminal.set_size(55, 66)?;
        // A shell handles signals after it has read a line.
        terminal.send("more\n")?;
        terminal.expect("55 66")?;
        terminal.expect("got-more")?;
        // Ctrl-Z stops the job, and the calling shell continues it.
        terminal.send("\x1a")?;
        terminal.expect("Stopped")?;
        terminal.send("echo \"she\"ll; stty -a | grep -o \"[-]*icanon\"\n")?;
        terminal.expect("shell")?;
        terminal.expect("icanon")?;
        terminal.send("fg\n")?;
        // The shell prints the job before it takes it to the foreground.
        terminal.expect("; done")?;
        terminal.send("again\n")?;
        terminal.expect("got-again")?;
        terminal.send("end\n")?;
        terminal.expect("$ ")?;
        terminal.send("echo \"ended\"-$?\n")?;
        terminal.expect("ended-7")?;
        leave(terminal, shell)
    });
}

#[test]
fn ctrl_c_ends_a_program_at_a_terminal_of_its_own() {
    test_with_file(|config| {
        let script = "echo \"rea\"dy; exec sleep 1000";
        let (mut terminal, shell, line) = shell_and_line(&config, &["--pty"], script)?;
        terminal.send(&format!("{line}\n"))?;
        terminal.expect("ready")?;
        terminal.send("\x03")?;
        terminal.expect("$ ")?;
        terminal.send("echo \"ended\"-$?\n")?;
        terminal.expect("ended-130")?;
        leave(terminal, shell)
    });
}

#[test]
fn a_terminated_vpn_exec_restores_the_terminal() {
    test_with_file(|config| {
        let script = "echo $PPID >/run/lab/launcher; stty -echo; echo \"rea\"dy; exec sleep 1000";
        let (mut terminal, shell, line) = shell_and_line(&config, &["--pty"], script)?;
        for signal in ["TERM", "HUP"] {
            // A non-interactive shell does not change the modes.
            std::fs::write("/run/lab/script", format!("stty -g >/run/lab/one; {line}; stty -g >/run/lab/two"))?;
            terminal.send("sh /run/lab/script; echo \"en\"ded\n")?;
            terminal.expect("ready")?;
            // The launcher's parent is the process at the caller's terminal.
            let launcher: i32 = std::fs::read_to_string("/run/lab/launcher")?.trim().parse()?;
            let outside = vpn_exec::linux::process::parent_of(launcher).context("a parent")?;
            let (before, during) = (std::fs::read_to_string("/run/lab/one")?, terminal.modes()?);
            kill(outside.cast_unsigned(), signal)?;
            terminal.expect("ended")?;
            let after = std::fs::read_to_string("/run/lab/two")?;
            ensure!(before != during && before == after, "{signal}: {before} {during} {after}");
        }
        leave(terminal, shell)
    });
}

#[test]
fn keys_go_to_the_rest_of_a_pipeline_unless_the_program_reads_them() {
    test_with_file(|config| {
        let (mut terminal, shell, line) = shell_and_line(&config, &["--pty"], "echo data")?;
        terminal.send(&format!("{line} | {{ read a; echo \"rea\"dy; read b </dev/tty; echo \"bo\"th $a $b; }}\n"))?;
        terminal.expect("ready")?;
        terminal.send("typed\n")?;
        terminal.expect("both data typed")?;
        // A program that reads from the terminal gets the keys.
        let script = "read word </dev/tty; echo \"got\" $word >/dev/tty";
        let line = Launcher::new(&config).option("--pty").program(["sh", "-c", script]).line();
        terminal.send(&format!("{line} >/dev/null; echo \"en\"ded\n"))?;
        terminal.send("early\n")?;
        terminal.expect("got early")?;
        terminal.expect("ended")?;
        leave(terminal, shell)
    });
}

#[test]
fn a_user_at_a_terminal_soon_gets_a_notice_about_a_missing_handshake() {
    test_with_file(|config| {
        let words = Launcher::new(&config).program(["sh", "-c", "read line"]).words();
        let (mut terminal, mut child) = Terminal::start(&words)?;
        terminal.expect("no handshake with any peer within 2 s")?;
        terminal.send("\n")?;
        ensure!(wait_for_end(&mut child)?.success());
        Ok(())
    });
}
