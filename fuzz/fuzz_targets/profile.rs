//! See fuzz/README.md.
#![no_main]

mod checks;

use libfuzzer_sys::fuzz_target;
use vpn_exec::config::profile;

fuzz_target!(|text: &[u8]| if let Err(errors) = profile::parse("fuzz", text) {
    assert!(errors.has_errors());
    checks::check(text, &errors);
});
