//! The kernels for AArch64, whose CPUs all have NEON. The same operations on each element as on x86-64.

use super::super::neon::{columns, from_half};
use super::{CHUNK, Run, Tiles, WIDTH, by_height, by_type};
use crate::file::types::GgmlType;
use std::arch::aarch64::*;

/// Lanes of a register.
const FOUR: usize = 4;
/// Registers of a tile's row.
const REGISTERS: usize = WIDTH / FOUR;
/// Values that are unpacked at a time.
const EIGHT: usize = 8;

/// With four registers of keys or values, 24 of the 32 registers hold sums.
const TILES: Tiles = Tiles {
    scores: by_height!(score_tile, 1 2 3 4 5 6),
    score_pairs: &[],
    values: by_height!(value_tile, 1 2 3 4 5 6),
    at_once: |_| &[],
};

/// Whether this CPU has the instructions.
pub(super) fn available() -> bool {
    true
}

pub(super) fn tiles() -> Tiles {
    TILES
}

/// How values lie in memory.
trait Values {
    /// Values `at` to `at + 8` of a row, `at` a multiple of 8.
    ///
    /// # Safety
    /// They must be there.
    unsafe fn eight(row: *const u8, at: usize) -> [float32x4_t; 2];
}

struct F32;

impl Values for F32 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn eight(row: *const u8, at: usize) -> [float32x4_t; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let from = row.cast::<f32>().add(at);
            [vld1q_f32(from), vld1q_f32(from.add(FOUR))]
        }
    }
}

struct F16;

impl Values for F16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn eight(row: *const u8, at: usize) -> [float32x4_t; 2] {
        // SAFETY: the caller's promise.
        let halves = unsafe { vld1q_u16(row.cast::<u16>().add(at)) };
        [
            from_half(vget_low_u16(halves)),
            from_half(vget_high_u16(halves)),
        ]
    }
}

/// Blocks of 32 signed bytes behind their step, as `block_q8_0` in ggml-common.h.
struct Q8;

impl Values for Q8 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn eight(row: *const u8, at: usize) -> [float32x4_t; 2] {
        const BLOCK: usize = 32;
        // SAFETY: the caller's promise.
        let (step, bytes) = unsafe {
            let block = row.add(at / BLOCK * (2 + BLOCK));
            (
                vld1_dup_u16(block.cast()),
                vld1_s8(block.add(2 + at % BLOCK).cast()),
            )
        };
        let (step, words) = (from_half(step), vmovl_s8(bytes));
        let wide = [
            vmovl_s16(vget_low_s16(words)),
            vmovl_s16(vget_high_s16(words)),
        ];
        [
            vmulq_f32(vcvtq_f32_s32(wide[0]), step),
            vmulq_f32(vcvtq_f32_s32(wide[1]), step),
        ]
    }
}

/// Unpacks up to [`WIDTH`] keys side by side, `ne = [WIDTH, d]`. What stands in the place of missing ones means nothing.
///
/// # Safety
/// The run must be there.
pub(super) unsafe fn unpack_keys(run: Run, to: &mut [f32]) {
    assert!(to.len() >= run.d * WIDTH && run.d.is_multiple_of(EIGHT));
    // SAFETY: the caller's promise, and room for the keys.
    unsafe { by_type!(run.ty, keys(run, to.as_mut_ptr())) }
}

/// # Safety
/// As for [`unpack_keys`], and `to` must have room.
#[target_feature(enable = "neon")]
unsafe fn keys<V: Values>(run: Run, to: *mut f32) {
    for first in (0..WIDTH).step_by(FOUR) {
        let rows: [_; FOUR] = std::array::from_fn(|r| {
            run.first
                .wrapping_add((first + r).min(run.n - 1) * run.row_bytes)
        });
        for row in rows {
            run.fetch_behind(row);
        }
        for at in (0..run.d).step_by(EIGHT) {
            // SAFETY: eight values of each row, and a place for each.
            unsafe {
                let [a, b, c, d] = rows.map(|row| V::eight(row, at));
                for half in 0..2 {
                    let four = [a[half], b[half], c[half], d[half]];
                    let columns = columns(four.map(|x| vreinterpretq_u32_f32(x)));
                    for (i, column) in columns.into_iter().enumerate() {
                        let to = to.add((at + half * FOUR + i) * WIDTH + first);
                        vst1q_f32(to, vreinterpretq_f32_u32(column));
                    }
                }
            }
        }
    }
}

