//! Changes of the host's files while a program runs, and the host's resolvers, of which the program must see nothing.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use lab::Launcher;
use lab::stand_in::{Protocol, StandIn};

use crate::support::*;

/// Starts a server at a path, in place of a resolver.
pub(crate) fn listen(path: &str) -> Result<StandIn> {
    StandIn::listen(path, Protocol::None)
}

const FILES: &str = "cat /etc/resolv.conf /etc/hosts; grep hosts: /etc/nsswitch.conf";

#[test]
fn the_host_may_replace_its_name_files_without_effect_on_the_program() {
    test_with_file(|config| {
        if !loosen_etc()? {
            return Ok(());
        }
        type Plant = fn() -> std::io::Result<()>;
        let kinds: [(&str, Plant); 3] = [
            ("a file", || fs::write("/etc/resolv.conf", "nameserver 192.0.2.99\n")),
            ("a symbolic link into /run", || {
                fs::create_dir_all("/run/systemd/resolve")?;
                fs::write("/run/systemd/resolve/stub-resolv.conf", "nameserver 192.0.2.99\n")?;
                std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf")
            }),
            ("nothing", || Ok(())),
        ];
        for (what, plant) in kinds {
            let _ = fs::remove_file("/etc/resolv.conf");
            plant()?;
            let mut shell = Shell::start(&config, &[])?;
            let before = shell.say(FILES)?;
            ensure!(before.contains("nameserver 10.64.0.1") && !before.contains("192.0.2.99"), "{what}: {before}");
            ensure!(before.contains("hosts: files dns"), "{what}: {before}");
            // Replaces the files as resolver managers do, then removes them and makes them links.
            for file in ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"] {
                fs::write(format!("{file}.new"), "nameserver 192.0.2.66\nhosts: resolve\n192.0.2.66 leak.example\n")?;
                fs::rename(format!("{file}.new"), file)?;
                ensure!(shell.say(FILES)? == before, "{what}: after the host replaced {file}");
            }
            fs::remove_file("/etc/resolv.conf")?;
            ensure!(shell.say(FILES)? == before, "{what}: after the host removed it");
            std::os::unix::fs::symlink("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")?;
            ensure!(shell.say(FILES)? == before, "{what}: after the host made it a link");
            shell.end()?;
            fs::write("/etc/hosts", "127.0.0.1 localhost\n")?;
            fs::write("/etc/nsswitch.conf", "hosts: resolve dns\n")?;
        }
        Ok(())
    });
}

/// The sockets of the host's resolvers.
pub(crate) const SOCKETS: [&str; 8] = [
    "/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/resolve.hook/io.systemd.Network",
    "/run/systemd/machine/io.systemd.Machine",
    "/run/avahi-daemon/socket",
    "/run/sssd/private",
    "/run/dnsmasq.control",
    "/run/dbus/system_bus_socket",
];

pub(crate) fn visible(shell: &mut Shell) -> Result<String> {
    let paths: Vec<String> = SOCKETS.iter().flat_map(|path| [(*path).to_owned(), format!("/var{path}")]).collect();
    shell.say(&format!("for path in {}; do [ -e $path ] && echo $path; done", paths.join(" ")))
}

#[test]
fn a_program_finds_no_resolver_of_the_host_even_after_a_restart() {
    test_with_file(|config| {
        let first = SOCKETS.map(listen).into_iter().collect::<Result<Vec<_>>>()?;
        fs::create_dir_all("/run/user/0")?;
        let mut shell = Shell::start(&config, &[])?;
        ensure!(visible(&mut shell)?.is_empty(), "{}", visible(&mut shell)?);
        // The C library asks nscd before it reads nsswitch.conf.
        let look_up =
            "RES_OPTIONS='timeout:1 attempts:1' getent ahosts unknown.example; getent passwd root | cut -d: -f1";
        ensure!(shell.say(look_up)? == "root\n");

        for directory in ["/run/nscd", "/run/systemd/resolve", "/run/avahi-daemon"] {
            fs::remove_dir_all(directory)?;
        }
        let second = SOCKETS[..2].iter().map(|path| listen(path)).collect::<Result<Vec<_>>>()?;
        listen("/run/nscd.socket")?;
        ensure!(visible(&mut shell)?.is_empty(), "after the restart: {}", visible(&mut shell)?);
        shell.say(look_up)?;
        ensure!(shell.say("ls -d /run/nscd*")?.contains("cannot access"), "a similar name");
        shell.end()?;
        let asked: Vec<usize> = first.iter().chain(&second).map(StandIn::clients).collect();
        ensure!(asked.iter().all(|count| *count == 0), "asked: {asked:?}");

        // The twin: without vpn-exec, the C library asks nscd.
        Command::new("getent")
            .args(["ahosts", "unknown.example"])
            .env("RES_OPTIONS", "timeout:1 attempts:1")
            .output()?;
        wait_until("a question to nscd", || Ok(second[0].clients() > 0))
    });
}

