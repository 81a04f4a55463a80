//! The product for x86-64 with AVX2, FMA and F16C.

use super::{BLOCK, Blocks, Line, MAX, ROWS, TINY, Tile};
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

/// Rows of X in a register tile: with two registers of W half of the 16 registers hold sums.
pub(super) const COLUMNS: usize = 4;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Rounds a block to words of two multiples of a step each, and returns the step.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn round(x: &[f32; BLOCK], to: &mut [f32; BLOCK / 2]) -> f32 {
    // SAFETY: loads within the array.
    let x = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) });
    store(rounded(x), to)
}

/// The words of a block, and its step.
type Rounded = ([__m256i; 2], f32);

/// Stores the words and returns the step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(([low, high], step): Rounded, to: &mut [f32; BLOCK / 2]) -> f32 {
    // SAFETY: within the array.
    unsafe {
        _mm256_storeu_si256(to.as_mut_ptr().cast(), low);
        _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), high);
    }
    step
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rounded(x: [__m256; 4]) -> Rounded {
    let abs = |x| _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    let most = _mm256_max_ps(
        _mm256_max_ps(abs(x[0]), abs(x[1])),
        _mm256_max_ps(abs(x[2]), abs(x[3])),
    );
    // Zero, or not a number if any value is infinite or not a number, which a maximum may lose.
    let zero = _mm256_setzero_ps();
    let odd = x.iter().fold(zero, |sum, &x| _mm256_fmadd_ps(x, zero, sum));
    let most = across(most, |a, b| _mm_max_ps(a, b));
    let odd = across(odd, |a, b| _mm_add_ps(a, b));
    let (step, inverse) = if most > TINY {
        (most / MAX, MAX / most)
    } else {
        (0.0, 0.0)
    };
    let inverse = _mm256_set1_ps(inverse);
    let [a, b, c, d] = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
    // Packing interleaves the halves of its operands.
    let words = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
    ([words(a, b), words(c, d)], step + odd)
}

impl Blocks<'_> {
    /// Unpacks blocks of type `ty`; false if there is no way but through F32.
    ///
    /// # Safety
    /// The rows must have as many blocks as there are steps, and the CPU AVX2, FMA and F16C.
    pub(super) unsafe fn unpack(&mut self, ty: GgmlType) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match ty {
                GgmlType::F32 => self.each::<F32>(),
                GgmlType::F16 => self.each::<F16>(),
                GgmlType::BF16 => self.each::<BF16>(),
                GgmlType::Q8_0 => self.each::<Q8_0>(),
                GgmlType::Q4_0 => self.each::<Q4_0>(),
                GgmlType::Q4_1 => self.each::<Q4_1>(),
                GgmlType::Q5_0 => self.each::<Q5_0>(),
                GgmlType::Q5_1 => self.each::<Q5_1>(),
                _ => return false,
            }
        }
        true
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn each<B: Block>(&mut self) {
        let mut words = [[0.0f32; BLOCK / 2]; ROWS];
        let to = self.words.as_chunks_mut::<{ BLOCK / 2 }>().0;
        for (b, (to, steps)) in to.iter_mut().zip(&mut *self.steps).enumerate() {
            for (r, (words, step)) in words
                .iter_mut()
                .zip(&mut steps.0)
                .take(self.rows)
                .enumerate()
            {
                // SAFETY: block b of row r.
                let block = unsafe { B::words(self.first.add(r * self.row_bytes + b * B::BYTES)) };
                *step = store(block, words);
            }
            interleave(&words, to);
        }
    }
}

/// 32 values as they lie in memory.
trait Block {
    const BYTES: usize;

    /// As [`rounded`] gives them, or exactly.
    ///
    /// # Safety
    /// There must be a block at `at`. Callers have AVX2, FMA and F16C, and this becomes part of them.
    unsafe fn words(at: *const u8) -> Rounded;
}

/// A half-precision number.
///
/// # Safety
/// There must be one at `at`, and the CPU have F16C.
#[inline(always)]
unsafe fn half(at: *const u8) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(
            at.cast::<u16>().read_unaligned(),
        ))))
    }
}

/// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
///
/// # Safety
/// They must be at `at`, and the CPU have AVX2.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let both = _mm_loadu_si128(at.cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(both), both);
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// 32 bits as the fifth bits of 32 bytes.
///
/// # Safety
/// They must be at `at`, and the CPU have AVX2.
#[inline(always)]
unsafe fn fifth_bits(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
        let spread = _mm256_shuffle_epi8(
            bits,
            _mm256_set_epi64x(
                0x0303_0303_0303_0303,
                0x0202_0202_0202_0202,
                0x0101_0101_0101_0101,
                0,
            ),
        );
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        _mm256_and_si256(set, _mm256_set1_epi8(16))
    }
}

/// Signed bytes times a scale: nothing is rounded.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn integers(x: __m256i, scale: f32) -> Rounded {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
        let high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(x));
        ([low, high], scale)
    }
}

/// Bytes times a scale and a minimum.
///
/// # Safety
/// The CPU must have AVX2, FMA and F16C.
#[inline(always)]
unsafe fn affine(x: __m256i, scale: f32, min: f32) -> Rounded {
    // SAFETY: the caller's promise.
    unsafe {
        let (scale, min) = (_mm256_set1_ps(scale), _mm256_set1_ps(min));
        let value = |x| _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), scale, min);
        let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        rounded([
            value(low),
            value(_mm_srli_si128::<8>(low)),
            value(high),
            value(_mm_srli_si128::<8>(high)),
        ])
    }
}

macro_rules! blocks {
    ($($ty:ident: $bytes:literal, |$at:ident| $words:expr;)*) => {
        $(
            struct $ty;

            impl Block for $ty {
                const BYTES: usize = $bytes;

                #[inline(always)]
                unsafe fn words($at: *const u8) -> Rounded {
                    // SAFETY: the parts of a block, whose layout is ggml-common.h's.
                    unsafe { $words }
                }
            }
        )*
    };
}

blocks! {
    F32: 128, |at| rounded(std::array::from_fn(|i| _mm256_loadu_ps(at.cast::<f32>().add(8 * i))));
    F16: 64, |at| rounded(std::array::from_fn(|i| _mm256_cvtph_ps(_mm_loadu_si128(at.cast::<__m128i>().add(i)))));
    BF16: 64, |at| rounded(std::array::from_fn(|i| {
        let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast::<__m128i>().add(i)));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
    }));
    Q8_0: 34, |at| integers(_mm256_loadu_si256(at.add(2).cast()), half(at));
    Q4_0: 18, |at| integers(_mm256_sub_epi8(nibbles(at.add(2)), _mm256_set1_epi8(8)), half(at));
    Q4_1: 20, |at| affine(nibbles(at.add(4)), half(at), half(at.add(2)));
    Q5_0: 22, |at| integers(
        _mm256_sub_epi8(_mm256_or_si256(nibbles(at.add(6)), fifth_bits(at.add(2))), _mm256_set1_epi8(16)),
        half(at)
    );
    Q5_1: 24, |at| affine(_mm256_or_si256(nibbles(at.add(8)), fifth_bits(at.add(4))), half(at), half(at.add(2)));
}

