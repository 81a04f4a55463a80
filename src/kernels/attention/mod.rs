//! Attention forward over keys and values as they lie in a cache (Dao et al. 2022): nothing of size T x N is kept.
//!
//! The queries of all heads that share keys, of some tokens, meet [`CHUNK`] keys at a time. That gives a [`Record`] for each query: its
//! values, weighted, and what merges them with those of the next keys, always in the order of keys. So a query's output is one fixed chain
//! of operations, whatever queries it is computed with, and whoever computes which chunk.

// What only kernels use: there is none for other CPUs.
#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code)
)]

use super::level::{FUSED, vectorized};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::prefetch;
use super::{exp, exp_sub_sum, room, tanh};
use crate::file::types::GgmlType;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::cell::RefCell;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod none;
#[cfg(target_arch = "x86_64")]
use avx2 as arch;
#[cfg(target_arch = "aarch64")]
use neon as arch;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use none as arch;

/// Keys whose scores are kept at a time; records are of so many.
const CHUNK: usize = 256;
/// Queries that meet keys at the same time: what unpacking keys and values costs is divided by them.
const QUERIES: usize = 64;
/// Keys side by side in a tile of scores, and values of a head: two registers.
const WIDTH: usize = 16;
/// Keys whose values are unpacked at a time.
const VALUES: usize = 64;
/// Interleaved sums of [`exp_sub_sum`]: a row of scores begins at a multiple, so that a key has one and the same lane.
const LANES: usize = 32;

/// Whether there is a kernel on this CPU for heads of `d` keys and values of this type.
pub(crate) fn has_attention(ty: GgmlType, d: usize) -> bool {
    arch::available()
        && d.is_multiple_of(8)
        && matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::Q8_0)
}

/// Keys or values, `ne = [d, Hk, N, S]`, as they lie in memory.
#[derive(Clone, Copy)]
pub(crate) struct Cached {
    pub(crate) first: *const u8,
    /// One that [`has_attention`].
    pub(crate) ty: GgmlType,
    /// Bytes from one head, token and stream to the next.
    pub(crate) nb: [usize; 3],
}

/// A run of rows of [`Cached`]: a head of neighbouring tokens.
#[derive(Clone, Copy)]
struct Run {
    first: *const u8,
    ty: GgmlType,
    /// From one row to the next.
    row_bytes: usize,
    /// Of a row.
    bytes: usize,
    /// Rows, at least one.
    n: usize,
    /// Values of a row.
    d: usize,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Run {
    /// Has a row that is read soon fetched from memory: other heads' lie between, so that the CPU does not see where rows lead.
    #[inline]
    fn fetch_behind(&self, row: *const u8) {
        /// Rows between the one that is read and the one that is fetched.
        const AHEAD: usize = 2 * WIDTH;
        prefetch(row.wrapping_add(AHEAD * self.row_bytes), self.bytes);
    }
}

impl Cached {
    /// Tokens `tokens` of a head.
    ///
    /// # Safety
    /// They must be there.
    unsafe fn run(&self, stream: usize, head: usize, tokens: Range<usize>, d: usize) -> Run {
        let [by_head, by_token, by_stream] = self.nb;
        let at = head * by_head + tokens.start * by_token + stream * by_stream;
        Run {
            // SAFETY: the caller's promise.
            first: unsafe { self.first.add(at) },
            ty: self.ty,
            row_bytes: by_token,
            bytes: self.ty.row_bytes(d as u64).expect("whole blocks") as usize,
            n: tokens.len(),
            d,
        }
    }
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Values of a head.
    pub(crate) d: usize,
    /// Heads of queries.
    pub(crate) h: usize,
    /// Heads of keys and values, a divisor of `h`.
    pub(crate) hk: usize,
    /// Tokens of a stream that ask.
    pub(crate) t: usize,
    /// Tokens of a stream in the cache.
    pub(crate) n: usize,
    /// Streams.
    pub(crate) s: usize,
}

impl Shape {
    /// Heads that share keys and values.
    fn group(&self) -> usize {
        self.h / self.hk
    }

    /// Tokens whose queries are computed together.
    fn tile(&self) -> usize {
        (QUERIES / self.group()).clamp(1, self.t)
    }

    fn tiles(&self) -> usize {
        self.t.div_ceil(self.tile())
    }

