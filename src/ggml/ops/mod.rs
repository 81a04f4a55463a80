//! What a decoder is made of: products, attention, norms, rotary positions, activations, sums, rows that are picked and stored, each with its derivative where
//! training needs it, and the loss. Where ggml has an operation, [`Operations`](super::Operations) or whoever calls says whose it is.

mod activation;
mod attention;
mod elementwise;
mod experts;
mod hadamard;
mod loss;
mod norm;
mod product;
mod rope;
mod rows;

pub(crate) use activation::Gate;
pub(crate) use attention::{PackedAttention, Scoring, Spans};
pub(crate) use experts::Grouped;
pub(crate) use hadamard::rotate;
pub(crate) use loss::{Targets, expected_logit};
pub(super) use rope::RopeTable;
