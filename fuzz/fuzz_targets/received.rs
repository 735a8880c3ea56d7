//! See fuzz/README.md.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vpn_exec::fuzzing::received(input));
