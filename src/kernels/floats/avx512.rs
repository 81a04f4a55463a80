//! Tiles of AVX-512: a register has all sums of an element.

use super::{
    CHAIN, DEPTH, LANES, Line, Part, Product, TILE_ROWS, Tiles, Weights, by_height, prefetch, tail,
};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Tiles for the weights that are F32 when they are multiplied.
pub(super) const TILES: Tiles = f32::TILES;
/// Tiles for [`Weights::Bf16Pairs`].
pub(super) const PAIRS: Tiles = pairs::TILES;

/// How words lie in memory, and how they are multiplied.
trait Values {
    /// Of a value.
    const BYTES: usize;
    /// Values whose sums are chains of multiply-adds.
    const CHAIN: usize;

    /// Values `at` to `at + LANES` of a row.
    ///
    /// # Safety
    /// They must be there. The CPU must have AVX-512 F, BW, DQ and VL.
    unsafe fn sixteen(row: *const u8, at: usize) -> __m512;

    /// Value `at` of a row.
    ///
    /// # Safety
    /// It must be there.
    unsafe fn one(row: *const u8, at: usize) -> f32;

    /// Adds products of words of W and X to sums.
    ///
    /// # Safety
    /// The CPU must have AVX-512 F, for pairs BF16.
    unsafe fn multiply_add(w: __m512, x: __m512, sum: __m512) -> __m512;
}

macro_rules! values {
    ($($ty:ident: $value:ty, in $chain:ident, |$row:ident| $sixteen:expr, |$one:ident| $as_f32:expr, $features:literal, |$w:ident, $x:ident, $sum:ident| $multiply_add:expr;)*) => {$(
        struct $ty;

        impl Values for $ty {
            const BYTES: usize = size_of::<$value>();
            const CHAIN: usize = $chain;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn sixteen(row: *const u8, at: usize) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe {
                    let $row = row.cast::<$value>().add(at);
                    $sixteen
                }
            }

            #[inline]
            unsafe fn one(row: *const u8, at: usize) -> f32 {
                // SAFETY: the caller's promise.
                let $one = unsafe { row.cast::<$value>().add(at).read_unaligned() };
                $as_f32
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn multiply_add($w: __m512, $x: __m512, $sum: __m512) -> __m512 {
                $multiply_add
            }
        }
    )*};
}

values! {
    F32: f32, in CHAIN, |at| _mm512_loadu_ps(at), |x| x, "avx512f", |w, x, sum| _mm512_fmadd_ps(w, x, sum);
    F16: u16, in DEPTH, |at| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), |x| f16::from_bits(x).to_f32(),
        "avx512f", |w, x, sum| _mm512_fmadd_ps(w, x, sum);
    Bf16: u16, in DEPTH, |at| {
        let upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
    }, |x| bf16::from_bits(x).to_f32(), "avx512f", |w, x, sum| _mm512_fmadd_ps(w, x, sum);
    Bf16Pairs: u32, in DEPTH, |at| _mm512_loadu_ps(at.cast()), |x| f32::from_bits(x), "avx512f,avx512bf16", |w, x, sum| {
        // SAFETY: plain vectors of one size.
        let pairs = |x: __m512| unsafe { std::mem::transmute::<__m512, __m512bh>(x) };
        _mm512_dpbf16_ps(sum, pairs(w), pairs(x))
    };
}