    fn chunks(&self) -> usize {
        self.n.div_ceil(CHUNK)
    }

    /// Values of a head with what fills up the last registers.
    fn padded(&self) -> usize {
        padded(self.d)
    }

    /// Values of a [`Record`].
    fn record(&self) -> usize {
        record(self.d)
    }

    /// Whether there is more to share among threads when chunks of keys are computed apart and merged in an operation of its own: with
    /// few queries.
    pub(crate) fn is_divided(&self) -> bool {
        self.tiles() == 1 && self.chunks() > 1
    }

    /// Values of all records of a chunk of keys for a head of keys; and how many such there are.
    pub(crate) fn records(&self) -> [usize; 2] {
        let queries = self.t * self.group();
        [self.record() * queries, self.chunks() * self.s * self.hk]
    }
}

fn padded(d: usize) -> usize {
    d.next_multiple_of(WIDTH)
}

fn record(d: usize) -> usize {
    padded(d) + 2
}

/// What is known of a query after some keys: values weighted with `e^(score - max)`, [`Shape::padded`] of them, then the largest score and the sum of the
/// weights.
struct Record<'a>(&'a mut [f32]);

impl Record<'_> {
    /// No key was seen: nothing changes what it is merged with.
    fn clear(&mut self) {
        self.0.fill(0.0);
        self.set(f32::NEG_INFINITY, 0.0);
    }

    fn set(&mut self, max: f32, sum: f32) {
        let at = self.0.len() - 2;
        self.0[at..].copy_from_slice(&[max, sum]);
    }

    /// Adds what is known after the next keys.
    fn merge(&mut self, next: &[f32]) {
        let n = self.0.len() - 2;
        let ((values, state), (next, next_state)) = (self.0.split_at_mut(n), next.split_at(n));
        // Not equal to 0 is also what is not a number.
        let unseen = next_state == [f32::NEG_INFINITY, 0.0];
        if unseen {
            return;
        }
        let max = state[0].max(next_state[0]);
        let factor =
            |own: f32| exp::<FUSED>(own - if max == f32::NEG_INFINITY { 0.0 } else { max });
        let (a, b) = (factor(state[0]), factor(next_state[0]));
        add_scaled(values, a, next, b);
        state[0] = max;
        state[1] = state[1] * a + next_state[1] * b;
    }

    /// The output: zeros if no key was seen.
    fn finish(&self, to: &mut [f32]) {
        let sum = self.0[self.0.len() - 1];
        let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        for (to, x) in to.iter_mut().zip(&*self.0) {
            *to = x * factor;
        }
    }
}

/// Memory that a thread keeps between operations.
#[derive(Default)]
struct Scratch {
    /// Queries of a tile, scaled: `ne = [d, queries]`.
    q: Vec<f32>,
    /// Scores, then weights: `ne = [CHUNK, queries]`.
    p: Vec<f32>,
    /// A row of the mask.
    bias: Vec<f32>,
    /// Unpacked keys, `ne = [WIDTH, d]`.
    keys: Vec<f32>,
    /// Unpacked values, `ne = [WIDTH, keys, padded / WIDTH]`.
    values: Vec<f32>,
    /// Records of a tile after the last chunk.
    next: Vec<f32>,
    /// Records of a tile.
    all: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Queries that are computed together: those of some tokens of all heads that share one of keys.
struct Tile {
    stream: usize,
    /// Of keys and values.
    head: usize,
    tokens: Range<usize>,
}

impl Tile {
    /// Token and head of query `r`: those of a token stand side by side.
    fn query(&self, r: usize, group: usize) -> (usize, usize) {
        (self.tokens.start + r / group, self.head * group + r % group)
    }
}

/// Attention, its operands in memory.
pub(crate) struct Attention<'a> {
    pub(crate) shape: Shape,
    /// `ne = [d, H, T, S]`, the values of a head side by side.
    pub(crate) q: &'a [f32],
    /// From one head, token and stream to the next.
    pub(crate) q_stride: [usize; 3],
    pub(crate) k: Cached,
    pub(crate) v: Cached,
    /// `ne = [N, T, S]`, added to scores; -inf hides a key.
    pub(crate) mask: &'a [f16],
    /// Factor of scores.
    pub(crate) scale: f32,
    /// Soft cap of scaled scores, `softcap * tanh(score / softcap)`; 0 is none.
    pub(crate) softcap: f32,
}

