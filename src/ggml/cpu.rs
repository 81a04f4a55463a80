//! What ggml was built for: unlike our kernels it is compiled for one CPU.

use crate::file::types::GgmlType;
use crate::kernels::{Bits, GgmlBuild, faster_than};
use ggml_sys as sys;

/// To how many bits `t` rows are rounded where our product with weights of type `ty` is faster than this ggml's; `None` where it is not.
pub(crate) fn faster_than_ggml(ty: GgmlType, t: usize) -> Option<Bits> {
    // SAFETY: pure queries of how ggml was compiled.
    let [avx2, avx512] = unsafe { [sys::ggml_cpu_has_avx2(), sys::ggml_cpu_has_avx512()] };
    let ggml = match (avx2 != 0, avx512 != 0) {
        (_, true) => GgmlBuild::Avx512,
        (true, false) => GgmlBuild::Avx2,
        (false, false) => GgmlBuild::Baseline,
    };
    faster_than(ggml, ty, t)
}
