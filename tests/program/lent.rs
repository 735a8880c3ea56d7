//! What a caller does not lend to a program of another user: the input of its terminal, and its keys.

use anyhow::{Context, Result, ensure};
use lab::Launcher;

use crate::support::*;

/// Says what becomes of the two commands of ioctl(2) that type on a terminal: on a file that is none, so that a kernel that
/// forbids them by itself (`dev.tty.legacy_tiocsti`) is told from the filter.
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
fn nothing_is_typed_on_a_terminal() {
    test_with_file(|config| {
        let python = ["/usr/bin/python3", "-c", TYPE];
        for options in [&[][..], &["--new-privs"], &["--keep-cap", "sys_admin"]] {
            let said = Launcher::new(&config).options(options).program(&python).stdout()?;
            ensure!(said == "EPERM EPERM EPERM ENOTTY\n", "{options:?}: {said}");
        }
        // The twin.
        let mut outside = std::process::Command::new(python[0]);
        outside.args(&python[1..]);
        ensure!(stdout(outside)? == "ENOTTY ENOTTY ENOTTY ENOTTY\n");
        Ok(())
    });
}

/// Looks for a key in the session keyring.
const SEARCH: &str = "
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
add_key, keyctl = {'x86_64': (248, 250), 'aarch64': (217, 219)}[platform.machine()]
def search():
    found = libc.syscall(keyctl, 10, -3, b'user', b'vpn-exec-test', 0)
    print('found' if found > 0 else errno.errorcode[ctypes.get_errno()])
";

#[test]
fn another_user_has_no_keys_of_the_callers() {
    test_with_file(|config| {
        let inside = format!("{SEARCH}search()");
        // A session of its own with a key, as pam_keyinit(8) and a login make it.
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
        ensure!(seen_by(&[])? == "found\n", "the same user's program is in the same session");
        if lab::world::has_users()? {
            let seen = seen_by(&["--user", "4321"])?;
            ensure!(seen == "ENOKEY\n", "{seen}");
            let seen = seen_by(&["--user", "0"])?;
            ensure!(seen == "ENOKEY\n", "as who was asked for: {seen}");
        }
        Ok(())
    });
}
