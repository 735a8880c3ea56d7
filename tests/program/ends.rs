//! The end of a program: exit status, signals, orphans.

use std::fs::{self};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use lab::{Launcher, world};

use crate::support::*;

#[test]
fn verbose_output_names_the_backend() {
    test_with_file(|config| {
        let output = Launcher::with_backend(&config, "auto").option("-v").program(["true"]).run()?;
        ensure!(output.status.success(), "{}", text_of(&output));
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        let kernel = words.contains("using the kernel's WireGuard");
        let embedded = words.contains(match lab::tunnel::is_rootless() {
            true => "using the embedded WireGuard",
            false => "using the embedded WireGuard instead",
        });
        ensure!(kernel != embedded, "exactly one backend must be named: {words}");
        Ok(())
    });
}

#[test]
fn an_invalid_state_file_is_named_in_the_error_and_left_alone() {
    test_with_file(|config| {
        let directory = vpn_exec::registry::path_of(&"nowhere".parse()?);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let state = directory.join("state");
        fs::write(&state, "garbage")?;
        let output = Launcher::new(&config).program(["true"]).run()?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(125), "{words}");
        ensure!(words.contains(&state.display().to_string()) && words.contains("remove the file"), "{words}");
        ensure!(fs::read_to_string(&state)? == "garbage");
        Ok(())
    });
}

#[test]
fn vpn_exec_exits_with_the_programs_status() {
    test_with_file(|config| {
        for (program, code) in [
            (&["true"][..], 0),
            (&["sh", "-c", "exit 7"], 7),
            (&["sh", "-c", "exit 255"], 255),
            (&["/etc/passwd"], 126),
            (&["/nonexistent/program"], 127),
            (&["no-such-program-anywhere"], 127),
        ] {
            let output = Launcher::new(&config).program(program).run()?;
            ensure!(output.status.code() == Some(code), "{program:?}: {}", text_of(&output));
        }
        for signal in [1, 2, 6, 9, 13, 15, 30, 35] {
            let output = Launcher::new(&config).program(["sh", "-c", &format!("kill -{signal} $$")]).run()?;
            ensure!(output.status.signal() == Some(signal), "{signal}: {}", text_of(&output));
        }
        Ok(())
    });
}

#[test]
fn the_error_says_why_a_program_cannot_be_executed() {
    test_with_file(|config| {
        let script = Path::new(world::FILES).join("script");
        fs::write(&script, "#!/no/interpreter\n")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let script = script.to_str().context("UTF-8")?;
        for (program, code, told) in [
            (&["no-such-program-anywhere"][..], 127, "PATH"),
            (&["true --version"], 127, "quotation marks"),
            (&["--wait", "3", "true"], 127, "before the two dashes"),
            (&[""], 127, "empty"),
            (&["/no/such/program"], 127, "check its path"),
            (&[script], 127, "interpreter"),
            (&["/etc"], 126, "it is a directory"),
            (&["/etc/passwd"], 126, "chmod +x"),
        ] {
            let output = Launcher::new(&config).program(program).run()?;
            ensure!(output.status.code() == Some(code), "{program:?}: {}", text_of(&output));
            ensure!(String::from_utf8_lossy(&output.stderr).contains(told), "{program:?}: {}", text_of(&output));
        }
        Ok(())
    });
}

