//! See fuzz/README.md.
#![no_main]

mod checks;

use libfuzzer_sys::fuzz_target;
use vpn_exec::config::wg_quick;

fuzz_target!(|text: &[u8]| match wg_quick::parse("fuzz", text) {
    Ok((_, warnings)) => {
        assert!(!warnings.has_errors());
        checks::check(text, &warnings);
    }
    Err(errors) => {
        assert!(errors.has_errors());
        checks::check(text, &errors);
    }
});
