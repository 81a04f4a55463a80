//! Attention forward over keys and values as they lie in pages (Dao et al. 2022; Kwon et al. 2023): nothing of size T x N is kept.
//!
//! One step has tokens of many texts, each of which sees its own keys. The queries of all heads that share keys, of some tokens of a text, meet
//! [`CHUNK`] keys at a time. That gives a [`Record`] for each query: its values, weighted, and what merges them with those of the next keys, always in
//! the order of keys. So a query's output is one fixed chain of operations, whatever queries and texts it is computed with, and whoever computes which
//! chunk.

// What only kernels use: there is none for other CPUs.
#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code)
)]

use super::level::{FUSED, vectorized};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::prefetch;
use super::{exp, exp_sub_sum, largest, room, tanh};
use crate::file::types::GgmlType;
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
const VALUES: usize = PAGE;
/// Tokens of a page: as many as values are unpacked of, and a chunk has whole pages.
pub(crate) const PAGE: usize = 64;
/// Interleaved sums of [`exp_sub_sum`]: a row of scores begins at a multiple, so that a key has one and the same lane.
const LANES: usize = 32;

/// Whether there is a kernel on this CPU for heads of `d` keys and values of this type.
pub(crate) fn has_attention(ty: GgmlType, d: usize) -> bool {
    arch::available()
        && d.is_multiple_of(8)
        && matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::Q8_0)
}

/// Positions that a token at position `at` sees: itself and everything before it, of which a sliding `window` leaves the last so many.
/// The rows of a prefix are positions like any others.
pub(crate) fn visible(at: usize, window: Option<usize>) -> Range<usize> {
    window.map_or(0, |w| (at + 1).saturating_sub(w))..at + 1
}

/// Keys and values of tokens that follow each other, as they lie in memory: of each layer keys, then values, both `ne = [d, room, Hk]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: *const u8,
    /// Tokens that there is room for.
    pub(crate) room: usize,
}

impl Rows {
    /// None.
    pub(crate) const EMPTY: Self = Self {
        first: std::ptr::null(),
        room: 0,
    };

    /// Where rows of heads are, `bytes` each, that lie behind so many bytes for each token: the row of a token.
    pub(crate) fn at(&self, behind: usize, bytes: usize, head: usize, token: usize) -> usize {
        (behind + head * bytes) * self.room + token * bytes
    }
}

/// A text, some of whose tokens are computed: what they see.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    /// Rows in front of the text's own, all of which are there: positions 0 to `prefix.room`.
    pub(crate) prefix: Rows,
    /// The text's own rows, [`PAGE`] tokens each. Those that no token sees may be [`Rows::EMPTY`].
    pub(crate) pages: Vec<Rows>,
    /// Which tokens of the step are this text's, at least one.
    pub(crate) tokens: Range<usize>,
    /// Of the first of them; the others follow.
    pub(crate) position: usize,
}

impl Text {
    /// The position of a token of the step.
    fn position(&self, token: usize) -> usize {
        self.position + token - self.tokens.start
    }

    /// Chunks of the prefix: those of the text do not depend on how long it is.
    fn prefix_chunks(&self) -> usize {
        self.prefix.room.div_ceil(CHUNK)
    }

    /// Which chunk a key is in.
    fn chunk_of(&self, key: usize) -> usize {
        match key.checked_sub(self.prefix.room) {
            None => key / CHUNK,
            Some(key) => self.prefix_chunks() + key / CHUNK,
        }
    }

    /// Keys of a chunk, as far as the last token of the step.
    fn keys(&self, chunk: usize) -> Range<usize> {
        let (first, end) = match chunk.checked_sub(self.prefix_chunks()) {
            None => (chunk * CHUNK, self.prefix.room),
            Some(chunk) => (self.prefix.room + chunk * CHUNK, usize::MAX),
        };
        let end = end.min(self.position(self.tokens.end));
        first..end.min(first + CHUNK)
    }

