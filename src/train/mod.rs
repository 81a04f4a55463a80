//! Training of adapters on a frozen base.

mod api_stub;
pub mod data;

pub use api_stub::*;
