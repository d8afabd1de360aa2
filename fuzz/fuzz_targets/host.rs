//! The entry of libFuzzer to `fuzz_targets::host`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::host::run(data));
