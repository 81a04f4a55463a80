//! Panels of weights.
//!
//! Eight rows of a block, 256 bytes, stand together: what a [tile](super::tile) reads of a block. For dot products that is a word of four bytes of each row, then the
//! next word of each; for products of matrices a word is eight bytes.

use super::super::Line;
use super::super::bytes::{Both, ByteBlocks, Kind, LANES, QUADS};
use super::formats::{Format, GROUP, Visit, for_each_block, groups, visit};
use super::tile::{ROWS, has_matrices};
use super::{Bytes, columns};
use crate::file::types::GgmlType;
use std::arch::aarch64::*;

impl ByteBlocks<'_> {
    /// Unpacks blocks of type `ty`, and says what they have. `None` if there is no format for it.
    ///
    /// # Safety
    /// The rows must have the blocks.
    pub(in super::super) unsafe fn unpack(self, ty: GgmlType) -> Option<Kind> {
        // SAFETY: the caller's promise.
        unsafe { visit(ty, self) }
    }

    #[target_feature(enable = "neon")]
    unsafe fn copy<F: Format>(self) -> Kind {
        const { assert!(!(F::HALVES && F::MINS)) };
        let matrices = has_matrices();
        let parts = if F::HALVES { 2 } else { 1 };
        for (first, rows) in groups(self.first, self.row_bytes, self.rows) {
            let mut units = rows;
            for block in (0..self.blocks).step_by(F::BLOCKS) {
                // SAFETY: units of these rows.
                let scales = unsafe { F::scales(units) };
                for_each_block!(F, I, {
                    // SAFETY: as above.
                    let rows = [0, 1, 2, 3].map(|r| unsafe { F::bytes(units.of(r), I) });
                    let rows = rows.map(|row| row.map(|x| vsubq_s8(x, vdupq_n_s8(F::OFFSET))));
                    let words = &mut self.words[(block + I) * QUADS..(block + I + 1) * QUADS];
                    put_block(words, first, rows, matrices);
                    for (part, step) in scales.steps[I].into_iter().take(parts).enumerate() {
                        put(&mut self.steps[(block + I) * parts + part], first, step);
                    }
                    if F::MINS {
                        put(&mut self.mins[block + I], first, scales.mins[I]);
                    }
                });
                units = units.next::<F>();
            }
        }
        match (F::HALVES, F::MINS) {
            (false, false) => Kind::Steps,
            (false, true) => Kind::StepsAndMins,
            (true, _) => Kind::StepsOfHalves,
        }
    }
}

impl Visit for ByteBlocks<'_> {
    type Output = Kind;

    unsafe fn visit<F: Format>(self) -> Kind {
        // SAFETY: the caller's promise.
        unsafe { self.copy::<F>() }
    }
}

/// Writes a value of each row from row `first` on.
#[inline]
#[target_feature(enable = "neon")]
fn put(to: &mut Both<f32>, first: usize, x: float32x4_t) {
    let to = &mut to[first / LANES].0[first % LANES..][..GROUP];
    // SAFETY: four values.
    unsafe { vst1q_f32(to.as_mut_ptr(), x) };
}

/// Writes the integers of rows from row `first` on to their block of the panel.
#[inline]
#[target_feature(enable = "neon")]
fn put_block(to: &mut [Both<f32>], first: usize, rows: [Bytes; GROUP], matrices: bool) {
    const BYTES: usize = ROWS * 4 * QUADS;
    let to = to
        .as_flattened_mut()
        .as_chunks_mut::<{ BYTES / size_of::<Line<f32>>() }>()
        .0;
    let to = to[first / ROWS].as_mut_ptr().cast::<u8>();
    let row = first % ROWS;
    for half in 0..2 {
        let rows = rows.map(|row| vreinterpretq_u32_s8(row[half]));
        let stored = if matrices {
            let pair = |a, b| {
                let (a, b) = (vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b));
                [vzip1q_u64(a, b), vzip2q_u64(a, b)].map(|x| vreinterpretq_u8_u64(x))
            };
            let ([a, c], [b, d]) = (pair(rows[0], rows[1]), pair(rows[2], rows[3]));
            [(a, 0), (b, 16), (c, 8 * ROWS), (d, 8 * ROWS + 16)].map(|(x, at)| (x, at + 8 * row))
        } else {
            let words = columns(rows).map(|x| vreinterpretq_u8_u32(x));
            std::array::from_fn(|word| (words[word], 4 * (word * ROWS + row)))
        };
        for (x, at) in stored {
            // SAFETY: within the 256 bytes of eight rows.
            unsafe { vst1q_u8(to.add(BYTES / 2 * half + at), x) };
        }
    }
}
