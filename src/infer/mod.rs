//! KV cache, session, sampling, generation.
