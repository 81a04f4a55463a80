//! The one decoder, the verbs it is written in and its typed inputs.

mod builder;
mod decoder;
mod input;
mod tape;

pub(crate) use builder::Builder;
pub(crate) use decoder::{Decoder, KeyValues};
pub(crate) use input::{Inputs, Masks, Topology, VirtualTokens, causal_mask};
pub(crate) use tape::{Gradients, Tape};
