//! Training of adapters on a frozen, quantized base.

mod batch;
mod check;
mod checkpoint;
pub mod data;
mod encoder;
mod error;
mod layout;
mod linalg;
mod optimizer;
mod options;
mod param;
mod pass;
mod report;
mod rng;
mod schedule;
mod sequences;
mod start;
mod teacher;
mod trainer;
mod variables;
mod workload;

pub use crate::ggml::CancelToken;
pub use error::TrainError;
pub use optimizer::{OptimizerKind, OptimizerOptions};
pub use options::{Init, Mezo, Objective, Reparam, TrainOptions};
pub use param::StateError;
pub use report::{Finish, Report, Summary, Trimmed};
pub use schedule::Schedule;
pub use trainer::Trainer;
pub use workload::{Position, SetWorkload, Workload};
