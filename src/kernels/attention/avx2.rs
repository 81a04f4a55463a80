//! The kernels for x86-64 with AVX2, FMA and F16C.

use super::{CHUNK, Run, Tiles, WIDTH, at_once_by_type, avx512, by_height, by_type, record};
use crate::file::types::GgmlType;
use crate::kernels::level::{CpuLevel, has};
use std::arch::x86_64::*;

/// Lanes of a register.
const EIGHT: usize = 8;
/// With two registers of keys or values, 12 of the 16 registers hold sums.
pub(super) const TILES: Tiles = Tiles {
    scores: by_height!(score_tile, 1 2 3 4 5 6),
    score_pairs: &[],
    values: by_height!(value_tile, 1 2 3 4 5 6),
    at_once: at_once_by_type!(at_once),
};

/// Whether this CPU has the instructions.
pub(super) fn available() -> bool {
    has(CpuLevel::Avx2)
}

/// The fastest tiles of this CPU.
pub(super) fn tiles() -> Tiles {
    if has(CpuLevel::Avx512) {
        avx512::TILES
    } else {
        TILES
    }
}

/// How values lie in memory.
trait Values {
    /// Values `at` to `at + 8` of a row, `at` a multiple of 8.
    ///
    /// # Safety
    /// They must be there. The CPU must have AVX2, FMA and F16C.
    unsafe fn eight(row: *const u8, at: usize) -> __m256;
}

struct F32;

impl Values for F32 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn eight(row: *const u8, at: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(row.cast::<f32>().add(at)) }
    }
}

struct F16;

impl Values for F16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn eight(row: *const u8, at: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(row.cast::<u16>().add(at).cast())) }
    }
}

/// Blocks of 32 signed bytes behind their step, as `block_q8_0` in ggml-common.h.
struct Q8;

impl Values for Q8 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn eight(row: *const u8, at: usize) -> __m256 {
        const BLOCK: usize = 32;
        // SAFETY: the caller's promise.
        unsafe {
            let block = row.add(at / BLOCK * (2 + BLOCK));
            let step = i32::from(block.cast::<u16>().read_unaligned());
            let step = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(step)));
            let bytes = _mm_loadl_epi64(block.add(2 + at % BLOCK).cast());
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), step)
        }
    }
}

/// Unpacks up to [`WIDTH`] keys side by side, `ne = [WIDTH, d]`. What stands in the place of missing ones means nothing.
///
/// # Safety
/// The run must be there; the CPU must have [`CpuLevel::Avx2`].
pub(super) unsafe fn unpack_keys(run: Run, to: &mut [f32]) {
    assert!(to.len() >= run.d * WIDTH && run.d.is_multiple_of(EIGHT));
    // SAFETY: the caller's promise, and room for the keys.
    unsafe { by_type!(run.ty, keys(run, to.as_mut_ptr())) }
}

/// # Safety
/// As for [`unpack_keys`], and `to` must have room.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn keys<V: Values>(run: Run, to: *mut f32) {
    for half in [0, EIGHT] {
        let row = |r: usize| {
            run.first
                .wrapping_add((half + r).min(run.n - 1) * run.row_bytes)
        };
        let rows: [_; EIGHT] = std::array::from_fn(row);
        for row in rows {
            run.fetch_behind(row);
        }
        for at in (0..run.d).step_by(EIGHT) {
            // SAFETY: eight values of each row, and a place for each.
            unsafe {
                let columns = transpose(rows.map(|row| V::eight(row, at)));
                for (i, column) in columns.into_iter().enumerate() {
                    _mm256_storeu_ps(to.add((at + i) * WIDTH + half), column);
                }
            }
        }
    }
}

/// Columns of eight rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(rows: [__m256; EIGHT]) -> [__m256; EIGHT] {
    let pair = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let four = |a: [__m256; 4]| {
        let ((ab0, ab1), (cd0, cd1)) = (pair(a[0], a[1]), pair(a[2], a[3]));
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(ab0, cd0),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab0, cd0),
            _mm256_shuffle_ps::<0b01_00_01_00>(ab1, cd1),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab1, cd1),
        ]
    };
    let [a, b, c, d, e, f, g, h] = rows;
    let (upper, lower) = (four([a, b, c, d]), four([e, f, g, h]));
    std::array::from_fn(|i| match i / 4 {
        0 => _mm256_permute2f128_ps::<0x20>(upper[i % 4], lower[i % 4]),
        _ => _mm256_permute2f128_ps::<0x31>(upper[i % 4], lower[i % 4]),
    })
}

