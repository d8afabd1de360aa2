//! The entry of libFuzzer to `fuzz_targets::session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::session::run(data));
