//! Graft tiny trained adapters (prefix, prompt and P-tuning) onto a frozen, memory-mapped, quantized GGUF model.
//!
//! Data flows one way: `file -> model -> adapter -> graph -> infer -> {capi, bin}`.

pub mod adapter;
pub mod error;
pub mod file;
pub(crate) mod ggml;
pub(crate) mod graph;
pub mod infer;
pub mod model;

pub use error::{Error, Result};
