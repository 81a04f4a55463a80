//! Other CPUs attend with ggml.

use super::{Run, Tiles};

pub(super) fn available() -> bool {
    false
}

pub(super) unsafe fn unpack_keys(_: Run, _: &mut [f32]) {
    unreachable!("not available")
}

pub(super) unsafe fn unpack_values(_: Run, _: &mut [f32]) {
    unreachable!("not available")
}

pub(super) fn tiles() -> Tiles {
    unreachable!("not available")
}