impl Attention<'_> {
    /// Computes part `ith` of `nth` of the output, `ne = [d, H, T, S]`.
    ///
    /// # Safety
    /// The operands must be there, and there must be [`has_attention`] for the types; all parts together write all of `out`, each its own.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize, out: *mut f32) {
        let shape = &self.shape;
        let (tiles, rows) = (shape.tiles(), shape.tile());
        SCRATCH.with_borrow_mut(|scratch| {
            // Every nth one: later tokens see more keys.
            for unit in (ith..tiles * shape.hk * shape.s).step_by(nth) {
                let (tile, unit) = (unit % tiles, unit / tiles);
                let tokens = tile * rows..shape.t.min((tile + 1) * rows);
                let (head, stream) = (unit % shape.hk, unit / shape.hk);
                let tile = Tile {
                    stream,
                    head,
                    tokens,
                };
                // SAFETY: the caller's promise; the queries of this tile are nobody else's.
                unsafe { self.tile(&tile, scratch, out) };
            }
        });
    }

    /// Computes some of the records of [`Shape::records`], from number `first` on.
    ///
    /// # Safety
    /// As for [`Attention::part`], apart from the output.
    pub(crate) unsafe fn records(&self, first: usize, out: &mut [f32]) {
        let shape = &self.shape;
        SCRATCH.with_borrow_mut(|scratch| {
            for (unit, to) in (first..).zip(out.chunks_exact_mut(shape.records()[0])) {
                let (chunk, unit) = (unit % shape.chunks(), unit / shape.chunks());
                let tile = Tile {
                    stream: unit / shape.hk,
                    head: unit % shape.hk,
                    tokens: 0..shape.t,
                };
                self.queries(&tile, scratch);
                // SAFETY: the caller's promise.
                unsafe { self.chunk(&tile, chunk, scratch, to) };
            }
        });
    }

    /// The output of a tile's queries.
    ///
    /// # Safety
    /// As for [`Attention::part`].
    unsafe fn tile(&self, tile: &Tile, scratch: &mut Scratch, out: *mut f32) {
        let shape = &self.shape;
        let (record, group) = (shape.record(), shape.group());
        let n = tile.tokens.len() * group;
        self.queries(tile, scratch);
        let (mut all, mut next) = (
            std::mem::take(&mut scratch.all),
            std::mem::take(&mut scratch.next),
        );
        let (into, from) = (room(&mut all, n * record), room(&mut next, n * record));
        into.chunks_exact_mut(record)
            .for_each(|r| Record(r).clear());
        for chunk in 0..shape.chunks() {
            // SAFETY: the caller's promise.
            if unsafe { self.chunk(tile, chunk, scratch, from) } {
                let rows = into.chunks_exact_mut(record).zip(from.chunks_exact(record));
                rows.for_each(|(into, next)| Record(into).merge(next));
            }
        }
        for (r, record) in into.chunks_exact_mut(record).enumerate() {
            let (token, head) = tile.query(r, group);
            let at = ((tile.stream * shape.t + token) * shape.h + head) * shape.d;
            // SAFETY: this query's output.
            let to = unsafe { std::slice::from_raw_parts_mut(out.add(at), shape.d) };
            Record(record).finish(to);
        }
        (scratch.all, scratch.next) = (all, next);
    }

    /// Collects a tile's queries, those of a token side by side, scaled.
    fn queries(&self, tile: &Tile, scratch: &mut Scratch) {
        let (d, group) = (self.shape.d, self.shape.group());
        let [by_head, by_token, by_stream] = self.q_stride;
        let n = tile.tokens.len() * group;
        let q = room(&mut scratch.q, n * d);
        for (r, to) in q.chunks_exact_mut(d).enumerate() {
            let (token, head) = tile.query(r, group);
            let at = head * by_head + token * by_token + tile.stream * by_stream;
            for (to, x) in to.iter_mut().zip(&self.q[at..at + d]) {
                *to = x * self.scale;
            }
        }
    }

    /// The mask of a token for some keys.
    fn mask(&self, stream: usize, token: usize, keys: &Range<usize>) -> &[f16] {
        let Shape { t, n, .. } = self.shape;
        &self.mask[(stream * t + token) * n..][keys.clone()]
    }

    /// The first and the last key of `keys` that some query of the tile sees, and all between, counted from the first of `keys`.
    fn seen(&self, tile: &Tile, keys: &Range<usize>) -> Range<usize> {
        let visible = |m: &f16| *m != f16::NEG_INFINITY;
        let mut seen = keys.len()..0;
        for token in tile.tokens.clone() {
            let mask = self.mask(tile.stream, token, keys);
            // What others see anyway need not be looked at.
            if let Some(first) = mask[..seen.start].iter().position(visible) {
                seen.start = first;
            }
            if let Some(last) = mask[seen.end..].iter().rposition(visible) {
                seen.end += last + 1;
            }
        }
        seen
    }

    /// Records of a tile's queries after one chunk of keys. False if none of them sees one.
    ///
    /// # Safety
    /// As for [`Attention::part`]; the queries must be in `scratch`.
    unsafe fn chunk(
        &self,
        tile: &Tile,
        chunk: usize,
        scratch: &mut Scratch,
        to: &mut [f32],
    ) -> bool {
        let shape = &self.shape;
        let (d, record) = (shape.d, shape.record());
        let keys = chunk * CHUNK..shape.n.min((chunk + 1) * CHUNK);
        let seen = self.seen(tile, &keys);
        if seen.is_empty() {
            to.chunks_exact_mut(record).for_each(|r| Record(r).clear());
            return false;
        }
        let n = tile.tokens.len() * shape.group();
        let scored = seen.start / LANES * LANES..seen.end.next_multiple_of(WIDTH);
        room(&mut scratch.p, n * CHUNK);
        room(&mut scratch.keys, 2 * d * WIDTH);
        room(&mut scratch.values, shape.padded() * VALUES);
        let rows = |c: &Cached, range: Range<usize>| {
            let range = keys.start + range.start..keys.start + range.end.min(keys.len());
            // SAFETY: the caller's promise.
            unsafe { c.run(tile.stream, tile.head, range, d) }
        };
        let mut first = scored.start;
        while first < scored.end {
            let panels = match arch::tiles().panels(n) {
                2 if first + WIDTH < scored.end => 2,
                _ => 1,
            };
            // SAFETY: rows of the cache, and memory of these sizes (made above).
            unsafe {
                for (i, keys) in scratch
                    .keys
                    .chunks_exact_mut(d * WIDTH)
                    .take(panels)
                    .enumerate()
                {
                    let first = first + i * WIDTH;
                    arch::unpack_keys(rows(&self.k, first..first + WIDTH), keys);
                }
                let keys = &scratch.keys[..panels * d * WIDTH];
                scores(&scratch.q, keys, [n, d], &mut scratch.p[first..]);
            }
            first += panels * WIDTH;
        }
        self.weights(tile, &keys, scored, scratch, to);
        for first in seen.clone().step_by(VALUES) {
            let some = first..seen.end.min(first + VALUES);
            // SAFETY: as above.
            unsafe {
                let run = rows(&self.v, some.clone());
                let weights = (&scratch.p[some.start..], some.len());
                let add = first > seen.start;
                if add_weighted_at_once(weights, run, n, add, to) {
                    continue;
                }
                arch::unpack_values(run, &mut scratch.values);
                add_weighted(weights, &scratch.values, [n, d], add, to);
            }
        }
        true
    }

    /// Replaces scores by `e^(score - max)`, and notes max and sum in the records.
    fn weights(
        &self,
        tile: &Tile,
        keys: &Range<usize>,
        scored: Range<usize>,
        scratch: &mut Scratch,
        to: &mut [f32],
    ) {
        let (record, group) = (self.shape.record(), self.shape.group());
        room(&mut scratch.bias, CHUNK);
        let p = scratch.p.chunks_exact_mut(CHUNK * group);
        let records = to.chunks_exact_mut(record * group);
        for ((token, p), records) in tile.tokens.clone().zip(p).zip(records) {
            let mask = &self.mask(tile.stream, token, keys)[scored.start..];
            let mask = &mask[..mask.len().min(scored.len())];
            let bias = &mut scratch.bias[..scored.len()];
            bias[mask.len()..].fill(f32::NEG_INFINITY);
            mask.convert_to_f32_slice(&mut bias[..mask.len()]);
            for (p, record) in p
                .chunks_exact_mut(CHUNK)
                .zip(records.chunks_exact_mut(record))
            {
                let p = &mut p[scored.clone()];
                if self.softcap > 0.0 {
                    cap(p, self.softcap);
                }
                let max = masked_max(p, bias);
                // Of a query that sees no key all weights are 0.
                let sum = exp_sub_sum(p, if max == f32::NEG_INFINITY { 0.0 } else { max });
                Record(record).set(max, sum);
            }
        }
    }
}