    /// Chunks that some of these tokens see.
    fn chunks(&self, tokens: &Range<usize>, window: Option<usize>) -> Range<usize> {
        let seen = visible(self.position(tokens.start), window);
        self.chunk_of(seen.start)..self.chunk_of(self.position(tokens.end - 1)) + 1
    }

    /// Where key number `key` of `n` lies, if it is kept.
    pub(crate) fn row(&self, key: usize, n: usize) -> Option<(Rows, usize)> {
        let (rows, at, _) = (key < n).then(|| self.find(key))?;
        (rows.room > 0).then_some((rows, at))
    }

    /// Where a key lies: in which rows, as which token, and how many keys are there from it on.
    fn find(&self, key: usize) -> (Rows, usize, usize) {
        let (rows, at) = match key.checked_sub(self.prefix.room) {
            None => (self.prefix, key),
            Some(key) => (self.pages[key / PAGE], key % PAGE),
        };
        (rows, at, rows.room.saturating_sub(at))
    }
}

/// A head of tokens that lie behind each other.
#[derive(Clone, Copy)]
struct Run {
    first: *const u8,
    ty: GgmlType,
    /// Of a row.
    row_bytes: usize,
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
        prefetch(row.wrapping_add(AHEAD * self.row_bytes), self.row_bytes);
    }
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Values of a head.
    pub(crate) d: usize,
    /// Heads of queries.
    pub(crate) h: usize,
    /// Heads of keys and values, a divisor of `h`.
    pub(crate) hk: usize,
}

/// What attention knows of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    pub(crate) heads: Heads,
    /// Of keys and values, one that [`has_attention`].
    pub(crate) ty: GgmlType,
    /// Bytes a token of what lies in front of the layer's keys, and of its values, see [`Rows`].
    pub(crate) behind: [usize; 2],
    /// See [`visible`].
    pub(crate) window: Option<usize>,
}

impl Heads {
    /// Heads that share keys and values.
    fn group(&self) -> usize {
        self.h / self.hk
    }

    /// Tokens at most whose queries are computed together.
    fn tile(&self) -> usize {
        (QUERIES / self.group()).max(1)
    }
}

fn padded(d: usize) -> usize {
    d.next_multiple_of(WIDTH)
}

fn record(d: usize) -> usize {
    padded(d) + 2
}

/// What is known of a query after some keys: values weighted with `e^(score - max)`, [`padded`] of them, then the largest score and the sum of the
/// weights.
struct Record<'a>(&'a mut [f32]);

impl Record<'_> {
    /// No key was seen, but the head's sink, if it has one: a score that has no value. Without one nothing changes what it is merged with.
    fn begin(&mut self, sink: Option<f32>) {
        self.0.fill(0.0);
        match sink {
            Some(score) => self.set(score, 1.0),
            None => self.set(f32::NEG_INFINITY, 0.0),
        }
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

    /// The output.
    fn finish(&self, to: &mut [f32]) {
        let factor = 1.0 / self.0[self.0.len() - 1];
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
struct Tile<'a> {
    text: &'a Text,
    /// Of keys and values.
    head: usize,
    /// Of the step.
    tokens: Range<usize>,
}

impl Tile<'_> {
    /// Token and head of query `r`: those of a token stand side by side.
    fn query(&self, r: usize, group: usize) -> (usize, usize) {
        (self.tokens.start + r / group, self.head * group + r % group)
    }
}

/// Attention, its operands in memory.
pub(crate) struct Attention<'a> {
    pub(crate) layer: Layer,
    /// `ne = [d, H, T]`, the values of a head side by side.
    pub(crate) q: &'a [f32],
    /// From one head and token to the next.
    pub(crate) q_stride: [usize; 2],
    /// In order of the step's tokens, all of which are some text's.
    pub(crate) texts: &'a [Text],
    /// Factor of scores.
    pub(crate) scale: f32,
    /// Soft cap of scaled scores, `softcap * tanh(score / softcap)`; 0 is none.
    pub(crate) softcap: f32,
    /// Of each head of queries a score of nothing (Xiao et al. 2024, gpt-oss): what a query sees shares its weights with it.
    pub(crate) sinks: Option<&'a [f32]>,
}

