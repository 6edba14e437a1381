#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assert!(containerd_shim_systemd_v1::fuzzing::run("wire", data)));
