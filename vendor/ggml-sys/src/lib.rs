//! What ggraft uses of ggml and libllama, and the libraries themselves: the only door to them. `build.rs` lists the functions; their comments are those of
//! the headers.

#![allow(missing_docs, non_camel_case_types, non_upper_case_globals)]
// Comments of C.
#![allow(rustdoc::all)]

// Builds the libraries and links them.
use llama_cpp_sys_2 as _;

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
