//! `ggml_context` as an arena of tensor descriptions, and the graph-building verbs.

use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::any::Any;
use std::ffi::{CStr, CString};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An arena of tensor descriptions (never of their data). Cloned handles share it.
pub(crate) struct Context {
    raw: NonNull<sys::ggml_context>,
    /// Held while ggml appends to the arena; the list is what tensors of this context point into.
    keep: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

// SAFETY: the arena is only appended to under `keep`'s lock, and tensor descriptions are written only while a graph that
// contains them is built or computed, which needs `&mut Graph`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `ggml_init` and every tensor handle holds an `Arc` of `self`.
        unsafe { sys::ggml_free(self.raw.as_ptr()) }
    }
}

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
    /// An arena for `n_tensors` descriptions and one graph of as many nodes if `with_graph`.
    pub(crate) fn new(n_tensors: usize, with_graph: bool) -> Arc<Self> {
        // SAFETY: pure size functions.
        let mut mem_size = n_tensors * unsafe { sys::ggml_tensor_overhead() };
        if with_graph {
            // SAFETY: as above.
            mem_size += unsafe { sys::ggml_graph_overhead_custom(n_tensors, false) };
        }
        let params = sys::ggml_init_params {
            mem_size,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: ggml owns the memory it allocates; `no_alloc` makes it an arena of descriptions.
        let raw = unsafe { sys::ggml_init(params) };
        let raw = NonNull::new(raw).expect("ggml_init allocates a few hundred kilobytes");
        Arc::new(Self {
            raw,
            keep: Mutex::new(Vec::new()),
        })
    }

    pub(super) fn raw(&self) -> *mut sys::ggml_context {
        self.raw.as_ptr()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<dyn Any + Send + Sync>>> {
        self.keep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps `owner` (a map, a buffer) alive as long as the context and its tensors.
    pub(crate) fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.lock().push(owner);
    }

    /// The tensor called `name`.
    pub(crate) fn find(self: &Arc<Self>, name: &str) -> Option<Tensor> {
        let name = CString::new(name).ok()?;
        // SAFETY: a live arena and a NUL-terminated name.
        let raw = NonNull::new(unsafe { sys::ggml_get_tensor(self.raw(), name.as_ptr()) })?;
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
        let mut keep = self.lock();
        for src in srcs {
            if !src.belongs_to(self) {
                let owner: Arc<dyn Any + Send + Sync> = src.ctx.clone();
                if !keep
                    .iter()
                    .any(|k| std::ptr::addr_eq(Arc::as_ptr(k), Arc::as_ptr(&owner)))
                {
                    keep.push(owner);
                }
            }
        }
        let raw = NonNull::new(f(self.raw())).expect("ggml tensor constructors do not return null");
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
    /// GELU, tanh approximation.
    gelu(a) = ggml_gelu;
    /// `silu(gate) * up`.
    swiglu(gate, up) = ggml_swiglu_split;
    /// `gelu(gate) * up`.
    geglu(gate, up) = ggml_geglu_split;
    /// `silu(first half) * second half` of each row: `ne = [2F, T]` -> [F, T].
    swiglu_fused(a) = ggml_swiglu;
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
