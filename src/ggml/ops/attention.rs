//! Attention of training: several rows of text packed into one sequence, each behind the same prefix, without seeing each
//! other; and its derivative. Nothing of size T x T is kept: the derivative computes the weights anew, a few queries at a
//! time (Dao et al. 2022).

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Operand, Output};
use crate::ggml::kernels::{exp_sub_sum, gemm};
use crate::ggml::tensor::Tensor;
use std::cell::RefCell;
use std::ops::Range;

/// Queries at a time.
const TILE: usize = 48;

/// Positions that a token at position `at` sees: itself and everything before it, of which a sliding `window` leaves the last so many.
/// The rows of a prefix are positions like any others.
pub(crate) fn visible(at: usize, window: Option<usize>) -> Range<usize> {
    window.map_or(0, |w| (at + 1).saturating_sub(w))..at + 1
}

/// Who sees whom. Keys in order of position: P rows of a prefix, S tokens that all rows begin with, a row's own tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spans {
    /// P.
    pub(crate) prefix: usize,
    /// S: tokens 0..S are seen by all that follow.
    pub(crate) shared: usize,
    /// Tokens of each row behind the shared ones, in order, without gaps from S to T.
    pub(crate) rows: Vec<Range<usize>>,
    /// See [`visible`].
    pub(crate) window: Option<usize>,
    /// Factor of scores.
    pub(crate) scale: f32,
    /// Soft cap of scores, 0 is none.
    pub(crate) softcap: f32,
}

/// A run of tokens that follow each other in position.
struct Span {
    tokens: Range<usize>,
    /// Keys in front of them.
    before: usize,
}

impl Span {
    /// Keys that its last token may see.
    fn keys(&self) -> usize {
        self.before + self.tokens.len()
    }

    /// Its tokens, a few at a time: first token and number.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let n = self.tokens.len();
        (0..n).step_by(TILE).map(move |i| (i, TILE.min(n - i)))
    }
}

impl Spans {
    fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        let shared = (self.shared > 0).then_some(Span {
            tokens: 0..self.shared,
            before: self.prefix,
        });
        shared.into_iter().chain(self.rows.iter().map(|r| Span {
            tokens: r.clone(),
            before: self.prefix + self.shared,
        }))
    }

    /// T.
    fn n_tokens(&self) -> usize {
        self.rows.last().map_or(self.shared, |r| r.end)
    }

    /// Keys that the query at key `at` sees.
    fn visible(&self, at: usize) -> Range<usize> {
        visible(at, self.window)
    }

    /// Keys that some of `n` queries from key `at` on see.
    fn visible_to(&self, at: usize, n: usize) -> Range<usize> {
        self.visible(at).start..at + n
    }

    /// Where key `n` of a span comes from: a row of the prefix or a token.
    fn source(&self, span: &Span, n: usize) -> Source {
        if n < self.prefix {
            Source::Prefix(n)
        } else if n < span.before {
            Source::Token(n - self.prefix)
        } else {
            Source::Token(span.tokens.start + n - span.before)
        }
    }
}

enum Source {
    Prefix(usize),
    Token(usize),
}

/// Keys or values: those of the tokens and those of the prefix.
struct Sources<'a> {
    tokens: Operand<'a>,
    prefix: Option<Operand<'a>>,
}

