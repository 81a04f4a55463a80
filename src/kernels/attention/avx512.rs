//! Register tiles on CPUs with AVX-512: one register of keys or values instead of two, and twice as many queries. The same operations on
//! each element as with AVX2, so the same bits.

use super::{CHUNK, Tiles, WIDTH, by_height};
use std::arch::x86_64::*;

/// As many chains of sums as keep two multipliers busy.
pub(super) const TILES: Tiles = Tiles {
    scores: by_height!(score_tile, 1 2 3 4 5 6 7 8 9 10 11 12),
    values: by_height!(value_tile, 1 2 3 4 5 6 7 8 9 10 11 12),
};

/// # Safety
/// There must be `M` queries, keys, and room for the scores.
#[target_feature(enable = "avx512f")]
unsafe fn score_tile<const M: usize>(q: *const f32, keys: *const f32, d: usize, s: *mut f32) {
    let mut sums = [_mm512_setzero_ps(); M];
    for i in 0..d {
        // SAFETY: value `i` of queries and keys.
        unsafe {
            let key = _mm512_loadu_ps(keys.add(i * WIDTH));
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(*q.add(m * d + i)), key, *sum);
            }
        }
    }
    for (m, sum) in sums.into_iter().enumerate() {
        // SAFETY: row `m` of the scores.
        unsafe { _mm512_storeu_ps(s.add(m * CHUNK), sum) };
    }
}

/// # Safety
/// There must be `M` queries with `keys` weights, values of these keys, and room for the result.
#[target_feature(enable = "avx512f")]
unsafe fn value_tile<const M: usize>(
    p: *const f32,
    values: *const f32,
    keys: usize,
    add: bool,
    to: *mut f32,
    stride: usize,
) {
    let mut sums = [_mm512_setzero_ps(); M];
    if add {
        for (m, sum) in sums.iter_mut().enumerate() {
            // SAFETY: record `m`.
            *sum = unsafe { _mm512_loadu_ps(to.add(m * stride)) };
        }
    }
    for key in 0..keys {
        // SAFETY: this key's values, and its weight for each query.
        unsafe {
            let value = _mm512_loadu_ps(values.add(key * WIDTH));
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(*p.add(m * CHUNK + key)), value, *sum);
            }
        }
    }
    for (m, sum) in sums.into_iter().enumerate() {
        // SAFETY: record `m`.
        unsafe { _mm512_storeu_ps(to.add(m * stride), sum) };
    }
}
