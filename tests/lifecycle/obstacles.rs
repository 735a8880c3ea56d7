//! Conditions under which a tunnel cannot be made: one clear message reports each, and nothing is left.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lab::{Launcher, Snapshot};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use vpn_exec::linux::sysctl;

use crate::support::{
    CONFIG_TEXT, PATIENCE, assert_refused, assert_unchanged, by_way_of, ended, errors, output_of, prepare, run, start,
    vpn_exec, with_task,
};

/// Returns a command that reads its configuration from standard input, which does not need `/run`.
fn from_input(name: &str, task: &str) -> Command {
    with_task(Launcher::new("-").options(["--name", name]), task)
}

fn run_with_input(mut command: Command) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("an input")?.write_all(CONFIG_TEXT.as_bytes())?;
    output_of(child)
}

#[test]
fn a_read_only_run_is_reported() {
    lab::world::test(|| {
        prepare()?;
        let flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
        mount_remount("/run", flags | MountFlags::RDONLY, c"")?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run(vpn_exec("obstacle", "exit 0"))?);
        assert!(message.contains("/run") && message.contains("ead-only"), "{message}");
        assert_unchanged(&before, "with a read-only /run")?;

        mount_remount("/run", flags, c"")?;
        assert_eq!(ended(run(vpn_exec("obstacle", "exit 0"))?.status), Ok(0));
        Ok(())
    });
}

#[test]
fn a_missing_run_is_reported() {
    lab::world::test(|| {
        prepare()?;
        fs::create_dir("/run/lab/root")?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run_with_input(by_way_of("without-run", &from_input("obstacle", "exit 0")))?);
        let directory = vpn_exec::registry::Scope::current().directory();
        assert!(message.contains(&directory.display().to_string()), "{message}");
        assert_unchanged(&before, "without /run")
    });
}

#[test]
fn a_file_in_place_of_a_directory_in_run_is_reported_and_kept() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has nothing in /run")?;
        prepare()?;
        for path in ["/run/netns", "/run/vpn-exec"] {
            fs::write(path, "foreign")?;
            let before = Snapshot::take()?;
            let message = assert_refused(&run(vpn_exec("obstacle", "exit 0"))?);
            assert!(message.contains("/run") && message.to_lowercase().contains("not a directory"), "{message}");
            assert_unchanged(&before, format_args!("where {path} is a file"))?;
            fs::remove_file(path).with_context(|| format!("{path} is in use"))?;
        }
        Ok(())
    });
}