#[test]
fn vpn_exec_forwards_signals_to_the_program() {
    test_with_file(|config| {
        for signal in ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "ABRT", "ALRM", "PWR", "37", "64"] {
            let script = format!("trap 'echo got; exit 3' {signal}; echo ready; while :; do sleep 0.05; done");
            let mut child = Launcher::new(&config).program(["sh", "-c", &script]).start()?;
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
fn the_program_inherits_signal_dispositions_and_the_signal_mask() {
    test_with_file(|config| {
        let line = Launcher::new(&config).program(["cat", "/proc/self/status"]).line();
        let mut command = Command::new("sh");
        let script = format!("trap '' HUP USR2; exec {line}");
        command.args(["-c", &script]).stdin(Stdio::null());
        let status = stdout(command)?;
        let (hup, usr2) = (1 << 0, 1 << 11);
        // Without signals 32 and 33, which the C library uses itself.
        let standard = (1 << 31) - 1;
        ensure!(bits(&status, "SigIgn")? & standard == hup | usr2, "{}", field(&status, "SigIgn")?);
        ensure!(bits(&status, "SigBlk")? == 0, "{}", field(&status, "SigBlk")?);
        Ok(())
    });
}

#[test]
fn the_kernel_kills_the_program_of_a_killed_launcher() {
    test_with_file(|config| {
        let mut child = Launcher::new(&config).program(["sh", "-c", "echo $$; exec sleep 1000"]).start()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        let program = PathBuf::from(format!("/proc/{}/cmdline", line.trim()));
        // The keeper would kill the program, too. It is stopped, so the kernel's parent-death signal must do it.
        let state = vpn_exec::registry::read(&"nowhere".parse()?)?.context("a state")?;
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
fn a_tunnel_stays_up_until_orphans_have_ended() {
    test_with_file(|config| {
        // The orphan, in a session of its own, looks at the tunnel after its parent has ended.
        let script = "setsid sh -c 'sleep 0.6; cat /sys/class/net/wg0/mtu; echo late' & exit 4";
        let output = Launcher::new(&config).program(["sh", "-c", script]).run()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.code() == Some(4), "{}", text_of(&output));
        ensure!(text.ends_with("late\n") && text.lines().count() == 2, "{}", text_of(&output));

        let begin = Instant::now();
        let output = Launcher::new(&config)
            .options(["--kill-orphans"])
            .program(["sh", "-c", "setsid sleep 1000 & exit 5"])
            .run()?;
        ensure!(output.status.code() == Some(5), "{}", text_of(&output));
        ensure!(begin.elapsed() < PATIENCE);
        Ok(())
    });
}

/// The process that becomes the program is killed after it has started the view helper, before the launcher knows of
/// that.
#[test]
fn the_launcher_does_not_wait_for_a_helper_of_a_killed_process() {
    test_with_file(|config| {
        let mut command = Launcher::new(&config).program(["true"]).command();
        command.env(lab::variables::FAIL, "kill:after the process that keeps the view");
        let mut child = command.stderr(Stdio::null()).spawn()?;
        let status = wait_for_end(&mut child)?;
        ensure!(status.signal() == Some(9), "{status}");
        wait_until("the end of the tunnel", || Ok(!Path::new("/run/vpn-exec").exists()))
    });
}

#[test]
fn vpn_exec_names_the_processes_that_it_waits_for() {
    test_with_file(|config| {
        // vpn-exec reports the orphan only after the program has ended.
        let script = "(until [ -e /run/lab/go ]; do sleep 0.1; done) & until [ -e /run/lab/end ]; do sleep 0.1; done";
        let mut child =
            Launcher::new(&config).program(["sh", "-c", script]).command().stderr(Stdio::piped()).spawn()?;
        let mut errors = BufReader::new(child.stderr.take().context("piped")?);
        let mut next = || -> anyhow::Result<String> {
            let mut line = String::new();
            errors.read_line(&mut line)?;
            Ok(line)
        };
        // No peer answers.
        let line = next()?;
        ensure!(line.contains("no handshake with any peer within 10 s"), "{line}");
        fs::write("/run/lab/end", "")?;
        let line = next()?;
        ensure!(line.contains("waiting for 1 that it left behind: sh -c ") && line.contains("(pid "), "{line}");
        fs::write("/run/lab/go", "")?;
        ensure!(wait_for_end(&mut child)?.success());
        let line = next()?;
        ensure!(line.is_empty(), "a message is repeated: {line}");
        Ok(())
    });
}

#[test]
fn a_wait_for_a_handshake_is_reported_in_a_log() {
    test_with_file(|config| {
        let output = Launcher::new(&config).options(["--wait", "3"]).program(["true"]).run()?;
        let said = lab::launcher::errors_of(&output);
        ensure!(output.status.code() == Some(125), "{said}");
        ensure!(said.matches("no handshake with any peer yet: waiting for it up to 3 s").count() == 1, "{said}");
        ensure!(said.contains("no handshake with any peer within 3 s"), "{said}");
        Ok(())
    });
}
