//! `vpn-exec plan` tells in which way a tunnel is made, and why.

use anyhow::{Context, Result, ensure};
use lab::{Lab, Peer, Reach, launcher};

use crate::{User, output};

/// Requires that a plan begins with this line, and that the JSON has the same reason.
fn begins(text: &str, json: &str, way: &str, reason: &str) -> Result<()> {
    let first = text.lines().next().unwrap_or_default();
    ensure!(first == format!("{way}: {reason}"), "{text}");
    let json: serde_json::Value = serde_json::from_str(json)?;
    ensure!(json["way_reason"] == reason, "{json}");
    let is_rootless = json["rootless"].as_bool().unwrap_or(false);
    ensure!(is_rootless == (way != "Made by root") && json["namespace"].is_null() == is_rootless, "{json}");
    Ok(())
}

#[test]
fn a_plan_tells_that_a_user_needs_no_root() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let user = User::new(lab)?;
        let plan = |options: &[&str]| {
            let mut command = user.vpn_exec(&["plan"]);
            command.arg(&user.file).args(options);
            output(command)
        };
        let reason = if user.is_other { "you are not root" } else { "--rootless was given" };
        begins(&plan(&[])?, &plan(&["--json"])?, "Made without root, in a user namespace", reason)?;
        if user.is_other {
            let (text, json) = (plan(&["--rootless"])?, plan(&["--rootless", "--json"])?);
            begins(&text, &json, "Made without root, in a user namespace", "--rootless was given")?;
        }
        Ok(())
    });
}

#[test]
fn a_plan_tells_by_which_privileges_root_makes_a_tunnel() {
    lab::test(Peer::Ours, |lab: &Lab| {
        let file = lab.wg_quick_file(Reach::Ipv4)?;
        let file = file.to_str().context("UTF-8")?;
        let plan = |program: &[&str], options: &[&str]| {
            let mut command = std::process::Command::new("env");
            command.args(program).arg(launcher::binary()).args(["plan", file]).args(options);
            output(command)
        };
        begins(&plan(&[], &[])?, &plan(&[], &["--json"])?, "Made by root", "you are root")?;

        let few = ["setpriv", "--bounding-set=-all,+sys_admin"];
        let reason = "this process lacks CAP_SYS_ADMIN, CAP_NET_ADMIN or CAP_SETPCAP";
        begins(&plan(&few, &[])?, &plan(&few, &["--json"])?, "Made without root, in a user namespace", reason)?;

        if lab::world::has_users()? {
            let capabilities = "+sys_admin,+net_admin,+setpcap,+kill,+sys_ptrace,+setuid,+setgid,+dac_override";
            let [inherited, ambient] = ["inh", "ambient"].map(|set| format!("--{set}-caps={capabilities}"));
            let many = ["setpriv", "--reuid=1000", "--clear-groups", inherited.as_str(), ambient.as_str()];
            let reason = "this process has CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SETPCAP";
            begins(&plan(&many, &[])?, &plan(&many, &["--json"])?, "Made by root", reason)?;
        }
        Ok(())
    });
}