/// Register tiles of some queries: the function for 1 query, for 2, and so on.
struct Tiles {
    scores: &'static [ScoreTile],
    /// With two panels of keys: a few queries alone are too few chains of sums. None where registers are too few.
    score_pairs: &'static [ScoreTile],
    values: &'static [ValueTile],
    /// Given the type of values in memory.
    at_once: fn(GgmlType) -> &'static [AtOnceTile],
}

impl Tiles {
    /// Panels of keys that `n` queries meet at a time.
    fn panels(&self, n: usize) -> usize {
        match n <= self.score_pairs.len() {
            true => 2,
            false => 1,
        }
    }
}

/// Products of queries, `ne = [d, queries]`, and [`WIDTH`] unpacked keys, or two panels of them: `(queries, keys, d, scores)`. Scores of a query are [`CHUNK`] from those
/// of the next.
type ScoreTile = unsafe fn(*const f32, *const f32, usize, *mut f32);

/// Values weighted: `(weights, values, keys, add, records, record)`, as [`add_weighted`], for [`WIDTH`] values of a head.
type ValueTile = unsafe fn(*const f32, *const f32, usize, bool, *mut f32, usize);

/// Values weighted: `(weights, values, add, records)`, as [`add_weighted_at_once`].
type AtOnceTile = unsafe fn(*const f32, Run, bool, *mut f32);

