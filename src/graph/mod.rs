//! The one decoder, the verbs it is written in and its typed inputs.

mod builder;
mod decoder;
mod input;

pub(crate) use builder::Builder;
pub(crate) use decoder::{KeyValues, decoder, max_nodes};
pub(crate) use input::{Entry, Inputs, Topology, causal_mask};
