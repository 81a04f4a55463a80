//! Mixtures of experts (Shazeer et al. 2017): which experts each token goes through, products of every expert with its own tokens, and sums of what comes out.
//!
//! T tokens that go through k experts each are R = k T *rows*. Rows are in order of their experts, and those of an expert in order of their tokens: so every product
//! reads and writes neighbours, and what is done to a row knows neither its token nor its rank.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts, small_parts};
use crate::ggml::quant::row_to_f32;
use crate::ggml::tensor::Tensor;
use crate::kernels::{
    Bits, MulMat, MulMatBack, exp, exp_sub_sum, largest, packed_words, vectorized,
};
use ggml_sys as sys;
use std::ops::Range;

/// Rows in order of their experts, made by [`Context::group_rows`].
#[derive(Clone)]
pub(crate) struct Grouped {
    /// See [`Groups`].
    table: Tensor,
    /// E.
    n_expert: usize,
    /// R.
    n_rows: usize,
}

impl Grouped {
    /// R.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }
}

/// What [`Grouped`] says. A token's choice of an expert is a *slot*: number `j + k t` for rank j of token t.
struct Groups<'a> {
    /// The first row of each expert, and R.
    starts: &'a [i32],
    /// The slot of each row.
    slots: &'a [i32],
    /// The row of each slot.
    rows: &'a [i32],
}

impl<'a> Groups<'a> {
    fn new(table: &'a [i32], n_expert: usize) -> Self {
        let (starts, rest) = table.split_at(n_expert + 1);
        let (slots, rest) = rest.split_at(rest.len() / 3);
        Self {
            starts,
            slots,
            rows: &rest[..slots.len()],
        }
    }

    /// Rows of expert `e`.
    fn of(&self, e: usize) -> Range<usize> {
        self.starts[e] as usize..self.starts[e + 1] as usize
    }

    /// Experts that have rows, with these.
    fn used(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let all = (0..self.starts.len() - 1).map(|e| (e, self.of(e)));
        all.filter(|(_, rows)| !rows.is_empty())
    }

    /// The most rows of an expert.
    fn most(&self) -> usize {
        self.used().map(|(_, rows)| rows.len()).max().unwrap_or(0)
    }

    /// Part `ith` of `nth`, as even as may be, of products that consist of `pieces` for each expert that is used: calls `each(expert, rows, pieces)`. What a piece takes is
    /// as much as `fixed` rows do, and its rows.
    fn share(
        &self,
        pieces: usize,
        fixed: usize,
        (ith, nth): (usize, usize),
        mut each: impl FnMut(usize, Range<usize>, Range<usize>),
    ) {
        let cost = |rows: &Range<usize>| fixed + rows.len();
        let total: usize = self.used().map(|(_, rows)| pieces * cost(&rows)).sum();
        let (begin, end) = (total * ith / nth, total * (ith + 1) / nth);
        let mut at = 0;
        for (e, rows) in self.used() {
            let piece = cost(&rows);
            // A piece belongs to the part in which it begins.
            let before = |cost: usize| cost.saturating_sub(at).div_ceil(piece).min(pieces);
            let mine = before(begin)..before(end);
            if !mine.is_empty() {
                each(e, rows, mine);
            }
            at += pieces * piece;
        }
    }
}

/// Probabilities of logits. Operand: logits `ne = [E, T]`.
struct Softmax;

impl Kernel for Softmax {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let x = op.operand(0);
        let (first, dst) = out.share(x.ne[1]);
        for (t, row) in (first..).zip(dst.chunks_exact_mut(x.ne[0])) {
            row.copy_from_slice(x.row(t, 0));
            let sum = exp_sub_sum(row, largest(row));
            row.iter_mut().for_each(|p| *p /= sum);
        }
    }
}

/// `dx` of `p = softmax(x)`: `p (dp - <p, dp>)`. Operands: p, dp.
struct SoftmaxBack;

impl Kernel for SoftmaxBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (p, dp) = (op.operand(0), op.operand(1));
        let (first, dst) = out.share(p.ne[1]);
        for (t, dx) in (first..).zip(dst.chunks_exact_mut(p.ne[0])) {
            let (p, dp) = (p.row(t, 0), dp.row(t, 0));
            let mean = dot(p, dp);
            for ((dx, p), dp) in dx.iter_mut().zip(p).zip(dp) {
                *dx = p * (dp - mean);
            }
        }
    }
}