/// All elements reduced to one.
#[target_feature(enable = "avx2,fma,f16c")]
fn across(x: __m256, f: impl Fn(__m128, __m128) -> __m128) -> f32 {
    let x = f(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = f(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(f(x, _mm_shuffle_ps::<1>(x, x)))
}

/// Words of [`ROWS`] rows, one after the other, to rows of words.
#[target_feature(enable = "avx2,fma,f16c")]
fn interleave(from: &[[f32; BLOCK / 2]; ROWS], to: &mut [Line<f32>; BLOCK / 2]) {
    for (half, rows) in from.as_chunks::<8>().0.iter().enumerate() {
        for (part, to) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: eight words of eight rows each.
            unsafe {
                let r: [__m256; 8] =
                    std::array::from_fn(|i| _mm256_loadu_ps(rows[i].as_ptr().add(8 * part)));
                let pair = |i: usize| {
                    (
                        _mm256_unpacklo_ps(r[i], r[i + 1]),
                        _mm256_unpackhi_ps(r[i], r[i + 1]),
                    )
                };
                let (a, b, c, d) = (pair(0), pair(2), pair(4), pair(6));
                let low = |a, b| _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
                let high = |a, b| _mm256_shuffle_ps::<0b11_10_11_10>(a, b);
                let four = [
                    (low(a.0, b.0), low(c.0, d.0)),
                    (high(a.0, b.0), high(c.0, d.0)),
                    (low(a.1, b.1), low(c.1, d.1)),
                    (high(a.1, b.1), high(c.1, d.1)),
                ];
                for (i, (x, y)) in four.into_iter().enumerate() {
                    let first = _mm256_permute2f128_ps::<0x20>(x, y);
                    let second = _mm256_permute2f128_ps::<0x31>(x, y);
                    _mm256_storeu_ps(to[i].0.as_mut_ptr().add(8 * half), first);
                    _mm256_storeu_ps(to[i + 4].0.as_mut_ptr().add(8 * half), second);
                }
            }
        }
    }
}

impl Tile {
    /// For `columns` rows of X, at most [`COLUMNS`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have AVX2 and FMA.
    pub(super) unsafe fn compute(&self, columns: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match columns {
                1 => self.fixed::<1>(),
                2 => self.fixed::<2>(),
                3 => self.fixed::<3>(),
                4 => self.fixed::<4>(),
                _ => unreachable!("a tile of {columns} columns"),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fixed<const N: usize>(&self) {
        // SAFETY: the caller's promise; with fewer rows than a panel has, Y is reached through a copy.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; N];
            let mut copy = [[0.0f32; ROWS]; N];
            let whole = self.rows == ROWS;
            if self.accumulate {
                for (t, (sums, copy)) in sums.iter_mut().zip(&mut copy).enumerate() {
                    let y = self.y.add(t * self.y_stride).cast_const();
                    let y = if whole { y } else { copied(y, copy, self.rows) };
                    *sums = [_mm256_loadu_ps(y), _mm256_loadu_ps(y.add(8))];
                }
            }
            for b in 0..self.blocks {
                let mut acc = [[_mm256_setzero_si256(); 2]; N];
                let words = self.words.add(b * BLOCK / 2 * ROWS);
                let x = self.x.add(b * BLOCK / 2);
                for p in 0..BLOCK / 2 {
                    let w = [0, 8].map(|v| _mm256_load_si256(words.add(p * ROWS + v).cast()));
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = _mm256_castps_si256(_mm256_broadcast_ss(
                            &*x.add(t * self.x_stride + p),
                        ));
                        for (acc, w) in acc.iter_mut().zip(w) {
                            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(w, x));
                        }
                    }
                }
                let steps = [0, 8].map(|v| _mm256_load_ps(self.steps.add(b * ROWS + v)));
                for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                    let x_step = _mm256_broadcast_ss(&*self.x_steps.add(t * self.x_stride + b));
                    for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                        *sum = _mm256_fmadd_ps(
                            _mm256_cvtepi32_ps(acc),
                            _mm256_mul_ps(step, x_step),
                            *sum,
                        );
                    }
                }
            }
            for (t, (sums, copy)) in sums.iter().zip(&mut copy).enumerate() {
                let y = self.y.add(t * self.y_stride);
                let to = if whole { y } else { copy.as_mut_ptr() };
                _mm256_storeu_ps(to, sums[0]);
                _mm256_storeu_ps(to.add(8), sums[1]);
                if !whole {
                    std::ptr::copy_nonoverlapping(to, y, self.rows);
                }
            }
        }
    }
}

/// `n` values in an array that has room for more.
///
/// # Safety
/// There must be so many at `from`.
unsafe fn copied(from: *const f32, to: &mut [f32; ROWS], n: usize) -> *const f32 {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), n) };
    to.as_ptr()
}
