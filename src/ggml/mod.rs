//! Safe handles over ggml, in which raw pointers stay. A graph is built in a [`Context`], of which [`GraphShape::new`] makes the
//! graph: from then on its tensors are neither changed nor added to, and their data is read and written only through the
//! [`Graph`] that owns their memory. Stored tensors, which any number of graphs read, lie in a [`Buffer`] and are immutable
//! from the first. A [`Tensor`] is a handle of either.
//!
//! ggml asserts that shapes fit and aborts the process if they do not. The verbs therefore rely on shapes that were
//! validated when the model, the adapter or the batch was accepted.

mod arena;
mod cancel;
mod context;
mod cores;
mod cpu;
mod custom;
mod graph;
mod kv;
pub(crate) mod log;
pub mod measure;
mod memory;
mod ops;
mod quant;
mod repack;
mod team;
mod tensor;
mod threadpool;

pub use cancel::CancelToken;
pub(crate) use context::{Context, Operations};
pub use cores::default_threads;
pub(crate) use cpu::faster_than_ggml;
pub(crate) use graph::{ComputeError, Graph, GraphMemory, GraphShape};
pub(crate) use kv::{KvFull, KvLayout, KvPart, KvPool, KvRows, KvSequence, KvStep};
pub(crate) use memory::Buffer;
pub(crate) use ops::{
    Gate, Grouped, PackedAttention, Scoring, Spans, Targets, expected_logit, rotate,
};
#[cfg(test)]
pub(crate) use quant::row_to_f32;
pub(crate) use quant::{quantize_rows, rows_to_f32};
pub(crate) use repack::RepackLayout;
pub(crate) use tensor::Tensor;
pub(crate) use threadpool::ThreadPool;

pub(crate) use crate::kernels::{Heads, PAGE as KV_PAGE};