/// The experts of each token, most probable first; of equal ones the first, and last what is not a number. Operand: probabilities `ne = [E, T]`. The result is I32
/// `ne = [k, T]`.
struct TopK;

impl Kernel for TopK {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let p = op.operand(0);
        let k = op.ne()[0];
        let (first, dst) = out.share_ids(p.ne[1]);
        for (t, ids) in (first..).zip(dst.chunks_exact_mut(k)) {
            top_k(p.row(t, 0), ids);
        }
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(op.operand(0).values.len())
    }
}

/// Places of the `ids.len()` largest of `values`, of which there are as many.
fn top_k(values: &[f32], ids: &mut [i32]) {
    assert!(ids.len() <= values.len());
    let rank = |i: usize| match values[i] {
        v if v.is_nan() => f32::NEG_INFINITY,
        v => v,
    };
    let mut found = 0;
    for i in 0..values.len() {
        let v = rank(i);
        let smaller = |id: i32| rank(id as usize) < v;
        if found == ids.len() && !ids.last().is_some_and(|&id| smaller(id)) {
            continue;
        }
        let mut at = found.min(ids.len() - 1);
        while at > 0 && smaller(ids[at - 1]) {
            ids[at] = ids[at - 1];
            at -= 1;
        }
        ids[at] = i as i32;
        found = (found + 1).min(ids.len());
    }
}

/// The table of [`Grouped`]: first rows of experts, slots of rows, rows of slots, experts of rows. Operand: ids I32 `ne = [k, T]`.
struct Group {
    n_expert: usize,
}

impl Kernel for Group {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let ids = op.ids(0);
        // One thread does it in no time.
        if op.ith == 0 {
            group(ids, self.n_expert, out.all_ids());
        }
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(1)
    }
}

fn group(ids: &[i32], n_expert: usize, table: &mut [i32]) {
    let (starts, rest) = table.split_at_mut(n_expert + 1);
    let (slots, rest) = rest.split_at_mut(ids.len());
    let (rows, experts) = rest.split_at_mut(ids.len());
    starts.fill(0);
    for &id in ids {
        starts[id as usize + 1] += 1;
    }
    for e in 0..n_expert {
        starts[e + 1] += starts[e];
    }
    // What follows moves each start to the next one's place.
    for (slot, &id) in ids.iter().enumerate() {
        let next = &mut starts[id as usize];
        let row = *next as usize;
        *next += 1;
        slots[row] = slot as i32;
        rows[slot] = row as i32;
        experts[row] = id;
    }
    starts.copy_within(..n_expert, 1);
    starts[0] = 0;
}

/// A token's row for each of its experts. Operands: x `ne = [W, T]`, groups.
struct Spread {
    n_expert: usize,
}

impl Kernel for Spread {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, groups) = (op.operand(0), Groups::new(op.ids(1), self.n_expert));
        let n = groups.slots.len();
        let k = n / x.ne[1];
        let (first, dst) = out.share(n);
        for (row, slot) in dst.chunks_exact_mut(x.ne[0]).zip(&groups.slots[first..]) {
            row.copy_from_slice(x.row(*slot as usize / k, 0));
        }
    }
}

/// `dx` of [`Spread`]: the sum of a token's rows. Operands: dy `ne = [W, R]`, groups. The result is `ne = [W, T]`.
struct SpreadBack {
    n_expert: usize,
}

impl Kernel for SpreadBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (dy, groups) = (op.operand(0), Groups::new(op.ids(1), self.n_expert));
        let [width, t, ..] = op.ne();
        let k = groups.rows.len() / t;
        let (first, dst) = out.share(t);
        for (t, sum) in (first..).zip(dst.chunks_exact_mut(width)) {
            sum.fill(0.0);
            for &row in &groups.rows[t * k..(t + 1) * k] {
                add_times(sum, dy.row(row as usize, 0), 1.0);
            }
        }
    }
}

/// What a piece of work takes besides that of its rows, counted in rows: unpacking weights forward, and backward.
const UNPACKED: usize = 16;
const DEQUANTIZED: usize = 64;

/// Products of each expert with its rows. Operands: W `ne = [K, N, E]`, rows packed to so many bits, as if they were few, or as they are, groups.
struct ExpertProduct(Bits);

impl ExpertProduct {
    fn groups<'a>(op: &Op<'a>) -> Groups<'a> {
        Groups::new(op.ids(2), op.memory(0).ne[2])
    }
}

