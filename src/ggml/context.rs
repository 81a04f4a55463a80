//! `ggml_context` as an arena of tensor descriptions, and the graph-building verbs.

use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::any::Any;
use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An arena of tensor descriptions (never of their data) that grows with what is built in it.
pub(crate) struct Context {
    /// Held while ggml appends to the arena.
    arena: Mutex<Arena>,
}

struct Arena {
    /// Descriptions do not move; the last chunk is the one that has room.
    chunks: Vec<Chunk>,
    /// Descriptions in all of them.
    len: usize,
    /// Descriptions of other contexts that some of them read, by address.
    foreign: HashSet<usize>,
    /// What tensors of this context point into.
    keep: Vec<Arc<dyn Any + Send + Sync>>,
}

/// Memory of ggml's own, whose size is fixed.
pub(super) struct Chunk(NonNull<sys::ggml_context>);

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
        // SAFETY: a live arena, and a tensor in it.
        let first = NonNull::new(unsafe { sys::ggml_get_first_tensor(self.raw()) });
        std::iter::successors(first, |t| {
            // SAFETY: as above.
            NonNull::new(unsafe { sys::ggml_get_next_tensor(self.raw(), t.as_ptr()) })
        })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `ggml_init`; whoever points into it keeps its owner.
        unsafe { sys::ggml_free(self.raw()) }
    }
}

impl Arena {
    /// A chunk with room for what one constructor makes.
    fn chunk(&mut self) -> &Chunk {
        // SAFETY: a pure size function.
        let each = unsafe { sys::ggml_tensor_overhead() };
        let used = |chunk: &Chunk| {
            // SAFETY: a live arena.
            unsafe { sys::ggml_used_mem(chunk.raw()) }
        };
        let has_room = |chunk: &Chunk| used(chunk) + MOST_AT_ONCE * each <= CHUNK * each;
        if !self.chunks.last().is_some_and(has_room) {
            self.chunks.push(Chunk::new(CHUNK * each));
        }
        self.chunks.last().expect("made above")
    }
}

// SAFETY: the arena is only appended to under its lock, and tensor descriptions are written only while a graph that
// contains them is built or computed, which needs `&mut Graph`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A tensor description in a [`Context`].
#[derive(Clone)]
pub(crate) struct Tensor {
    raw: NonNull<sys::ggml_tensor>,
    ctx: Arc<Context>,
}

// SAFETY: descriptions are immutable once built, see `Context`.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Tensor {
    pub(super) fn raw(&self) -> *mut sys::ggml_tensor {
        self.raw.as_ptr()
    }

    fn get(&self) -> &sys::ggml_tensor {
        // SAFETY: `ctx` keeps the arena alive; only `data` and `buffer` change after construction, under `&mut Graph`.
        unsafe { self.raw.as_ref() }
    }

    pub(super) fn belongs_to(&self, ctx: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.ctx, ctx)
    }

    /// Tells tensors of one context apart.
    pub(crate) fn id(&self) -> usize {
        self.raw.as_ptr() as usize
    }

    /// Elements per dimension, fastest first.
    pub(crate) fn ne(&self) -> [usize; 4] {
        self.get().ne.map(|n| n as usize)
    }

    /// Bytes from one row, plane or cube to the next.
    pub(crate) fn nb(&self) -> [usize; 4] {
        self.get().nb
    }

    /// Bytes of the data.
    pub(crate) fn nbytes(&self) -> usize {
        // SAFETY: a valid description.
        unsafe { sys::ggml_nbytes(self.raw()) }
    }

    /// ggml's type number.
    pub(crate) fn type_id(&self) -> u32 {
        self.get().type_
    }

    /// The tensor's name.
    pub(crate) fn name(&self) -> String {
        // SAFETY: `name` is a NUL-terminated array inside the description.
        unsafe { CStr::from_ptr(self.get().name.as_ptr()) }
            .to_string_lossy()
            .into_owned()
    }

    /// Names the tensor `name`, or `name-layer`, as llama.cpp does, so that a test can find it.
    pub(crate) fn named(self, name: &str, layer: Option<usize>) -> Self {
        let name = match layer {
            Some(il) => format!("{name}-{il}\0"),
            None => format!("{name}\0"),
        };
        // SAFETY: NUL-terminated; ggml truncates to its own capacity.
        unsafe { sys::ggml_set_name(self.raw(), name.as_ptr().cast()) };
        self
    }

    /// Marks graph memory that is written before the graph runs and must not be reused within it.
    pub(crate) fn input(self) -> Self {
        // SAFETY: a valid description.
        unsafe { sys::ggml_set_input(self.raw()) };
        self
    }

    /// Marks graph memory that is read after the graph ran; for a view, that of the tensor it looks into.
    pub(crate) fn output(self) -> Self {
        // SAFETY: valid descriptions; a view's source is never a view itself and lives as long as the view.
        unsafe {
            sys::ggml_set_output(self.raw());
            if let Some(source) = NonNull::new(self.get().view_src) {
                sys::ggml_set_output(source.as_ptr());
            }
        }
        self
    }
}