impl<'a> Sources<'a> {
    fn row(&self, source: Source, head: usize) -> &'a [f32] {
        match source {
            Source::Token(t) => self.tokens.row(head, t),
            Source::Prefix(t) => self.prefix.expect("P > 0").row(head, t),
        }
    }

    /// All rows of a span, `ne = [d, N]`.
    fn gather(&self, spans: &Spans, span: &Span, head: usize, out: &mut Vec<f32>) {
        out.clear();
        for n in 0..span.keys() {
            out.extend_from_slice(self.row(spans.source(span, n), head));
        }
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

/// Memory that a thread keeps between operations.
#[derive(Default)]
struct Scratch {
    k: Vec<f32>,
    k_t: Vec<f32>,
    v: Vec<f32>,
    v_t: Vec<f32>,
    weights: Vec<f32>,
    slopes: Vec<f32>,
    d_weights: Vec<f32>,
    tile: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// At least `n` values, whatever they are.
fn room(v: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if v.len() < n {
        v.resize(n, 0.0);
    }
    &mut v[..n]
}

/// The attention weights of some queries.
struct AttentionWeights<'a> {
    /// Keys that the columns stand for.
    keys: Range<usize>,
    /// `ne = [keys, queries]`.
    values: &'a mut [f32],
}

impl Spans {
    /// Attention weights of `n` queries of `span` from token `i` of it on. `slopes` takes the derivative of the soft cap.
    #[allow(clippy::too_many_arguments)]
    fn weights<'a>(
        &self,
        span: &Span,
        (i, n): (usize, usize),
        q: Operand<'_>,
        head: usize,
        k_t: &[f32],
        values: &'a mut Vec<f32>,
        slopes: &mut Vec<f32>,
    ) -> AttentionWeights<'a> {
        let at = span.before + i;
        let keys = self.visible_to(at, n);
        let (width, all) = (keys.len(), span.keys());
        let values = room(values, n * width);
        let d = q.ne[0];
        let queries = &q.values[head * q.stride[1] + (span.tokens.start + i) * q.stride[2]..];
        gemm(
            false,
            n,
            width,
            d,
            queries,
            q.stride[2],
            1,
            &k_t[keys.start..],
            all,
            values,
            width,
        );
        let slopes = room(slopes, if self.softcap > 0.0 { n * width } else { 0 });
        for (j, row) in values.chunks_exact_mut(width).enumerate() {
            let seen = self.visible(at + j);
            let seen = seen.start - keys.start..seen.end - keys.start;
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            if self.softcap > 0.0 {
                let slopes = &mut slopes[j * width..][..width];
                for (s, slope) in row[seen.clone()].iter_mut().zip(&mut slopes[seen.clone()]) {
                    let t = (*s * self.scale / self.softcap).tanh();
                    *s = self.softcap * t;
                    *slope = 1.0 - t * t;
                }
            } else {
                row[seen.clone()].iter_mut().for_each(|s| *s *= self.scale);
            }
            let row = &mut row[seen];
            let max = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let sum = exp_sub_sum(row, max);
            row.iter_mut().for_each(|w| *w /= sum);
        }
        AttentionWeights { keys, values }
    }
}

/// Operands: q, k, v and with a prefix its k and v -> `ne = [H d, T]`.
struct Attention(Spans);

impl Kernel for Attention {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let spans = &self.0;
        let (q, k, v) = operands(op, spans);
        let [d, h, ..] = q.ne;
        let group = h / k.tokens.ne[1];
        let list: Vec<_> = spans.spans().collect();
        SCRATCH.with_borrow_mut(|s| {
            for unit in op.share(h * list.len()) {
                let (head, span) = (unit % h, &list[unit / h]);
                k.gather(spans, span, head / group, &mut s.k);
                v.gather(spans, span, head / group, &mut s.v);
                transpose(&s.k, d, &mut s.k_t);
                for (i, n) in span.tiles() {
                    let w =
                        spans.weights(span, (i, n), q, head, &s.k_t, &mut s.weights, &mut s.slopes);
                    let width = w.keys.len();
                    let tile = room(&mut s.tile, n * d);
                    gemm(
                        false,
                        n,
                        d,
                        width,
                        w.values,
                        width,
                        1,
                        &s.v[w.keys.start * d..],
                        d,
                        tile,
                        d,
                    );
                    for (j, row) in tile.chunks_exact(d).enumerate() {
                        let at = ((span.tokens.start + i + j) * h + head) * d;
                        // SAFETY: one token's values of one head, which only this unit writes.
                        unsafe {
                            out.as_mut_ptr()
                                .add(at)
                                .copy_from_nonoverlapping(row.as_ptr(), d)
                        };
                    }
                }
            }
        });
    }
}

fn operands<'a>(op: &Op<'a>, spans: &Spans) -> (Operand<'a>, Sources<'a>, Sources<'a>) {
    let prefix = |i| (spans.prefix > 0).then(|| op.operand(i));
    let rows = |i, j| Sources {
        tokens: op.operand(i),
        prefix: prefix(j),
    };
    (op.operand(0), rows(1, 3), rows(2, 4))
}

/// Operands as [`Attention`], then d(output). Result, one behind the other: dq `ne = [d, H, T]`, and for each query head its
/// part of dk and of dv, `ne = [d, P + T, H]`.
struct AttentionBack(Spans);