impl Kernel for ExpertProduct {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (w, x) = (op.memory(0), op.operand(1));
        let [k, n, ..] = w.ne;
        let &Self(bits) = self;
        assert_eq!(x.ne[0], packed_words(k, 1, bits));
        let y = out.as_mut_ptr();
        let part = (op.ith, op.nth);
        Self::groups(op).share(
            MulMat::panels_of(bits, n),
            UNPACKED,
            part,
            |e, rows, panels| {
                // SAFETY: expert e of W, its rows of X and of the result; the pieces of all parts are disjoint.
                unsafe {
                    let product = MulMat {
                        ty: w.ty,
                        to_f32: row_to_f32,
                        w: w.first.add(e * w.nb[2]),
                        row_bytes: w.nb[1],
                        k,
                        n,
                        x: x.values.as_ptr().add(rows.start * x.stride[1]),
                        x_stride: x.stride[1],
                        bits,
                        t: rows.len(),
                        y: y.add(rows.start * n),
                    };
                    product.panels(panels);
                }
            },
        );
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        let groups = Self::groups(op);
        let w = op.memory(0);
        let most = MulMat::most_parts(w.ty, self.0, w.ne[1], groups.most());
        most.map_or(Parts::Long, |n| Parts::AtMost(n * groups.used().count()))
    }
}

/// `dx` of [`ExpertProduct`]. Operands: W (any type), dy `ne = [N, R]`, groups.
struct ExpertProductBack;

impl ExpertProductBack {
    fn pieces(k: usize) -> usize {
        MulMatBack::pieces(k).max(1)
    }
}

impl Kernel for ExpertProductBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (w, dy) = (op.memory(0), op.operand(1));
        let [k, n, ..] = w.ne;
        assert_eq!(dy.ne[0], n);
        let dx = out.as_mut_ptr();
        let pieces = Self::pieces(k);
        let part = (op.ith, op.nth);
        ExpertProduct::groups(op).share(pieces, DEQUANTIZED, part, |e, rows, mine| {
            // SAFETY: expert e of W, its rows of dY and of the result; the pieces of all parts are disjoint.
            unsafe {
                let product = MulMatBack {
                    ty: w.ty,
                    to_f32: row_to_f32,
                    w: w.first.add(e * w.nb[2]),
                    row_bytes: w.nb[1],
                    k,
                    n,
                    dy: dy.values.as_ptr().add(rows.start * dy.stride[1]),
                    dy_stride: dy.stride[1],
                    dx: dx.add(rows.start * k),
                    dx_stride: k,
                    t: rows.len(),
                };
                for piece in mine {
                    product.part(piece, pieces);
                }
            }
        });
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        let used = ExpertProduct::groups(op).used().count();
        Parts::AtMost(used * Self::pieces(op.ne()[0]))
    }
}

/// What the experts of a token count: their probabilities, which may be divided by their sum. Operands: probabilities `ne = [E, T]`, ids I32 `ne = [k, T]`.
struct ExpertWeights {
    normalized: bool,
}

/// Adds each expert's bias to its rows. Operands: what it replaces, `ne = [N, R]`, biases `ne = [N, E]`, groups.
struct AddBiases {
    n_expert: usize,
}

impl Kernel for AddBiases {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (biases, groups) = (op.operand(1), Groups::new(op.ids(2), self.n_expert));
        let [width, r, ..] = op.ne();
        let (first, rows) = out.share(r);
        let mut rows = (first..).zip(rows.chunks_exact_mut(width)).peekable();
        for (e, of_expert) in groups.used() {
            while let Some((_, row)) = rows.next_if(|(r, _)| *r < of_expert.end) {
                add_times(row, biases.row(e, 0), 1.0);
            }
        }
    }
}

/// Sums of probabilities are this at least, as in llama.cpp: the smallest normal number of half precision.
const SMALLEST_SUM: f32 = 1.0 / 16_384.0;

impl ExpertWeights {
    /// What the probabilities of `ids` are divided by, and whether it is their sum.
    fn divisor(&self, p: &[f32], ids: &[i32]) -> (f32, bool) {
        if !self.normalized {
            return (1.0, false);
        }
        let sum: f64 = ids.iter().map(|&id| f64::from(p[id as usize])).sum();
        let sum = sum as f32;
        (sum.max(SMALLEST_SUM), sum > SMALLEST_SUM)
    }
}

