//! Parts of kernels for AArch64.

use std::arch::aarch64::*;
use std::arch::asm;

/// Numbers in half precision as F32. The standard library's intrinsic is not stable yet.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn from_half(x: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: every AArch64 CPU has the instruction, which reads and writes these registers only.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {x:v}.4h",
            wide = out(vreg) wide, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    wide
}

/// Rows of four words as columns.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn columns([a, b, c, d]: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
    let (ac, bd) = (vzip1q_u32(a, c), vzip1q_u32(b, d));
    let (eg, fh) = (vzip2q_u32(a, c), vzip2q_u32(b, d));
    [
        vzip1q_u32(ac, bd),
        vzip2q_u32(ac, bd),
        vzip1q_u32(eg, fh),
        vzip2q_u32(eg, fh),
    ]
}
