//! The C ABI (`include/ggraft.h`, `docs/C_API.md`): translation to the public Rust API and nothing else.
//!
//! Rules that hold for every function:
//!
//! - Names are those of the header, because the header is generated from these files.
//! - Functions return [`ggraft_status`] (or a number that is a negative status on failure) and store a message per thread. No
//!   panic leaves a function. A null pointer that is not allowed is an error, not a crash.
//! - Structs that cross the boundary begin with, or come with, their size, so that they can grow: see `params.rs`.
//! - Enumerations come in as `i32`: C may pass any number.
//! - Handles that change (session, sampler, text stream, trainer, reply) lock themselves without waiting: use from two threads at once, or from
//!   a callback of the same handle, is [`ggraft_status::GGRAFT_ERROR_BUSY`].

#![allow(non_camel_case_types)]

mod adapter;
mod engine;
mod exclusive;
mod log;
mod model;
mod params;
mod pointer;
mod sampler;
mod saved;
mod session;
mod status;
mod stream;
mod train;

pub use adapter::*;
pub use engine::*;
pub use log::*;
pub use model::*;
pub use sampler::*;
pub use saved::*;
pub use session::*;
pub use status::*;
pub use stream::*;
pub use train::*;
