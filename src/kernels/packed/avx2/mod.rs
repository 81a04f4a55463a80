//! The kernels for x86-64 with AVX2, FMA and F16C.

use super::bytes::{ByteBlocks, ByteTile, Kind, QUADS};
use super::{BLOCK, Bytes, Line, MAX, Rounded, TINY, Tiles, WORDS, avx512, has_avx512, has_words};
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

mod bytes;
mod dot;
mod eight;
pub(super) mod formats;
mod panel;
mod scales;
mod tile;
pub(super) mod turned;

pub(super) use formats::has_format;
pub(super) use tile::TILES;

/// Whether this CPU multiplies in bytes: all that have kernels do.
pub(super) fn has_bytes() -> bool {
    has_words()
}

/// Whether what integers of X add to sums because they are more than they stand for is computed when weights are unpacked: dot products want X without a sign.
pub(super) fn has_starts() -> bool {
    has_avx512()
}

/// Whether sums of X's integers are kept as they are, not times steps: what weights are more than they stand for is subtracted from sums.
pub(super) fn has_plain_sums() -> bool {
    !has_avx512()
}

/// Rows of X in a tile of bytes.
pub(super) fn byte_tile_height() -> usize {
    if has_avx512() {
        avx512::bytes::BYTE_TILE_HEIGHT
    } else {
        bytes::TILE_HEIGHT
    }
}

/// Rounds a block to words of four multiples of a step each; plus 128 for dot products.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn round_to_bytes(x: &[f32; BLOCK], quads: &mut [f32; QUADS]) -> Rounded {
    let rounded = Integers::round_block(x, MAX_BYTE);
    let bytes = packed_bytes(rounded.words);
    let bytes = match has_avx512() {
        true => _mm256_xor_si256(bytes, _mm256_set1_epi8(avx512::bytes::OFFSET)),
        false => bytes,
    };
    // SAFETY: within the array.
    unsafe { _mm256_storeu_si256(quads.as_mut_ptr().cast(), bytes) };
    rounded.scales()
}

impl ByteBlocks<'_> {
    /// Unpacks blocks of type `ty`, and says what they have. `None` if there is no format for it.
    ///
    /// # Safety
    /// The rows must have the blocks, and the CPU the instructions ([`has_bytes`]).
    pub(super) unsafe fn unpack(self, ty: GgmlType) -> Option<Kind> {
        // SAFETY: the caller's promise.
        unsafe {
            match has_avx512() {
                true => self.unpack_512(ty),
                false => self.unpack_256(ty),
            }
        }
    }
}

impl ByteTile {
    /// For `t` rows of X, at most [`byte_tile_height`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have the instructions ([`has_bytes`]).
    pub(super) unsafe fn compute(&self, t: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match has_avx512() {
                true => self.compute_512(t),
                false => self.compute_256(t),
            }
        }
    }
}

impl Kind {
    /// Of weights of a format.
    pub(super) fn of<F: formats::Format>() -> Self {
        match (F::FACTORS, F::MINS) {
            (false, false) => Self::Steps,
            (false, true) => Self::StepsAndMins,
            (true, false) => Self::StepsOfHalves,
            (true, true) => Self::StepsAndMinsOfHalves,
        }
    }
}

/// As [`prefetch`](super::prefetch), to the second-level cache: the first one has a panel.
#[inline]
pub(super) fn prefetch_for_later(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(size_of::<Line<f32>>()) {
        // SAFETY: reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line).cast()) };
    }
}

/// Largest multiple of a step in bytes.
const MAX_BYTE: f32 = 127.0;

/// Whether this CPU has tiles: all that have kernels do.
pub(super) fn has_tiles() -> bool {
    true
}

/// The fastest tiles of this CPU.
pub(super) fn fastest_tiles() -> Tiles {
    if has_avx512() { avx512::TILES } else { TILES }
}

/// 32 values as words of two integers, times a step.
#[derive(Clone, Copy)]
pub(super) struct Integers {
    pub(super) words: [__m256i; 2],
    step: f32,
}

