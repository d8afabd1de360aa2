//! The entry of libFuzzer to `fuzz_targets::controller`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::controller::run(data));
