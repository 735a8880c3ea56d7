//! Facilities that programs expect: all ports, ping(8), file capabilities, kernel parameters.

use std::fs;

use anyhow::{Context, ensure};
use lab::Launcher;

use crate::support::*;

/// Returns whether programs can be of other users.
fn has_other_users() -> anyhow::Result<bool> {
    Ok(!lab::tunnel::is_rootless() && lab::world::has_users()?)
}

#[test]
fn an_unprivileged_program_can_bind_to_every_port() {
    test_with_file(|config| {
        let bind = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 80)); s.listen(); print('listens')";
        let options: &[&[&str]] = if has_other_users()? { &[&[], &["--user", "4321"]] } else { &[&[]] };
        for options in options {
            let said = Launcher::new(&config).options(*options).program(["/usr/bin/python3", "-c", bind]).stdout()?;
            ensure!(said == "listens\n", "{options:?}: {said}");
        }
        Ok(())
    });
}

#[test]
fn ping_works_with_and_without_cap_net_raw() {
    test_with_file(|config| {
        let options: &[&[&str]] = match has_other_users()? {
            true => {
                &[&[], &["--user", "4321"], &["--keep-cap", "net_raw"], &["--user", "4321", "--keep-cap", "net_raw"]]
            }
            false => &[&[], &["--keep-cap", "net_raw"]],
        };
        for options in options {
            let said = Launcher::new(&config).options(*options).program(["ping", "-c", "1", "127.0.0.1"]).stdout()?;
            ensure!(said.contains(" 0% packet loss"), "{options:?}: {said}");
        }
        Ok(())
    });
}

/// Debian's ping is a file with a capability that the program's bounding set lacks.
#[test]
fn the_error_says_that_a_files_capabilities_are_refused() {
    test_with_file(|config| {
        // The world's file systems are mounted nosuid, which disables file capabilities.
        let mount = std::path::Path::new("/run/lab/capable");
        fs::create_dir(mount)?;
        rustix::mount::mount("capable", mount, c"tmpfs", rustix::mount::MountFlags::empty(), None)?;
        let file = "/run/lab/capable/file";
        fs::copy("/bin/true", file)?;
        let setcap = std::process::Command::new("/sbin/setcap").args(["cap_net_raw=ep", file]).status();
        if !setcap.is_ok_and(|status| status.success()) {
            lab::skipped("setcap cannot set file capabilities");
            return Ok(());
        }
        let output = Launcher::new(&config).options(["--new-privs"]).program([file]).run()?;
        ensure!(output.status.code() == Some(126) && text_of(&output).contains("--keep-cap"), "{}", text_of(&output));
        for options in [&[][..], &["--keep-cap", "net_raw"]] {
            let output = Launcher::new(&config).options(options).program([file]).run()?;
            ensure!(output.status.success(), "{options:?}: {}", text_of(&output));
        }
        Ok(())
    });
}

#[test]
fn kernel_parameters_have_the_values_of_the_plan() {
    test_with_file(|config| {
        let mut plan = lab::vpn_exec(["plan", "--json", "--config"]);
        plan.arg(&config);
        let plan: serde_json::Value = serde_json::from_str(&stdout(plan)?)?;
        let parameters = plan["parameters"].as_array().context("an array")?;
        ensure!(parameters.len() == 2);
        for parameter in parameters {
            let name = parameter["name"].as_str().context("a name")?;
            let value = parameter["value"].as_str().context("a value")?;
            // A user namespace without all groups has a smaller range.
            let has_all = fs::read_to_string("/proc/self/gid_map")?.contains("4294967295");
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            let inside = Launcher::new(&config).program(["cat", &path]).stdout()?;
            ensure!(inside.trim_end() == value || !has_all, "{name} is {inside}");
            ensure!(!inside.starts_with("1\t0"), "{name} is {inside}");
        }
        Ok(())
    });
}
