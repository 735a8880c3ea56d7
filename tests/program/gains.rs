//! Real programs that gain or change privileges: they work with `--new-privs`, and vpn-exec explains why they fail
//! without.

use std::fs;

use anyhow::ensure;
use lab::Launcher;

use crate::support::*;

#[test]
fn sudo_and_runuser_work_with_new_privileges() {
    test_with_file(|config| {
        lab::tunnel::needs_root("programs that change their user")?;
        lab::require_users()?;
        if !loosen_etc()? {
            return Ok(());
        }
        fs::write("/etc/sudoers", "ALL ALL=(ALL:ALL) NOPASSWD: ALL\n")?;
        fs::set_permissions("/etc/sudoers", std::os::unix::fs::PermissionsExt::from_mode(0o440))?;
        let sudo = ["sudo", "-n", "sh", "-c", "id -u; cat /proc/self/status"];
        let said_inside =
            Launcher::new(&config).options(["--user", "nobody", "--new-privs"]).program(&sudo).stdout()?;
        ensure!(said_inside.starts_with("0\n"), "{said_inside}");
        // Root inside has no capability to change the network, to mount or to enter a namespace.
        ensure!(bits(&said_inside, "CapEff")? == 0x2000_00fb, "{said_inside}");
        let other = ["sudo", "-n", "-u", "daemon", "cat", "/proc/self/status"];
        let said_inside =
            Launcher::new(&config).options(["--user", "nobody", "--new-privs"]).program(&other).stdout()?;
        ensure!(
            field(&said_inside, "Uid")?.starts_with("1\t1\t1") && bits(&said_inside, "CapEff")? == 0,
            "{said_inside}"
        );
        let other = ["runuser", "-u", "nobody", "--", "id", "-u"];
        let as_root = ["--user", "0", "--new-privs"];
        ensure!(Launcher::new(&config).options(&as_root).program(&other).stdout()? == "65534\n");
        // Without the option they fail, and vpn-exec names it.
        for (options, command, told) in
            [(["--user", "nobody"], &sudo[..], "--new-privs"), (["--user", "0"], &other[..], "--user NAME")]
        {
            let output = Launcher::new(&config).options(&options).program(command).run()?;
            ensure!(!output.status.success() && text_of(&output).contains(told), "{}", text_of(&output));
        }
        for way_out in ["nsenter -t 1 -n true", "mount -t tmpfs none /mnt", "ip link set lo down", "unshare -n true"] {
            let output = Launcher::new(&config).options(&as_root).program(["sh", "-c", way_out]).run()?;
            ensure!(!output.status.success(), "{way_out}: {}", text_of(&output));
        }
        Ok(())
    });
}

#[test]
fn apt_get_works_with_new_privileges() {
    test_with_file(|config| {
        lab::tunnel::needs_root("programs that change their user")?;
        lab::require_users()?;
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
        let fetched = |more: &[&str], options: &[&str]| Launcher::new(&config).options(more).program(options).run();
        let output = fetched(&["--user", "0", "--new-privs"], &options)?;
        ensure!(output.status.success(), "{}", text_of(&output));
        let output = fetched(&["--user", "0"], &options)?;
        ensure!(!output.status.success() && text_of(&output).contains("--new-privs"), "{}", text_of(&output));
        Ok(())
    });
}
