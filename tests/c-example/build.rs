//! Compiles the C examples as libraries, each `main` under another name.

fn main() {
    let root = "../..";
    println!("cargo:rerun-if-changed={root}/include/ggraft.h");
    let llama = std::env::var("DEP_GGML_SYS_INCLUDE").expect("set by ggml-sys");
    for example in ["host", "swap", "train", "users"] {
        let file = format!("{root}/examples/c/{example}.c");
        println!("cargo:rerun-if-changed={file}");
        let main = format!("ggraft_example_{example}");
        cc::Build::new()
            .file(file)
            .include(format!("{root}/include"))
            // llama.h has functions that it deprecates, and casts between them.
            .flag("-isystem")
            .flag(&llama)
            .define("main", main.as_str())
            .std("c11")
            .warnings(true)
            .extra_warnings(true)
            .warnings_into_errors(true)
            .compile(&main);
    }
}
