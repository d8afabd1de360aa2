//! The entry of libFuzzer to `fuzz_targets::framer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::framer::run(data));
