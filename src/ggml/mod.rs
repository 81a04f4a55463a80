//! Safe handles over ggml. Raw pointers stay in this module: a [`Tensor`] keeps its [`Context`] alive, a context keeps
//! alive whatever its tensors point into, and data is read and written only through the owner of the memory.
//!
//! ggml asserts that shapes fit and aborts the process if they do not. The verbs therefore rely on shapes that were
//! validated when the model, the adapter or the batch was accepted.

mod cancel;
mod context;
mod cores;
mod cpu;
mod custom;
mod graph;
pub(crate) mod kernels;
pub(crate) mod log;
mod memory;
mod ops;
mod quant;
mod threadpool;

pub use cancel::CancelToken;
pub(crate) use context::{Context, Rope, RopeKind, Tensor};
pub use cores::default_threads;
pub(crate) use cpu::warn_once_if_slow;
pub(crate) use graph::{ComputeError, Graph, GraphMemory, GraphShape};
pub(crate) use kernels::gemm;
pub(crate) use memory::{Buffer, RepackLayout, repackable};
pub(crate) use ops::{Activation, Gate, Spans, Targets, rotate, visible};
pub(crate) use quant::quantize_rows;
pub(crate) use threadpool::ThreadPool;
