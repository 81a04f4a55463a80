//! KV cache, session, sampling, generation.

mod engine;
mod error;
mod generate;
mod kv_block;
mod kv_cache;
pub mod sampler;
mod session;
pub mod text;

pub use crate::ggml::CancelToken;
pub use error::SessionError;
pub use generate::{GenerateOptions, Generated, StopReason, Timings};
pub use kv_cache::KvType;
pub use session::{ExistingText, FlashAttention, Session, SessionOptions};
