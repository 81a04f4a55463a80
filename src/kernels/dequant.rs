//! Tiles of a weight matrix as the values that they stand for.

use super::gemm::NR;
use super::prefetch;
use crate::file::types::GgmlType;

/// Columns of a tile at most: the largest block.
pub(super) const MAX_COLUMNS: usize = 256;

/// Whole blocks of some rows of a matrix.
pub(super) struct Tile {
    pub(super) ty: GgmlType,
    pub(super) to_f32: RowToF32,
    /// The first row, from its beginning.
    pub(super) rows: *const u8,
    pub(super) row_bytes: usize,
    /// Rows.
    pub(super) n: usize,
    /// First column, where a block begins.
    pub(super) k0: usize,
    /// Columns, at most [`MAX_COLUMNS`].
    pub(super) k: usize,
}

impl Tile {
    /// The tile's first block of row `n`.
    ///
    /// # Safety
    /// `n` must be a row of the matrix.
    unsafe fn row(&self, n: usize) -> *const u8 {
        let bytes = self.k0 / self.ty.block_size() as usize * self.ty.type_size() as usize;
        // SAFETY: the caller's promise.
        unsafe { self.rows.add(n * self.row_bytes + bytes) }
    }

    /// Has a row that is read soon fetched from memory: rows lie too far apart for the CPU to guess.
    ///
    /// # Safety
    /// `n` must be a row of the matrix.
    #[inline(always)]
    unsafe fn prefetch_after(&self, n: usize) {
        /// Rows between the one that is read and the one that is fetched.
        const AHEAD: usize = 16;
        let bytes = self.k / self.ty.block_size() as usize * self.ty.type_size() as usize;
        // SAFETY: the caller's row; addresses outside of the matrix are not fetched.
        let row = unsafe { self.row(n) };
        prefetch(row.wrapping_add(AHEAD * self.row_bytes), bytes);
    }
}

/// Writes the first values of a row of some type as F32, whole blocks of it: for the types that no kernel here unpacks itself.
///
/// # Safety
/// The second operand must hold as many values as the last one says, the third have room for them.
pub(crate) type RowToF32 = unsafe fn(GgmlType, *const u8, *mut f32, usize);

/// Writes a tile as panels of [`NR`] columns, `panel` values apart: a row of [`NR`] values for each row of the tile.
///
/// # Safety
/// The tile must lie in a matrix, `to` have room for its panels, the last one complete.
pub(super) unsafe fn to_f32(tile: &Tile, to: *mut f32, panel: usize) {
    let mut row = [0.0f32; MAX_COLUMNS];
    for n in 0..tile.n {
        // SAFETY: row n of the tile; `row` holds MAX_COLUMNS values.
        unsafe {
            tile.prefetch_after(n);
            (tile.to_f32)(tile.ty, tile.row(n), row.as_mut_ptr(), tile.k);
        }
        for (i, values) in row[..tile.k.next_multiple_of(NR)]
            .as_chunks::<NR>()
            .0
            .iter()
            .enumerate()
        {
            // SAFETY: row n of panel i.
            unsafe {
                to.add(i * panel + n * NR)
                    .cast::<[f32; NR]>()
                    .write(*values)
            };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn to_bf16_pairs(_: &Tile, _: *mut u32, _: usize) {
    unreachable!("Rounding::of never says BF16")
}

#[cfg(target_arch = "x86_64")]
pub(super) use bf16::to_bf16_pairs;

#[cfg(target_arch = "x86_64")]
mod bf16;

#[cfg(test)]
mod tests;
