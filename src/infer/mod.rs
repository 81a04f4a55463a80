//! KV cache, session, sampling, generation.

mod attached;
mod core;
pub mod engine;
mod ensemble;
mod error;
mod generate;
mod kv;
mod kv_block;
mod llama;
mod memory;
mod own;
pub mod sampler;
mod session;
pub mod text;

pub use crate::ggml::CancelToken;
pub use ensemble::{Combine, Ensemble, EnsembleError, Fit, Losses, Sample};
pub use error::SessionError;
pub use generate::{GenerateOptions, Generated, StopReason, Timings, TokenLogprobs};
pub use kv::KvType;
pub use session::{ExistingText, FlashAttention, SavedError, Session, SessionOptions};
