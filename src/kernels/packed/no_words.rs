//! What stands in the place of kernels for [`Bits::Fourteen`](super::Bits) where there are none: [`has_words`](super::has_words) says so.

use super::{BLOCK, Blocks, Bytes, Mins, Rounded, Tiles, WORDS};
use crate::file::types::GgmlType;

pub(super) unsafe fn round_row(
    _: &[f32; BLOCK],
    _: &mut [f32; WORDS],
    _: Option<&mut Bytes>,
) -> Rounded {
    unreachable!("not available")
}

impl Blocks<'_> {
    pub(super) unsafe fn unpack(self, _: GgmlType) -> Option<Mins> {
        unreachable!("not available")
    }
}

pub(super) fn fastest_tiles() -> Tiles {
    unreachable!("not available")
}
