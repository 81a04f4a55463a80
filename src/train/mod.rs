//! Training of adapters on a frozen, quantized base.

mod batch;
mod checkpoint;
pub mod data;
mod encoder;
mod error;
mod linalg;
mod optimizer;
mod options;
mod param;
mod pass;
mod rng;
mod schedule;
mod trainer;

pub use error::TrainError;
pub use optimizer::{OptimizerKind, OptimizerOptions};
pub use options::{Init, Objective, Reparam, TrainOptions};
pub use param::StateError;
pub use schedule::Schedule;
pub use trainer::{CancelToken, Finish, Report, Summary, Trainer};
