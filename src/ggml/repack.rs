//! Copies of matrices in layouts of ggml's that are multiplied faster.

use super::context::{Context, Operations};
use super::memory::Buffer;
use super::tensor::Tensor;
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::ffi::CStr;

/// One of the interleaved layouts of ggml's "extra" CPU buffer types: faster products, for a second copy in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RepackLayout {
    buft: sys::ggml_backend_buffer_type_t,
}

/// ggml's name of the layout for AMX tiles, which is never used: built by GCC 12.2, products with it load a tile
/// configuration that the CPU refuses, which ends the process, and nothing tells who built ggml.
const AMX: &CStr = c"AMX";

/// Asks ggml whether `mul_mat` takes a weight of this type and shape from memory of kind `buft`.
fn supports_mul_mat(
    dev: sys::ggml_backend_dev_t,
    buft: sys::ggml_backend_buffer_type_t,
    ty: GgmlType,
    ne: [usize; 2],
) -> bool {
    let ctx = Context::new(Operations::Ggml);
    let w = ctx.new_tensor(ty, &ne);
    let x = ctx.new_tensor(GgmlType::F32, &[ne[0], 512]);
    let y = ctx.mul_mat(&w, &x);
    // SAFETY: `w` is of a context that is private to this function, so its buffer field may be set and unset; the empty buffer
    // only carries its type.
    unsafe {
        let empty = sys::ggml_backend_buft_alloc_buffer(buft, 0);
        (*w.raw()).buffer = empty;
        let supported = sys::ggml_backend_dev_supports_op(dev, y.raw());
        sys::ggml_backend_buffer_free(empty);
        (*w.raw()).buffer = std::ptr::null_mut();
        supported
    }
}

impl RepackLayout {
    /// The layout that ggml would use for products with this matrix on this CPU, if it has one.
    pub(crate) fn of(matrix: &Tensor) -> Option<Self> {
        let [n0, n1, ..] = matrix.ne();
        // SAFETY: static registry objects; the returned list is null-terminated and lives as long as the process.
        unsafe {
            let reg = sys::ggml_backend_cpu_reg();
            let dev = sys::ggml_backend_reg_dev_get(reg, 0);
            let get = sys::ggml_backend_reg_get_proc_address(
                reg,
                c"ggml_backend_dev_get_extra_bufts".as_ptr(),
            );
            if get.is_null() {
                return None;
            }
            type GetExtra = unsafe extern "C" fn(
                sys::ggml_backend_dev_t,
            )
                -> *mut sys::ggml_backend_buffer_type_t;
            let get: GetExtra = std::mem::transmute(get);
            let mut list = get(dev);
            while !list.is_null() && !(*list).is_null() {
                let buft = *list;
                let is_amx = CStr::from_ptr(sys::ggml_backend_buft_name(buft)) == AMX;
                if !is_amx && supports_mul_mat(dev, buft, matrix.ty(), [n0, n1]) {
                    return Some(Self { buft });
                }
                list = list.add(1);
            }
        }
        None
    }

    /// Bytes that copies of `matrices` take one behind the other.
    pub(crate) fn size(self, matrices: &[Tensor]) -> usize {
        matrices.iter().map(|t| self.room(t)).sum()
    }

    /// Bytes of a copy of one stored matrix, padded to the layout's alignment.
    fn room(self, matrix: &Tensor) -> usize {
        assert!(matrix.buffer().is_some(), "a stored tensor");
        // SAFETY: static buffer type and a valid description.
        unsafe {
            let alignment = sys::ggml_backend_buft_get_alignment(self.buft);
            sys::ggml_backend_buft_get_alloc_size(self.buft, matrix.raw())
                .next_multiple_of(alignment)
        }
    }

    /// Copies stored `matrices`, which lie in memory as in a file, into one buffer of this layout. `None` when memory runs
    /// out.
    ///
    /// # Panics
    /// If one of them is in memory that graphs may write.
    pub(crate) fn repack(self, matrices: &[Tensor]) -> Option<Vec<Tensor>> {
        super::log::init();
        // SAFETY: a static buffer type.
        let buffer = unsafe { Buffer::allocate(self.buft, self.size(matrices))? };
        let mut offset = 0;
        let mut copy = |matrix: &Tensor| {
            let (ty, name, bytes) = matrix.read_stored();
            let copy = buffer.tensor(ty, &matrix.ne(), &name, offset);
            // SAFETY: new memory that nobody else has seen, for as many bytes in this type and shape.
            unsafe {
                sys::ggml_backend_tensor_set(copy.raw(), bytes.as_ptr().cast(), 0, bytes.len());
            }
            offset += self.room(matrix);
            copy
        };
        Some(matrices.iter().map(&mut copy).collect())
    }
}