impl Kernel for ExpertWeights {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (p, ids) = (op.operand(0), op.ids(1));
        let k = op.ne()[0];
        let (first, dst) = out.share(p.ne[1]);
        let tokens = dst.chunks_exact_mut(k).zip(ids.chunks_exact(k).skip(first));
        for (t, (weights, ids)) in (first..).zip(tokens) {
            let p = p.row(t, 0);
            let (divisor, _) = self.divisor(p, ids);
            for (w, &id) in weights.iter_mut().zip(ids) {
                *w = p[id as usize] / divisor;
            }
        }
    }
}

/// `dp` of [`ExpertWeights`]: where the divisor is the sum s, `(dw_j - <dw, w>) / s`. Operands: probabilities, ids, dw `ne = [k, T]`.
struct ExpertWeightsBack(ExpertWeights);

impl Kernel for ExpertWeightsBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (p, ids, dw) = (op.operand(0), op.ids(1), op.operand(2));
        let k = dw.ne[0];
        let (first, dst) = out.share(p.ne[1]);
        let tokens = dst
            .chunks_exact_mut(p.ne[0])
            .zip(ids.chunks_exact(k).skip(first));
        for (t, (dp, ids)) in (first..).zip(tokens) {
            let (p, dw) = (p.row(t, 0), dw.row(t, 0));
            let (divisor, is_sum) = self.0.divisor(p, ids);
            let products = ids
                .iter()
                .zip(dw)
                .map(|(&id, dw)| p[id as usize] / divisor * dw);
            let mean = if is_sum { products.sum() } else { 0.0 };
            dp.fill(0.0);
            for (&id, dw) in ids.iter().zip(dw) {
                dp[id as usize] = (dw - mean) / divisor;
            }
        }
    }
}

/// Sums of what the experts of a token say, by their weights. Operands: y `ne = [D, R]`, weights `ne = [k, T]`, groups.
struct Mix {
    n_expert: usize,
}

impl Kernel for Mix {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (y, weights) = (op.operand(0), op.operand(1));
        let groups = Groups::new(op.ids(2), self.n_expert);
        let [k, t, ..] = weights.ne;
        let (first, dst) = out.share(t);
        for (t, sum) in (first..).zip(dst.chunks_exact_mut(y.ne[0])) {
            let rows = &groups.rows[t * k..(t + 1) * k];
            for (j, (&row, &weight)) in rows.iter().zip(weights.row(t, 0)).enumerate() {
                let row = y.row(row as usize, 0);
                match j {
                    0 => set_times(sum, row, weight),
                    _ => add_times(sum, row, weight),
                }
            }
        }
    }
}

vectorized! {
    /// `y = s x`.
    fn set_times(y: &mut [f32], x: &[f32], s: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = s * x;
        }
    }
}

vectorized! {
    /// `y + s x`, in two operations as ggml does.
    fn add_times(y: &mut [f32], x: &[f32], s: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += s * x;
        }
    }
}

vectorized! {
    /// `<a, b>`.
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        const LANES: usize = 16;
        let mut sums = [0.0f32; LANES];
        let (a, b) = (a.chunks(LANES), b.chunks(LANES));
        for (a, b) in a.zip(b) {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum += a * b;
            }
        }
        sums.iter().sum()
    }
}

/// `dy` of [`Mix`]. Operands: dout `ne = [D, T]`, weights `ne = [k, T]`, groups. The result is `ne = [D, R]`.
struct MixBack {
    n_expert: usize,
}

impl Kernel for MixBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (dout, weights) = (op.operand(0), op.operand(1));
        let groups = Groups::new(op.ids(2), self.n_expert);
        let k = weights.ne[0];
        let (first, dst) = out.share(groups.slots.len());
        for (dy, &slot) in dst.chunks_exact_mut(dout.ne[0]).zip(&groups.slots[first..]) {
            let (t, j) = (slot as usize / k, slot as usize % k);
            set_times(dy, dout.row(t, 0), weights.row(t, 0)[j]);
        }
    }
}

/// Gradient of the weights of [`Mix`]. Operands: dout `ne = [D, T]`, y `ne = [D, R]`, groups. The result is `ne = [k, T]`.
struct MixWeightsBack {
    n_expert: usize,
}

impl Kernel for MixWeightsBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (dout, y) = (op.operand(0), op.operand(1));
        let groups = Groups::new(op.ids(2), self.n_expert);
        let k = op.ne()[0];
        let (first, dst) = out.share(groups.rows.len());
        for ((slot, dw), &row) in (first..).zip(dst).zip(&groups.rows[first..]) {
            *dw = dot(dout.row(slot / k, 0), y.row(row as usize, 0));
        }
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(op.operand(1).values.len())
    }
}

