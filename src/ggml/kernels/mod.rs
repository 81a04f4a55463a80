//! Compute kernels for training through frozen weights, where ggml has none: products of a quantized matrix's transpose,
//! and what attention's backward pass is made of.
//!
//! Results do not depend on how work is cut into tiles, chunks or threads: every element is one fixed chain of
//! operations.

mod dequant;
pub(crate) mod exp;
pub(crate) mod gemm;
mod mul_mat_back;

pub(crate) use exp::{exp, exp_sub_sum};
pub(crate) use gemm::gemm;
pub(crate) use mul_mat_back::mul_mat_back;
