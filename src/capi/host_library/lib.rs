//! `libggraft_host.so` and `libggraft_host.a`: adapters for applications that bring a libllama of their own. The functions of ggraft.h that need no model of ours.

pub use ggraft_capi::*;
