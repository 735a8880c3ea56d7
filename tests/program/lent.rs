//! Resources of the caller that a program cannot use: the input of its terminal, and the keys of its session keyring.

use anyhow::{Context, Result, ensure};
use lab::Launcher;

use crate::support::*;

/// Prints the errors of the two ioctl(2) commands that insert input into a terminal, on a file that is not a terminal.
/// That distinguishes the seccomp filter from a kernel that forbids them itself (`dev.tty.legacy_tiocsti`).
const TYPE: &str = "
import ctypes, errno, os, platform
libc = ctypes.CDLL(None, use_errno=True)
number = {'x86_64': 16, 'aarch64': 29}[platform.machine()]
null = os.open('/dev/null', os.O_RDWR)
said = []
for command in 0x5412, 0x541c, 0x5412 | 1 << 32, 0x5401:
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(number), null, ctypes.c_ulong(command), b'x')
    said.append(errno.errorcode[ctypes.get_errno()])
print(*said)
";

#[test]
fn a_program_cannot_type_into_a_terminal() {
    test_with_file(|config| {
        let python = ["/usr/bin/python3", "-c", TYPE];
        let all = [&[][..], &["--new-privs"], &["--keep-cap", "sys_admin"]];
        // The last one needs root.
        for options in all.into_iter().take(if lab::tunnel::is_rootless() { 2 } else { 3 }) {
            let said = Launcher::new(&config).options(options).program(&python).stdout()?;
            ensure!(said == "EPERM EPERM EPERM ENOTTY\n", "{options:?}: {said}");
        }
        // The twin: outside, the kernel finds that the file is not a terminal.
        let mut outside = std::process::Command::new(python[0]);
        outside.args(&python[1..]);
        ensure!(stdout(outside)? == "ENOTTY ENOTTY ENOTTY ENOTTY\n");
        Ok(())
    });
}

/// Searches the session keyring for a key.
const SEARCH: &str = "
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
add_key, keyctl = {'x86_64': (248, 250), 'aarch64': (217, 219)}[platform.machine()]
def search():
    found = libc.syscall(keyctl, 10, -3, b'user', b'vpn-exec-test', 0)
    print('found' if found > 0 else errno.errorcode[ctypes.get_errno()])
";

#[test]
fn a_program_of_another_user_has_no_keys_of_the_caller() {
    test_with_file(|config| {
        lab::tunnel::needs_root("another user for the program")?;
        let inside = format!("{SEARCH}search()");
        // A new session keyring with a key, as pam_keyinit(8) creates it at a login.
        let outside = format!(
            "{SEARCH}
import os, sys
assert libc.syscall(keyctl, 1, None) > 0, os.strerror(ctypes.get_errno())
assert libc.syscall(add_key, b'user', b'vpn-exec-test', b'secret', 6, -3) > 0
sys.stdout.flush()
os.execv(sys.argv[1], sys.argv[1:])"
        );
        let seen_by = |options: &[&str]| -> Result<String> {
            let inner = Launcher::new(&config).options(options).program(["/usr/bin/python3", "-c", &inside]);
            let mut command = std::process::Command::new("/usr/bin/python3");
            command.args(["-c", &outside]).args(inner.words());
            stdout(command).context("a session with a key")
        };
        ensure!(seen_by(&[])? == "found\n", "a program of the same user shares the session keyring");
        if lab::world::has_users()? {
            let seen = seen_by(&["--user", "4321"])?;
            ensure!(seen == "ENOKEY\n", "{seen}");
            let seen = seen_by(&["--user", "0"])?;
            ensure!(seen == "ENOKEY\n", "with --user 0: {seen}");
        }
        Ok(())
    });
}
