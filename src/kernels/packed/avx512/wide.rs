//! What [formats](super::super::avx2::formats) are made of, for a block of sixteen rows at a time: words of four values that stand next to each other,
//! lanes are rows. Rows are turned as they lie in memory, before what shares a byte is told apart: that is done once for sixteen rows, and half of the
//! registers are turned.

use super::super::avx2::formats::{GROUP, Levels, table};
use super::super::bytes::QUADS;
use super::two::Sixteen;
use std::arch::x86_64::*;

/// A block of each row.
pub(in super::super) type Quads = [__m512i; QUADS];

/// A place in each of sixteen rows.
#[derive(Clone, Copy)]
pub(in super::super) struct At<'a> {
    rows: &'a Sixteen,
    /// From where the rows begin.
    bytes: usize,
}

impl<'a> At<'a> {
    #[inline]
    pub(super) fn new(rows: &'a Sixteen, bytes: usize) -> Self {
        Self { rows, bytes }
    }

    /// Some bytes behind it.
    #[inline]
    pub(in super::super) fn add(self, bytes: usize) -> Self {
        Self {
            bytes: self.bytes + bytes,
            ..self
        }
    }

    /// Where it is in row `r`.
    #[inline]
    pub(super) fn of(self, r: usize) -> *const u8 {
        self.rows[r / GROUP][r % GROUP].wrapping_add(self.bytes)
    }
}

/// 32 bytes. Quarters go to their places as they are loaded, which any port does, so that fewer shuffles are left than if whole rows were loaded: where shuffles have one
/// port, this is more to the point than that it takes more instructions.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) unsafe fn load(at: At) -> Quads {
    // SAFETY: the caller has them, and the features.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (columns(at), columns(at.add(16))) };
    [a, b, c, d, e, f, g, h]
}

/// 16 bytes, as four columns of four.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn columns(at: At) -> [__m512i; 4] {
    // SAFETY: the caller has them.
    let row = |r| unsafe { _mm_loadu_si128(at.of(r).cast()) };
    let four = |r| {
        let x = _mm512_castsi128_si512(row(r));
        let x = _mm512_inserti32x4::<1>(x, row(r + 4));
        let x = _mm512_inserti32x4::<2>(x, row(r + 8));
        _mm512_inserti32x4::<3>(x, row(r + 12))
    };
    turned([four(0), four(1), four(2), four(3)])
}

/// Within quarters, rows to columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn turned([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ef, gh),
        _mm512_unpackhi_epi64(ef, gh),
    ]
}

/// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) unsafe fn nibbles(at: At) -> Quads {
    // SAFETY: the caller has them, and the features.
    let both = unsafe { columns(at) };
    std::array::from_fn(|i| {
        let both = match i {
            0..4 => both[i],
            _ => _mm512_srli_epi16::<4>(both[i - 4]),
        };
        _mm512_and_si512(both, _mm512_set1_epi8(15))
    })
}

/// Bits of each byte from `from` on, as many as the mask has, moved to `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn bits(mut x: Quads, from: usize, mask: i8, to: usize) -> Quads {
    let mask = _mm512_set1_epi8(mask << to);
    for x in &mut x {
        let moved = if from > to {
            _mm512_srl_epi16(*x, _mm_cvtsi32_si128((from - to) as i32))
        } else {
            _mm512_sll_epi16(*x, _mm_cvtsi32_si128((to - from) as i32))
        };
        *x = _mm512_and_si512(moved, mask);
    }
    x
}

/// Bits of either.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn or(mut a: Quads, b: Quads) -> Quads {
    for (a, b) in a.iter_mut().zip(b) {
        *a = _mm512_or_si512(*a, b);
    }
    a
}

/// Integers with a sign, plus 128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn without_sign(mut x: Quads) -> Quads {
    for x in &mut x {
        *x = _mm512_xor_si512(*x, _mm512_set1_epi8(i8::MIN));
    }
    x
}

/// 32 bits as the fifth bits of 32 bytes. 16 bytes are read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) unsafe fn fifth_bits(at: At) -> Quads {
    // SAFETY: the caller has them, and the features.
    let [all, ..] = unsafe { columns(at) };
    let lanes = _mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c);
    std::array::from_fn(|i| {
        let byte = _mm_add_epi8(lanes, _mm_set1_epi8(i as i8 / 2));
        let spread = _mm512_shuffle_epi8(all, _mm512_broadcast_i32x4(byte));
        let bit = _mm512_set1_epi32(match i % 2 {
            0 => 0x0804_0201,
            _ => 0x8040_2010_u32.cast_signed(),
        });
        _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(spread, bit), 16)
    })
}

/// Four bits as the values that a table gives them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn levels(of: Levels, mut x: Quads) -> Quads {
    let levels = _mm512_broadcast_i32x4(table(of));
    for x in &mut x {
        *x = _mm512_shuffle_epi8(levels, *x);
    }
    x
}
