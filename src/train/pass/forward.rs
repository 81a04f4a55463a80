//! The layers of the base over a batch, each on a tape of its own.

use super::io::{Io, Leaves};
use super::recompute::Passed;
use crate::ggml::{PackedAttention, Scoring, Spans, Tensor};
use crate::graph::{Builder, Decoder, KeyValues, Tape};
use crate::model::{HParams, LayerShape};
use std::ops::Range;
use std::sync::Arc;

/// Keys and values of the tokens at hand, behind a trained prefix.
pub(super) struct PackedKeys<'a> {
    leaves: &'a Leaves,
    /// Who sees whom in each layer.
    spans: Vec<Arc<Spans>>,
    stored: Option<(Tensor, Tensor)>,
}

impl<'a> PackedKeys<'a> {
    /// Rows of text as in a batch, each behind `shared` tokens that are behind `prefix` rows.
    pub(super) fn new(
        hp: &HParams,
        leaves: &'a Leaves,
        prefix: usize,
        shared: usize,
        rows: &[Range<usize>],
    ) -> Self {
        let spans = |layer: &LayerShape| {
            Arc::new(Spans {
                prefix,
                shared,
                rows: rows.to_vec(),
                window: layer.window,
                scoring: Scoring {
                    scale: layer.score_scale,
                    softcap: hp.attn_softcap,
                },
            })
        };
        Self {
            leaves,
            spans: hp.layers.iter().map(spans).collect(),
            stored: None,
        }
    }
}

impl KeyValues for PackedKeys<'_> {
    fn store(&mut self, _: &mut Builder, _: usize, k: &Tensor, v: &Tensor) {
        self.stored = Some((k.clone(), v.clone()));
    }

    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor, sinks: Option<&Tensor>) -> Tensor {
        let (k, v) = self
            .stored
            .take()
            .expect("a layer stores before it attends");
        let of = PackedAttention {
            q,
            k: &k,
            v: &v,
            prefix: self.leaves.prefix(il).map(|[k, v]| [k, v]),
            sinks,
        };
        b.packed_attention(&self.spans[il], of)
    }
}

/// What a layer computed, with the tape that leads from its output back to its input and to its part of the prefix.
pub(super) struct Taped {
    pub(super) tape: Tape,
    pub(super) output: Tensor,
}

/// The layers, ready to be computed once or twice.
pub(super) struct Stack<'a> {
    decoder: &'a Decoder<'a>,
    io: &'a Io,
    n_layer: usize,
    kv: PackedKeys<'a>,
}

/// What the forward pass leaves behind.
pub(super) struct Forward {
    /// From the virtual tokens to the first layer's input, if they are trained.
    pub(super) embed: Option<Tape>,
    /// Of each layer.
    pub(super) layers: Vec<Passed>,
    /// Rows whose logits are wanted, in front of the last norm: `ne = [D, C]`.
    pub(super) output: Tensor,
}

impl<'a> Stack<'a> {
    pub(super) fn new(
        decoder: &'a Decoder<'a>,
        io: &'a Io,
        n_layer: usize,
        kv: PackedKeys<'a>,
    ) -> Self {
        Self {
            decoder,
            io,
            n_layer,
            kv,
        }
    }

    pub(super) fn leaves(&self) -> &'a Leaves {
        &self.io.leaves
    }

    /// All layers; the tapes of those in `taped` are kept.
    pub(super) fn forward(&mut self, b: &mut Builder, taped: Range<usize>) -> Forward {
        if let Some(rows) = self.leaves().virtual_tokens() {
            b.record([rows]);
        }
        let mut x = self.decoder.embed(b);
        let embed = self.leaves().virtual_tokens().map(|_| b.recorded());
        let mut layers = Vec::with_capacity(self.n_layer);
        for il in 0..self.n_layer {
            let (taped, y) = if taped.contains(&il) {
                let taped = self.taped_layer(b, il, &x);
                let output = taped.output.clone();
                (Some(taped), output)
            } else {
                (None, self.layer(b, il, &x))
            };
            b.demand(&y);
            let input = std::mem::replace(&mut x, y);
            layers.push(Passed { input, taped });
        }
        Forward {
            embed,
            layers,
            output: x,
        }
    }

    /// Layer `il` on `x`, on a tape whose variables are `x`, if a gradient is wanted below, and the layer's part of the
    /// prefix.
    pub(super) fn taped_layer(&mut self, b: &mut Builder, il: usize, x: &Tensor) -> Taped {
        let below = il > 0 || self.leaves().virtual_tokens().is_some();
        let prefix = self.leaves().prefix(il).into_iter().flatten();
        b.record(below.then_some(x).into_iter().chain(prefix));
        let output = self.layer(b, il, x);
        let tape = b.recorded();
        Taped { tape, output }
    }

    /// Layer `il` on `x`; the last one only on the rows whose logits are wanted.
    fn layer(&mut self, b: &mut Builder, il: usize, x: &Tensor) -> Tensor {
        let outputs = (il + 1 == self.n_layer).then_some(&self.io.outputs);
        self.decoder.layer(b, il, x, outputs, &mut self.kv)
    }
}
