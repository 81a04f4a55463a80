//! Handles of tensors.

use super::memory::Buffer;
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A tensor: its shape, and where ggml's description of it is.
///
/// There are two kinds. A *stored* tensor (weights, a cache) is described by the [`Buffer`] that its data is in; it is
/// complete when [`Buffer::tensor`] returns it, nothing writes its description ever after, and the handle keeps both. A tensor
/// of a *graph* is described by the [`Context`](super::Context) that it is built in and then by the graph that this becomes.
/// Such a handle is only a number to these two: it keeps nothing alive, and neither a handle nor who has one can change
/// what is described.
#[derive(Clone)]
pub(crate) struct Tensor(Arc<Handle>);

struct Handle {
    raw: NonNull<sys::ggml_tensor>,
    home: Home,
    // Copies: nothing changes a shape, and so nobody who asks for it reads what a graph writes to.
    ne: [usize; 4],
    nb: [usize; 4],
    nbytes: usize,
    ty: GgmlType,
    is_view: bool,
}

// SAFETY: descriptions of stored tensors are never written. Those of graphs are reached by who owns the context or the graph
// only, after a look at the number of their home; what a handle itself tells are copies.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Who describes a tensor.
pub(super) enum Home {
    Graph(GraphId),
    Buffer(Arc<Buffer>),
}

/// Tells contexts, and the graphs that they become, apart. No number comes twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GraphId(u64);

impl GraphId {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Tensor {
    /// A handle of a description.
    ///
    /// # Safety
    /// `raw` must be a description in the arena of `home` that nobody writes meanwhile.
    pub(super) unsafe fn new(raw: NonNull<sys::ggml_tensor>, home: Home) -> Self {
        // SAFETY: a valid description; the caller's promise.
        let (t, nbytes) = unsafe { (raw.as_ref(), sys::ggml_nbytes(raw.as_ptr())) };
        Self(Arc::new(Handle {
            raw,
            home,
            ne: t.ne.map(|n| n as usize),
            nb: t.nb,
            nbytes,
            ty: GgmlType::from_u32(t.type_).expect("made with a known type"),
            is_view: !t.view_src.is_null(),
        }))
    }

    /// The description, to be followed by its home only, or if it is stored.
    pub(super) fn raw(&self) -> *mut sys::ggml_tensor {
        self.0.raw.as_ptr()
    }

    /// The buffer of a stored tensor.
    pub(super) fn buffer(&self) -> Option<&Arc<Buffer>> {
        match &self.0.home {
            Home::Buffer(buffer) => Some(buffer),
            Home::Graph(_) => None,
        }
    }

    /// Type, name and bytes of a stored tensor.
    ///
    /// # Panics
    /// If it is not stored, or in memory that graphs may write.
    pub(super) fn read_stored(&self) -> (GgmlType, String, &[u8]) {
        assert!(self.buffer().is_some());
        // SAFETY: a complete description, whose name is NUL-terminated, and bytes that nobody writes; the buffer keeps both.
        unsafe {
            let t = self.0.raw.as_ref();
            let name = CStr::from_ptr(t.name.as_ptr())
                .to_string_lossy()
                .into_owned();
            let bytes = std::slice::from_raw_parts(t.data.cast::<u8>(), self.nbytes());
            (self.ty(), name, bytes)
        }
    }

    pub(super) fn belongs_to(&self, graph: GraphId) -> bool {
        matches!(self.0.home, Home::Graph(id) if id == graph)
    }

    /// Tells tensors of one graph, and the stored ones that it reads, apart.
    pub(crate) fn id(&self) -> usize {
        self.0.raw.as_ptr() as usize
    }

    /// Elements per dimension, fastest first.
    pub(crate) fn ne(&self) -> [usize; 4] {
        self.0.ne
    }

    /// Bytes from one row, plane or cube to the next.
    pub(crate) fn nb(&self) -> [usize; 4] {
        self.0.nb
    }

    /// Bytes of the data.
    pub(crate) fn nbytes(&self) -> usize {
        self.0.nbytes
    }

    /// Whether its memory is another tensor's.
    pub(crate) fn is_view(&self) -> bool {
        self.0.is_view
    }

    /// The type of its elements.
    pub(crate) fn ty(&self) -> GgmlType {
        self.0.ty
    }
}

impl Buffer {
    /// The stored tensor called `name` that lies at `offset` of the buffer.
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
        let raw = self.describe(ty, ne, name, offset);
        // SAFETY: a description of this buffer, complete.
        unsafe { Tensor::new(raw, Home::Buffer(self.clone())) }
    }
}
