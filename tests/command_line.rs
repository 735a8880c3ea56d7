//! The command line with running tunnels: their names, their states, shells inside, and completions.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Peer, Reach};
use rustix::mount::MountFlags;

const FOLDER: &str = "/etc/wireguard";

/// A provider's file whose endpoint does not answer.
const SILENT: &str = "[Interface]\n\
    PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
    Address = 10.99.0.2/32\n\
    [Peer]\n\
    PublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\n\
    AllowedIPs = 0.0.0.0/0\n\
    Endpoint = 192.0.2.1:51820\n";

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-exec"));
    command.args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1").env("SHELL", "/bin/sh");
    for variable in ["SUDO_UID", "VPN_EXEC_TUNNEL", "VPN_EXEC_CONFIG", "XDG_CONFIG_HOME"] {
        command.env_remove(variable);
    }
    command
}

fn outcome(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Runs a command that succeeds, and returns its output.
fn works(arguments: &[&str]) -> Result<String> {
    let (status, text, said) = outcome(&command(arguments).output()?);
    ensure!(status == Some(0), "{arguments:?}: {status:?}: {said}");
    Ok(text)
}

/// Runs a command that fails with a status, and returns its messages.
fn fails(status: i32, arguments: &[&str]) -> Result<String> {
    let (found, _, said) = outcome(&command(arguments).output()?);
    ensure!(found == Some(status), "{arguments:?}: {found:?}: {said}");
    Ok(said)
}

/// Runs a shell in a tunnel, and returns the output of its script.
fn shell(mut command: Command, script: &str) -> Result<String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(script.as_bytes())?;
    let (status, text, said) = outcome(&child.wait_with_output()?);
    ensure!(status == Some(7), "{status:?}: {said}");
    Ok(text)
}

/// Creates the files `name.conf` in an `/etc/wireguard` of the test's own.
fn wg_quick_files(lab: &Lab) -> Result<()> {
    if !Path::new(FOLDER).is_dir() {
        // The host's /etc must not change. What cannot be copied without privileges does not matter.
        let copy = format!("{}/etc", lab::world::FILES);
        Command::new("cp").args(["-a", "/etc", &copy]).stderr(Stdio::null()).status()?;
        std::fs::create_dir_all(format!("{copy}/wireguard"))?;
        rustix::mount::mount_bind_recursive(&copy, "/etc")?;
    }
    rustix::mount::mount("lab-wireguard", FOLDER, c"tmpfs", MountFlags::NOSUID, Some(c"mode=0700"))?;
    for (name, text) in [("office", lab.wg_quick_text(Reach::Ipv4)), ("silent", SILENT.to_owned())] {
        let path = format!("{FOLDER}/{name}.conf");
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    }
    Ok(())
}

#[test]
fn a_running_tunnel_is_used_by_its_name() {
    lab::test(Peer::Ours, |lab| {
        lab::require_tun()?;
        wg_quick_files(lab)?;
        let backend = ["--backend", lab::backend()];

        // A name without a profile stands for the file of wg-quick.
        ensure!(works(&["plan", "office"])?.contains("/run/netns/office"));
        ensure!(works(&["check", "--tunnel", "office"])?.contains("the configuration is valid"));
        ensure!(fails(125, &["up", "ofice"])?.contains("a similar name exists: office"));
        works(&[&["up", "office", "--wait", "20"], &backend[..]].concat())?;
        works(&[&["up", "silent"], &backend[..]].concat())?;

        // The exit status of `--check` is the state.
        let check = |name| Ok::<_, anyhow::Error>(outcome(&command(&["status", "--check", name]).output()?));
        ensure!(check("office")? == (Some(0), "up\n".into(), String::new()), "{:?}", check("office")?);
        ensure!(check("silent")? == (Some(3), "connecting\n".into(), String::new()), "{:?}", check("silent")?);
        ensure!(check("missing")?.0 == Some(4), "{:?}", check("missing")?);
        ensure!(works(&["-q", "status", "--check", "office"])?.is_empty());
        let list = works(&["list"])?;
        let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
        ensure!(rows[1][..2] == ["office", "up"] && rows[2][..3] == ["silent", "connecting", "-"], "{list}");

        // Programs and shells run in it, and find its name in their environment.
        let namespace = |text: &str| text.trim().to_owned();
        let outside = std::fs::read_link("/proc/self/ns/net")?.display().to_string();
        let by_name = works(&["office", "--", "readlink", "/proc/self/ns/net"])?;
        ensure!(
            namespace(&by_name) != outside
                && by_name == works(&["-t", "office", "--", "readlink", "/proc/self/ns/net"])?
        );
        let script = "readlink /proc/self/ns/net; echo $VPN_EXEC_TUNNEL${VPN_EXEC_CONFIG-none}; exit 7\n";
        let expected = format!("{by_name}officenone\n");
        ensure!(shell(command(&["shell", "office"]), script)? == expected);
        let mut by_variable = command(&["shell"]);
        by_variable.env("VPN_EXEC_CONFIG", format!("{FOLDER}/office.conf")).env("VPN_EXEC_TUNNEL", "silent");
        by_variable.args(backend);
        ensure!(shell(by_variable, script)? == expected);

        // Running tunnels are completed, and suggested.
        let mut completion = command(&["--", "vpn-exec", "down", ""]);
        completion.env("_VPN_EXEC_COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", "2").env("_CLAP_IFS", " ");
        let (_, text, _) = outcome(&completion.output()?);
        ensure!(text.starts_with("office silent"), "{text}");
        ensure!(fails(125, &["down", "ofice"])?.contains("a similar tunnel exists: office"));
        ensure!(fails(125, &["status", "office.conf"])?.contains("a similar tunnel exists: office"));

        works(&["down", "office"])?;
        works(&["down", "silent"]).map(drop)
    });
}

#[test]
fn messages_of_a_keeper_are_found() {
    lab::test(Peer::Ours, |lab| {
        lab::require_tun()?;
        wg_quick_files(lab)?;
        let journalctl = lab::world::FILES.to_owned() + "/bin/journalctl";
        std::fs::create_dir_all(Path::new(&journalctl).parent().context("a folder")?)?;
        std::fs::write(&journalctl, "#!/bin/sh\necho journal: \"$@\"\n")?;
        std::fs::set_permissions(&journalctl, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let logs = || {
            let path = format!("{}/bin:/usr/bin:/bin", lab::world::FILES);
            Ok::<_, anyhow::Error>(outcome(&command(&["logs", "office", "--lines", "3"]).env("PATH", path).output()?))
        };
        works(&["up", "office", "--backend", lab::backend()])?;
        let (status, text, said) = logs()?;
        // The tests may run in a service.
        let is_journal = status == Some(0) && text.starts_with("journal: --unit=") && text.ends_with("--lines=3\n");
        let is_discarded =
            status == Some(125) && said.contains("discards its messages") && said.contains("vpn-exec@office");
        ensure!(is_journal || is_discarded, "{status:?} {text} {said}");
        works(&["down", "office"]).map(drop)
    });
}
