//! Generates the messages of `proto/`, without protoc.

fn main() {
    let inputs = [
        "proto/options.proto",
        "proto/bootstrap.proto",
        "proto/runtimeoptions.proto",
        "proto/linux_runtime.proto",
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
}
