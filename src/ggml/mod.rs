//! Safe handles over ggml.

pub(crate) mod log;
