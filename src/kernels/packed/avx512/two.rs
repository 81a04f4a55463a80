//! Two blocks of sixteen rows of weights at a time: a register holds both of a row.

use super::super::avx2::formats::{Format, GROUP, groups};
use super::super::avx2::prefetch_for_later;
use super::super::{for_each_block, prefetch};
use super::scales::WideScales;
use super::wide::{At, Quads};
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
    /// How many rows behind these those are that are visited next with the same columns.
    const AHEAD: usize;
    /// Whether they are visited before much else is read or written.
    const SOON: bool;

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
    at: At<'a>,
    scales: &'a WideScales,
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
        let of = |b: usize| unsafe { F::bytes(self.blocks[b].at.of(row), Self::index::<F>(b)) };
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(of(0)), of(1))
    }

    /// The integers in words of four that stand next to each other, eight of each block. Lanes are rows.
    ///
    /// # Safety
    /// As for [`Two::bytes`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn quads<F: Format>(&self) -> [Quads; 2] {
        // SAFETY: the caller's promise.
        let of = |b: usize| unsafe { F::quads(self.blocks[b].at, Self::index::<F>(b)) };
        [of(0), of(1)]
    }

    /// Steps of one of the blocks; of its half, if halves have factors. Lanes are rows.
    #[inline]
    pub(super) fn steps<F: Format>(&self, block: usize, half: usize) -> __m512 {
        self.blocks[block].scales.steps[Self::index::<F>(block)][half]
    }

    /// Minimums of one of the blocks; of its half, if halves have factors. Lanes are rows.
    #[inline]
    pub(super) fn mins<F: Format>(&self, block: usize, half: usize) -> __m512 {
        self.blocks[block].scales.mins[Self::index::<F>(block)][half]
    }
}

/// Visits all blocks of some rows, and fetches those of the rows that are visited next from memory.
///
/// # Safety
/// The rows must have so many blocks, whole units of them. The CPU must have AVX-512 with VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn for_each_two<F: Format, V: Visit>(
    rows: Sixteen,
    row_bytes: usize,
    blocks: usize,
    visitor: &mut V,
) {
    // A unit has one block, or an even number.
    let step = if F::BLOCKS == 1 { 2 } else { 1 };
    for u in (0..blocks / F::BLOCKS).step_by(step) {
        let unit = |u: usize| At::new(&rows, u * F::BYTES);
        let here = unit(u);
        for r in 0..ROWS {
            let next = here.of(r).wrapping_add(V::AHEAD * row_bytes);
            match V::SOON {
                true => prefetch(next, step * F::BYTES),
                false => prefetch_for_later(next, step * F::BYTES),
            }
        }
        // SAFETY: these units of the rows.
        let first_scales = unsafe { F::wide_scales(here) };
        let first = Block {
            at: here,
            scales: &first_scales,
        };
        if F::BLOCKS == 1 {
            let there = (blocks - u).min(2);
            let behind = unit(u + there - 1);
            // SAFETY: as above.
            let second_scales = unsafe { F::wide_scales(behind) };
            let second = Block {
                at: behind,
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
