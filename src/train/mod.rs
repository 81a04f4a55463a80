//! Training of adapters: what is trained, from which random numbers, and by which rule it moves.

#[cfg_attr(not(test), expect(dead_code, reason = "used by the trainer"))]
mod encoder;
mod linalg;
#[cfg_attr(not(test), expect(dead_code, reason = "used by the trainer"))]
mod optimizer;
#[cfg_attr(not(test), expect(dead_code, reason = "used by the trainer"))]
mod param;
#[cfg_attr(not(test), expect(dead_code, reason = "used by the trainer"))]
mod rng;
#[cfg_attr(not(test), expect(dead_code, reason = "used by the trainer"))]
mod schedule;

pub use optimizer::{OptimizerKind, OptimizerOptions};
pub use param::StateError;
pub use schedule::Schedule;
