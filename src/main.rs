//! The program `containerd-shim-systemd-v1`. Everything is in the library of the same name, which fuzzers link too.

fn main() -> std::process::ExitCode {
    containerd_shim_systemd_v1::cli::run(std::env::args_os().skip(1))
}
