//! The computing half of sessions: steps, without any notion of what a text says.

use super::error::SessionError;
use super::kv::{KvType, PagedText};
use super::llama::LlamaDecoder;
use super::memory::{KvText, Memory};
use super::own::OwnDecoder;
use crate::error::Result;
use crate::ggml::{CancelToken, KvPool};
use crate::model::Model;
use std::ops::Range;

/// What the keys and values of a text depend on besides model and text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Type of the rows.
    pub(crate) ty: KvType,
    /// Fused attention.
    pub(crate) flash: bool,
    /// LongRoPE's factors for contexts beyond the original one.
    pub(crate) long_context: bool,
}

impl Mode {
    /// A number of its own for each mode.
    pub(crate) fn key(self) -> u32 {
        self.ty.ggml() as u32 * 4 + u32::from(self.flash) * 2 + u32::from(self.long_context)
    }
}

/// What enters a step.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Tokens(&'a [i32]),
    /// Virtual tokens, `ne = [D, n]`.
    Virtual(&'a [f32]),
}

impl<'a> Input<'a> {
    /// Tokens, or rows of `width` values.
    pub(super) fn len(self, width: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Virtual(rows) => rows.len() / width,
        }
    }

    /// Pieces of at most `n` positions, in order, each with its number of positions.
    pub(super) fn pieces(self, n: usize, width: usize) -> Vec<(Self, usize)> {
        let pieces: Vec<Self> = match self {
            Self::Tokens(tokens) => tokens.chunks(n).map(Self::Tokens).collect(),
            Self::Virtual(rows) => rows.chunks(n * width).map(Self::Virtual).collect(),
        };
        pieces.into_iter().map(|p| (p, p.len(width))).collect()
    }
}

/// The part of a text in a step.
pub(super) struct Part<'a, Text = KvText> {
    pub(super) text: &'a mut Text,
    /// What is computed next.
    pub(super) input: Input<'a>,
    /// Which of these need logits.
    pub(super) outputs: Range<usize>,
}

/// How much is computed at a time, and for how many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Threads.
    pub(super) n_threads: usize,
    /// Tokens of a text in one step at most.
    pub(super) n_batch: usize,
    /// Positions of a text.
    pub(super) n_ctx: usize,
    /// Texts at a time.
    pub(super) n_texts: usize,
    /// Bytes that their keys and values take at most.
    pub(super) kv_bytes: Option<usize>,
}

/// The computing half of sessions.
pub(crate) struct Core {
    pub(crate) model: Model,
    pub(super) mode: Mode,
    pub(super) n_batch: usize,
    pub(super) n_threads: usize,
    memory: Memory,
    by: Decoding,
}

/// Who computes.
enum Decoding {
    Own(Box<OwnDecoder>),
    Llama(LlamaDecoder),
}

impl Core {
    /// # Errors
    /// If libllama computes the model, and refuses the options.
    pub(crate) fn new(model: &Model, mode: Mode, extent: &Extent) -> Result<Self> {
        let n_threads = extent.n_threads;
        let (memory, by) = match model.computed_by() {
            Ok(native) => {
                let decoder = OwnDecoder::new(model, native, mode, n_threads);
                let limit = extent.kv_bytes.unwrap_or(usize::MAX);
                let pool = KvPool::new(decoder.layout().clone(), limit);
                let native = native.clone();
                let memory = Memory::Pages { native, pool };
                (memory, Decoding::Own(Box::new(decoder)))
            }
            Err(llama) => {
                let decoder = LlamaDecoder::new(model, llama, mode, extent)?;
                let memory = Memory::Llama(decoder.memory().clone());
                (memory, Decoding::Llama(decoder))
            }
        };
        Ok(Self {
            model: model.clone(),
            mode,
            n_batch: extent.n_batch,
            n_threads,
            memory,
            by,
        })
    }

    /// What comes out for a text does not depend on what else is in a step, nor on how its tokens are divided among steps, as far as our own decoder computes.
    pub(super) fn invariant(mut self) -> Self {
        if let Decoding::Own(own) = &mut self.by {
            own.invariant = true;
        }
        self
    }

    /// Where texts are kept.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Our own decoder, if that one computes.
    pub(super) fn own(&self) -> Option<&OwnDecoder> {
        match &self.by {
            Decoding::Own(own) => Some(own),
            Decoding::Llama(_) => None,
        }
    }

    /// Stops a step.
    pub(super) fn cancel(&self) -> &CancelToken {
        match &self.by {
            Decoding::Own(own) => &own.cancel,
            Decoding::Llama(llama) => llama.cancel(),
        }
    }

    /// Lets another token stop it.
    pub(super) fn cancelled_by(&mut self, token: &CancelToken) {
        match &mut self.by {
            Decoding::Own(own) => own.cancel = token.clone(),
            Decoding::Llama(llama) => llama.cancelled_by(token),
        }
    }

    /// Graphs of our own that were built so far.
    pub(super) fn graphs_built(&self) -> usize {
        self.own().map_or(0, |own| own.graphs_built)
    }

    /// Positions computed so far, those that were forgotten or computed again included.
    pub(super) fn positions_computed(&self) -> usize {
        match &self.by {
            Decoding::Own(own) => own.positions_computed,
            Decoding::Llama(llama) => llama.positions_computed(),
        }
    }

    /// Computes the next tokens of some texts of its memory. Returns logits of the outputs of all parts, one part behind the other,
    /// `ne = [V, outputs]`. Each text's are what they would be without the others, by our own decoder. Whether they are numbers is for the caller to
    /// [check](check_logits).
    pub(super) fn step(&mut self, parts: &mut [Part<'_>]) -> Result<&[f32], SessionError> {
        match &mut self.by {
            Decoding::Own(own) => {
                let paged = parts.iter_mut().map(|part| Part {
                    text: part.text.paged_mut(),
                    input: part.input,
                    outputs: part.outputs.clone(),
                });
                own.step(&mut paged.collect::<Vec<Part<'_, PagedText>>>())
            }
            Decoding::Llama(llama) => llama.step(parts),
        }
    }
}

/// Rows of logits that are read from one step at most, so that they take no more than 64 MiB: more are computed in several steps.
pub(super) fn most_logits(n_vocab: usize) -> usize {
    ((1 << 24) / n_vocab).max(1)
}

/// Logits that are no numbers must not become text.
pub(super) fn check_logits(logits: &[f32]) -> Result<(), SessionError> {
    match all_finite(logits) {
        true => Ok(()),
        false => Err(SessionError::NonFiniteLogits),
    }
}

/// No NaN and no infinity. Compares bits, so that it runs at memory speed.
fn all_finite(values: &[f32]) -> bool {
    const INFINITY: u32 = 0x7f80_0000;
    values
        .iter()
        .fold(0, |max: u32, v| max.max(v.to_bits() & !(1 << 31)))
        < INFINITY
}
