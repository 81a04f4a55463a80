//! Tiles of AVX2: two registers have the sums of an element.

use super::{
    CHAIN, DEPTH, LANES, Line, Part, Product, TILE_ROWS, Tiles, Weights, by_height, prefetch, tail,
};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// With two rows of W at a time, 12 of the 16 registers hold sums.
pub(super) const TILES: Tiles = Tiles {
    height: 3,
    one_by_one,
    rows,
};

/// Lanes of a register.
const EIGHT: usize = LANES / 2;
/// Rows of W whose sums are in registers.
const PAIR: usize = 2;

unsafe fn one_by_one(part: &Part) {
    // SAFETY: the caller's promise.
    unsafe { by_height!(part, one_row, [F32 F16 Bf16], 1 2 3) }
}

unsafe fn rows(part: &Part) {
    // SAFETY: the caller's promise.
    unsafe { by_height!(part, four_rows, [F32 F16 Bf16], 1 2 3) }
}

/// How values lie in memory.
trait Values {
    /// Of a value.
    const BYTES: usize;
    /// Values whose sums are chains of multiply-adds.
    const CHAIN: usize;

    /// Values `at` to `at + EIGHT` of a row.
    ///
    /// # Safety
    /// They must be there. The CPU must have AVX2, FMA and F16C.
    unsafe fn eight(row: *const u8, at: usize) -> __m256;

    /// Value `at` of a row.
    ///
    /// # Safety
    /// It must be there.
    unsafe fn one(row: *const u8, at: usize) -> f32;
}

macro_rules! values {
    ($($ty:ident: $value:ty, in $chain:ident, |$row:ident| $eight:expr, |$one:ident| $as_f32:expr;)*) => {$(
        struct $ty;

        impl Values for $ty {
            const BYTES: usize = size_of::<$value>();
            const CHAIN: usize = $chain;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn eight(row: *const u8, at: usize) -> __m256 {
                // SAFETY: the caller's promise.
                unsafe {
                    let $row = row.cast::<$value>().add(at);
                    $eight
                }
            }

            #[inline]
            unsafe fn one(row: *const u8, at: usize) -> f32 {
                // SAFETY: the caller's promise.
                let $one = unsafe { row.cast::<$value>().add(at).read_unaligned() };
                $as_f32
            }
        }
    )*};
}

values! {
    F32: f32, in CHAIN, |at| _mm256_loadu_ps(at), |x| x;
    F16: u16, in DEPTH, |at| _mm256_cvtph_ps(_mm_loadu_si128(at.cast())), |x| f16::from_bits(x).to_f32();
    Bf16: u16, in DEPTH, |at| {
        let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
    }, |x| bf16::from_bits(x).to_f32();
}

/// The lanes of an element's sums.
type Sums = [__m256; 2];

/// The lanes of `R` rows of W times `N` of X. Calls with each value of a row that it comes to, in steps of [`LANES`].
///
/// # Safety
/// There must be the rows. The CPU must have AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums<V: Values, const R: usize, const N: usize>(
    w: [*const u8; R],
    of: &Product,
    at_value: impl Fn(usize),
) -> [[Sums; R]; N] {
    let Product { k, x, x_stride, .. } = *of;
    let zeros = [[[_mm256_setzero_ps(); 2]; R]; N];
    let mut sums = zeros;
    // SAFETY: values of these rows.
    unsafe {
        for from in (0..k).step_by(V::CHAIN) {
            let mut chains = zeros;
            let to = k.min(from + V::CHAIN);
            let whole = to / LANES * LANES;
            for at in (from..whole).step_by(LANES) {
                at_value(at);
                for half in 0..2 {
                    let at = at + half * EIGHT;
                    let w = w.map(|row| V::eight(row, at));
                    for (t, chains) in chains.iter_mut().enumerate() {
                        let x = _mm256_loadu_ps(x.add(t * x_stride + at));
                        for (chain, w) in chains.iter_mut().zip(w) {
                            chain[half] = _mm256_fmadd_ps(w, x, chain[half]);
                        }
                    }
                }
            }
            if whole < to {
                let load =
                    |x: &[f32; LANES]| [0, EIGHT].map(|at| _mm256_loadu_ps(x[at..].as_ptr()));
                let w = w.map(|row| load(&tail(whole, to, |i| V::one(row, i))));
                for (t, chains) in chains.iter_mut().enumerate() {
                    let x = x.add(t * x_stride);
                    let x = load(&tail(whole, to, |i| *x.add(i)));
                    for (chain, w) in chains.iter_mut().zip(&w) {
                        *chain = [0, 1].map(|half| _mm256_fmadd_ps(w[half], x[half], chain[half]));
                    }
                }
            }
            for (sums, chains) in sums.iter_mut().zip(chains) {
                for (sum, chain) in sums.iter_mut().zip(chains) {
                    *sum = [0, 1].map(|half| _mm256_add_ps(sum[half], chain[half]));
                }
            }
        }
    }
    sums
}

/// Rows of W, one after the other, and `N` of X.
#[target_feature(enable = "avx2,fma,f16c")]
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
                    let sum = _mm_cvtss_f32(added([lanes; TILE_ROWS]));
                    *y = if part.accumulate || k > 0 {
                        *y + sum
                    } else {
                        sum
                    };
                }
            }
        }
    }
}

/// [`TILE_ROWS`] rows of W, or fewer, and `N` of X.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn four_rows<V: Values, const N: usize>(part: &Part) {
    let of = &part.of;
    // Missing rows are the last one again.
    let row = |r: usize| of.first.wrapping_add(r.min(of.rows - 1) * of.row_bytes);
    for r in 0..part.fetched {
        prefetch(part.next.wrapping_add(r * of.row_bytes), of.k * V::BYTES);
    }
    // SAFETY: these rows, and elements of Y.
    unsafe {
        let first = sums::<V, PAIR, N>([row(0), row(1)], of, |_| ());
        let second = match of.rows > PAIR {
            true => sums::<V, PAIR, N>([row(2), row(3)], of, |_| ()),
            false => first,
        };
        for (t, ([a, b], [c, d])) in first.into_iter().zip(second).enumerate() {
            let y = of.y.wrapping_add(t * of.y_stride);
            let mut sum = [0.0f32; TILE_ROWS];
            _mm_storeu_ps(sum.as_mut_ptr(), added([a, b, c, d]));
            for (r, sum) in sum.into_iter().enumerate().take(of.rows) {
                let y = &mut *y.add(r);
                *y = if part.accumulate { *y + sum } else { sum };
            }
        }
    }
}

/// The lanes of four elements added.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn added(sums: [Sums; TILE_ROWS]) -> __m128 {
    let [a, b, c, d] = sums.map(|[first, second]| _mm256_add_ps(first, second));
    let halves = |a, b| {
        let (first, second) = (
            _mm256_permute2f128_ps::<0x20>(a, b),
            _mm256_permute2f128_ps::<0x31>(a, b),
        );
        _mm256_add_ps(first, second)
    };
    // Lanes are four of a and four of c, four of b and four of d.
    let (ac, bd) = (halves(a, c), halves(b, d));
    let (first, second) = (
        _mm256_shuffle_ps::<0b01_00_01_00>(ac, bd),
        _mm256_shuffle_ps::<0b11_10_11_10>(ac, bd),
    );
    let x = _mm256_add_ps(first, second);
    let (ab, cd) = (_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    _mm_add_ps(
        _mm_shuffle_ps::<0b10_00_10_00>(ab, cd),
        _mm_shuffle_ps::<0b11_01_11_01>(ab, cd),
    )
}
