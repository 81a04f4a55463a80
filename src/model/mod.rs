//! The base model: architecture table, hyper-parameters, weights, vocabulary, fingerprint.

pub mod shape;
pub mod vocab;
pub use shape::{BaseShape, Fingerprint};
