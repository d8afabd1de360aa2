//! The entry of libFuzzer to `fuzz_targets::connect`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::connect::run(data));