/// A function for each number of queries.
macro_rules! by_height {
    ($f:ident, $($n:literal)*) => {
        &[$($f::<$n>),*]
    };
    ($f:ident::<$t:tt>, $($n:literal)*) => {
        &[$($f::<$t, $n>),*]
    };
}
use by_height;

/// Calls a function with the type of values in memory, of those that the CPU's module has.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_type {
    ($ty:expr, $f:ident($($arg:expr),*)) => {
        match $ty {
            GgmlType::F32 => $f::<F32>($($arg),*),
            GgmlType::F16 => $f::<F16>($($arg),*),
            GgmlType::Q8_0 => $f::<Q8>($($arg),*),
            ty => unreachable!("{ty:?} is not a cache's type"),
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use by_type;

/// Tiles of a function for values of a type in memory and so many queries.
#[cfg(target_arch = "x86_64")]
macro_rules! at_once_by_type {
    ($f:ident) => {
        |ty| match ty {
            GgmlType::F32 => by_height!($f::<F32>, 1 2 3 4 5 6),
            GgmlType::F16 => by_height!($f::<F16>, 1 2 3 4 5 6),
            GgmlType::Q8_0 => by_height!($f::<Q8>, 1 2 3 4 5 6),
            ty => unreachable!("{ty:?} is not a cache's type"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
use at_once_by_type;

/// Cuts `n` queries into tiles of at most `tiles` of them and of almost equal height: a small last one would leave the multipliers waiting for its
/// few chains. Calls with the first of each, and its function.
fn each_tile<T: Copy>(tiles: &[T], n: usize, mut call: impl FnMut(usize, T)) {
    let count = n.div_ceil(tiles.len());
    for i in 0..count {
        let (first, end) = (i * n / count, (i + 1) * n / count);
        call(first, tiles[end - first - 1]);
    }
}

/// Products of `n` queries, `ne = [d, n]`, and a panel of unpacked keys, or as many as [`Tiles::panels`]: `ne = [WIDTH panels, n]`, rows of which are [`CHUNK`] apart.
///
/// # Safety
/// There must be the kernels ([`has_attention`]).
unsafe fn scores(q: &[f32], keys: &[f32], [n, d]: [usize; 2], s: &mut [f32]) {
    let panels = keys.len() / (d * WIDTH);
    assert!(q.len() >= n * d && s.len() >= (n - 1) * CHUNK + panels * WIDTH);
    let tiles = arch::tiles();
    let tiles = match panels {
        1 => tiles.scores,
        _ => tiles.score_pairs,
    };
    each_tile(tiles, n, |first, tile| {
        // SAFETY: queries from `first` on, as many as the tile has.
        unsafe {
            tile(
                &raw const q[first * d],
                keys.as_ptr(),
                d,
                &raw mut s[first * CHUNK],
            )
        };
    });
}

/// [`add_weighted`] of values as they lie in memory, for so few queries that one tile holds them: unpacked values would have no other use. False for more.
///
/// # Safety
/// As for [`add_weighted`]; the run must be there.
unsafe fn add_weighted_at_once(
    (weights, keys): (&[f32], usize),
    values: Run,
    n: usize,
    add: bool,
    to: &mut [f32],
) -> bool {
    let Some(tile) = (arch::tiles().at_once)(values.ty).get(n - 1) else {
        return false;
    };
    assert!(weights.len() >= (n - 1) * CHUNK + keys && values.n == keys);
    assert!(to.len() >= n * record(values.d));
    // SAFETY: as many queries as the tile has.
    unsafe { tile(weights.as_ptr(), values, add, to.as_mut_ptr()) };
    true
}

/// Sets records of `n` queries to values weighted, of keys side by side, or adds these. Weights of a query are [`CHUNK`] from those of the next.
///
/// # Safety
/// There must be the kernels ([`has_attention`]).
unsafe fn add_weighted(
    (weights, keys): (&[f32], usize),
    values: &[f32],
    [n, d]: [usize; 2],
    add: bool,
    to: &mut [f32],
) {
    let record = record(d);
    assert!(weights.len() >= (n - 1) * CHUNK + keys && values.len() >= padded(d) * keys);
    assert!(to.len() >= n * record);
    each_tile(arch::tiles().values, n, |first, tile| {
        for at in (0..d).step_by(WIDTH) {
            // SAFETY: queries from `first` on, as many as the tile has.
            unsafe {
                let p = &raw const weights[first * CHUNK];
                let values = &raw const values[at * keys];
                tile(
                    p,
                    values,
                    keys,
                    add,
                    &raw mut to[first * record + at],
                    record,
                );
            }
        }
    });
}

vectorized! {
    /// `x = x * a + y * b`.
    fn add_scaled(x: &mut [f32], a: f32, y: &[f32], b: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = *x * a + y * b;
        }
    }
}

vectorized! {
    /// Replaces scores by `softcap * tanh(score / softcap)`.
    fn cap(scores: &mut [f32], softcap: f32) {
        for score in scores {
            *score = softcap * tanh::<FUSED>(*score / softcap);
        }
    }
}

vectorized! {
    /// Adds `bias` to scores, of which there are a multiple of 16, and gives the largest. What the mask hides is -inf even if the score is not a number.
    fn masked_max(scores: &mut [f32], bias: &[f32]) -> f32 {
        let mut max = [f32::NEG_INFINITY; WIDTH];
        let scores = scores.as_chunks_mut::<WIDTH>().0;
        for (s, b) in scores.iter_mut().zip(bias.as_chunks::<WIDTH>().0) {
            for ((s, b), max) in s.iter_mut().zip(b).zip(&mut max) {
                *s = if *b == f32::NEG_INFINITY { *b } else { *s + *b };
                *max = if *s > *max { *s } else { *max };
            }
        }
        max.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// The output of queries, given all [`Shape::records`]: those of some pairs of a token and a head, `ne = [d, H, T, S]`, from number `first` on.
pub(crate) fn merge_records(shape: &Shape, records: &[f32], first: usize, out: &mut [f32]) {
    let (record, group) = (shape.record(), shape.group());
    let [chunk, _] = shape.records();
    let mut all = vec![0.0; record];
    for (query, to) in (first..).zip(out.chunks_exact_mut(shape.d)) {
        let (head, token) = (query % shape.h, query / shape.h);
        let (token, stream) = (token % shape.t, token / shape.t);
        let chunks = (stream * shape.hk + head / group) * shape.chunks();
        let mut all = Record(&mut all);
        all.clear();
        for i in chunks..chunks + shape.chunks() {
            let at = i * chunk + (token * group + head % group) * record;
            all.merge(&records[at..at + record]);
        }
        all.finish(to);
    }
}

#[cfg(test)]
mod tests;
