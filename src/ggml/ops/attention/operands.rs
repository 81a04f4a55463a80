//! What attention reads, and the keys and values of a span one behind the other.

use super::spans::{Source, Span, Spans};
use crate::ggml::custom::{Op, Operand};

/// What both directions read.
pub(super) struct Operands<'a> {
    /// `ne = [d, H, T]`.
    pub(super) q: Operand<'a>,
    k: KeysOrValues<'a>,
    v: KeysOrValues<'a>,
    /// `ne = [H]`.
    sinks: Option<&'a [f32]>,
}

/// Those of the tokens, `ne = [d, Hk, T]`, and those of the prefix, `ne = [d, Hk, P]`.
struct KeysOrValues<'a> {
    tokens: Operand<'a>,
    prefix: Option<Operand<'a>>,
}

impl<'a> Operands<'a> {
    /// The first `n` operands, which are those that [`PackedAttention::operands`](super::PackedAttention::operands) lists.
    pub(super) fn new(op: &Op<'a>, spans: &Spans, n: usize) -> Self {
        let prefix = |i| (spans.prefix > 0).then(|| op.operand(i));
        let rows = |i, j| KeysOrValues {
            tokens: op.operand(i),
            prefix: prefix(j),
        };
        let others = if spans.prefix > 0 { 5 } else { 3 };
        Self {
            q: op.operand(0),
            k: rows(1, 3),
            v: rows(2, 4),
            sinks: (n > others).then(|| op.operand(others).values),
        }
    }

    /// The sink of a head of queries, if it has one.
    pub(super) fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.map(|sinks| sinks[head])
    }

    /// The head of keys and values that query head `head` reads.
    fn kv_head(&self, head: usize) -> usize {
        head / (self.q.ne[1] / self.k.tokens.ne[1])
    }

    /// The queries of a head from token `token` on; one is [`Operands::query_stride`] values behind the other.
    pub(super) fn queries(&self, head: usize, token: usize) -> &'a [f32] {
        &self.q.values[head * self.q.stride[1] + token * self.q.stride[2]..]
    }

    pub(super) fn query_stride(&self) -> usize {
        self.q.stride[2]
    }
}

impl<'a> KeysOrValues<'a> {
    fn row(&self, source: Source, head: usize) -> &'a [f32] {
        match source {
            Source::Token(t) => self.tokens.row(head, t),
            Source::Prefix(t) => self.prefix.expect("P > 0").row(head, t),
        }
    }

    /// The first `n` rows of a span, `ne = [d, n]`.
    fn gather(&self, spans: &Spans, (span, n): (&Span, usize), head: usize, out: &mut Vec<f32>) {
        out.clear();
        for n in 0..n {
            out.extend_from_slice(self.row(spans.source(span, n), head));
        }
    }
}

/// The first keys and values of one head that a span sees, N of them.
#[derive(Default)]
pub(super) struct KeysValues {
    /// `ne = [d, N]`.
    pub(super) k: Vec<f32>,
    /// `ne = [N, d]`.
    pub(super) k_t: Vec<f32>,
    /// `ne = [d, N]`.
    pub(super) v: Vec<f32>,
    /// `ne = [N, d]`, after [`KeysValues::transpose_values`].
    pub(super) v_t: Vec<f32>,
}

impl KeysValues {
    /// Gathers the first so many of what query head `head` reads.
    pub(super) fn gather(
        &mut self,
        x: &Operands<'_>,
        spans: &Spans,
        span: (&Span, usize),
        head: usize,
    ) {
        let head = x.kv_head(head);
        x.k.gather(spans, span, head, &mut self.k);
        x.v.gather(spans, span, head, &mut self.v);
        transpose(&self.k, x.q.ne[0], &mut self.k_t);
    }

    /// For the way back.
    pub(super) fn transpose_values(&mut self, d: usize) {
        transpose(&self.v, d, &mut self.v_t);
    }
}

/// `ne = [cols, rows]` -> `ne = [rows, cols]`.
fn transpose(a: &[f32], cols: usize, out: &mut Vec<f32>) {
    /// Columns of the result written at a time: one cache line.
    const BLOCK: usize = 16;
    let rows = a.len() / cols;
    out.resize(a.len(), 0.0);
    for r0 in (0..rows).step_by(BLOCK) {
        let r1 = (r0 + BLOCK).min(rows);
        for c in 0..cols {
            for r in r0..r1 {
                out[c * rows + r] = a[r * cols + c];
            }
        }
    }
}