/// # Safety
/// There must be `M` queries, keys, and room for the scores.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn score_tile<const M: usize>(q: *const f32, keys: *const f32, d: usize, s: *mut f32) {
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    for i in 0..d {
        // SAFETY: value `i` of queries and keys.
        unsafe {
            let key = [0, EIGHT].map(|at| _mm256_loadu_ps(keys.add(i * WIDTH + at)));
            for (m, sum) in sums.iter_mut().enumerate() {
                let q = _mm256_broadcast_ss(&*q.add(m * d + i));
                *sum = [0, 1].map(|j| _mm256_fmadd_ps(q, key[j], sum[j]));
            }
        }
    }
    for (m, sum) in sums.into_iter().enumerate() {
        // SAFETY: row `m` of the scores.
        unsafe { store(sum, s.add(m * CHUNK)) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store(x: [__m256; 2], to: *mut f32) {
    // SAFETY: the caller has room for 16.
    unsafe {
        _mm256_storeu_ps(to, x[0]);
        _mm256_storeu_ps(to.add(EIGHT), x[1]);
    }
}

/// Unpacks the values of some keys, `ne = [WIDTH, keys, d / WIDTH]`, the last ones filled up with zeros.
///
/// # Safety
/// The run must be there; the CPU must have [`CpuLevel::Avx2`].
pub(super) unsafe fn unpack_values(run: Run, to: &mut [f32]) {
    assert!(to.len() >= run.d.next_multiple_of(WIDTH) * run.n && run.d.is_multiple_of(EIGHT));
    // SAFETY: the caller's promise, and room for the values.
    unsafe { by_type!(run.ty, values(run, to.as_mut_ptr())) }
}

/// # Safety
/// As for [`unpack_values`], and `to` must have room.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn values<V: Values>(run: Run, to: *mut f32) {
    for r in 0..run.n {
        let row = run.first.wrapping_add(r * run.row_bytes);
        run.fetch_behind(row);
        for at in (0..run.d).step_by(WIDTH) {
            // SAFETY: values of this row, and a place for them.
            unsafe { store(sixteen::<V>(row, at, run.d), to.add(at * run.n + r * WIDTH)) };
        }
    }
}

/// Values `at` to `at + 16` of a row of `d`, filled up with zeros.
///
/// # Safety
/// As for [`Values::eight`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sixteen<V: Values>(row: *const u8, at: usize, d: usize) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let second = match at + EIGHT < d {
            true => V::eight(row, at + EIGHT),
            false => _mm256_setzero_ps(),
        };
        [V::eight(row, at), second]
    }
}

/// # Safety
/// There must be `M` queries with `keys` weights, values of these keys, and room for the result.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn value_tile<const M: usize>(
    p: *const f32,
    values: *const f32,
    keys: usize,
    add: bool,
    to: *mut f32,
    stride: usize,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    if add {
        for (m, sum) in sums.iter_mut().enumerate() {
            // SAFETY: record `m`.
            *sum = [0, EIGHT].map(|at| unsafe { _mm256_loadu_ps(to.add(m * stride + at)) });
        }
    }
    for key in 0..keys {
        // SAFETY: this key's values, and its weight for each query.
        unsafe {
            let value = [0, EIGHT].map(|at| _mm256_loadu_ps(values.add(key * WIDTH + at)));
            for (m, sum) in sums.iter_mut().enumerate() {
                let p = _mm256_broadcast_ss(&*p.add(m * CHUNK + key));
                *sum = [0, 1].map(|j| _mm256_fmadd_ps(p, value[j], sum[j]));
            }
        }
    }
    for (m, sum) in sums.into_iter().enumerate() {
        // SAFETY: record `m`.
        unsafe { store(sum, to.add(m * stride)) };
    }
}

/// # Safety
/// There must be `M` queries with weights, the values, and room for the result.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn at_once<V: Values, const M: usize>(p: *const f32, run: Run, add: bool, to: *mut f32) {
    let stride = record(run.d);
    for at in (0..run.d).step_by(WIDTH) {
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        if add {
            for (m, sum) in sums.iter_mut().enumerate() {
                let to = to.wrapping_add(m * stride + at);
                // SAFETY: record `m`.
                *sum = [0, EIGHT].map(|at| unsafe { _mm256_loadu_ps(to.add(at)) });
            }
        }
        for key in 0..run.n {
            let row = run.first.wrapping_add(key * run.row_bytes);
            if at == 0 {
                run.fetch_behind(row);
            }
            // SAFETY: this key's values, and its weight for each query.
            unsafe {
                let value = sixteen::<V>(row, at, run.d);
                for (m, sum) in sums.iter_mut().enumerate() {
                    let p = _mm256_broadcast_ss(&*p.add(m * CHUNK + key));
                    *sum = [0, 1].map(|j| _mm256_fmadd_ps(p, value[j], sum[j]));
                }
            }
        }
        for (m, sum) in sums.into_iter().enumerate() {
            // SAFETY: record `m`.
            unsafe { store(sum, to.add(m * stride + at)) };
        }
    }
}