impl Kernel for AttentionBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let spans = &self.0;
        let (q, k, v) = operands(op, spans);
        let dout = op.operand(if spans.prefix > 0 { 5 } else { 3 });
        let [d, h, t, _] = q.ne;
        let group = h / k.tokens.ne[1];
        let rows = spans.prefix + t;
        let (dk_at, dv_at) = (d * h * t, d * h * t + d * rows * h);
        let head_rows = |at: usize, head: usize| {
            // SAFETY: the rows of one head, which only the thread that this head belongs to writes.
            unsafe {
                std::slice::from_raw_parts_mut(out.as_mut_ptr().add(at + head * rows * d), rows * d)
            }
        };
        SCRATCH.with_borrow_mut(|s| {
            for head in op.share(h) {
                let (dk_all, dv_all) = (head_rows(dk_at, head), head_rows(dv_at, head));
                dk_all.fill(0.0);
                dv_all.fill(0.0);
                for span in spans.spans() {
                    k.gather(spans, &span, head / group, &mut s.k);
                    v.gather(spans, &span, head / group, &mut s.v);
                    transpose(&s.k, d, &mut s.k_t);
                    transpose(&s.v, d, &mut s.v_t);
                    let all = span.keys();
                    let (dk, dv) = (room(&mut s.dk, all * d), room(&mut s.dv, all * d));
                    dk.fill(0.0);
                    dv.fill(0.0);
                    for (i, n) in span.tiles() {
                        let token = span.tokens.start + i;
                        let w = spans.weights(
                            &span,
                            (i, n),
                            q,
                            head,
                            &s.k_t,
                            &mut s.weights,
                            &mut s.slopes,
                        );
                        let (first, width) = (w.keys.start, w.keys.len());
                        let dout_tile = &dout.values[token * dout.stride[1] + head * d..];
                        // dv += weights^T dout
                        gemm(
                            true,
                            width,
                            d,
                            n,
                            w.values,
                            1,
                            width,
                            dout_tile,
                            dout.stride[1],
                            &mut dv[first * d..],
                            d,
                        );
                        // d(weights) = dout v^T
                        let dw = room(&mut s.d_weights, n * width);
                        gemm(
                            false,
                            n,
                            width,
                            d,
                            dout_tile,
                            dout.stride[1],
                            1,
                            &s.v_t[first..],
                            all,
                            dw,
                            width,
                        );
                        // d(scores) = weights (d(weights) - sum(weights d(weights)))
                        for (j, (w, dw)) in w
                            .values
                            .chunks_exact(width)
                            .zip(dw.chunks_exact_mut(width))
                            .enumerate()
                        {
                            let dot = dot(w, dw);
                            for (w, dw) in w.iter().zip(dw.iter_mut()) {
                                *dw = w * (*dw - dot) * spans.scale;
                            }
                            if spans.softcap > 0.0 {
                                let slopes = &s.slopes[j * width..][..width];
                                dw.iter_mut()
                                    .zip(slopes)
                                    .zip(w)
                                    .for_each(|((dw, slope), &w)| {
                                        // Slopes of keys out of sight were never computed.
                                        *dw *= if w > 0.0 { *slope } else { 0.0 };
                                    });
                            }
                        }
                        // dq = d(scores) k
                        let tile = room(&mut s.tile, n * d);
                        gemm(
                            false,
                            n,
                            d,
                            width,
                            dw,
                            width,
                            1,
                            &s.k[first * d..],
                            d,
                            tile,
                            d,
                        );
                        for (j, row) in tile.chunks_exact(d).enumerate() {
                            let at = ((token + j) * h + head) * d;
                            // SAFETY: one token's values of one head, which only this thread writes.
                            unsafe {
                                out.as_mut_ptr()
                                    .add(at)
                                    .copy_from_nonoverlapping(row.as_ptr(), d)
                            };
                        }
                        // dk += d(scores)^T q
                        let queries = &q.values[head * q.stride[1] + token * q.stride[2]..];
                        gemm(
                            true,
                            width,
                            d,
                            n,
                            dw,
                            1,
                            width,
                            queries,
                            q.stride[2],
                            &mut dk[first * d..],
                            d,
                        );
                    }
                    for n in 0..all {
                        let row = match spans.source(&span, n) {
                            Source::Prefix(p) => p,
                            Source::Token(t) => spans.prefix + t,
                        };
                        add(&mut dk_all[row * d..][..d], &dk[n * d..][..d]);
                        add(&mut dv_all[row * d..][..d], &dv[n * d..][..d]);
                    }
                }
            }
        });
    }
}

