//! `libggraft.so` and `libggraft.a`: the functions of the C interface under the name that C links.

pub use ggraft_capi::*;
