//! `lab-agent`, the program that tests run in a tunnel, on the host or as a hook. Not part of vpn-exec: the feature
//! `test-programs`, which only the lab enables, makes cargo build it.
//!
//! ```text
//! lab-agent act              performs the acts that it reads from standard input (`acts`)
//! lab-agent task NAME ...    performs one task and ends (`tasks`)
//! lab-agent vectors          lists the vectors of leak tests, each with the protection that stops it (`vectors`)
//! ```

mod acts;
mod attempts;
mod dns_client;
mod inspection;
#[path = "../lab/shared/mod.rs"]
#[expect(dead_code, unreachable_pub, reason = "the lab publishes these modules and uses the rest of them")]
mod shared;
mod syscalls;
mod tasks;
mod trespass;
mod vectors;

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["act"] => acts::serve(),
        ["task", ..] => tasks::perform(&words[1..]),
        ["vectors"] => {
            vectors::list();
            Ok(())
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("invalid arguments {words:?}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {words:?}: {error}");
            ExitCode::FAILURE
        }
    }
}