/// `sigmoid(x)`.
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp::<false>(-x))
}

/// `sigmoid(gate) * x`, a gate for each row. Operands: x `ne = [D, T]`, gates `ne = [1, T]`.
struct GateRows;

impl Kernel for GateRows {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, gates) = (op.operand(0), op.operand(1).contiguous());
        let (first, dst) = out.share(x.ne[1]);
        for (t, y) in (first..).zip(dst.chunks_exact_mut(x.ne[0])) {
            set_times(y, x.row(t, 0), sigmoid(gates[t]));
        }
    }
}

/// Gradient of the gates of [`GateRows`]. Operands: x, gates, dy. The result is `ne = [1, T]`.
struct GatesBack;

impl Kernel for GatesBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, gates, dy) = (op.operand(0), op.operand(1).contiguous(), op.operand(2));
        let (first, dst) = out.share(x.ne[1]);
        for (t, dgate) in (first..).zip(dst) {
            let s = sigmoid(gates[t]);
            *dgate = s * (1.0 - s) * dot(x.row(t, 0), dy.row(t, 0));
        }
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(op.operand(0).values.len())
    }
}

impl Context {
    /// `softmax(x)` of rows.
    pub(crate) fn softmax_rows(&self, x: &Tensor) -> Tensor {
        if self.is_own() {
            return self.custom(Softmax, &[x], x.ne());
        }
        // SAFETY: a valid description.
        self.build(&[x], |c| unsafe { sys::ggml_soft_max(c, x.raw()) })
    }

    /// Gradient of `p = softmax(x)` with respect to x.
    pub(crate) fn softmax_rows_back(&self, p: &Tensor, dp: &Tensor) -> Tensor {
        self.custom(SoftmaxBack, &[p, dp], p.ne())
    }

    /// The `k` largest of each row, the largest first: p `ne = [E, T]` -> I32 `ne = [k, T]`. (ggml's has no order for what is not a number, and reads beyond the row.)
    ///
    /// # Panics
    /// When computed, if a row has less than `k`.
    pub(crate) fn choose_experts(&self, p: &Tensor, k: usize) -> Tensor {
        self.custom_ids(TopK, &[p], [k, p.ne()[1], 1, 1])
    }

    /// Puts what tokens chose in order: ids I32 `ne = [k, T]`, of `n_expert` experts.
    pub(crate) fn group_rows(&self, ids: &Tensor, n_expert: usize) -> Grouped {
        let n_rows = ids.ne()[0] * ids.ne()[1];
        let n = n_expert + 1 + 3 * n_rows;
        Grouped {
            table: self.custom_ids(Group { n_expert }, &[ids], [n, 1, 1, 1]),
            n_expert,
            n_rows,
        }
    }

    /// A token's row for each of its experts: x `ne = [W, T]` -> `ne = [W, R]`.
    pub(crate) fn spread_rows(&self, x: &Tensor, groups: &Grouped) -> Tensor {
        let &Grouped {
            n_expert, n_rows, ..
        } = groups;
        let ne = [x.ne()[0], n_rows, 1, 1];
        self.custom(Spread { n_expert }, &[x, &groups.table], ne)
    }

    /// Gradient of [`Context::spread_rows`] over `t` tokens: dy `ne = [W, R]` -> `ne = [W, T]`.
    pub(crate) fn spread_rows_back(&self, dy: &Tensor, groups: &Grouped, t: usize) -> Tensor {
        let kernel = SpreadBack {
            n_expert: groups.n_expert,
        };
        self.custom(kernel, &[dy, &groups.table], [dy.ne()[0], t, 1, 1])
    }

    /// Each expert's product with its rows: w `ne = [K, N, E]`, x `ne = [K, R]` -> `ne = [N, R]`. By our own kernel if x is packed to so many bits, see
    /// [`Context::pack_few`]; otherwise by ggml's.
    pub(crate) fn mul_mat_experts(
        &self,
        w: &Tensor,
        x: &Tensor,
        bits: Option<Bits>,
        groups: &Grouped,
    ) -> Tensor {
        let (n, r) = (w.ne()[1], groups.n_rows);
        if let Some(bits) = bits {
            return self.custom(ExpertProduct(bits), &[w, x, &groups.table], [n, r, 1, 1]);
        }
        // Rows are to ggml what tokens of one expert each are.
        let size = size_of::<i32>();
        let offset = (groups.n_expert + 1 + 2 * r) * size;
        let ids = self.view(
            &groups.table,
            [1, r, 1, 1],
            [size, r * size, r * size],
            offset,
        );
        let x = self.reshape(x, &[x.ne()[0], 1, r]);
        // SAFETY: valid descriptions; shapes were validated upstream, ids are those of experts.
        let y = self.build(&[w, &x, &ids], |c| unsafe {
            sys::ggml_mul_mat_id(c, w.raw(), x.raw(), ids.raw())
        });
        self.reshape(&y, &[n, r])
    }

