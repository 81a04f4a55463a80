//! ggml's own quantizers, safe to call.

use ggml_sys as sys;
use ggraft::file::types::GgmlType;

/// Converts rows of `n_per_row` floats to `ty`, without an importance matrix.
///
/// # Panics
/// If `src` is not whole rows, a row is not whole blocks of `ty`, or `ty` cannot be made without an importance matrix
/// (see [`can_quantize`]).
pub fn quantize(ty: GgmlType, src: &[f32], n_per_row: usize) -> Vec<u8> {
    assert!(can_quantize(ty), "{} needs an importance matrix", ty.name());
    assert!(
        n_per_row > 0 && src.len().is_multiple_of(n_per_row),
        "{} floats are not rows of {n_per_row}",
        src.len()
    );
    let row = ty
        .row_bytes(n_per_row as u64)
        .unwrap_or_else(|| panic!("rows of {n_per_row} are not whole {} blocks", ty.name()));
    let n_rows = src.len() / n_per_row;
    let mut out = vec![0u8; n_rows * row as usize];
    // SAFETY: `src` holds n_rows * n_per_row floats and `out` n_rows rows of `ty` (both sized above); no importance matrix is
    // read because the type needs none.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            ty as sys::ggml_type,
            src.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            n_per_row as i64,
            std::ptr::null(),
        )
    };
    assert_eq!(
        written,
        out.len(),
        "ggml wrote another size of {} than its row size says",
        ty.name()
    );
    out
}

/// What quantized rows of `n_per_row` values stand for.
///
/// # Panics
/// If `src` is not whole rows of `ty`, or `ty` is not a type of weights.
pub fn dequantize(ty: GgmlType, src: &[u8], n_per_row: usize) -> Vec<f32> {
    let row = ty.row_bytes(n_per_row as u64).map(|n| n as usize);
    let row = row.unwrap_or_else(|| panic!("no rows of {n_per_row} in {}", ty.name()));
    assert!(
        src.len().is_multiple_of(row),
        "{} bytes are not rows of {row}",
        src.len()
    );
    let mut out = vec![0.0; src.len() / row * n_per_row];
    // SAFETY: `src` holds whole blocks for as many values as `out` has room for; the traits table is static.
    unsafe {
        let to_float = (*sys::ggml_get_type_traits(ty as sys::ggml_type)).to_float;
        let to_float = to_float.unwrap_or_else(|| panic!("{} is no type of weights", ty.name()));
        to_float(src.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64);
    }
    out
}

/// Whether [`quantize`] can make `ty`.
pub fn can_quantize(ty: GgmlType) -> bool {
    // SAFETY: a pure function of the type's number.
    !unsafe { sys::ggml_quantize_requires_imatrix(ty as sys::ggml_type) }
}