/// `GGML_ROPE_TYPE_NEOX`, a macro in ggml.h that the bindings leave out.
const ROPE_TYPE_NEOX: i32 = 2;

/// How RoPE pairs the values of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeKind {
    /// Neighbours (2i, 2i+1), llama's permuted rows.
    Interleaved,
    /// (i, i + n_rot/2), GPT-NeoX and Hugging Face.
    Neox,
}

/// `ggml_rope_ext` and its derivative.
type RopeFn = unsafe extern "C" fn(
    *mut sys::ggml_context,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    i32,
    i32,
    i32,
    f32,
    f32,
    f32,
    f32,
    f32,
    f32,
) -> *mut sys::ggml_tensor;

/// Parameters of a rotary embedding, as `ggml_rope_ext` takes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rope {
    pub(crate) kind: RopeKind,
    /// Rotated values per head, from the front.
    pub(crate) n_rot: usize,
    /// Context length of the original training (YaRN).
    pub(crate) n_ctx_orig: usize,
    pub(crate) freq_base: f32,
    pub(crate) freq_scale: f32,
    pub(crate) ext_factor: f32,
    pub(crate) attn_factor: f32,
    pub(crate) beta_fast: f32,
    pub(crate) beta_slow: f32,
}

impl Context {
    /// An empty arena.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            arena: Mutex::new(Arena {
                chunks: Vec::new(),
                len: 0,
                foreign: HashSet::new(),
                keep: Vec::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Arena> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Descriptions that a graph of what was built here can consist of: those of the arena, and those of other contexts that
    /// they are computed from.
    pub(super) fn reachable(&self) -> usize {
        let arena = self.lock();
        let mut seen = arena.foreign.clone();
        let mut left: Vec<usize> = seen.iter().copied().collect();
        while let Some(address) = left.pop() {
            // SAFETY: a description of a context that `keep` keeps alive, or one that it is computed from.
            let srcs = unsafe { (*(address as *const sys::ggml_tensor)).src };
            let new = srcs.iter().map(|src| *src as usize);
            left.extend(new.filter(|&src| src != 0 && seen.insert(src)));
        }
        arena.len + seen.len()
    }

    /// Takes the memory from all descriptions, for whoever gives them other memory.
    ///
    /// # Safety
    /// Nobody may be reading them, and none may have memory that is not given to it again.
    pub(super) unsafe fn forget_memory(&self) {
        for t in self.lock().chunks.iter().flat_map(Chunk::tensors) {
            // SAFETY: a live description; the caller's promise.
            unsafe {
                (*t.as_ptr()).data = std::ptr::null_mut();
                (*t.as_ptr()).buffer = std::ptr::null_mut();
            }
        }
    }

    /// Keeps `owner` (a map, a buffer) alive as long as the context and its tensors.
    pub(crate) fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.lock().keep.push(owner);
    }

    /// The tensor called `name`.
    pub(crate) fn find(self: &Arc<Self>, name: &str) -> Option<Tensor> {
        let name = CString::new(name).ok()?;
        let raw = self.lock().chunks.iter().find_map(|chunk| {
            // SAFETY: a live arena and a NUL-terminated name.
            NonNull::new(unsafe { sys::ggml_get_tensor(chunk.raw(), name.as_ptr()) })
        })?;
        Some(Tensor {
            raw,
            ctx: self.clone(),
        })
    }

    /// Runs a ggml constructor that reads `srcs` and appends to this arena.
    pub(super) fn build(
        self: &Arc<Self>,
        srcs: &[&Tensor],
        f: impl FnOnce(*mut sys::ggml_context) -> *mut sys::ggml_tensor,
    ) -> Tensor {
        let mut arena = self.lock();
        for src in srcs.iter().filter(|src| !src.belongs_to(self)) {
            arena.foreign.insert(src.id());
            let owner: Arc<dyn Any + Send + Sync> = src.ctx.clone();
            let is_owner = |k: &Arc<_>| std::ptr::addr_eq(Arc::as_ptr(k), Arc::as_ptr(&owner));
            if !arena.keep.iter().any(is_owner) {
                arena.keep.push(owner);
            }
        }
        let chunk = arena.chunk().raw();
        let raw = NonNull::new(f(chunk)).expect("ggml tensor constructors do not return null");
        arena.len += 1;
        Tensor {
            raw,
            ctx: self.clone(),
        }
    }

    /// A new tensor without data.
    pub(crate) fn new_tensor(self: &Arc<Self>, ty: GgmlType, ne: &[usize]) -> Tensor {
        let ne: Vec<i64> = ne.iter().map(|&n| n as i64).collect();
        // SAFETY: `ne` holds as many dimensions as said.
        self.build(&[], |c| unsafe {
            sys::ggml_new_tensor(c, ty as u32, ne.len() as i32, ne.as_ptr())
        })
    }
}

