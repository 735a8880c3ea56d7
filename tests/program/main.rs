//! What the program gets and what it does not: privileges, descriptors, identity, signals, the terminal, its own view of files;
//! and what its caller gets back. The tunnels here lead nowhere, and need not.
//!
//! - `privileges`: what it may do, and as whom.
//! - `view`: what it sees of files.
//! - `hidden`: what it does not see of the host, whatever the host does meanwhile.
//! - `terminal`: how it lives with one.
//! - `lent`: what its caller does not lend it.
//! - `service`: whom it names the main process of a service.
//! - `expects`: what it may expect to work.
//! - `gains`: programs that gain or change privileges.
//! - `ends`: its exit status, its signals, and what it leaves behind.

mod ends;
mod expects;
mod gains;
mod hidden;
mod lent;
mod privileges;
mod renewed;
mod service;
mod support;
mod terminal;
mod view;

/// What [`probe`] runs inside. By itself it does nothing.
#[test]
#[ignore = "this is the program that other tests run in a tunnel"]
fn probe_inside() {
    let Ok(what) = std::env::var("VPN_EXEC_TEST_PROBE") else { return };
    let report = match what.as_str() {
        "secure-bits" => format!("{:#x}", rustix::thread::capabilities_secure_bits().expect("readable").bits()),
        "key" => [None, Some(c"to whom")].map(|callout| lab::request_unknown_key(callout).to_string()).join(", "),
        other => panic!("there is no probe {other}"),
    };
    println!("report: {report}");
}
