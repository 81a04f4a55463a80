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
pub(crate) mod kernels;
pub(crate) mod log;
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
pub(crate) use cpu::warn_once_if_slow;
pub(crate) use graph::{ComputeError, Graph, GraphMemory, GraphShape};
pub(crate) use kernels::{
    Bits, RowMajor, Strided, faster_than_ggml, gemm, has_attention, has_mul_mat, sensible,
};
pub use kernels::{CpuError, CpuLevel};
pub(crate) use memory::Buffer;
pub(crate) use ops::{Activation, Gate, Rope, RopeKind, Scoring, Spans, Targets, rotate, visible};
pub(crate) use quant::quantize_rows;
pub(crate) use repack::RepackLayout;
pub(crate) use tensor::Tensor;
pub(crate) use threadpool::ThreadPool;
