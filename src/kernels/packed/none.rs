//! Other CPUs multiply with ggml.

use super::bytes::{ByteBlocks, ByteTile, Kind, QUADS};
use super::{BLOCK, Dots, Rounded};
use crate::file::types::GgmlType;

pub(super) use super::no_words::{fastest_tiles, round_row};

pub(super) fn has_bytes() -> bool {
    false
}

pub(super) fn has_tiles() -> bool {
    false
}

pub(super) fn has_starts() -> bool {
    false
}

pub(super) fn has_plain_sums() -> bool {
    false
}

pub(super) fn byte_tile_height() -> usize {
    1
}

pub(super) unsafe fn round_to_bytes(_: &[f32; BLOCK], _: &mut [f32; QUADS]) -> Rounded {
    unreachable!("not available")
}

pub(super) fn has_format(_: GgmlType) -> bool {
    false
}

impl Dots {
    pub(in super::super) unsafe fn compute(self, _: GgmlType) -> bool {
        unreachable!("not available")
    }
}

impl ByteBlocks<'_> {
    pub(super) unsafe fn unpack(self, _: GgmlType) -> Option<Kind> {
        unreachable!("not available")
    }
}

impl ByteTile {
    pub(super) unsafe fn compute(&self, _: usize) {
        unreachable!("not available")
    }
}
