//! What [formats](super::formats) are made of, for a block of eight rows at a time: words of four values that stand next to each other, lanes are rows. As for
//! [sixteen](super::super::avx512::wide), rows are turned as they lie in memory.

use super::super::bytes::QUADS;
use super::formats::{Levels, Units, masked, table};
use std::arch::x86_64::*;

/// A block of each row.
pub(in super::super) type Quads = [__m256i; QUADS];

/// 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn load(at: Units) -> Quads {
    // SAFETY: the caller has them, and the features.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (columns(at), columns(at.add(16))) };
    [a, b, c, d, e, f, g, h]
}

/// 16 bytes, as four columns of four.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn columns(at: Units) -> [__m256i; 4] {
    // SAFETY: the caller has them.
    let row = |r| unsafe { _mm_loadu_si128(at.of(r).cast()) };
    let [a, b, c, d] = [0, 1, 2, 3].map(|r| _mm256_set_m128i(row(r + 4), row(r)));
    let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
    let (ef, gh) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab, cd),
        _mm256_unpackhi_epi64(ab, cd),
        _mm256_unpacklo_epi64(ef, gh),
        _mm256_unpackhi_epi64(ef, gh),
    ]
}

/// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn nibbles(at: Units) -> Quads {
    // SAFETY: the caller has them, and the features.
    let both = unsafe { columns(at) };
    std::array::from_fn(|i| {
        let both = match i {
            0..4 => both[i],
            _ => _mm256_srli_epi16::<4>(both[i - 4]),
        };
        masked(both, 15)
    })
}

/// Bits of each byte from `from` on, as many as the mask has, moved to `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn bits(mut x: Quads, from: usize, mask: i8, to: usize) -> Quads {
    for x in &mut x {
        *x = super::formats::bits(*x, from, mask, to);
    }
    x
}

/// Bits of either.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn or(mut a: Quads, b: Quads) -> Quads {
    for (a, b) in a.iter_mut().zip(b) {
        *a = _mm256_or_si256(*a, b);
    }
    a
}

/// Integers with a sign, plus 128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn without_sign(mut x: Quads) -> Quads {
    for x in &mut x {
        *x = super::formats::without_sign(*x);
    }
    x
}

/// 32 bits as the fifth bits of 32 bytes. 16 bytes are read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn fifth_bits(at: Units) -> Quads {
    // SAFETY: the caller has them, and the features.
    let [all, ..] = unsafe { columns(at) };
    let lanes = _mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c);
    std::array::from_fn(|i| {
        let byte = _mm_add_epi8(lanes, _mm_set1_epi8(i as i8 / 2));
        let spread = _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(byte));
        let bit = _mm256_set1_epi32(match i % 2 {
            0 => 0x0804_0201,
            _ => 0x8040_2010_u32.cast_signed(),
        });
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        masked(set, 16)
    })
}

/// Four bits as the values that a table gives them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn levels(of: Levels, mut x: Quads) -> Quads {
    let levels = _mm256_broadcastsi128_si256(table(of));
    for x in &mut x {
        *x = _mm256_shuffle_epi8(levels, *x);
    }
    x
}