/// Mounts a small `/run` over the world's own. `options` limit its files (nr_inodes) or its bytes (size).
fn small_run(options: &str) -> Result<()> {
    let options = std::ffi::CString::new(format!("mode=0755,{options}"))?;
    Ok(mount("lab-small", "/run", c"tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(&*options))?)
}

#[test]
fn a_full_run_is_reported_at_whichever_file() {
    lab::world::test(|| {
        lab::tunnel::needs_root("a rootless tunnel has nothing in /run")?;
        prepare()?;
        let mut worked = 0;
        let sizes = (1..=16).map(|files| format!("nr_inodes={files}"));
        // The kernel rounds up to pages, of at least 4096 bytes.
        let page = 4096;
        let sizes = sizes.chain((1..=9).map(|pages| format!("size={}", pages * page)));
        let mut refused = Vec::new();
        for size in sizes {
            small_run(&size)?;
            let before = Snapshot::take()?;
            let output = run_with_input(from_input("obstacle", "exit 0"))?;
            if ended(output.status) == Ok(0) {
                worked += 1;
            } else {
                assert!(assert_refused(&output).contains("/run"), "{size}: {}", errors(&output));
                refused.push(size.clone());
            }
            assert_unchanged(&before, format_args!("with {size}"))?;
            unmount("/run", UnmountFlags::empty())?;
        }
        assert!(worked >= 2 && refused.len() >= 6, "{refused:?}");
        Ok(())
    });
}

#[test]
fn a_missing_tun_device_is_reported() {
    lab::world::test(|| {
        prepare()?;
        mount("lab-no-tun", "/dev/net", c"tmpfs", MountFlags::empty(), None)?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run(vpn_exec("obstacle", "exit 0"))?);
        assert!(message.contains("/dev/net/tun") && message.contains("modprobe tun"), "{message}");
        assert_unchanged(&before, "without /dev/net/tun")?;
        unmount("/dev/net", UnmountFlags::empty())?;

        rustix::mount::mount_bind("/dev/null", "/dev/net/tun")?;
        let before = Snapshot::take()?;
        let message = assert_refused(&run(vpn_exec("obstacle", "exit 0"))?);
        assert!(message.contains("/dev/net/tun"), "{message}");
        assert_unchanged(&before, "with another /dev/net/tun")
    });
}

#[test]
fn a_limit_of_namespaces_is_reported() {
    lab::world::test(|| {
        prepare()?;
        // The limits belong to the world's user namespace.
        let refuse = |limit: &str, expected: &str| -> Result<()> {
            let parameter = format!("user/{limit}");
            let usual = sysctl::get(&parameter)?;
            let before = Snapshot::take()?;
            sysctl::set(&parameter, "0")?;
            let message = assert_refused(&run(vpn_exec("obstacle", "exit 0"))?);
            assert!(message.contains(expected), "{message}");
            sysctl::set(&parameter, &usual)?;
            assert_unchanged(&before, parameter)
        };
        // A rootless tunnel tries one first, and names the parameter at once.
        let expected = if lab::tunnel::is_rootless() { "user.max_net_namespaces" } else { "network namespace" };
        refuse("max_net_namespaces", expected)?;
        // The world itself has one, so this allows one tunnel, which has a gateway as well if it is rootless.
        sysctl::set("user/max_net_namespaces", if lab::tunnel::is_rootless() { "3" } else { "2" })?;
        let before = Snapshot::take()?;
        let running = start("one", "wait")?;
        let message = assert_refused(&run(vpn_exec("two", "exit 0"))?);
        assert!(message.contains("user.max_net_namespaces"), "{message}");
        running.end()?;
        assert_unchanged(&before, "after one of two")?;
        // The kernel may not have removed the first namespace yet.
        let deadline = Instant::now() + lab::patience(PATIENCE);
        while ended(run(vpn_exec("two", "exit 0"))?.status) != Ok(0) {
            ensure!(Instant::now() < deadline, "the kernel does not remove the first tunnel's namespace");
        }
        assert_unchanged(&before, "after the other of two")?;
        sysctl::set("user/max_net_namespaces", "100")?;
        refuse("max_mnt_namespaces", "mount namespace")
    });
}

#[test]
fn a_limit_of_open_files_is_reported_however_low() {
    lab::world::test(|| {
        prepare()?;
        let before = Snapshot::take()?;
        let (mut refused, mut worked) = (0, 0);
        // A rootless tunnel needs a few more.
        for files in 6..=44 {
            let output = run(by_way_of(&format!("with-open-files {files}"), &vpn_exec("obstacle", "exit 0")))?;
            if ended(output.status) == Ok(0) {
                worked += 1;
            } else {
                assert_refused(&output);
                refused += 1;
            }
            assert_unchanged(&before, format_args!("with {files} files at most"))?;
        }
        assert!(refused >= 3 && worked >= 3, "{refused} refused, {worked} worked");
        Ok(())
    });
}

/// A filter of system calls, as services have by `SystemCallFilter=~@resources`, that kills who chooses CPUs.
const WITHOUT_CHOICE_OF_CPUS: &str = "
import ctypes, os, platform, struct, sys
call = {'x86_64': 203, 'aarch64': 122}[platform.machine()]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7fff0000)]
text = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack('HP', len(rules), ctypes.addressof(text)))
if ctypes.CDLL(None).prctl(22, 2, program, 0, 0):
    sys.exit('cannot install the filter')
os.execv(sys.argv[1], sys.argv[1:])
";

#[test]
fn a_filter_of_system_calls_that_forbids_to_choose_cpus_is_respected() {
    lab::world::test(|| {
        prepare()?;
        let launch = vpn_exec("filtered", "exit 7");
        let mut filtered = Command::new("/usr/bin/python3");
        filtered.args(["-c", WITHOUT_CHOICE_OF_CPUS]).arg(launch.get_program()).args(launch.get_args());
        for (name, value) in launch.get_envs() {
            filtered.env(name, value.unwrap_or_default());
        }
        filtered.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = run(filtered)?;
        assert_eq!(ended(output.status), Ok(7), "{}", errors(&output));
        Ok(())
    });
}
