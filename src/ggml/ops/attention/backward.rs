//! From dO to the gradients of queries, keys and values.

use super::operands::Operands;
use super::spans::{Source, Span, Spans, Tile};
use super::weights::{softmax_back, weights};
use super::{PackedAttention, SCRATCH, Scratch, store_head};
use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Operand, Output, Parts};
use crate::ggml::tensor::Tensor;
use crate::kernels::{RowMajor, Strided, gemm, room};

/// Units of work at least, where heads are cut into [`slices`].
const UNITS: usize = 16;

/// Into how many slices the queries of a head are cut, of about as much work each: threads share heads and slices, and each slice has a part of dk and dv of its
/// own. A matter of the shape alone, so that sums do not depend on threads.
fn slices(h: usize) -> usize {
    UNITS.div_ceil(h)
}

/// Operands: those of [`PackedAttention`], then dO `ne = [H d, T]`. Result, one behind the other: dq `ne = [d, H, T]`, and
/// for each slice of each query head its part of dk and of dv, `ne = [d, P + T, slices, H]`.
struct AttentionBack(Spans);

impl Kernel for AttentionBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let spans = &self.0;
        let back = Back {
            spans,
            x: Operands::new(op, spans, op.n_operands() - 1),
            d_o: op.operand(op.n_operands() - 1),
        };
        let [d, h, t, _] = back.x.q.ne;
        let rows = spans.prefix + t;
        let slices = slices(h);
        let (dk_at, dv_at) = (d * h * t, d * h * t + d * rows * slices * h);
        let rows_of = |at: usize, unit: usize| {
            // SAFETY: the rows of one slice of one head, which only the thread that computes it writes.
            unsafe {
                std::slice::from_raw_parts_mut(out.as_mut_ptr().add(at + unit * rows * d), rows * d)
            }
        };
        let tiles = back.tiles(slices);
        SCRATCH.with_borrow_mut(|s| {
            for unit in op.share(h * slices) {
                let (dk, dv) = (rows_of(dk_at, unit), rows_of(dv_at, unit));
                dk.fill(0.0);
                dv.fill(0.0);
                let (head, slice) = (unit / slices, unit % slices);
                for (span, tiles) in &tiles {
                    let mine = tiles.iter().filter(|(of, _)| *of == slice);
                    let mine: Vec<_> = mine.map(|(_, tile)| tile).collect();
                    if let Some(last) = mine.last() {
                        let keys = last.keys.end;
                        // SAFETY: these queries' dq, which only this thread writes.
                        unsafe { back.span((span, keys), &mine, head, s, &out) };
                        back.scatter(span, &s.dk[..keys * d], dk);
                        back.scatter(span, &s.dv[..keys * d], dv);
                    }
                }
            }
        });
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(usize::MAX)
    }
}

/// What the way back reads.
struct Back<'a> {
    spans: &'a Spans,
    x: Operands<'a>,
    /// dO.
    d_o: Operand<'a>,
}