fn add(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

/// Sum of products in 16 interleaved parts, which the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut parts = [0.0f32; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a16
        .remainder()
        .iter()
        .zip(b16.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a16.zip(b16) {
        for ((p, a), b) in parts.iter_mut().zip(a).zip(b) {
            *p += a * b;
        }
    }
    parts.iter().sum::<f32>() + rest
}

/// Sums dk and dv over the query heads of each group. Operand: the result of [`AttentionBack`]; result, one behind the other:
/// dk and dv, `ne = [d, Hk, P + T]`.
struct SumGroups {
    d: usize,
    h: usize,
    group: usize,
    t: usize,
}

impl Kernel for SumGroups {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let &Self { d, h, group, t } = self;
        let parts = &op.operand(0).contiguous()[d * h * t..];
        let rows = parts.len() / (2 * d * h);
        let (first, dst) = out.share(2 * rows);
        for (i, out) in (first..).zip(dst.chunks_exact_mut(d * (h / group))) {
            let (half, row) = (i / rows, i % rows);
            for (hk, out) in out.chunks_exact_mut(d).enumerate() {
                out.fill(0.0);
                for head in hk * group..(hk + 1) * group {
                    add(out, &parts[((half * h + head) * rows + row) * d..][..d]);
                }
            }
        }
    }
}

/// Gradients of attention with respect to everything it reads.
pub(crate) struct AttentionGrads {
    /// `ne = [d, H, T]`.
    pub(crate) q: Tensor,
    /// `ne = [d, Hk, T]`.
    pub(crate) k: Tensor,
    /// `ne = [d, Hk, T]`.
    pub(crate) v: Tensor,
    /// Of the prefix's keys and values, `ne = [d, Hk, P]`.
    pub(crate) prefix: Option<(Tensor, Tensor)>,
}

impl Context {
    /// Scaled dot-product attention over packed rows: q `ne = [d, H, T]`, k and v `ne = [d, Hk, T]`, the prefix's keys and
    /// values `ne = [d, Hk, P]` -> `ne = [H d, T]`.
    pub(crate) fn packed_attention(
        &self,
        spans: &Spans,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        prefix: Option<(&Tensor, &Tensor)>,
    ) -> Tensor {
        let [d, h, t, _] = q.ne();
        assert_eq!(spans.n_tokens(), t);
        let srcs: Vec<_> = [q, k, v]
            .into_iter()
            .chain(prefix.map(|p| [p.0, p.1]).into_iter().flatten())
            .collect();
        self.custom(Attention(spans.clone()), &srcs, [d * h, t, 1, 1])
    }

    /// The derivative of [`Context::packed_attention`], whose output has the gradient `dout`, `ne = [H d, T]`.
    pub(crate) fn packed_attention_back(
        &self,
        spans: &Spans,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        prefix: Option<(&Tensor, &Tensor)>,
        dout: &Tensor,
    ) -> AttentionGrads {
        let [d, h, t, _] = q.ne();
        let hk = k.ne()[1];
        let p = spans.prefix;
        let rows = p + t;
        let srcs: Vec<_> = [q, k, v]
            .into_iter()
            .chain(prefix.map(|p| [p.0, p.1]).into_iter().flatten())
            .chain([dout])
            .collect();
        let all = self.custom(
            AttentionBack(spans.clone()),
            &srcs,
            [d * h * (t + 2 * rows), 1, 1, 1],
        );
        let sums = self.custom(
            SumGroups {
                d,
                h,
                group: h / hk,
                t,
            },
            &[&all],
            [2 * d * hk * rows, 1, 1, 1],
        );
        let heads = |of: &Tensor, heads: usize, n: usize, at: usize| {
            let (head, row) = (d * size_of::<f32>(), heads * d * size_of::<f32>());
            self.view(of, [d, heads, n, 1], [head, row, row * n], at * row)
        };
        AttentionGrads {
            q: heads(&all, h, t, 0),
            k: heads(&sums, hk, t, p),
            v: heads(&sums, hk, t, rows + p),
            prefix: (p > 0).then(|| (heads(&sums, hk, p, 0), heads(&sums, hk, p, rows))),
        }
    }
}
