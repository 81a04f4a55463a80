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
