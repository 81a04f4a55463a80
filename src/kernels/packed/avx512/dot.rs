//! Products in bytes of a few rows of X with weights as they lie in memory: the same operations on each element as in a tile of
//! [bytes](super::bytes), so the same bits.
//!
//! A row's two blocks times those of X are sums of four products, a lane each. Those of sixteen rows are added across by transposing them: then
//! lanes are rows.

use super::super::avx2::formats::{Format, Visit};
use super::super::bytes::{ByteRows, QUADS};
use super::super::{BLOCK, Dots, Rows, by_height};
use super::bytes::OFFSET;
use super::two::{self, ROWS, Sixteen, Two, even_quarters, for_each_two, odd_quarters, sixteens};
use std::arch::x86_64::*;

/// [`Dots`] of rows of X that were rounded to 8 bits.
pub(in super::super) struct ByteDots(pub(in super::super) Dots);

impl Visit for ByteDots {
    type Output = ();

    unsafe fn visit<F: Format>(self) {
        // SAFETY: the caller's promise.
        unsafe { by_height!(self.fixed::<F>, self.0.t, 1 2 3 4) }
    }
}

impl ByteDots {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn fixed<F: Format, const N: usize>(self) {
        let Dots {
            first,
            row_bytes,
            rows,
            y,
            y_stride,
            ..
        } = self.0;
        for (i, sixteen) in sixteens(first, row_bytes, rows).enumerate() {
            let row = i * ROWS;
            let there = ((1u32 << (rows - row).min(ROWS)) - 1) as __mmask16;
            // SAFETY: rows of W, and elements of Y; those that it does not have are masked.
            unsafe {
                let sums = self.sixteen::<F, N>(sixteen);
                for (t, sum) in sums.into_iter().enumerate() {
                    _mm512_mask_storeu_ps(y.wrapping_add(t * y_stride + row), there, sum);
                }
            }
        }
    }

    /// Of sixteen rows of W. Lanes are rows.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn sixteen<F: Format, const N: usize>(&self, rows: Sixteen) -> [__m512; N] {
        let Dots {
            x, k, row_bytes, ..
        } = self.0;
        let mut products = Products {
            x: ByteRows::new(Rows::of_bytes(x, N, k)),
            sums: [_mm512_setzero_ps(); N],
        };
        // SAFETY: the blocks of these rows of W, and of X.
        unsafe { for_each_two::<F, _>(rows, row_bytes, k / BLOCK, &mut products) };
        products.sums
    }
}

/// Sums of products of sixteen rows of W with `N` of X. Lanes are rows of W.
struct Products<const N: usize> {
    x: ByteRows,
    sums: [__m512; N],
}

impl<const N: usize> two::Visit for Products<N> {
    const AHEAD: usize = ROWS;
    const SOON: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn visit<F: Format, const I: usize>(&mut self, two: Two<I>) {
        let x = self.x;
        // SAFETY: the caller's promise; what is not there of X is masked.
        unsafe {
            let quads = ((1u32 << (two.there * QUADS)) - 1) as __mmask16;
            let zero = _mm512_setzero_si512();
            // The integers of X with their sign, and what sums begin with: minus what the integers of W are more than they stand for.
            let rows_of_x: [_; N] = std::array::from_fn(|t| {
                let at = x.quads.add(t * x.stride + two.first * QUADS);
                let unsigned = _mm512_maskz_loadu_epi32(quads, at.cast());
                let x = _mm512_xor_si512(unsigned, _mm512_set1_epi8(OFFSET));
                let offset = _mm512_set1_epi8(F::OFFSET.cast_signed());
                let more = _mm512_dpbusd_epi32(zero, offset, x);
                (x, _mm512_sub_epi32(zero, more))
            });
            let row = |r: usize| {
                let w = two.bytes::<F>(r);
                rows_of_x.map(|(x, start)| _mm512_dpbusd_epi32(start, w, x))
            };
            let pair = |r: usize| each(row(r), row(r + 1), |a, b| add_words(a, b));
            let four = |r: usize| each(pair(r), pair(r + 2), |a, b| add_pairs(a, b));
            // Sums of whole blocks, where their halves need not be told apart, take half of the registers.
            let eight = |r: usize| {
                let (a, b) = (four(r), four(r + 4));
                let halves: [[__m512i; 2]; N] = std::array::from_fn(|t| {
                    let (first, second) = (even_quarters(a[t], b[t]), odd_quarters(a[t], b[t]));
                    match F::FACTORS {
                        true => [first, second],
                        false => [_mm512_add_epi32(first, second); 2],
                    }
                });
                halves
            };
            let (a, b) = (eight(0), eight(8));
            for (t, sum) in self.sums.iter_mut().enumerate() {
                let half = |h: usize| {
                    let (a, b) = (a[t][h], b[t][h]);
                    [even_quarters(a, b), odd_quarters(a, b)]
                };
                let (first, second) = (half(0), half(1));
                let mut add_block = |b: usize, halves: [__m512i; 2]| {
                    let at = t * x.stride + two.first + b;
                    let x_step = _mm512_set1_ps(*x.steps.add(at));
                    let mut add = |products, step| {
                        let step = _mm512_mul_ps(step, x_step);
                        *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), step, *sum);
                    };
                    add(halves[0], two.steps::<F>(b, 0));
                    if F::FACTORS {
                        add(halves[1], two.steps::<F>(b, 1));
                    }
                    if F::MINS {
                        let x_sum = _mm512_set1_ps(*x.sums.add(at));
                        if F::FACTORS {
                            let x_first = _mm512_set1_ps(*x.firsts.add(at));
                            let x_second = _mm512_sub_ps(x_sum, x_first);
                            *sum = _mm512_fmadd_ps(two.mins::<F>(b, 0), x_first, *sum);
                            *sum = _mm512_fmadd_ps(two.mins::<F>(b, 1), x_second, *sum);
                        } else {
                            *sum = _mm512_fmadd_ps(two.mins::<F>(b, 0), x_sum, *sum);
                        }
                    }
                };
                add_block(0, [first[0], second[0]]);
                if two.there == 2 {
                    add_block(1, [first[1], second[1]]);
                }
            }
        }
    }
}

/// `f` for each row of X.
#[inline]
fn each<const N: usize>(
    a: [__m512i; N],
    b: [__m512i; N],
    f: impl Fn(__m512i, __m512i) -> __m512i,
) -> [__m512i; N] {
    std::array::from_fn(|t| f(a[t], b[t]))
}

/// Of each four words the sums of the first and third, and of the second and fourth: a's, b's, a's, b's.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_words(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// Of each two pairs of words the sum: a's, then b's.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
}
