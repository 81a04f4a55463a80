//! Graft tiny trained adapters (prefix, prompt and P-tuning) onto a frozen, memory-mapped, quantized GGUF model.
//!
//! Data flows one way: `file -> model -> adapter -> graph -> infer -> {capi, bin}`.

pub mod adapter;
#[cfg(feature = "capi")]
pub mod capi;
mod error;
pub mod file;
mod ggml;
mod graph;
pub mod infer;
pub mod model;

pub use adapter::Adapter;
pub use error::{Error, Result};
pub use infer::{Session, SessionOptions};
pub use model::{Model, ModelOptions};
