//! Memory that tensors point into: the mapped file, anonymous pages, ggml's repacked buffers.

use super::arena::Arena;
use super::context::{Context, numbered};
use super::tensor::{Home, Tensor};
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::any::Any;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory with stored tensors in it, as ggml sees it, and their descriptions.
pub(crate) struct Buffer {
    raw: NonNull<sys::ggml_backend_buffer>,
    base: *mut u8,
    size: usize,
    writable: bool,
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
        // SAFETY: the caller's promise.
        unsafe { Self::wrap(base.cast_mut(), size, false, owner) }
    }

    /// As [`Buffer::read_only`], for bytes that graphs may write.
    ///
    /// # Safety
    /// The bytes must stay valid as long as `owner` lives. While a graph runs that writes some of them, nobody else may use
    /// these.
    pub(crate) unsafe fn writable(
        base: *mut u8,
        size: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        // SAFETY: the caller's promise.
        unsafe { Self::wrap(base, size, true, owner) }
    }

    /// # Safety
    /// As for [`Buffer::read_only`] or [`Buffer::writable`].
    unsafe fn wrap(
        base: *mut u8,
        size: usize,
        writable: bool,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        // SAFETY: the caller's promise.
        let raw = unsafe { sys::ggml_backend_cpu_buffer_from_ptr(base.cast(), size) };
        Arc::new(Self {
            raw: NonNull::new(raw).expect("wrapping memory does not fail"),
            base,
            size,
            writable,
            descriptions: Mutex::default(),
            _owner: Some(owner),
        })
    }

    /// Whether graphs may write its bytes.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// The tensor called `name` that lies at `offset` of the buffer.
    ///
    /// # Panics
    /// If it does not fit: offsets are validated when the file is parsed. If it has no name.
    pub(crate) fn tensor(
        self: &Arc<Self>,
        ty: GgmlType,
        ne: &[usize],
        name: &str,
        offset: usize,
    ) -> Tensor {
        assert!(!name.is_empty(), "ggml would write one");
        let c_name = numbered(name, None);
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
            Tensor::new(raw, Home::Buffer(self.clone()))
        }
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
        let ty = GgmlType::from_u32(matrix.type_id())?;
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
                if !is_amx && supports_mul_mat(dev, buft, ty, [n0, n1]) {
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
        let size = self.size(matrices);
        // SAFETY: sizes come from ggml; the buffer is wrapped at once, so it is freed exactly once.
        let buffer = unsafe {
            let raw = NonNull::new(sys::ggml_backend_buft_alloc_buffer(self.buft, size))?;
            let base = sys::ggml_backend_buffer_get_base(raw.as_ptr()).cast::<u8>();
            Arc::new(Buffer {
                raw,
                base,
                size,
                writable: false,
                descriptions: Mutex::default(),
                _owner: None,
            })
        };
        prefer_huge_pages(buffer.base, size);
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
