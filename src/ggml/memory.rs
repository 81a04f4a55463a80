//! Memory that tensors point into: the mapped file, anonymous pages, ggml's repacked buffers.

use super::context::{Context, Tensor};
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::any::Any;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Arc;

/// ggml's view of memory that somebody else owns.
pub(crate) struct Buffer {
    raw: NonNull<sys::ggml_backend_buffer>,
    base: *mut u8,
    size: usize,
    /// Owner of the memory; `None` when ggml owns it.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: a buffer is a pair of pointers that are set once; the bytes behind it are written only through `&mut` owners.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: created by this type; tensors that point here hold it through their context.
        unsafe { sys::ggml_backend_buffer_free(self.raw.as_ptr()) }
    }
}

impl Buffer {
    /// Wraps `size` bytes at `base`, aligned to 32, that `owner` keeps alive and in place.
    ///
    /// # Safety
    /// The bytes must stay valid as long as `owner` lives. If they are read-only, no graph may write them.
    pub(crate) unsafe fn from_owner(
        base: *mut u8,
        size: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        // SAFETY: the caller's promise.
        let raw = unsafe { sys::ggml_backend_cpu_buffer_from_ptr(base.cast(), size) };
        let raw = NonNull::new(raw).expect("wrapping memory does not fail");
        Arc::new(Self {
            raw,
            base,
            size,
            _owner: Some(owner),
        })
    }

    /// Places `tensor` at `offset` of the buffer.
    ///
    /// # Panics
    /// If the tensor does not fit: offsets are validated when the file is parsed.
    pub(crate) fn place(&self, tensor: &Tensor, offset: usize) {
        assert!(
            offset
                .checked_add(tensor.nbytes())
                .is_some_and(|end| end <= self.size),
            "{}",
            tensor.name()
        );
        // SAFETY: inside the buffer, checked above.
        let status = unsafe {
            sys::ggml_backend_tensor_alloc(
                self.raw.as_ptr(),
                tensor.raw(),
                self.base.add(offset).cast(),
            )
        };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "{}", tensor.name());
    }
}

/// One of the interleaved layouts of ggml's "extra" CPU buffer types: faster products, for a second copy in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RepackLayout {
    buft: sys::ggml_backend_buffer_type_t,
}

/// ggml's name of the layout for AMX tiles, which is never used: built by GCC 12.2, products with it load a tile
/// configuration that the CPU refuses, which ends the process, and nothing tells who built ggml.
const AMX: &CStr = c"AMX";

/// The repacked layout that ggml would use for a matrix of this type and shape on this CPU, if it has one.
pub(crate) fn repackable(ty: GgmlType, ne: [usize; 2]) -> Option<RepackLayout> {
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
        type GetExtra =
            unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
        let get: GetExtra = std::mem::transmute(get);
        let mut list = get(dev);
        while !list.is_null() && !(*list).is_null() {
            let buft = *list;
            let is_amx = CStr::from_ptr(sys::ggml_backend_buft_name(buft)) == AMX;
            if !is_amx && supports_mul_mat(dev, buft, ty, ne) {
                return Some(RepackLayout { buft });
            }
            list = list.add(1);
        }
    }
    None
}

/// Asks ggml whether `mul_mat` takes a weight of this type and shape from memory of kind `buft`.
fn supports_mul_mat(
    dev: sys::ggml_backend_dev_t,
    buft: sys::ggml_backend_buffer_type_t,
    ty: GgmlType,
    ne: [usize; 2],
) -> bool {
    let ctx = Context::new();
    let w = ctx.new_tensor(ty, &ne);
    let x = ctx.new_tensor(GgmlType::F32, &[ne[0], 512]);
    let y = ctx.mul_mat(&w, &x);
    // SAFETY: `w` is private to this function, so its buffer field may be set and unset; the empty buffer only carries
    // its type.
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
    /// Bytes that the tensors take one behind the other.
    pub(crate) fn size(self, items: &[(Tensor, &[u8])]) -> usize {
        items.iter().map(|(t, _)| self.room(t)).sum()
    }

    /// Bytes of one tensor, padded to the layout's alignment.
    fn room(self, tensor: &Tensor) -> usize {
        // SAFETY: static buffer type and a valid description.
        unsafe {
            let alignment = sys::ggml_backend_buft_get_alignment(self.buft);
            sys::ggml_backend_buft_get_alloc_size(self.buft, tensor.raw())
                .next_multiple_of(alignment)
        }
    }

    /// Allocates one buffer, places the tensors in it, converts their plain bytes and returns the owner, which the
    /// tensors' context must keep. `None` when memory runs out.
    pub(crate) fn fill(self, items: &[(Tensor, &[u8])]) -> Option<Arc<Buffer>> {
        super::log::init();
        let size = self.size(items);
        // SAFETY: sizes come from ggml; the buffer is wrapped at once, so it is freed exactly once.
        let buffer = unsafe {
            let raw = NonNull::new(sys::ggml_backend_buft_alloc_buffer(self.buft, size))?;
            let base = sys::ggml_backend_buffer_get_base(raw.as_ptr()).cast::<u8>();
            Arc::new(Buffer {
                raw,
                base,
                size,
                _owner: None,
            })
        };
        prefer_huge_pages(buffer.base, size);
        let mut offset = 0;
        for (tensor, bytes) in items {
            assert_eq!(tensor.nbytes(), bytes.len(), "{}", tensor.name());
            buffer.place(tensor, offset);
            // SAFETY: placed inside the buffer; exactly the tensor's bytes are read.
            unsafe {
                sys::ggml_backend_tensor_set(tensor.raw(), bytes.as_ptr().cast(), 0, bytes.len());
            }
            offset += self.room(tensor);
        }
        Some(buffer)
    }
}

/// Asks for huge pages behind `size` bytes at `base`: all weights are read for each token, which costs fewer table walks
/// then. A hint; nothing depends on it.
#[cfg(target_os = "linux")]
fn prefer_huge_pages(base: *mut u8, size: usize) {
    const PAGE: usize = 4096;
    let start = (base as usize).next_multiple_of(PAGE);
    let end = (base as usize + size) / PAGE * PAGE;
    if start < end {
        // SAFETY: whole pages of memory that the caller owns; the advice does not change their content.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_base: *mut u8, _size: usize) {}