    /// Gradient of [`Context::mul_mat_experts`] with respect to x: w `ne = [K, N, E]`, dy `ne = [N, R]` -> `ne = [K, R]`.
    pub(crate) fn mul_mat_experts_back(&self, w: &Tensor, dy: &Tensor, groups: &Grouped) -> Tensor {
        let ne = [w.ne()[0], groups.n_rows, 1, 1];
        self.custom(ExpertProductBack, &[w, dy, &groups.table], ne)
    }

    /// Adds each expert's bias to its rows, which nothing else may read: y `ne = [N, R]`, biases F32 `ne = [N, E]`.
    pub(crate) fn add_expert_biases(
        &self,
        y: &Tensor,
        biases: &Tensor,
        groups: &Grouped,
    ) -> Tensor {
        let kernel = AddBiases {
            n_expert: groups.n_expert,
        };
        self.custom_inplace(kernel, y, &[biases, &groups.table])
    }

    /// What the experts of a token count: p `ne = [E, T]`, ids I32 `ne = [k, T]` -> `ne = [k, T]`. `normalized`: divided by their sum.
    pub(crate) fn expert_weights(&self, p: &Tensor, ids: &Tensor, normalized: bool) -> Tensor {
        self.custom(ExpertWeights { normalized }, &[p, ids], ids.ne())
    }

    /// Gradient of [`Context::expert_weights`] with respect to p.
    pub(crate) fn expert_weights_back(
        &self,
        p: &Tensor,
        ids: &Tensor,
        normalized: bool,
        dw: &Tensor,
    ) -> Tensor {
        let kernel = ExpertWeightsBack(ExpertWeights { normalized });
        self.custom(kernel, &[p, ids, dw], p.ne())
    }

    /// Sums of a token's rows by their weights: y `ne = [D, R]`, weights `ne = [k, T]` -> `ne = [D, T]`.
    pub(crate) fn mix_rows(&self, y: &Tensor, weights: &Tensor, groups: &Grouped) -> Tensor {
        let kernel = Mix {
            n_expert: groups.n_expert,
        };
        let ne = [y.ne()[0], weights.ne()[1], 1, 1];
        self.custom(kernel, &[y, weights, &groups.table], ne)
    }

    /// Gradients of [`Context::mix_rows`] with respect to y and the weights.
    pub(crate) fn mix_rows_back(
        &self,
        y: &Tensor,
        weights: &Tensor,
        groups: &Grouped,
        dout: &Tensor,
    ) -> (Tensor, Tensor) {
        let n_expert = groups.n_expert;
        let dy = self.custom(
            MixBack { n_expert },
            &[dout, weights, &groups.table],
            y.ne(),
        );
        let kernel = MixWeightsBack { n_expert };
        let dw = self.custom(kernel, &[dout, y, &groups.table], weights.ne());
        (dy, dw)
    }

    /// `sigmoid(gate) * x`: x `ne = [D, T]`, a gate for each row `ne = [1, T]`.
    pub(crate) fn gate_rows(&self, x: &Tensor, gates: &Tensor) -> Tensor {
        if self.is_own() {
            return self.custom(GateRows, &[x, gates], x.ne());
        }
        // As libllama has it, to the last bit.
        let silu = self.activation(crate::operation::Activation::Silu, gates);
        // SAFETY: valid descriptions; a gate is repeated over its row.
        self.build(&[x, &silu, gates], |c| unsafe {
            let sigmoid = sys::ggml_div(c, silu.raw(), gates.raw());
            sys::ggml_mul(c, x.raw(), sigmoid)
        })
    }

