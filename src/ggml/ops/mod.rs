//! The operations that ggml lacks or has in a form too slow: for training, attention over packed rows with its derivative,
//! products through frozen weights backwards, the loss, and the derivatives of norms and activations; for sessions, the
//! rotation of what a quantized cache holds.

mod activation;
mod attention;
mod hadamard;
mod loss;
mod norm;
mod product;
mod rows;

pub(crate) use activation::{Activation, Gate};
pub(crate) use attention::{Scoring, Spans, visible};
pub(crate) use hadamard::rotate;
pub(crate) use loss::Targets;
