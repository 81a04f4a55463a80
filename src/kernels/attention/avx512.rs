//! Register tiles on CPUs with AVX-512: one register of keys or values instead of two, and twice as many queries. The same operations on
//! each element as with AVX2, so the same bits.

use super::{CHUNK, Run, Tiles, WIDTH, at_once_by_type, by_height, record};
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

/// As many chains of sums as keep two multipliers busy.
pub(super) const TILES: Tiles = Tiles {
    scores: by_height!(score_tile, 1 2 3 4 5 6 7 8 9 10 11 12),
    score_pairs: by_height!(score_pair, 1 2 3 4 5 6),
    values: by_height!(value_tile, 1 2 3 4 5 6 7 8 9 10 11 12),
    at_once: at_once_by_type!(at_once),
};

/// # Safety
/// There must be `M` queries, keys, and room for the scores.
#[target_feature(enable = "avx512f")]
unsafe fn score_tile<const M: usize>(q: *const f32, keys: *const f32, d: usize, s: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { scores::<M, 1>(q, keys, d, s) }
}

/// # Safety
/// As for [`score_tile`], with two panels of keys.
#[target_feature(enable = "avx512f")]
unsafe fn score_pair<const M: usize>(q: *const f32, keys: *const f32, d: usize, s: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { scores::<M, 2>(q, keys, d, s) }
}

/// # Safety
/// As for [`score_tile`], with `P` panels of keys.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scores<const M: usize, const P: usize>(
    q: *const f32,
    keys: *const f32,
    d: usize,
    s: *mut f32,
) {
    let mut sums = [[_mm512_setzero_ps(); P]; M];
    for i in 0..d {
        // SAFETY: value `i` of queries and keys.
        unsafe {
            let key: [_; P] =
                std::array::from_fn(|p| _mm512_loadu_ps(keys.add((p * d + i) * WIDTH)));
            for (m, sums) in sums.iter_mut().enumerate() {
                let q = _mm512_set1_ps(*q.add(m * d + i));
                for (sum, key) in sums.iter_mut().zip(key) {
                    *sum = _mm512_fmadd_ps(q, key, *sum);
                }
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (p, sum) in sums.into_iter().enumerate() {
            // SAFETY: row `m` of the scores.
            unsafe { _mm512_storeu_ps(s.add(m * CHUNK + p * WIDTH), sum) };
        }
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

/// How values lie in memory.
trait Values {
    /// Values `at` to `at + 16` of a row, `at` a multiple of 8: those of the mask, and zeros.
    ///
    /// # Safety
    /// They must be there. The CPU must have AVX-512 with BW and VL.
    unsafe fn sixteen(row: *const u8, at: usize, mask: u16) -> __m512;
}

struct F32;

impl Values for F32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(row: *const u8, at: usize, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, row.cast::<f32>().add(at)) }
    }
}

struct F16;

impl Values for F16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(row: *const u8, at: usize, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let row = row.cast::<i16>().add(at);
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row))
        }
    }
}

/// Blocks of 32 signed bytes behind their step, as `block_q8_0` in ggml-common.h.
struct Q8;

impl Values for Q8 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(row: *const u8, at: usize, mask: u16) -> __m512 {
        const BLOCK: usize = 32;
        // SAFETY: the caller's promise.
        unsafe {
            let block = row.add(at / BLOCK * (2 + BLOCK));
            let step = _mm_set1_epi16(block.cast::<i16>().read_unaligned());
            let step = _mm512_broadcastss_ps(_mm_cvtph_ps(step));
            let bytes = _mm_maskz_loadu_epi8(mask, block.add(2 + at % BLOCK).cast());
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), step)
        }
    }
}

/// # Safety
/// There must be `M` queries with weights, the values, and room for the result.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn at_once<V: Values, const M: usize>(p: *const f32, run: Run, add: bool, to: *mut f32) {
    for at in (0..run.d).step_by(2 * WIDTH) {
        // SAFETY: the caller's promise.
        unsafe {
            match at + WIDTH < run.d {
                true => columns::<V, M, 2>(p, &run, at, add, to),
                false => columns::<V, M, 1>(p, &run, at, add, to),
            }
        }
    }
}

/// `C` registers of values, from number `at` on.
///
/// # Safety
/// As for [`at_once`], and there must be values for the last register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn columns<V: Values, const M: usize, const C: usize>(
    p: *const f32,
    run: &Run,
    at: usize,
    add: bool,
    to: *mut f32,
) {
    let stride = record(run.d);
    // Half of the last register may be missing.
    let mask: [u16; C] = std::array::from_fn(|c| match at + (c + 1) * WIDTH <= run.d {
        true => !0,
        false => 0xff,
    });
    let mut sums = [[_mm512_setzero_ps(); C]; M];
    if add {
        for (m, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                // SAFETY: record `m`.
                *sum = unsafe { _mm512_loadu_ps(to.add(m * stride + at + c * WIDTH)) };
            }
        }
    }
    for key in 0..run.n {
        let row = run.first.wrapping_add(key * run.row_bytes);
        if at == 0 {
            run.fetch_behind(row);
        }
        // SAFETY: this key's values, and its weight for each query.
        unsafe {
            let value: [_; C] = std::array::from_fn(|c| V::sixteen(row, at + c * WIDTH, mask[c]));
            for (m, sums) in sums.iter_mut().enumerate() {
                let p = _mm512_set1_ps(*p.add(m * CHUNK + key));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = _mm512_fmadd_ps(p, value, *sum);
                }
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (c, sum) in sums.into_iter().enumerate() {
            // SAFETY: record `m`.
            unsafe { _mm512_storeu_ps(to.add(m * stride + at + c * WIDTH), sum) };
        }
    }
}