#[test]
fn the_system_bus_is_visible_only_with_its_option() {
    test_with_file(|config| {
        let _bus = listen("/run/dbus/system_bus_socket")?;
        let script = ["sh", "-c", "ls /run/dbus"];
        ensure!(Launcher::new(&config).program(&script).stdout()?.is_empty());
        ensure!(
            Launcher::new(&config).options(["--dbus", "system"]).program(&script).stdout()? == "system_bus_socket\n"
        );
        Ok(())
    });
}

/// sssd(8) listens at sockets below /var/lib.
#[test]
fn the_sockets_of_sssd_are_hidden_and_its_other_files_are_visible() {
    test_with_file(|config| {
        vpn_exec::linux::mounts::mount_tmpfs("/var/lib".as_ref())?;
        let _daemon = listen("/var/lib/sss/pipes/nss")?;
        fs::create_dir("/var/lib/sss/mc")?;
        fs::write("/var/lib/sss/mc/passwd", "a cache")?;
        let mut shell = Shell::start(&config, &[])?;
        ensure!(shell.say("ls /var/lib/sss; cat /var/lib/sss/mc/passwd")? == "mc\na cache");
        // As after a reinstallation of its package.
        fs::remove_dir_all("/var/lib/sss/pipes")?;
        let _again = listen("/var/lib/sss/pipes/nss")?;
        fs::write("/var/lib/sss/beside", "")?;
        wait_until("another file becomes visible", || Ok(shell.say("ls /var/lib/sss")? == "beside\nmc\n"))?;
        shell.end()?;
        // The directory appears after the program's start, or is replaced as a whole.
        for is_there in [true, false] {
            if !is_there {
                fs::remove_dir_all("/var/lib/sss")?;
            }
            let mut shell = Shell::start(&config, &[])?;
            for time in ["first", "second"] {
                let _ = fs::remove_dir_all("/var/lib/sss");
                let _daemon = listen("/var/lib/sss/pipes/nss")?;
                wait_until(time, || Ok(shell.say("ls -d /var/lib/sss; ls /var/lib/sss")? == "/var/lib/sss\n"))?;
            }
            fs::write("/var/lib/beside", "written by the host")?;
            ensure!(shell.say("cat /var/lib/beside; rm /var/lib/beside")? == "written by the host");
            shell.end()?;
        }
        Ok(())
    });
}

#[test]
fn other_sockets_and_files_in_run_stay_visible() {
    test_with_file(|config| {
        let sockets = [
            "/run/user/1000/bus",
            "/run/user/1000/wayland-0",
            "/run/user/1000/pulse/native",
            "/run/systemd/notify",
            "/run/systemd/journal/socket",
            "/run/service/socket",
        ];
        let listening = sockets.map(listen).into_iter().collect::<Result<Vec<_>>>()?;
        std::os::unix::fs::symlink("/nix/store/system", "/run/current-system")?;
        let mut shell = Shell::start(&config, &[])?;
        for path in sockets {
            ensure!(shell.say(&format!("[ -S {path} ] && echo yes"))? == "yes\n", "{path}");
        }
        ensure!(shell.say("readlink /run/current-system")? == "/nix/store/system\n");
        // A file that appears in an existing directory.
        fs::write("/run/service/later", "")?;
        ensure!(shell.say("ls /run/service/later")? == "/run/service/later\n");
        shell.say("cd /run/service && echo x >from-inside")?;
        ensure!(fs::read_to_string("/run/service/from-inside")? == "x\n");
        shell.end()?;
        drop(listening);
        Ok(())
    });
}

#[test]
fn a_working_directory_in_a_hidden_directory_does_not_show_it() {
    test_with_file(|config| {
        let _resolver = listen("/run/nscd/socket")?;
        let mut command = Launcher::new(&config).program(["sh", "-c", "pwd; ls"]).command();
        command.current_dir("/run/nscd");
        let text = stdout(command)?;
        ensure!(text.starts_with("/\n") && !text.contains("socket"), "{text}");
        Ok(())
    });
}

/// As if an administrator had moved the directory to another disk.
#[test]
fn a_resolver_in_a_linked_directory_is_hidden() {
    test_with_file(|config| {
        vpn_exec::linux::mounts::mount_tmpfs("/var/lib".as_ref())?;
        let _daemon = listen("/var/lib/disk/moved/pipes/nss")?;
        fs::write("/var/lib/disk/moved/beside", "")?;
        std::os::unix::fs::symlink("disk/moved", "/var/lib/sss")?;
        let mut shell = Shell::start(&config, &[])?;
        for path in ["/var/lib/sss/", "/var/lib/disk/moved"] {
            let seen = shell.say(&format!("ls {path}"))?;
            ensure!(seen == "beside\n", "{path}: {seen}");
        }
        fs::remove_dir_all("/var/lib/disk/moved/pipes")?;
        let _again = listen("/var/lib/disk/moved/pipes/nss")?;
        fs::write("/var/lib/disk/moved/later", "")?;
        wait_until("another file becomes visible", || Ok(shell.say("ls /var/lib/sss/")? == "beside\nlater\n"))?;
        shell.end()
    });
}
