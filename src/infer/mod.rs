//! KV cache, session, sampling, generation.

pub mod sampler;
pub mod text;
