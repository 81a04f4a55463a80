//! Panels of weights.

use super::super::for_each_block;
use super::super::{BLOCK, Blocks, Line, MAX, Mins, WIDTH, WORDS};
use super::formats::{Format, GROUP, Units, Visit, groups, visit};
use super::scales::Scales;
use super::{Integers, columns, store_lanes};
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

impl Blocks<'_> {
    /// Unpacks blocks of type `ty`, and says which minimums they have. `None` if there is no way but through F32.
    ///
    /// # Safety
    /// The rows must have as many blocks as there are steps, and the CPU AVX2, FMA and F16C.
    pub(in super::super) unsafe fn unpack(self, ty: GgmlType) -> Option<Mins> {
        // SAFETY: the caller's promise.
        unsafe {
            match ty {
                GgmlType::F32 => Some(self.round()),
                _ => visit(ty, self),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn copy<F: Format>(self) -> Mins {
        let blocks = self.words.as_chunks_mut::<WORDS>().0;
        for (lane, rows) in groups(self.first, self.row_bytes, self.rows) {
            let all = (blocks.chunks_mut(F::BLOCKS))
                .zip(self.steps.chunks_mut(F::BLOCKS))
                .zip(self.mins.chunks_mut(F::BLOCKS * F::PARTS));
            for (u, ((blocks, steps), mins)) in all.enumerate() {
                let units = Units::new::<F>(&rows, u);
                // SAFETY: unit u of these rows.
                unsafe {
                    let scales = F::scales(units);
                    for_each_block!(F, I, {
                        store_lanes(_mm256_castps_si256(scales.steps[I]), &mut steps[I], lane);
                        if F::MINS {
                            for (part, min) in scales.mins[I].into_iter().enumerate().take(F::PARTS)
                            {
                                let to = &mut mins[I * F::PARTS + part];
                                store_lanes(_mm256_castps_si256(min), to, lane);
                            }
                        }
                        copy_block::<F>(units, I, &scales, &mut blocks[I], lane);
                    });
                }
            }
        }
        match (F::MINS, F::FACTORS) {
            (false, _) => Mins::None,
            (true, false) => Mins::OfBlocks,
            (true, true) => Mins::OfHalves,
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn round(self) -> Mins {
        let blocks = self.words.as_chunks_mut::<WORDS>().0;
        for (lane, rows) in groups(self.first, self.row_bytes, self.rows) {
            for (b, (to, steps)) in blocks.iter_mut().zip(&mut *self.steps).enumerate() {
                // SAFETY: block b of these rows.
                let rounded = rows.map(|row| unsafe {
                    let block = row.cast::<[f32; BLOCK]>().wrapping_add(b);
                    Integers::round_block(&block.read_unaligned(), MAX)
                });
                for (r, rounded) in rounded.iter().enumerate() {
                    steps.0[lane + r] = rounded.step;
                }
                for (half, to) in to.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                    for (words, to) in columns(rounded.map(|r| r.words[half])).into_iter().zip(to) {
                        store_lanes(words, to, lane);
                    }
                }
            }
        }
        Mins::None
    }
}

impl Visit for Blocks<'_> {
    type Output = Mins;

    unsafe fn visit<F: Format>(self) -> Mins {
        // SAFETY: the caller's promise.
        unsafe { self.copy::<F>() }
    }
}

/// Block `i` of the rows' units in words of 16 bits, times their factors, as columns.
///
/// # Safety
/// The units must exist. The CPU must have AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn copy_block<F: Format>(
    units: Units,
    i: usize,
    scales: &Scales,
    to: &mut [Line<f32>; WORDS],
    lane: usize,
) {
    const { assert!(WIDTH.is_multiple_of(GROUP) && WORDS == 2 * GROUP) };
    // SAFETY: the caller's promise.
    unsafe {
        let offset = _mm256_set1_epi8(F::OFFSET.cast_signed());
        let bytes: [_; GROUP] =
            std::array::from_fn(|r| _mm256_sub_epi8(F::bytes(units.of(r), i), offset));
        let halves = [
            bytes.map(|x| _mm256_castsi256_si128(x)),
            bytes.map(|x| _mm256_extracti128_si256::<1>(x)),
        ];
        for (half, to) in to.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let words = halves[half].map(|x| _mm256_cvtepi8_epi16(x));
            let factor = scales.factors[i][half];
            let factor = _mm256_blend_epi16::<0b1010_1010>(factor, _mm256_slli_epi32::<16>(factor));
            for (words, to) in columns(words).into_iter().zip(to) {
                let words = match F::FACTORS {
                    true => _mm256_mullo_epi16(words, factor),
                    false => words,
                };
                store_lanes(words, to, lane);
            }
        }
    }
}
