//! Panels of weights.
//!
//! Eight rows of a block, 256 bytes, stand together: what a [tile](super::tile) reads of a block. For dot products that is a word of four bytes of each row, then the
//! next word of each; for products of matrices a word is eight bytes.

use super::super::bytes::{Both, ByteBlocks, Kind, LANES, QUADS};
use super::super::for_each_block;
use super::formats::{Format, GROUP, Units, Visit, groups, visit};
use super::tile::ROWS;
use super::{Bytes, columns, has_matrices};
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
    unsafe fn copy<F: Format, const MATRICES: bool>(self) -> Kind {
        const { assert!(!(F::HALVES && F::MINS)) };
        let parts = if F::HALVES { 2 } else { 1 };
        for (first, rows) in groups(self.first, self.row_bytes, self.rows) {
            let mut units = rows;
            for block in (0..self.blocks).step_by(F::BLOCKS) {
                // SAFETY: units of these rows.
                let scales = unsafe { F::scales(units) };
                for_each_block!(F, I, {
                    // SAFETY: as above.
                    let rows = unsafe { integers::<F, I>(units) };
                    let words = &mut self.words[(block + I) * QUADS..(block + I + 1) * QUADS];
                    put_block::<MATRICES>(words, first, &rows);
                    for part in 0..parts {
                        let to = &mut self.steps[(block + I) * parts + part];
                        put(to, first, scales.steps[part][I]);
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
        unsafe {
            match has_matrices() {
                true => self.copy::<F, true>(),
                false => self.copy::<F, false>(),
            }
        }
    }
}

/// Block `I` of the rows' units, as what the integers stand for.
///
/// # Safety
/// The units must exist.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn integers<F: Format, const I: usize>(units: Units) -> [Bytes; GROUP] {
    let mut rows = [[vdupq_n_s8(0); 2]; GROUP];
    for (r, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let [first, second] = unsafe { F::bytes(units.of(r), I) };
        let offset = vdupq_n_s8(F::OFFSET);
        *row = [vsubq_s8(first, offset), vsubq_s8(second, offset)];
    }
    rows
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
fn put_block<const MATRICES: bool>(to: &mut [Both<f32>], first: usize, rows: &[Bytes; GROUP]) {
    /// Of eight rows.
    const BYTES: usize = ROWS * 4 * QUADS;
    let lines = to.as_flattened_mut();
    let lines = &mut lines[first / ROWS * (BYTES / 64)..][..BYTES / 64];
    let to = lines.as_mut_ptr().cast::<u8>();
    let row = first % ROWS;
    for half in 0..2 {
        let [a, b, c, d] = rows.map(|row| vreinterpretq_u64_s8(row[half]));
        let stored = if MATRICES {
            let (first, second) = (8 * row, 8 * (ROWS + row));
            [
                (vzip1q_u64(a, b), first),
                (vzip1q_u64(c, d), first + 16),
                (vzip2q_u64(a, b), second),
                (vzip2q_u64(c, d), second + 16),
            ]
        } else {
            let [a, b, c, d] = columns([a, b, c, d].map(|x| vreinterpretq_u32_u64(x)));
            let at = |word: usize| 4 * (word * ROWS + row);
            [
                (vreinterpretq_u64_u32(a), at(0)),
                (vreinterpretq_u64_u32(b), at(1)),
                (vreinterpretq_u64_u32(c), at(2)),
                (vreinterpretq_u64_u32(d), at(3)),
            ]
        };
        for (x, at) in stored {
            // SAFETY: within the lines of eight rows.
            unsafe { vst1q_u8(to.add(BYTES / 2 * half + at), vreinterpretq_u8_u64(x)) };
        }
    }
}
