//! Bytes in, facts out: memory maps, GGUF, safetensors, PEFT folders. One validation gate per format. No ggml.

pub mod atomic;
pub mod gguf;
pub(crate) mod gguf_seal;
pub mod gguf_write;
pub mod mmap;
pub mod peft;
pub(crate) mod read;
pub mod types;