    /// Gradients of [`Context::gate_rows`] with respect to x and the gates.
    pub(crate) fn gate_rows_back(
        &self,
        x: &Tensor,
        gates: &Tensor,
        dy: &Tensor,
    ) -> (Tensor, Tensor) {
        let dx = self.custom(GateRows, &[dy, gates], x.ne());
        let dgates = self.custom(GatesBack, &[x, gates, dy], gates.ne());
        (dx, dgates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::types::GgmlType;
    use crate::ggml::{Graph, GraphMemory, Operations, ThreadPool, quantize_rows};
    use crate::kernels::available_bits;

    /// From -1 to 1.
    fn random(n: usize, mut state: u32) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// K, N, E, k.
    const SIZES: [usize; 4] = [512, 70, 6, 3];

    /// What T tokens choose: one expert is nobody's, one is everybody's.
    fn chosen(t: usize) -> Vec<i32> {
        let others = |i: usize| [[0, 4], [4, 1], [1, 3], [0, 1]][i % 4];
        (0..t)
            .flat_map(|i| [2, others(i)[0], others(i)[1]])
            .collect()
    }

    /// Products of experts with their rows of x, and gradients of the rows by `y`, in order of slots; `None`: ggml's product.
    fn products(ty: GgmlType, bits: Option<Bits>, t: usize, n_threads: usize) -> [Vec<f32>; 2] {
        let [k, n, n_expert, used] = SIZES;
        let ctx = Context::new(Operations::Own);
        let w = ctx.input(ty, &[k, n, n_expert], "w");
        let x = ctx.input(GgmlType::F32, &[k, t], "x");
        let ids = ctx.input(GgmlType::I32, &[used, t], "ids");
        let groups = ctx.group_rows(&ids, n_expert);
        let packed = bits.map_or(x.clone(), |bits| ctx.pack_few(&x, bits));
        let rows = ctx.spread_rows(&packed, &groups);
        let y = ctx.mul_mat_experts(&w, &rows, bits, &groups);
        let dx = ctx.mul_mat_experts_back(&w, &y, &groups);
        let [y, dx] = [y, dx].map(|t| ctx.output(t));
        let outputs = [y.clone(), dx.clone()];
        let mut graph = Graph::new(ctx, &outputs, GraphMemory::new()).unwrap();
        let mut weights = Vec::new();
        quantize_rows(ty, &random(k * n * n_expert, 1), k, &mut weights);
        graph.bytes_mut(&w).copy_from_slice(&weights);
        graph.slice_mut(&x).copy_from_slice(&random(k * t, 2));
        let ids_of = chosen(t);
        graph.slice_mut(&ids).copy_from_slice(&ids_of);
        graph.compute(&ThreadPool::new(n_threads), None).unwrap();
        let mut table = vec![0; n_expert + 1 + 3 * ids_of.len()];
        group(&ids_of, n_expert, &mut table);
        let order = Groups::new(&table, n_expert).rows;
        [y, dx].map(|t| {
            let rows: Vec<&[f32]> = graph.read_f32(&t).chunks(t.ne()[0]).collect();
            order
                .iter()
                .flat_map(|&r| rows[r as usize])
                .copied()
                .collect()
        })
    }

    /// The same of one expert after the other, as if it were a dense matrix, and with one row after the other.
    fn alone(ty: GgmlType, bits: Bits, t: usize) -> [Vec<f32>; 2] {
        let [k, n, n_expert, used] = SIZES;
        let mut weights = Vec::new();
        quantize_rows(ty, &random(k * n * n_expert, 1), k, &mut weights);
        let xs = random(k * t, 2);
        let mut found = [Vec::new(), Vec::new()];
        for (slot, e) in chosen(t).into_iter().enumerate() {
            let ctx = Context::new(Operations::Own);
            let w = ctx.input(ty, &[k, n], "w");
            let x = ctx.input(GgmlType::F32, &[k, 1], "x");
            let y = ctx.mul_mat_packed(&w, &ctx.pack(&x, bits), bits);
            let dx = ctx.mul_mat_back(&w, &y);
            let outputs = [y, dx].map(|t| ctx.output(t));
            let mut graph = Graph::new(ctx, &outputs, GraphMemory::new()).unwrap();
            let bytes = weights.len() / n_expert;
            let of = &weights[e as usize * bytes..][..bytes];
            graph.bytes_mut(&w).copy_from_slice(of);
            let row = &xs[slot / used * k..][..k];
            graph.slice_mut(&x).copy_from_slice(row);
            graph.compute(&ThreadPool::new(1), None).unwrap();
            for (found, t) in found.iter_mut().zip(&outputs) {
                found.extend(graph.read_f32(t));
            }
        }
        found
    }

    #[test]
    fn an_experts_row_has_the_bits_that_it_has_alone() {
        use GgmlType::*;
        let bits = |v: &[Vec<f32>; 2]| {
            v.clone()
                .map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let mut n = 0;
        for ty in [F32, F16, BF16, Q8_0, Q4_0, Q5_1, Q2_K, Q4_K, Q6_K, IQ4_XS] {
            let available = available_bits(ty, SIZES[0]).into_iter().flatten();
            for kind in available {
                // Few rows are multiplied with weights as they lie in memory, more with weights that are unpacked.
                for t in [1, 2, 5, 40] {
                    let want = bits(&alone(ty, kind, t));
                    for threads in [1, 3] {
                        let got = products(ty, Some(kind), t, threads);
                        assert!(bits(&got) == want, "{ty} {kind:?}, {t} tokens, {threads}");
                        n += 1;
                    }
                }
            }
        }
        // Without AVX2 or NEON there are no kernels.
        let any = available_bits(Q8_0, SIZES[0]) != [None; 2];
        assert!(n > 0 || !any);
    }

    #[test]
    fn products_by_ggml_are_the_same_up_to_rounding() {
        for ty in [GgmlType::F32, GgmlType::Q8_0] {
            for t in [1, 40] {
                let exact = products(GgmlType::F32, None, t, 2);
                let got = products(ty, None, t, 1);
                let error = ggraft_testkit::metrics::nmse(&got[0], &exact[0]);
                assert!(error < 1e-3, "{ty}, {t}: {error:.1e}");
            }
        }
    }

    fn top(values: &[f32], k: usize) -> Vec<i32> {
        let mut ids = vec![-1; k];
        top_k(values, &mut ids);
        ids
    }

    #[test]
    fn the_largest_come_first_equal_ones_in_order_and_numbers_before_others() {
        assert_eq!(top(&[0.1, 0.4, 0.2, 0.3], 3), [1, 3, 2]);
        assert_eq!(top(&[0.5, 0.5, 0.5], 2), [0, 1]);
        assert_eq!(top(&[0.1, 0.5, 0.2, 0.5], 3), [1, 3, 2]);
        assert_eq!(top(&[0.0, -0.0, 0.0], 3), [0, 1, 2]);
        let nan = f32::NAN;
        assert_eq!(top(&[nan, 0.1, nan, 0.2], 3), [3, 1, 0]);
        assert_eq!(top(&[nan; 4], 2), [0, 1]);
        assert_eq!(top(&[f32::INFINITY, nan, 1.0], 1), [0]);
        assert_eq!(top(&[2.0], 1), [0]);
    }

    #[test]
    fn rows_are_in_order_of_experts_and_tokens() {
        // Two experts for each of three tokens, of four.
        let ids = [2, 0, 0, 3, 2, 3];
        let mut table = vec![-1; 4 + 1 + 3 * ids.len()];
        group(&ids, 4, &mut table);
        let groups = Groups::new(&table, 4);
        assert_eq!(groups.starts, [0, 2, 2, 4, 6]);
        assert_eq!(groups.slots, [1, 2, 0, 4, 3, 5]);
        assert_eq!(groups.rows, [2, 0, 1, 4, 3, 5]);
        assert_eq!(table[4 + 1 + 2 * ids.len()..], [0, 0, 2, 2, 3, 3]);
        let used: Vec<_> = groups.used().collect();
        assert_eq!(used, [(0, 0..2), (2, 2..4), (3, 4..6)]);
        assert_eq!(groups.most(), 2);
    }

    #[test]
    fn parts_share_all_pieces() {
        let ids: Vec<i32> = (0..40).map(|i| [0, 5, 5, 5, 2, 5, 7][i % 7]).collect();
        let mut table = vec![-1; 8 + 1 + 3 * ids.len()];
        group(&ids, 8, &mut table);
        let groups = Groups::new(&table, 8);
        for pieces in [1, 3, 16] {
            for nth in [1, 2, 5, 64] {
                let mut times = vec![0; 8 * pieces];
                for ith in 0..nth {
                    groups.share(pieces, 4, (ith, nth), |e, rows, mine| {
                        assert_eq!(rows, groups.of(e));
                        mine.for_each(|p| times[e * pieces + p] += 1);
                    });
                }
                for (e, times) in times.chunks(pieces).enumerate() {
                    let want = usize::from(!groups.of(e).is_empty());
                    assert!(
                        times.iter().all(|&n| n == want),
                        "{pieces}, {nth}: {times:?}"
                    );
                }
            }
        }
    }
}
