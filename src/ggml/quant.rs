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
    // SAFETY: initializes ggml's lookup tables once; the traits table is static.
    let from_float = unsafe {
        sys::ggml_cpu_init();
        (*sys::ggml_get_type_traits_cpu(ty as u32)).from_float
    };
    let from_float = from_float.expect("the type can be written");
    for row in values.chunks_exact(width) {
        let start = out.len();
        out.resize(start + row_bytes, 0);
        // SAFETY: reads `width` values, writes `row_bytes` bytes.
        unsafe { from_float(row.as_ptr(), out[start..].as_mut_ptr().cast(), width as i64) };
    }
}
