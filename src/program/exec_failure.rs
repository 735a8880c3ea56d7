//! Explains why the program could not be executed.

use std::io;
use std::path::Path;

use crate::failure::Failure;

/// The exit status if the program exists but cannot be executed, as in env(1), timeout(1) and chroot(1).
const CANNOT_EXECUTE: u8 = 126;

/// The exit status if the program does not exist, as in env(1), timeout(1) and chroot(1).
const NOT_FOUND: u8 = 127;

const NO_INTERPRETER: &str =
    "install the interpreter in its first line (`#!`), or for a binary the loader that `file` shows";
const NO_ACCESS: &str =
    "make the file executable (chmod +x), and its directories accessible to the user that it runs as";
const MORE_CAPABILITIES: &str =
    "if `getcap` shows capabilities of the file, keep them with --keep-cap, or omit --new-privs to run it without";

/// Returns the failure for an error of execve(2). Must be called where the program was to be executed: it looks at the
/// file.
pub(super) fn explain(program: &Path, error: &io::Error) -> Failure {
    let errno = error.raw_os_error();
    let shown = program.to_string_lossy();
    let (message, status, advice) = match errno {
        // A program without a slash in its name is only searched for in PATH.
        Some(libc::ENOENT) if shown.contains('/') && program.is_file() => {
            (format!("cannot find the interpreter of the program {shown:?}"), NOT_FOUND, Some(NO_INTERPRETER))
        }
        Some(libc::ENOENT) => {
            (format!("cannot find the program {shown:?}"), NOT_FOUND, Some(advice_for_missing(&shown)))
        }
        Some(libc::EACCES) if program.is_dir() => {
            (format!("cannot execute {shown:?}: it is a directory"), CANNOT_EXECUTE, None)
        }
        _ => {
            let advice = match errno {
                Some(libc::EACCES) => Some(NO_ACCESS),
                // execve(2): the file has effective capabilities that the bounding set lacks.
                Some(libc::EPERM) => Some(MORE_CAPABILITIES),
                _ => None,
            };
            (format!("cannot execute {shown:?}: {error}"), CANNOT_EXECUTE, advice)
        }
    };
    Failure { message, advice: advice.map(Into::into), errno, status }
}

fn advice_for_missing(program: &str) -> &'static str {
    match program {
        "" => "the name of the program is empty",
        _ if program.starts_with('-') => {
            "put options of vpn-exec before the two dashes, and the program directly after them"
        }
        _ if program.contains(char::is_whitespace) => {
            "give the program and each of its arguments as separate words: omit the quotation marks"
        }
        _ if program.contains('/') => "check its path",
        _ => "check that its directory is in PATH (sudo sets its own PATH), or give its full path",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(program: &str, errno: i32) -> (String, u8, Option<String>) {
        let failure = explain(Path::new(program), &io::Error::from_raw_os_error(errno));
        assert_eq!(failure.errno, Some(errno));
        (failure.message, failure.status, failure.advice)
    }

    #[test]
    fn a_missing_program_is_told_from_a_missing_interpreter() {
        let (message, status, advice) = explained("no-such-program", libc::ENOENT);
        assert_eq!((message.as_str(), status), ("cannot find the program \"no-such-program\"", NOT_FOUND));
        assert!(advice.is_some_and(|advice| advice.contains("PATH")));
        let (message, status, _) = explained("/proc/self/exe", libc::ENOENT);
        assert_eq!((message.contains("interpreter"), status), (true, NOT_FOUND), "{message}");
        for (program, expected) in [("-v", "two dashes"), ("curl example.org", "separate words"), ("./x", "path")] {
            assert!(explained(program, libc::ENOENT).2.is_some_and(|advice| advice.contains(expected)), "{program}");
        }
    }

    #[test]
    fn a_program_that_cannot_be_executed_has_another_status() {
        assert_eq!(explained("/", libc::EACCES).0, "cannot execute \"/\": it is a directory");
        for (errno, expected) in [(libc::EACCES, Some("chmod")), (libc::EPERM, Some("getcap")), (libc::ENOEXEC, None)] {
            let (message, status, advice) = explained("/proc/self/exe", errno);
            assert_eq!(status, CANNOT_EXECUTE, "{message}");
            assert_eq!(advice.is_some(), expected.is_some(), "{message}");
            assert!(
                expected.is_none_or(|expected| advice.is_some_and(|advice| advice.contains(expected))),
                "{message}"
            );
        }
    }
}
