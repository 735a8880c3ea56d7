//! Real programs that gain or change privileges: what `--new-privs` lets them do, and what is said where they cannot.

use std::fs;

use anyhow::ensure;

use crate::privileges::has_other_users;
use crate::support::*;

#[test]
fn sudo_and_runuser_work_with_new_privileges() {
    test_with_file(|config| {
        if !has_other_users()? || !loosen_etc()? {
            return Ok(());
        }
        fs::write("/etc/sudoers", "ALL ALL=(ALL:ALL) NOPASSWD: ALL\n")?;
        fs::set_permissions("/etc/sudoers", std::os::unix::fs::PermissionsExt::from_mode(0o440))?;
        let sudo = ["sudo", "-n", "sh", "-c", "id -u; cat /proc/self/status"];
        let said_inside = stdout_of(vpn_exec(&config, &["--user", "nobody", "--new-privs"], &sudo))?;
        ensure!(said_inside.starts_with("0\n"), "{said_inside}");
        // Root inside has no capability that changes the network, mounts or enters a namespace.
        ensure!(bits(&said_inside, "CapEff")? == 0x2000_00fb, "{said_inside}");
        let other = ["sudo", "-n", "-u", "daemon", "cat", "/proc/self/status"];
        let said_inside = stdout_of(vpn_exec(&config, &["--user", "nobody", "--new-privs"], &other))?;
        ensure!(
            field(&said_inside, "Uid")?.starts_with("1\t1\t1") && bits(&said_inside, "CapEff")? == 0,
            "{said_inside}"
        );
        let other = ["runuser", "-u", "nobody", "--", "id", "-u"];
        let as_root = ["--user", "0", "--new-privs"];
        ensure!(stdout_of(vpn_exec(&config, &as_root, &other))? == "65534\n");
        // Without, they fail, and what to do is said.
        for (options, command, told) in
            [(["--user", "nobody"], &sudo[..], "--new-privs"), (["--user", "0"], &other[..], "--user NAME")]
        {
            let output = vpn_exec(&config, &options, command).output()?;
            ensure!(!output.status.success() && said(&output).contains(told), "{}", said(&output));
        }
        for way_out in ["nsenter -t 1 -n true", "mount -t tmpfs none /mnt", "ip link set lo down", "unshare -n true"] {
            let output = vpn_exec(&config, &as_root, &["sh", "-c", way_out]).output()?;
            ensure!(!output.status.success(), "{way_out}: {}", said(&output));
        }
        Ok(())
    });
}

#[test]
fn apt_get_works_with_new_privileges() {
    test_with_file(|config| {
        if !has_other_users()? {
            return Ok(());
        }
        let root = std::path::Path::new("/run/lab/apt");
        for folder in ["repo", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(folder))?;
        }
        let package =
            "Package: nothing\nVersion: 1\nArchitecture: all\nFilename: ./nothing.deb\nSize: 1\nDescription: nothing\n";
        fs::write(root.join("repo/Packages"), package)?;
        fs::write(root.join("sources.list"), "deb [trusted=yes] file:/run/lab/apt/repo ./\n")?;
        let options = [
            "apt-get",
            "-o=Dir::State=/run/lab/apt/state",
            "-o=Dir::Cache=/run/lab/apt/cache",
            "-o=Dir::Etc::SourceList=/run/lab/apt/sources.list",
            "-o=Dir::Etc::SourceParts=/nowhere",
            "-o=APT::Update::Error-Mode=any",
            "update",
        ];
        let fetched = |more: &[&str], options: &[&str]| vpn_exec(&config, more, options).output();
        let output = fetched(&["--user", "0", "--new-privs"], &options)?;
        ensure!(output.status.success(), "{}", said(&output));
        let output = fetched(&["--user", "0"], &options)?;
        ensure!(!output.status.success() && said(&output).contains("--new-privs"), "{}", said(&output));
        Ok(())
    });
}
