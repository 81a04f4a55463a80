//! The operations of training that ggml lacks or has in a form too slow: attention over packed rows with its derivative,
//! products through frozen weights backwards, the loss, and the derivatives of norms and activations.

mod activation;
mod attention;
mod loss;
mod norm;
mod product;
mod rows;

pub(crate) use activation::{Activated, Gate};
pub(crate) use attention::Spans;
pub(crate) use loss::Targets;
