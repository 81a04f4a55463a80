//! Row conversion with ggml's own kernels, so that what is written here equals what a graph would write.

use crate::file::types::GgmlType;
use ggml_sys as sys;

/// Quantizes whole rows of `width` values and appends their blocks.
///
/// # Panics
/// If `width` is no multiple of the type's block size or `values` holds no whole number of rows.
pub(crate) fn quantize_rows(ty: GgmlType, values: &[f32], width: usize, out: &mut Vec<u8>) {
    assert!(values.len().is_multiple_of(width));
    let row_bytes = ty.row_bytes(width as u64).expect("whole blocks") as usize;
    // SAFETY: initializes ggml's lookup tables once.
    unsafe { sys::ggml_cpu_init() };
    for row in values.chunks_exact(width) {
        let start = out.len();
        out.resize(start + row_bytes, 0);
        // SAFETY: writes `row_bytes` bytes.
        unsafe { row_from_f32(ty, row, out[start..].as_mut_ptr()) };
    }
}

/// A row as blocks of type `ty`.
///
/// # Safety
/// `to` must have room for them; ggml's tables must be there, which computing any graph sees to.
///
/// # Panics
/// If ggml cannot write the type.
pub(super) unsafe fn row_from_f32(ty: GgmlType, row: &[f32], to: *mut u8) {
    // SAFETY: the traits table is static.
    let from_float = unsafe { (*sys::ggml_get_type_traits_cpu(ty as u32)).from_float };
    let from_float = from_float.expect("the type can be written");
    // SAFETY: the caller's promise.
    unsafe { from_float(row.as_ptr(), to.cast(), row.len() as i64) };
}

/// `n` values of whole blocks as F32.
///
/// # Panics
/// If they take another number of bytes, or are of no type of weights.
pub(crate) fn rows_to_f32(ty: GgmlType, from: &[u8], n: usize) -> Vec<f32> {
    assert_eq!(ty.row_bytes(n as u64), Some(from.len() as u64));
    let mut out = vec![0.0; n];
    // SAFETY: as many values of the type, and room for them.
    unsafe { row_to_f32(ty, from.as_ptr(), out.as_mut_ptr(), n) };
    out
}

/// Whole blocks of a row as F32.
///
/// # Safety
/// `from` must hold `n` values of the type, `to` have room for them.
pub(crate) unsafe fn row_to_f32(ty: GgmlType, from: *const u8, to: *mut f32, n: usize) {
    // SAFETY: the caller's promise; the traits table is static. F16 and BF16 have vectorized functions beside it.
    unsafe {
        match ty {
            GgmlType::F32 => std::ptr::copy_nonoverlapping(from, to.cast(), 4 * n),
            GgmlType::F16 => sys::ggml_cpu_fp16_to_fp32(from.cast(), to, n as i64),
            GgmlType::BF16 => sys::ggml_cpu_bf16_to_fp32(from.cast(), to, n as i64),
            _ => {
                let to_float = (*sys::ggml_get_type_traits(ty as u32)).to_float;
                to_float.expect("a type of weights")(from.cast(), to, n as i64);
            }
        }
    }
}