/// How what is to be done for a text is divided. Its bits do not depend on it.
enum Division {
    /// Into tiles of tokens, so many for each head of keys.
    Tiles(usize),
    /// There are few tokens and many keys: records of chunks are computed apart and merged when all are there.
    Chunks(Range<usize>),
}

impl Layer {
    /// Bytes of a head of a token.
    pub(crate) fn row_bytes(&self) -> usize {
        let bytes = self.ty.row_bytes(self.heads.d as u64);
        bytes.expect("whole blocks") as usize
    }

    fn division(&self, text: &Text) -> Division {
        let tiles = text.tokens.len().div_ceil(self.heads.tile());
        let chunks = text.chunks(&text.tokens, self.window);
        match tiles == 1 && chunks.len() > 1 {
            true => Division::Chunks(chunks),
            false => Division::Tiles(tiles),
        }
    }

    /// Values of all records of a chunk for a head of keys.
    fn records_of(&self, text: &Text) -> usize {
        record(self.heads.d) * text.tokens.len() * self.heads.group()
    }

    /// Values of the records that are kept from [`Attention::part`] to [`Layer::merge_part`].
    pub(crate) fn n_records(&self, texts: &[Text]) -> usize {
        let of = |text| match self.division(text) {
            Division::Tiles(_) => 0,
            Division::Chunks(chunks) => self.heads.hk * chunks.len() * self.records_of(text),
        };
        texts.iter().map(of).sum()
    }
}

