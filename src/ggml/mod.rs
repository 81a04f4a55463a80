//! Safe handles over ggml.