impl Integers {
    /// Values rounded to multiples of 1/`largest` of the largest.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round(x: [__m256; 4], largest: f32) -> Self {
        let [a, b, c, d] = x.map(|x| abs_bits(x));
        let most = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
        let most = across(most, |a, b| _mm_max_epi32(a, b));
        let most = f32::from_bits(most.cast_unsigned());
        let (step, inverse) = if !most.is_finite() {
            (f32::NAN, 0.0)
        } else if most > TINY {
            (most / largest, largest / most)
        } else {
            (0.0, 0.0)
        };
        let inverse = _mm256_set1_ps(inverse);
        let [a, b, c, d] = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
        // Packing interleaves the halves of its operands.
        let words = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
        let words = [words(a, b), words(c, d)];
        Self { words, step }
    }

    /// Values of a block, rounded.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn round_block(x: &[f32; BLOCK], largest: f32) -> Self {
        // SAFETY: loads within the array.
        let x = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) });
        Self::round(x, largest)
    }

    /// What stands beside the integers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn scales(self) -> Rounded {
        let [first, second] = self.half_sums();
        Rounded {
            step: self.step,
            sum: (first + second) as f32,
            half_sum: first as f32,
        }
    }

    /// The sums of the integers of each half.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn half_sums(self) -> [i32; 2] {
        let pairs = |x| _mm256_madd_epi16(x, _mm256_set1_epi16(1));
        self.words
            .map(|x| across(pairs(x), |a, b| _mm_add_epi32(a, b)))
    }

    /// Stores the integers as high and low bytes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn store_bytes(self, to: &mut Bytes) {
        let high = self
            .words
            .map(|x| _mm256_srai_epi16::<7>(_mm256_add_epi16(x, _mm256_set1_epi16(64))));
        let low = [0, 1].map(|i| _mm256_sub_epi16(self.words[i], _mm256_slli_epi16::<7>(high[i])));
        store([high, low].map(|x| packed_bytes(x)), to);
    }
}

/// Integers of 16 bits as bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn packed_bytes([a, b]: [__m256i; 2]) -> __m256i {
    // Packing interleaves the halves of its operands.
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(a, b))
}

/// Words of [`formats::GROUP`] rows as columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn columns(rows: [__m256i; 8]) -> [__m256i; 8] {
    transpose(rows.map(|x| _mm256_castsi256_ps(x))).map(|x| _mm256_castps_si256(x))
}

/// Writes eight lanes of a line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store_lanes<T>(x: __m256i, to: &mut Line<T>, lane: usize) {
    const { assert!(size_of::<T>() == 4) };
    let to = &mut to.0[lane..lane + 8];
    // SAFETY: eight values of 32 bits.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) };
}

/// Writes the first `n` of a group's sums, or all eight if there are more.
///
/// # Safety
/// There must be room for them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store_group(sums: __m256, to: *mut f32, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if n >= formats::GROUP {
            _mm256_storeu_ps(to, sums);
        } else {
            let mut lanes = [0.0f32; formats::GROUP];
            _mm256_storeu_ps(lanes.as_mut_ptr(), sums);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(x: [__m256i; 2], to: &mut [f32; WORDS]) {
    // SAFETY: within the array.
    unsafe {
        _mm256_storeu_si256(to.as_mut_ptr().cast(), x[0]);
        _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), x[1]);
    }
}

/// Absolute values as integers, which have the same order. What is infinite or not a number is above all others.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn abs_bits(x: __m256) -> __m256i {
    _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0), x))
}

/// All elements reduced to one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn across(x: __m256i, f: impl Fn(__m128i, __m128i) -> __m128i) -> i32 {
    let x = f(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = f(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    let x = f(x, _mm_shuffle_epi32::<0b10_11_00_01>(x));
    _mm_cvtsi128_si32(x)
}

/// Rows to columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
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
    std::array::from_fn(|i| {
        let (x, y) = four[i % 4];
        if i < 4 {
            _mm256_permute2f128_ps::<0x20>(x, y)
        } else {
            _mm256_permute2f128_ps::<0x31>(x, y)
        }
    })
}

/// Rounds a block to words of two multiples of a step each, and to bytes where they are wanted.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn round_row(
    x: &[f32; BLOCK],
    words: &mut [f32; WORDS],
    bytes: Option<&mut Bytes>,
) -> Rounded {
    let rounded = Integers::round_block(x, MAX);
    store(rounded.words, words);
    if let Some(bytes) = bytes {
        rounded.store_bytes(bytes);
    }
    rounded.scales()
}