/// Verbs with one, two or three tensor operands that map onto one ggml call each.
macro_rules! verbs {
    ($($(#[$doc:meta])* $name:ident($($t:ident),+ $(; $($p:ident: $ty:ty => $conv:expr),+)?) = $ggml:ident;)*) => {
        impl Context {
            $($(#[$doc])*
            pub(crate) fn $name(self: &Arc<Self>, $($t: &Tensor),+ $(, $($p: $ty),+)?) -> Tensor {
                // SAFETY: valid descriptions; shapes were validated upstream (module comment).
                self.build(&[$($t),+], |c| unsafe { sys::$ggml(c, $($t.raw()),+ $(, $($conv),+)?) })
            })*
        }
    };
}

verbs! {
    /// `b` times `w` transposed: w `ne = [K, N]`, b `ne = [K, T]` -> `ne = [N, T]`. `w` may be quantized.
    mul_mat(w, b) = ggml_mul_mat;
    /// Element-wise sum, `b` repeated to the shape of `a`.
    add(a, b) = ggml_add;
    /// Element-wise product, `b` repeated to the shape of `a`.
    mul(a, b) = ggml_mul;
    /// `a / sqrt(mean(a^2) + eps)` over rows (Zhang & Sennrich 2019), without a weight.
    rms_norm(a; eps: f32 => eps) = ggml_rms_norm;
    /// `(a - mean) / sqrt(var + eps)` over rows (Ba et al. 2016), without weight and bias.
    norm(a; eps: f32 => eps) = ggml_norm;
    /// `s * a`.
    scale(a; s: f32 => s) = ggml_scale;
    /// tanh.
    tanh(a) = ggml_tanh;
    /// `x sigmoid(x)`.
    silu(a) = ggml_silu;
    /// GELU, tanh approximation.
    gelu(a) = ggml_gelu;
    /// `silu(gate) * up`.
    swiglu(gate, up) = ggml_swiglu_split;
    /// `gelu(gate) * up`.
    geglu(gate, up) = ggml_geglu_split;
    /// `silu(first half) * second half` of each row: `ne = [2F, T]` -> [F, T].
    swiglu_fused(a) = ggml_swiglu;
    /// `gelu(first half) * second half` of each row: `ne = [2F, T]` -> [F, T].
    geglu_fused(a) = ggml_geglu;
    /// Rows of `a` (any type) picked by `rows` (I32), as F32.
    get_rows(a, rows) = ggml_get_rows;
    /// Writes the rows of `b` (F32) into `a` at `rows` (I64), converting to a's type; the result is a view of `a`.
    set_rows(a, b, rows) = ggml_set_rows;
    /// A contiguous copy.
    cont(a) = ggml_cont;
    /// Swaps the first two dimensions of the view.
    transpose(a) = ggml_transpose;
}

impl Context {
    /// Reinterprets contiguous data.
    pub(crate) fn reshape(self: &Arc<Self>, a: &Tensor, ne: &[usize]) -> Tensor {
        let n: [i64; 4] = std::array::from_fn(|i| ne.get(i).copied().unwrap_or(1) as i64);
        // SAFETY: valid description; the element count is the caller's promise (module comment).
        self.build(&[a], |c| unsafe {
            match ne.len() {
                2 => sys::ggml_reshape_2d(c, a.raw(), n[0], n[1]),
                3 => sys::ggml_reshape_3d(c, a.raw(), n[0], n[1], n[2]),
                _ => sys::ggml_reshape_4d(c, a.raw(), n[0], n[1], n[2], n[3]),
            }
        })
    }

    /// A window into `a`: shape `ne`, strides `nb` of dimensions 1 to 3 in bytes, first byte at `offset`.
    pub(crate) fn view(
        self: &Arc<Self>,
        a: &Tensor,
        ne: [usize; 4],
        nb: [usize; 3],
        offset: usize,
    ) -> Tensor {
        let n = ne.map(|n| n as i64);
        // SAFETY: valid description; the window lies inside `a` (module comment).
        self.build(&[a], |c| unsafe {
            sys::ggml_view_4d(
                c,
                a.raw(),
                n[0],
                n[1],
                n[2],
                n[3],
                nb[0],
                nb[1],
                nb[2],
                offset,
            )
        })
    }

    /// The rows of `a`, then those of `b`: `ne = [n, T]` and [n, U] -> [n, T + U].
    pub(crate) fn concat_rows(self: &Arc<Self>, a: &Tensor, b: &Tensor) -> Tensor {
        // SAFETY: valid descriptions of equal width.
        self.build(&[a, b], |c| unsafe {
            sys::ggml_concat(c, a.raw(), b.raw(), 1)
        })
    }

    /// Dimension i of `a` becomes dimension `axes[i]`.
    pub(crate) fn permute(self: &Arc<Self>, a: &Tensor, axes: [i32; 4]) -> Tensor {
        // SAFETY: valid description, a permutation of 0..4.
        self.build(&[a], |c| unsafe {
            sys::ggml_permute(c, a.raw(), axes[0], axes[1], axes[2], axes[3])
        })
    }

    /// Rotary position embedding: a `ne = [d, H, T]`, pos I32 `ne = [T]`, factors F32 `ne = [n_rot/2]` divide the frequencies.
    pub(crate) fn rope(
        self: &Arc<Self>,
        a: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        r: &Rope,
    ) -> Tensor {
        self.rotate(sys::ggml_rope_ext, a, pos, factors, r)
    }

    /// The derivative of [`Context::rope`]: rotates the gradient back.
    pub(crate) fn rope_back(
        self: &Arc<Self>,
        dy: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        r: &Rope,
    ) -> Tensor {
        self.rotate(sys::ggml_rope_ext_back, dy, pos, factors, r)
    }

    fn rotate(
        self: &Arc<Self>,
        direction: RopeFn,
        a: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        r: &Rope,
    ) -> Tensor {
        let mode = match r.kind {
            RopeKind::Interleaved => 0,
            RopeKind::Neox => ROPE_TYPE_NEOX,
        };
        let mut srcs = vec![a, pos];
        srcs.extend(factors);
        // SAFETY: valid descriptions; shapes were validated upstream.
        self.build(&srcs, |c| unsafe {
            direction(
                c,
                a.raw(),
                pos.raw(),
                factors.map_or(std::ptr::null_mut(), Tensor::raw),
                r.n_rot as i32,
                mode,
                r.n_ctx_orig as i32,
                r.freq_base,
                r.freq_scale,
                r.ext_factor,
                r.attn_factor,
                r.beta_fast,
                r.beta_slow,
            )
        })
    }

    /// `softmax(scale * a + mask)` over rows: a `ne = [N, T, H, S]`, mask `ne = [N, T, 1, S]`.
    pub(crate) fn soft_max(self: &Arc<Self>, a: &Tensor, mask: &Tensor, scale: f32) -> Tensor {
        // SAFETY: valid descriptions; no ALiBi.
        self.build(&[a, mask], |c| unsafe {
            sys::ggml_soft_max_ext(c, a.raw(), mask.raw(), scale, 0.0)
        })
    }

    /// Fused attention (Dao et al. 2022): q `ne = [d, T, H, S]`, k and v `ne = [d, N, Hk, S]`, mask F16 `ne = [N, T, 1, S]`
    /// -> `ne = [d, H, T, S]`. `softcap` 0 is none.
    pub(crate) fn flash_attn(
        self: &Arc<Self>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: &Tensor,
        scale: f32,
        softcap: f32,
    ) -> Tensor {
        // SAFETY: valid descriptions; shapes were validated upstream.
        self.build(&[q, k, v, mask], |c| unsafe {
            let t = sys::ggml_flash_attn_ext(
                c,
                q.raw(),
                k.raw(),
                v.raw(),
                mask.raw(),
                scale,
                0.0,
                softcap,
            );
            sys::ggml_prec_set_acc(t, sys::GGML_PREC_F32);
            t
        })
    }

    /// [`Context::mul_mat`] that accumulates in F32 whatever the operand types (attention scores).
    pub(crate) fn mul_mat_f32(self: &Arc<Self>, w: &Tensor, b: &Tensor) -> Tensor {
        let t = self.mul_mat(w, b);
        // SAFETY: a valid description.
        unsafe { sys::ggml_prec_set_acc(t.raw(), sys::GGML_PREC_F32) };
        t
    }
}
