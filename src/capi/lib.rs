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
// What only running and training use.
#![cfg_attr(
    not(feature = "runtime"),
    allow(dead_code, unused_imports, unused_macros)
)]

mod adapter;
mod exclusive;
mod host;
mod log;
mod params;
mod pointer;
mod status;

pub use adapter::*;
pub use host::*;
pub use log::*;
pub use status::*;

/// A module with what it exports, in the library that runs models.
macro_rules! runtime {
    ($($name:ident)*) => {$(
        #[cfg(feature = "runtime")]
        mod $name;
        #[cfg(feature = "runtime")]
        pub use $name::*;
    )*};
}
runtime!(engine import model sampler saved session stream train);