/// Unpacks the values of some keys, `ne = [WIDTH, keys, d / WIDTH]`, the last ones filled up with zeros.
///
/// # Safety
/// The run must be there.
pub(super) unsafe fn unpack_values(run: Run, to: &mut [f32]) {
    assert!(to.len() >= run.d.next_multiple_of(WIDTH) * run.n && run.d.is_multiple_of(EIGHT));
    // SAFETY: the caller's promise, and room for the values.
    unsafe { by_type!(run.ty, values(run, to.as_mut_ptr())) }
}

/// # Safety
/// As for [`unpack_values`], and `to` must have room.
#[target_feature(enable = "neon")]
unsafe fn values<V: Values>(run: Run, to: *mut f32) {
    for r in 0..run.n {
        let row = run.first.wrapping_add(r * run.row_bytes);
        run.fetch_behind(row);
        for at in (0..run.d.next_multiple_of(WIDTH)).step_by(EIGHT) {
            // SAFETY: values of this row, and a place for them.
            unsafe {
                let eight = match at < run.d {
                    true => V::eight(row, at),
                    false => [vdupq_n_f32(0.0); 2],
                };
                let to = to.add(at / WIDTH * WIDTH * run.n + r * WIDTH + at % WIDTH);
                vst1q_f32(to, eight[0]);
                vst1q_f32(to.add(FOUR), eight[1]);
            }
        }
    }
}

/// A row of a tile.
type Row = [float32x4_t; REGISTERS];

/// # Safety
/// There must be 16 values.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(from: *const f32) -> Row {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { vld1q_f32(from.add(FOUR * i)) })
}

/// # Safety
/// There must be room for 16 values.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(row: Row, to: *mut f32) {
    for (i, x) in row.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { vst1q_f32(to.add(FOUR * i), x) };
    }
}

/// Adds `row` times `factor`.
#[inline]
#[target_feature(enable = "neon")]
fn add(sums: &mut Row, row: Row, factor: f32) {
    for (sum, x) in sums.iter_mut().zip(row) {
        *sum = vfmaq_n_f32(*sum, x, factor);
    }
}

/// # Safety
/// There must be `M` queries, keys, and room for the scores.
#[target_feature(enable = "neon")]
unsafe fn score_tile<const M: usize>(q: *const f32, keys: *const f32, d: usize, s: *mut f32) {
    let mut sums = [[vdupq_n_f32(0.0); REGISTERS]; M];
    for i in 0..d {
        // SAFETY: value `i` of queries and keys.
        unsafe {
            let key = load(keys.add(i * WIDTH));
            for (m, sums) in sums.iter_mut().enumerate() {
                add(sums, key, *q.add(m * d + i));
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        // SAFETY: row `m` of the scores.
        unsafe { store(sums, s.add(m * CHUNK)) };
    }
}

/// # Safety
/// There must be `M` queries with `keys` weights, values of these keys, and room for the result.
#[target_feature(enable = "neon")]
unsafe fn value_tile<const M: usize>(
    p: *const f32,
    values: *const f32,
    keys: usize,
    add_to: bool,
    to: *mut f32,
    stride: usize,
) {
    let mut sums = [[vdupq_n_f32(0.0); REGISTERS]; M];
    if add_to {
        for (m, sums) in sums.iter_mut().enumerate() {
            // SAFETY: record `m`.
            *sums = unsafe { load(to.add(m * stride)) };
        }
    }
    for key in 0..keys {
        // SAFETY: this key's values, and its weight for each query.
        unsafe {
            let value = load(values.add(key * WIDTH));
            for (m, sums) in sums.iter_mut().enumerate() {
                add(sums, value, *p.add(m * CHUNK + key));
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        // SAFETY: record `m`.
        unsafe { store(sums, to.add(m * stride)) };
    }
}
