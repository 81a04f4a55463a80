//! The one decoder, the verbs it is written in and its typed inputs.

mod builder;
mod decoder;
mod input;
mod tape;

pub(crate) use builder::{AttentionKernel, Builder};
pub(crate) use decoder::{Decoder, KeyValues};
pub(crate) use input::{CacheInputs, Entry, Inputs, Topology, VirtualTokens, causal_mask};
pub(crate) use tape::{Gradients, Tape};
