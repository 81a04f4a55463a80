//! Memory that stored tensors point into: the mapped file, ggml's own.

use super::arena::Arena;
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::any::Any;
use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory with stored tensors in it, as ggml sees it, and their descriptions.
pub(crate) struct Buffer {
    raw: NonNull<sys::ggml_backend_buffer>,
    base: *mut u8,
    size: usize,
    /// Added to under the lock. What is in it is complete and read without.
    descriptions: Mutex<Arena>,
    /// Owner of the memory; `None` when ggml owns it.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: ggml's buffer and the address are set once and belong to no thread; the bytes behind them are written by no method,
// except those of new memory that nobody else has seen yet. See `descriptions` for these.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: created by this type; stored tensors hold it, and graphs hold it for those that they read.
        unsafe { sys::ggml_backend_buffer_free(self.raw.as_ptr()) }
    }
}

impl Buffer {
    /// `size` bytes at `base`, aligned to 32, that `owner` keeps alive and in place. Graphs cannot write them.
    ///
    /// # Safety
    /// The bytes must stay valid, and the same, as long as `owner` lives.
    pub(crate) unsafe fn read_only(
        base: *const u8,
        size: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        let base = base.cast_mut();
        // SAFETY: the caller's promise.
        let raw = unsafe { sys::ggml_backend_cpu_buffer_from_ptr(base.cast(), size) };
        Arc::new(Self {
            raw: NonNull::new(raw).expect("wrapping memory does not fail"),
            base,
            size,
            descriptions: Mutex::default(),
            _owner: Some(owner),
        })
    }

    /// `size` bytes of ggml's for copies in the layout `buft`, which graphs cannot write. `None` when memory runs out.
    ///
    /// # Safety
    /// `buft` must be one of ggml's buffer types.
    pub(super) unsafe fn allocate(
        buft: sys::ggml_backend_buffer_type_t,
        size: usize,
    ) -> Option<Arc<Self>> {
        // SAFETY: the caller's promise; the buffer is wrapped at once, so it is freed exactly once.
        let (raw, base) = unsafe {
            let raw = NonNull::new(sys::ggml_backend_buft_alloc_buffer(buft, size))?;
            (raw, sys::ggml_backend_buffer_get_base(raw.as_ptr()))
        };
        let buffer = Self {
            raw,
            base: base.cast(),
            size,
            descriptions: Mutex::default(),
            _owner: None,
        };
        prefer_huge_pages(buffer.base, size);
        Some(Arc::new(buffer))
    }

    /// The description of a tensor called `name` that lies at `offset`, complete.
    ///
    /// # Panics
    /// If it does not fit, or has no name.
    pub(super) fn describe(
        &self,
        ty: GgmlType,
        ne: &[usize],
        name: &str,
        offset: usize,
    ) -> NonNull<sys::ggml_tensor> {
        assert!(!name.is_empty(), "ggml would write one");
        let c_name = CString::new(name).expect("names of tensors hold no NUL");
        let ne: Vec<i64> = ne.iter().map(|&n| n as i64).collect();
        let mut descriptions = self
            .descriptions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `ne` holds as many dimensions as said.
        let raw = descriptions.append(|c| unsafe {
            sys::ggml_new_tensor(c, ty as u32, ne.len() as i32, ne.as_ptr())
        });
        // SAFETY: a new description that nobody else has seen.
        let nbytes = unsafe { sys::ggml_nbytes(raw.as_ptr()) };
        let end = offset.checked_add(nbytes);
        assert!(end.is_some_and(|end| end <= self.size), "{name}");
        // SAFETY: as above; inside the buffer.
        unsafe {
            sys::ggml_set_name(raw.as_ptr(), c_name.as_ptr());
            let at = self.base.add(offset).cast();
            let status = sys::ggml_backend_tensor_alloc(self.raw.as_ptr(), raw.as_ptr(), at);
            assert_eq!(status, sys::GGML_STATUS_SUCCESS, "{name}");
        }
        raw
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
