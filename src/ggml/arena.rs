//! Memory of ggml's for tensor descriptions, never for their data.

use ggml_sys as sys;
use std::ptr::NonNull;

/// Descriptions of tensors. They do not move and live as long as the arena, which has them to itself.
#[derive(Default)]
pub(super) struct Arena {
    /// The last one is the one that has room.
    chunks: Vec<Chunk>,
    /// Descriptions in all of them.
    len: usize,
}

/// Memory of ggml's own, whose size is fixed.
pub(super) struct Chunk(NonNull<sys::ggml_context>);

// SAFETY: a list in memory that belongs to no thread; only whoever has the chunk to itself appends to it.
unsafe impl Send for Chunk {}

/// Descriptions in a chunk.
const CHUNK: usize = 256;
/// Descriptions that one constructor makes at most.
const MOST_AT_ONCE: usize = 4;

impl Chunk {
    /// Room for `bytes` of objects.
    pub(super) fn new(bytes: usize) -> Self {
        let params = sys::ggml_init_params {
            mem_size: bytes,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: ggml owns the memory it allocates; `no_alloc` makes it an arena of descriptions.
        let raw = unsafe { sys::ggml_init(params) };
        Self(NonNull::new(raw).expect("ggml_init allocates a few hundred kilobytes"))
    }

    pub(super) fn raw(&self) -> *mut sys::ggml_context {
        self.0.as_ptr()
    }

    /// The descriptions in it.
    fn tensors(&self) -> impl Iterator<Item = NonNull<sys::ggml_tensor>> {
        // SAFETY: a live chunk, and a tensor in it.
        let first = NonNull::new(unsafe { sys::ggml_get_first_tensor(self.raw()) });
        std::iter::successors(first, |t| {
            // SAFETY: as above.
            NonNull::new(unsafe { sys::ggml_get_next_tensor(self.raw(), t.as_ptr()) })
        })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `ggml_init`; handles of what was in it are not followed without the arena.
        unsafe { sys::ggml_free(self.raw()) }
    }
}

impl Arena {
    /// Descriptions in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Runs a ggml constructor, which appends what it makes.
    pub(super) fn append(
        &mut self,
        constructor: impl FnOnce(*mut sys::ggml_context) -> *mut sys::ggml_tensor,
    ) -> NonNull<sys::ggml_tensor> {
        let made = constructor(self.chunk().raw());
        self.len += 1;
        NonNull::new(made).expect("ggml tensor constructors do not return null")
    }

    /// A chunk with room for what one constructor makes.
    fn chunk(&mut self) -> &Chunk {
        // SAFETY: a pure size function.
        let each = unsafe { sys::ggml_tensor_overhead() };
        let used = |chunk: &Chunk| {
            // SAFETY: a live chunk.
            unsafe { sys::ggml_used_mem(chunk.raw()) }
        };
        let has_room = |chunk: &Chunk| used(chunk) + MOST_AT_ONCE * each <= CHUNK * each;
        if !self.chunks.last().is_some_and(has_room) {
            self.chunks.push(Chunk::new(CHUNK * each));
        }
        self.chunks.last().expect("made above")
    }

    /// The description called `name`.
    pub(super) fn find(&self, name: &std::ffi::CStr) -> Option<NonNull<sys::ggml_tensor>> {
        self.chunks.iter().find_map(|chunk| {
            // SAFETY: a live chunk and a NUL-terminated name.
            NonNull::new(unsafe { sys::ggml_get_tensor(chunk.raw(), name.as_ptr()) })
        })
    }

    /// Takes the memory from all descriptions, so that ggml's allocator gives them other memory: it does so for those that have
    /// none.
    pub(super) fn forget_memory(&mut self) {
        for t in self.chunks.iter().flat_map(Chunk::tensors) {
            // SAFETY: a live description, which is ours alone (`&mut self`).
            unsafe {
                (*t.as_ptr()).data = std::ptr::null_mut();
                (*t.as_ptr()).buffer = std::ptr::null_mut();
            }
        }
    }
}
