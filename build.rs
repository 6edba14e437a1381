//! Generates the messages of `proto/`, without protoc, and compiles the first process of sandboxes.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let inputs = [
        "proto/options.proto",
        "proto/bootstrap.proto",
        "proto/runtimeoptions.proto",
        "proto/linux_runtime.proto",
        "proto/cri.proto",
    ];
    for input in inputs {
        println!("cargo:rerun-if-changed={input}");
    }
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .inputs(inputs)
        .cargo_out_dir("proto")
        // Broken messages can only be mended here: stop the build with the compiler's own words.
        .run_from_script();
    compile_sandbox_init();
}

/// The architectures whose system calls `src/sandbox_init` knows. For any other, the program is empty, and the shim
/// refuses sandboxes.
const SANDBOX_INIT_ARCHITECTURES: [&str; 3] = ["x86_64", "aarch64", "riscv64"];

/// Compiles `src/sandbox_init`, which the shim contains. It is no target of Cargo's: those are installed beside the shim,
/// and linked with its libraries.
fn compile_sandbox_init() {
    const SOURCE: &str = "src/sandbox_init/main.rs";
    println!("cargo:rerun-if-changed={SOURCE}");
    let variable = |name: &str| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let program = PathBuf::from(variable("OUT_DIR")).join("sandbox_init");
    let architecture = variable("CARGO_CFG_TARGET_ARCH");
    if !SANDBOX_INIT_ARCHITECTURES.iter().any(|known| architecture == *known) {
        fs::write(&program, []).expect("write to cargo's directory for generated files");
        return;
    }
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition=2024", "--crate-type=bin", "--crate-name=sandbox_init", SOURCE, "-o"]);
    rustc.arg(&program).arg("--target").arg(variable("TARGET"));
    for option in ["opt-level=s", "panic=abort", "relocation-model=static", "strip=symbols"] {
        rustc.args(["-C", option]);
    }
    // Nothing but this program, in one page.
    for option in ["-nostartfiles", "-nostdlib", "-static", "-Wl,--build-id=none,-n"] {
        rustc.arg("-C").arg(format!("link-arg={option}"));
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        rustc.arg("-C").arg(joined("linker=", Path::new(&linker)));
    }
    let status = rustc.status().expect("run rustc");
    assert!(status.success(), "rustc can't compile {SOURCE}");
}

fn joined(option: &str, path: &Path) -> OsString {
    let mut whole = OsString::from(option);
    whole.push(path);
    whole
}