impl Back<'_> {
    /// d.
    fn head_dim(&self) -> usize {
        self.x.q.ne[0]
    }

    /// The tiles of each span, and to which of `n` slices each belongs.
    fn tiles(&self, n: usize) -> Vec<(Span, Vec<(usize, Tile)>)> {
        let work = |tile: &Tile| tile.n * tile.keys.len();
        let tiles = |span: &Span| self.spans.tiles(span).collect::<Vec<_>>();
        let spans: Vec<_> = self
            .spans
            .spans()
            .map(|span| (tiles(&span), span))
            .collect();
        let all: usize = spans.iter().flat_map(|(tiles, _)| tiles).map(work).sum();
        let mut done = 0;
        // Where the middle of a tile lies in all of the work.
        let mut slice = |tile: &Tile| {
            let at = 2 * done + work(tile);
            done += work(tile);
            at * n / (2 * all)
        };
        let spans = spans.into_iter().map(|(tiles, span)| {
            let tiles = tiles.into_iter().map(|tile| (slice(&tile), tile));
            (span, tiles.collect())
        });
        spans.collect()
    }

    /// The gradients of one head from some queries of a span, which see so many of its keys: dq, which is written to `out`, and what these keys and values get,
    /// which is left in `s.dk` and `s.dv`.
    ///
    /// # Safety
    /// No other thread may write dq of these queries of this head.
    unsafe fn span(
        &self,
        (span, keys): (&Span, usize),
        tiles: &[&Tile],
        head: usize,
        s: &mut Scratch,
        out: &Output<'_>,
    ) {
        let d = self.head_dim();
        s.kv.gather(&self.x, self.spans, (span, keys), head);
        s.kv.transpose_values(d);
        for sums in [&mut s.dk, &mut s.dv] {
            room(sums, keys * d).fill(0.0);
        }
        for tile in tiles {
            self.tile(tile, head, s);
            // SAFETY: the caller's promise.
            unsafe {
                let (h, dq) = (self.x.q.ne[1], &s.rows[..tile.n * d]);
                store_head(out, d, (head, h), tile.token, dq);
            }
        }
    }

    /// The gradients from a few queries: dq, left in `s.rows`, and what is added to `s.dk` and `s.dv`.
    fn tile(&self, tile: &Tile, head: usize, s: &mut Scratch) {
        let (x, d, n, width) = (&self.x, self.head_dim(), tile.n, tile.keys.len());
        let n_keys = s.kv.k.len() / d;
        let first = tile.keys.start;
        let d_o = &self.d_o.values[tile.token * self.d_o.stride[1] + head * d..];
        let d_o_stride = self.d_o.stride[1];
        let p = weights(
            x,
            self.spans,
            (tile, head),
            &s.kv.k_t,
            &mut s.p,
            &mut s.slopes,
        );
        // dV += P^T dO
        gemm(
            true,
            [width, d, n],
            Strided::columns(p, width),
            RowMajor(d_o, d_o_stride),
            RowMajor(&mut s.dv[first * d..], d),
        );
        // dP = dO V^T
        let ds = room(&mut s.ds, n * width);
        gemm(
            false,
            [n, width, d],
            Strided::rows(d_o, d_o_stride),
            RowMajor(&s.kv.v_t[first..], n_keys),
            RowMajor(ds, width),
        );
        softmax_back(self.spans, tile, p, &s.slopes, ds);
        // dQ = dS K
        gemm(
            false,
            [n, d, width],
            Strided::rows(ds, width),
            RowMajor(&s.kv.k[first * d..], d),
            RowMajor(room(&mut s.rows, n * d), d),
        );
        // dK += dS^T Q
        gemm(
            true,
            [width, d, n],
            Strided::columns(ds, width),
            RowMajor(x.queries(head, tile.token), x.query_stride()),
            RowMajor(&mut s.dk[first * d..], d),
        );
    }

    /// Adds the first rows of a span, `ne = [d, N]`, to those of the prefix and the tokens, `ne = [d, P + T]`.
    fn scatter(&self, span: &Span, from: &[f32], to: &mut [f32]) {
        let d = self.head_dim();
        for (n, row) in from.chunks_exact(d).enumerate() {
            let at = match self.spans.source(span, n) {
                Source::Prefix(p) => p,
                Source::Token(t) => self.spans.prefix + t,
            };
            add(&mut to[at * d..][..d], row);
        }
    }
}

fn add(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

/// Sums dk and dv over the slices of the query heads of each group. Operand: the result of [`AttentionBack`]; result, one behind the other:
/// dk and dv, `ne = [d, Hk, P + T]`.
struct SumGroups {
    d: usize,
    h: usize,
    /// Heads of a group.
    group: usize,
    t: usize,
}

impl Kernel for SumGroups {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let &Self { d, h, group, t } = self;
        let parts = &op.operand(0).contiguous()[d * h * t..];
        let slices = slices(h);
        let rows = parts.len() / (2 * d * slices * h);
        let (first, dst) = out.share(2 * rows);
        for (i, out) in (first..).zip(dst.chunks_exact_mut(d * (h / group))) {
            let (half, row) = (i / rows, i % rows);
            for (hk, out) in out.chunks_exact_mut(d).enumerate() {
                out.fill(0.0);
                for unit in hk * group * slices..(hk + 1) * group * slices {
                    add(
                        out,
                        &parts[((half * slices * h + unit) * rows + row) * d..][..d],
                    );
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
    pub(crate) prefix: Option<[Tensor; 2]>,
}

impl Context {
    /// The derivative of [`Context::packed_attention`], whose output has the gradient `dout`, `ne = [H d, T]`.
    pub(crate) fn packed_attention_back(
        &self,
        spans: &Spans,
        of: PackedAttention<'_>,
        dout: &Tensor,
    ) -> AttentionGrads {
        let [d, h, t, _] = of.q.ne();
        let hk = of.k.ne()[1];
        let p = spans.prefix;
        let rows = p + t;
        let mut srcs = of.operands();
        srcs.push(dout);
        let all = self.custom(
            AttentionBack(spans.clone()),
            &srcs,
            [d * h * (t + 2 * rows * slices(h)), 1, 1, 1],
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
            prefix: (p > 0).then(|| [heads(&sums, hk, p, 0), heads(&sums, hk, p, rows)]),
        }
    }
}
