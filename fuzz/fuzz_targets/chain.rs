//! The entry of libFuzzer to `fuzz_targets::chain`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::chain::run(data));
