//! Training of adapters on a frozen, quantized base.
mod batch;
mod encoder;
mod linalg;
mod optimizer;
mod param;
mod pass;
mod rng;
mod schedule;

pub use optimizer::{OptimizerKind, OptimizerOptions};
pub use param::StateError;
pub use schedule::Schedule;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The cancel token was raised.
    #[error("cancelled")]
    Cancelled,
    /// Memory ran out.
    #[error("out of memory: use smaller batches, shorter rows or a smaller memory budget")]
    OutOfMemory,
}
