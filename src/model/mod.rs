//! The base model: architecture table, hyper-parameters, weights in the map, vocabulary, fingerprint.

mod arch;
mod base;
mod error;
mod experts;
mod hparams;
mod identity;
mod keys;
mod rope;
mod shape;

pub use base::Base;
pub use error::ModelError;
pub(crate) use identity::hex;
pub use shape::{BaseShape, Fingerprint, PerLayer};

#[cfg(feature = "runtime")]
pub mod chat;
#[cfg(feature = "runtime")]
mod frozen;
#[cfg(feature = "runtime")]
mod llama;
#[cfg(feature = "runtime")]
pub mod vocab;
#[cfg(feature = "runtime")]
mod weights;

#[cfg(feature = "runtime")]
pub use frozen::{DecoderChoice, Kernels, Model, ModelOptions};
#[cfg(all(test, feature = "runtime"))]
pub(crate) use weights::SharedExpert;
#[cfg(feature = "runtime")]
pub(crate) use {
    arch::{NormKind, Weighting},
    frozen::Native,
    hparams::{HParams, LayerShape},
    llama::LlamaModel,
    weights::{Experts, FeedForward, Hidden, Linear, Mlp, Norm, Qkv, Weights},
};