/// Functions of tiles, compiled for some weights with the instructions that they need.
macro_rules! tiles {
    ($name:ident, $features:literal, $weights:tt) => {
        mod $name {
            use super::*;

            /// 24 of the 32 registers hold sums.
            pub(super) const TILES: Tiles = Tiles {
                height: 6,
                one_by_one,
                rows,
            };

            unsafe fn one_by_one(part: &Part) {
                // SAFETY: the caller's promise.
                unsafe { by_height!(part, one_row, $weights, 1 2 3 4 5 6) }
            }

            unsafe fn rows(part: &Part) {
                // SAFETY: the caller's promise.
                unsafe { by_height!(part, four_rows, $weights, 1 2 3 4 5 6) }
            }

            /// The lanes of `R` rows of W times `N` of X. Calls with each value of a row that it comes to, in steps of [`LANES`].
            ///
            /// # Safety
            /// There must be the rows, and the instructions.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn sums<V: Values, const R: usize, const N: usize>(
                w: [*const u8; R],
                of: &Product,
                at_value: impl Fn(usize),
            ) -> [[__m512; R]; N] {
                let Product { k, x, x_stride, .. } = *of;
                let zeros = [[_mm512_setzero_ps(); R]; N];
                let mut sums = zeros;
                // SAFETY: values of these rows.
                unsafe {
                    for from in (0..k).step_by(V::CHAIN) {
                        let mut chains = zeros;
                        let to = k.min(from + V::CHAIN);
                        let whole = to / LANES * LANES;
                        for at in (from..whole).step_by(LANES) {
                            at_value(at);
                            let w = w.map(|row| V::sixteen(row, at));
                            for (t, chains) in chains.iter_mut().enumerate() {
                                let x = _mm512_loadu_ps(x.add(t * x_stride + at));
                                for (chain, w) in chains.iter_mut().zip(w) {
                                    *chain = V::multiply_add(w, x, *chain);
                                }
                            }
                        }
                        if whole < to {
                            let load = |x: [f32; LANES]| _mm512_loadu_ps(x.as_ptr());
                            let w = w.map(|row| load(tail(whole, to, |i| V::one(row, i))));
                            for (t, chains) in chains.iter_mut().enumerate() {
                                let x = x.add(t * x_stride);
                                let x = load(tail(whole, to, |i| *x.add(i)));
                                for (chain, w) in chains.iter_mut().zip(w) {
                                    *chain = V::multiply_add(w, x, *chain);
                                }
                            }
                        }
                        for (sums, chains) in sums.iter_mut().zip(chains) {
                            for (sum, chain) in sums.iter_mut().zip(chains) {
                                *sum = _mm512_add_ps(*sum, chain);
                            }
                        }
                    }
                }
                sums
            }

            /// Rows of W, one after the other, and `N` of X.
            #[target_feature(enable = $features)]
            unsafe fn one_row<V: Values, const N: usize>(part: &Part) {
                let of = &part.of;
                // SAFETY: runs of the rows, and their elements of Y.
                unsafe {
                    for r in 0..of.rows {
                        let row = of.rows(r..r + 1);
                        let next = part.next.wrapping_add(r * of.row_bytes);
                        for k in (0..of.k).step_by(DEPTH) {
                            let run = row.run(k);
                            let fetch = |at: usize| {
                                let at = (k + at) * V::BYTES;
                                if at.is_multiple_of(size_of::<Line<f32>>()) {
                                    prefetch(next.wrapping_add(at), 1);
                                }
                            };
                            let sums = sums::<V, 1, N>([run.first], &run, fetch);
                            for (t, [lanes]) in sums.into_iter().enumerate() {
                                let y = &mut *row.y.add(t * of.y_stride);
                                let sum = added_one(lanes);
                                *y = if part.accumulate || k > 0 { *y + sum } else { sum };
                            }
                        }
                    }
                }
            }

            /// [`TILE_ROWS`] rows of W, or fewer, and `N` of X.
            #[target_feature(enable = $features)]
            unsafe fn four_rows<V: Values, const N: usize>(part: &Part) {
                let of = &part.of;
                // Missing rows are the last one again.
                let row = |r: usize| of.first.wrapping_add(r.min(of.rows - 1) * of.row_bytes);
                let w: [_; TILE_ROWS] = std::array::from_fn(row);
                for r in 0..part.fetched {
prefetch(part.next.wrapping_add(r * of.row_bytes), of.k * V::BYTES);
}
                // SAFETY: these rows, and elements of Y; those that it does not have are masked.
                unsafe {
                    let there = (1u8 << of.rows) - 1;
                    for (t, lanes) in sums::<V, TILE_ROWS, N>(w, of, |_| ())
                        .into_iter()
                        .enumerate()
                    {
                        let y = of.y.wrapping_add(t * of.y_stride);
                        let mut sum = added(lanes);
                        if part.accumulate {
                            sum = _mm_add_ps(_mm_maskz_loadu_ps(there, y), sum);
                        }
                        _mm_mask_storeu_ps(y, there, sum);
                    }
                }
            }
        }
    };
}

tiles!(f32, "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl", [F32 F16 Bf16]);
tiles!(
    pairs,
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16",
    [Bf16Pairs]
);

/// The lanes of a register added.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn added_one(x: __m512) -> f32 {
    let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// The lanes of four registers added.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn added([a, b, c, d]: [__m512; TILE_ROWS]) -> __m128 {
    let halves = |a, b| {
        let (first, second) = (
            _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
            _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
        );
        _mm512_add_ps(first, second)
    };
    let (a, b) = (halves(a, b), halves(c, d));
    let (first, second) = (
        _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
        _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
    );
    // A quarter each, of four lanes.
    let x = _mm512_add_ps(first, second);
    let x = _mm512_add_ps(x, _mm512_permute_ps::<0b01_00_11_10>(x));
    let x = _mm512_add_ps(x, _mm512_permute_ps::<0b10_11_00_01>(x));
    let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x))
}