impl Attention<'_> {
    /// Part `ith` of `nth` of what is merged from records.
    ///
    /// # Safety
    /// All parts of [`Attention::part`] are over. All parts together write what these have not written of `out`, each its own.
    pub(crate) unsafe fn merge_part(&self, records: &[f32], ith: usize, nth: usize, out: *mut f32) {
        let layer = &self.layer;
        let Heads { d, h, hk } = layer.heads;
        let (record, group) = (record(d), layer.heads.group());
        let (mut unit, mut before) = (ith, 0);
        let mut rest = records;
        SCRATCH.with_borrow_mut(|scratch| {
            let all = room(&mut scratch.all, record);
            for text in self.texts {
                let Division::Chunks(chunks) = layer.division(text) else {
                    continue;
                };
                let len = layer.records_of(text);
                let (own, others) = rest.split_at(chunks.len() * hk * len);
                rest = others;
                while unit < before + text.tokens.len() * h {
                    let (token, head) = ((unit - before) / h, (unit - before) % h);
                    Record(all).begin(self.sink(head));
                    let of_head = own.chunks_exact(len).skip(head / group * chunks.len());
                    for of_chunk in of_head.take(chunks.len()) {
                        let at = (token * group + head % group) * record;
                        Record(all).merge(&of_chunk[at..at + record]);
                    }
                    // SAFETY: this query's output.
                    let to = unsafe {
                        let at = ((text.tokens.start + token) * h + head) * d;
                        std::slice::from_raw_parts_mut(out.add(at), d)
                    };
                    Record(all).finish(to);
                    unit += nth;
                }
                before += text.tokens.len() * h;
            }
        });
    }

    /// The sink of a head of queries, if it has one.
    fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.map(|sinks| sinks[head])
    }

    /// Computes part `ith` of `nth` of the output, `ne = [d, H, T]`, or of the records that it is merged from.
    ///
    /// # Safety
    /// The operands must be there, [`Layer::n_records`] values for records, and there must be [`has_attention`] for the types; all parts together write all of
    /// `out` and the records, each its own.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize, out: *mut f32, records: *mut f32) {
        let Heads { hk, .. } = self.layer.heads;
        let size = self.layer.heads.tile();
        // Every nth unit of all texts: later tokens see more keys.
        let (mut unit, mut before) = (ith, 0);
        let mut records_before = 0;
        SCRATCH.with_borrow_mut(|scratch| {
            for text in self.texts {
                match self.layer.division(text) {
                    Division::Tiles(tiles) => {
                        while unit < before + tiles * hk {
                            let (head, i) = ((unit - before) / tiles, (unit - before) % tiles);
                            let first = text.tokens.start + i * size;
                            let tile = Tile {
                                text,
                                head,
                                tokens: first..text.tokens.end.min(first + size),
                            };
                            // SAFETY: the caller's promise; the queries of this tile are nobody else's.
                            unsafe { self.tile(&tile, scratch, out) };
                            unit += nth;
                        }
                        before += tiles * hk;
                    }
                    Division::Chunks(chunks) => {
                        let len = self.layer.records_of(text);
                        while unit < before + chunks.len() * hk {
                            let i = unit - before;
                            let tile = Tile {
                                text,
                                head: i / chunks.len(),
                                tokens: text.tokens.clone(),
                            };
                            self.queries(&tile, scratch);
                            // SAFETY: the caller's promise; the records of this chunk and head are nobody else's.
                            unsafe {
                                let at = records.add(records_before + i * len);
                                let to = std::slice::from_raw_parts_mut(at, len);
                                self.chunk(&tile, chunks.start + i % chunks.len(), scratch, to);
                            }
                            unit += nth;
                        }
                        before += chunks.len() * hk;
                        records_before += chunks.len() * hk * len;
                    }
                }
            }
        });
    }

    /// The output of a tile's queries.
    ///
    /// # Safety
    /// As for [`Attention::part`].
    unsafe fn tile(&self, tile: &Tile<'_>, scratch: &mut Scratch, out: *mut f32) {
        let Heads { d, h, .. } = self.layer.heads;
        let (record, group) = (record(d), self.layer.heads.group());
        let n = tile.tokens.len() * group;
        self.queries(tile, scratch);
        let (mut all, mut next) = (
            std::mem::take(&mut scratch.all),
            std::mem::take(&mut scratch.next),
        );
        let (into, from) = (room(&mut all, n * record), room(&mut next, n * record));
        for (r, record) in into.chunks_exact_mut(record).enumerate() {
            let (_, head) = tile.query(r, group);
            Record(record).begin(self.sink(head));
        }
        for chunk in tile.text.chunks(&tile.tokens, self.layer.window) {
            // SAFETY: the caller's promise.
            unsafe { self.chunk(tile, chunk, scratch, from) };
            let rows = into.chunks_exact_mut(record).zip(from.chunks_exact(record));
            rows.for_each(|(into, next)| Record(into).merge(next));
        }
        for (r, record) in into.chunks_exact_mut(record).enumerate() {
            let (token, head) = tile.query(r, group);
            // SAFETY: this query's output.
            let to = unsafe { std::slice::from_raw_parts_mut(out.add((token * h + head) * d), d) };
            Record(record).finish(to);
        }
        (scratch.all, scratch.next) = (all, next);
    }

    /// Collects a tile's queries, those of a token side by side, scaled.
    fn queries(&self, tile: &Tile<'_>, scratch: &mut Scratch) {
        let (d, group) = (self.layer.heads.d, self.layer.heads.group());
        let [by_head, by_token] = self.q_stride;
        let n = tile.tokens.len() * group;
        let q = room(&mut scratch.q, n * d);
        for (r, to) in q.chunks_exact_mut(d).enumerate() {
            let (token, head) = tile.query(r, group);
            let at = head * by_head + token * by_token;
            for (to, x) in to.iter_mut().zip(&self.q[at..at + d]) {
                *to = x * self.scale;
            }
        }
    }

    /// Those of `keys`, counted from the first of them, that tokens at these positions see, some of them.
    fn seen(&self, positions: Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let first = visible(positions.start, self.layer.window)
            .start
            .max(keys.start);
        let end = positions.end.min(keys.end).max(first);
        first - keys.start..end - keys.start
    }

    /// Records of a tile's queries after one chunk of keys.
    ///
    /// # Safety
    /// As for [`Attention::part`]; the queries must be in `scratch`.
    unsafe fn chunk(&self, tile: &Tile<'_>, chunk: usize, scratch: &mut Scratch, to: &mut [f32]) {
        let d = self.layer.heads.d;
        let text = tile.text;
        let keys = text.keys(chunk);
        let positions = text.position(tile.tokens.start)..text.position(tile.tokens.end);
        let seen = self.seen(positions, &keys);
        let n = tile.tokens.len() * self.layer.heads.group();
        let scored = seen.start / LANES * LANES..seen.end.next_multiple_of(WIDTH);
        room(&mut scratch.p, n * CHUNK);
        room(&mut scratch.keys, 2 * d * WIDTH);
        room(&mut scratch.values, padded(d) * VALUES);
        let row_bytes = self.layer.row_bytes();
        // At most so many keys, of which some may be behind the last one.
        let run = |behind: usize, first: usize, n: usize| {
            let n = n.min(keys.len() - first);
            let (rows, at, there) = text.find(keys.start + first);
            assert!(n <= there, "pages are whole panels");
            Run {
                first: rows
                    .first
                    .wrapping_add(rows.at(behind, row_bytes, tile.head, at)),
                ty: self.layer.ty,
                row_bytes,
                n,
                d,
            }
        };
        let [behind_k, behind_v] = self.layer.behind;
        let mut first = scored.start;
        while first < scored.end {
            let panels = match arch::tiles().panels(n) {
                2 if first + WIDTH < scored.end => 2,
                _ => 1,
            };
            // SAFETY: rows of the text, and memory of these sizes (made above).
            unsafe {
                for (i, keys) in scratch
                    .keys
                    .chunks_exact_mut(d * WIDTH)
                    .take(panels)
                    .enumerate()
                {
                    arch::unpack_keys(run(behind_k, first + i * WIDTH, WIDTH), keys);
                }
                let keys = &scratch.keys[..panels * d * WIDTH];
                scores(&scratch.q, keys, [n, d], &mut scratch.p[first..]);
            }
            first += panels * WIDTH;
        }
        self.weights(tile, &keys, scored, scratch, to);
        let mut first = seen.start;
        while first < seen.end {
            // As far as a page goes.
            let end = seen.end.min((first + 1).next_multiple_of(VALUES));
            let run = run(behind_v, first, end - first);
            let weights = (&scratch.p[first..], end - first);
            let add = first > seen.start;
            // SAFETY: as above.
            unsafe {
                if !add_weighted_at_once(weights, run, n, add, to) {
                    arch::unpack_values(run, &mut scratch.values);
                    add_weighted(weights, &scratch.values, [n, d], add, to);
                }
            }
            first = end;
        }
    }

    /// Replaces scores by `e^(score - max)`, and notes max and sum in the records. A query that sees none of the keys has weights of 0.
    fn weights(
        &self,
        tile: &Tile<'_>,
        keys: &Range<usize>,
        scored: Range<usize>,
        scratch: &mut Scratch,
        to: &mut [f32],
    ) {
        let (record, group) = (record(self.layer.heads.d), self.layer.heads.group());
        let p = scratch.p.chunks_exact_mut(CHUNK * group);
        let records = to.chunks_exact_mut(record * group);
        for ((token, p), records) in tile.tokens.clone().zip(p).zip(records) {
            let position = tile.text.position(token);
            let seen = self.seen(position..position + 1, keys);
            let [hidden, end] = [seen.start, seen.end]
                .map(|key| key.clamp(scored.start, scored.end) - scored.start);
            for (p, record) in p
                .chunks_exact_mut(CHUNK)
                .zip(records.chunks_exact_mut(record))
            {
                let p = &mut p[scored.clone()];
                if self.softcap > 0.0 {
                    cap(p, self.softcap);
                }
                // Also scores that are no numbers.
                p[..hidden].fill(f32::NEG_INFINITY);
                p[end..].fill(f32::NEG_INFINITY);
                let max = largest(p);
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

#[cfg(test)]
mod tests;
