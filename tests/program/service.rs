//! A program that declares another process the service's main process (MAINPID of sd_notify(3)).

use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::Launcher;
use vpn_exec::linux::process::parent_of;

use crate::support::*;

/// Starts a child whose child it declares the main process, and ends. The main process ends once a file exists. Its
/// parent waits for it, and then for SIGTERM.
const PROGRAM: &str = "
import os, socket, sys, time
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
between, write = os.pipe()
if os.fork() == 0:
    main = os.fork()
    if main == 0:
        wait_for('/run/lab/end')
        os._exit(0)
    os.write(write, str(main).encode())
    os.waitpid(main, 0)
    open('/run/lab/ended', 'w').close()
    time.sleep(1000)
main = os.read(between, 20).decode()
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(f'MAINPID={main}\\nSTATUS=main {main}'.encode(), os.environ['NOTIFY_SOCKET'])
wait_for('/run/lab/go')
";

#[test]
fn a_process_with_the_id_of_an_ended_main_process_gets_no_signal() {
    test_with_file(|config| {
        let manager = UnixDatagram::bind("/run/lab/notify")?;
        manager.set_read_timeout(Some(PATIENCE))?;
        let mut command = Launcher::new(&config).program(["/usr/bin/python3", "-c", PROGRAM]).command();
        let mut child = command.env("NOTIFY_SOCKET", "/run/lab/notify").stdout(Stdio::piped()).spawn()?;
        let main = loop {
            let mut text = [0; 1000];
            let length = manager.recv(&mut text)?;
            if let Some(main) = std::str::from_utf8(&text[..length])?.strip_prefix("STATUS=main ") {
                break main.trim().parse::<i32>()?;
            }
        };
        let exists = |path: &str| std::path::Path::new(path).exists();
        std::fs::write("/run/lab/go", "")?;
        // The launcher has read the notification before it waits for the program.
        let launcher = child.id().cast_signed();
        wait_until("the end of the program", || {
            let between = parent_of(main).context("the parent of the main process")?;
            Ok(parent_of(between) == Some(launcher) && between != launcher)
        })?;
        std::fs::write("/run/lab/end", "")?;
        wait_until("the end of the main process", || Ok(exists("/run/lab/ended")))?;
        // Another process gets its ID.
        let mut other = with_number(main)?;
        kill(child.id(), "TERM")?;
        let status = wait_for_end(&mut child)?;
        ensure!(status.code() == Some(0), "the program ended so: {status}");
        ensure!(other.try_wait()?.is_none(), "another process was signalled");
        other.kill()?;
        let signal = other.wait()?.signal();
        ensure!(signal == Some(libc::SIGKILL), "{signal:?}");
        Ok(())
    });
}

/// Starts a process with a free process ID.
fn with_number(number: i32) -> Result<std::process::Child> {
    for _ in 0..1000 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (number - 1).to_string())
            .context("cannot choose a process ID")?;
        let mut child = Command::new("sleep").arg("1000").spawn()?;
        if child.id().cast_signed() == number {
            return Ok(child);
        }
        child.kill()?;
        child.wait()?;
    }
    anyhow::bail!("the process ID {number} is always taken")
}
