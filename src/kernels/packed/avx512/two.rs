//! Two blocks of sixteen rows of weights at a time: a register holds both of a row.

use super::super::avx2::formats::{Format, GROUP, Scales, Units, groups};
use super::super::bytes::QUADS;
use super::super::for_each_block;
use super::super::prefetch;
use std::arch::x86_64::*;

/// Rows that are read side by side: lanes of a register.
pub(super) const ROWS: usize = 2 * GROUP;

/// Where [`ROWS`] rows begin.
pub(super) type Sixteen = [[*const u8; GROUP]; 2];

/// Rows by sixteens. Where there are too few, others stand for those that are missing.
pub(super) fn sixteens(
    first: *const u8,
    row_bytes: usize,
    rows: usize,
) -> impl Iterator<Item = Sixteen> {
    let mut eights = groups(first, row_bytes, rows).map(|(_, rows)| rows);
    std::iter::from_fn(move || {
        let first = eights.next()?;
        Some([first, eights.next().unwrap_or(first)])
    })
}

/// Blocks of [`ROWS`] rows of weights, two by two.
pub(super) trait Visit {
    /// Called for each two blocks, in order. Which blocks of their units they are is a constant, which shifts depend on.
    ///
    /// # Safety
    /// The CPU must have AVX-512 with VNNI.
    unsafe fn visit<F: Format, const I: usize>(&mut self, two: Two<I>);
}

/// Two blocks of the rows, of which the first is block `I` of its unit.
pub(super) struct Two<'a, const I: usize> {
    /// Which block of the rows the first one is.
    pub(super) first: usize,
    /// How many there are: a last block stands for the second one, too.
    pub(super) there: usize,
    blocks: [Block<'a>; 2],
}

/// A block's unit.
#[derive(Clone, Copy)]
struct Block<'a> {
    units: [Units<'a>; 2],
    scales: &'a [Scales; 2],
}

impl<const I: usize> Two<'_, I> {
    /// Which block of its unit one of the two is.
    const fn index<F: Format>(block: usize) -> usize {
        match F::BLOCKS {
            1 => 0,
            _ => I + block,
        }
    }

    /// Both blocks of a row, as [`Format::bytes`] gives them.
    ///
    /// # Safety
    /// The units must exist. The CPU must have AVX-512 F, BW, DQ and VL.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn bytes<F: Format>(&self, row: usize) -> __m512i {
        // SAFETY: the caller's promise.
        let of = |b: usize| unsafe {
            let at = self.blocks[b].units[row / GROUP].of(row % GROUP);
            F::bytes(at, Self::index::<F>(b))
        };
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(of(0)), of(1))
    }

    /// The integers in words of four that stand next to each other, eight of each block. Lanes are rows.
    ///
    /// # Safety
    /// As for [`Two::bytes`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn quads<F: Format>(&self) -> [[__m512i; QUADS]; 2] {
        let offset = _mm512_set1_epi8(F::OFFSET.cast_signed());
        // SAFETY: the caller's promise.
        let row = |r| _mm512_sub_epi8(unsafe { self.bytes::<F>(r) }, offset);
        // Of four rows: quad i of each quarter in register i.
        let four = |r: usize| {
            let [a, b, c, d] = [row(r), row(r + 1), row(r + 2), row(r + 3)];
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ef, gh),
                _mm512_unpackhi_epi64(ef, gh),
            ]
        };
        let [a, b, c, d] = [four(0), four(4), four(8), four(12)];
        let quads = |i: usize| quarters([a[i], b[i], c[i], d[i]]);
        let [i, j, k, l] = [quads(0), quads(1), quads(2), quads(3)];
        let block = |b: usize| {
            let ([i, m], [j, n], [k, o], [l, p]) = (i[b], j[b], k[b], l[b]);
            [i, j, k, l, m, n, o, p]
        };
        [block(0), block(1)]
    }

    /// Steps of one of the blocks; of its half, if halves have factors. Lanes are rows.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn steps<F: Format>(&self, block: usize, half: usize) -> __m512 {
        let (scales, index) = (self.blocks[block].scales, Self::index::<F>(block));
        let steps = lanes([scales[0].steps[index], scales[1].steps[index]]);
        if !F::FACTORS {
            return steps;
        }
        let factors = |s: &Scales| _mm256_cvtepi32_ps(s.factors[index][half]);
        _mm512_mul_ps(steps, lanes([factors(&scales[0]), factors(&scales[1])]))
    }

    /// Minimums of one of the blocks; of its half, if halves have factors. Lanes are rows.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn mins<F: Format>(&self, block: usize, half: usize) -> __m512 {
        let (scales, index) = (self.blocks[block].scales, Self::index::<F>(block));
        lanes([scales[0].mins[index][half], scales[1].mins[index][half]])
    }
}

/// Visits all blocks of some rows, and fetches those of the next rows from memory.
///
/// # Safety
/// The rows must have so many blocks, whole units of them. The CPU must have AVX-512 with VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn for_each_two<F: Format>(
    rows: Sixteen,
    row_bytes: usize,
    blocks: usize,
    visitor: &mut impl Visit,
) {
    // A unit has one block, or an even number.
    let step = if F::BLOCKS == 1 { 2 } else { 1 };
    for u in (0..blocks / F::BLOCKS).step_by(step) {
        let units = |u: usize| [Units::new::<F>(&rows[0], u), Units::new::<F>(&rows[1], u)];
        // SAFETY: these units of the rows.
        let scales = |[a, b]: [Units; 2]| unsafe { [F::scales(a), F::scales(b)] };
        let here = units(u);
        for r in 0..ROWS {
            let next = here[r / GROUP].of(r % GROUP).wrapping_add(ROWS * row_bytes);
            prefetch(next, step * F::BYTES);
        }
        let first_scales = scales(here);
        let first = Block {
            units: here,
            scales: &first_scales,
        };
        if F::BLOCKS == 1 {
            let there = (blocks - u).min(2);
            let behind = units(u + there - 1);
            let second_scales = scales(behind);
            let second = Block {
                units: behind,
                scales: &second_scales,
            };
            let two = Two::<0> {
                first: u,
                there,
                blocks: [first, second],
            };
            // SAFETY: the caller's promise.
            unsafe { visitor.visit::<F, 0>(two) };
        } else {
            for_each_block!(F, I, {
                if I.is_multiple_of(2) {
                    let two = Two::<I> {
                        first: u * F::BLOCKS + I,
                        there: 2,
                        blocks: [first; 2],
                    };
                    // SAFETY: the caller's promise.
                    unsafe { visitor.visit::<F, I>(two) };
                }
            });
        }
    }
}

/// Registers of four rows each, whose quarters are the halves of their first block and of their second one, as both halves of each block: lanes are
/// all sixteen rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters([a, b, c, d]: [__m512i; 4]) -> [[__m512i; 2]; 2] {
    let first = [even_quarters(a, b), even_quarters(c, d)];
    let second = [odd_quarters(a, b), odd_quarters(c, d)];
    [
        [
            even_quarters(first[0], first[1]),
            even_quarters(second[0], second[1]),
        ],
        [
            odd_quarters(first[0], first[1]),
            odd_quarters(second[0], second[1]),
        ],
    ]
}

/// Quarters 0 and 2 of both.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn even_quarters(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b)
}

/// Quarters 1 and 3 of both.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn odd_quarters(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b)
}

/// Both halves of the rows.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512dq")]
fn lanes([first, second]: [__m256; 2]) -> __m512 {
    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(first), second)
}
