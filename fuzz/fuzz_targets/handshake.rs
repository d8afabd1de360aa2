//! The entry of libFuzzer to `fuzz_targets::handshake`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::handshake::run(data));
