//! Compiles the C example as a library, its `main` under another name.

fn main() {
    let root = "../..";
    println!("cargo:rerun-if-changed={root}/examples/c/swap.c");
    println!("cargo:rerun-if-changed={root}/include/ggraft.h");
    cc::Build::new()
        .file(format!("{root}/examples/c/swap.c"))
        .include(format!("{root}/include"))
        .define("main", "ggraft_example_main")
        .std("c11")
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .compile("ggraft_c_example");
}
