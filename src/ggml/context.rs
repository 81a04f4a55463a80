//! A graph being built: tensors and the verbs that make them.

use super::arena::Arena;
use super::memory::Buffer;
use super::ops::{RopeTable, Scoring};
use super::tensor::{GraphId, Home, Tensor};
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::any::Any;
use std::cell::{RefCell, RefMut};
use std::collections::HashMap;
use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::Arc;

/// What a graph is built in. It alone makes tensors of a graph, names and marks them; it is no other thread's to see, and it
/// ends when [`GraphShape::new`](super::GraphShape::new) makes the graph, after which nothing is added or changed.
pub(crate) struct Context {
    operations: Operations,
    parts: RefCell<Parts>,
    rope_tables: RefCell<Vec<RopeTable>>,
}

/// What a graph consists of.
pub(super) struct Parts {
    pub(super) id: GraphId,
    pub(super) arena: Arena,
    /// Stored tensors that some of the graph's read, by [`Tensor::id`].
    stored: HashMap<usize, Arc<Buffer>>,
    /// What custom operations point to.
    kernels: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Parts {
    /// Tensors that a graph of these parts can consist of.
    pub(super) fn len(&self) -> usize {
        self.arena.len() + self.stored.len()
    }
}

/// Whose code computes what stands between products: norms, rotary positions, activations, sums, rows that are picked and stored. (Products and attention are
/// chosen one by one.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operations {
    /// Ours, on a [team](super::team) of threads.
    Own,
    /// ggml's: results are libllama's, bit for bit.
    Ggml,
}

impl Context {
    /// Nothing yet.
    pub(crate) fn new(operations: Operations) -> Self {
        Self {
            operations,
            rope_tables: RefCell::default(),
            parts: RefCell::new(Parts {
                id: GraphId::new(),
                arena: Arena::default(),
                stored: HashMap::new(),
                kernels: Vec::new(),
            }),
        }
    }

    /// Whether what stands between products is computed by us.
    pub(super) fn is_own(&self) -> bool {
        self.operations == Operations::Own
    }

    /// Tables of rotary positions that are there.
    pub(super) fn rope_tables(&self) -> RefMut<'_, Vec<RopeTable>> {
        self.rope_tables.borrow_mut()
    }

    /// Everything that was built.
    pub(super) fn into_parts(self) -> Parts {
        self.parts.into_inner()
    }

    /// Keeps `kernel` as long as the graph.
    pub(super) fn keep(&self, kernel: Arc<dyn Any + Send + Sync>) {
        self.parts.borrow_mut().kernels.push(kernel);
    }

    /// Runs a ggml constructor that reads `srcs`.
    ///
    /// # Panics
    /// If one of them is of another graph, whose memory can go at any time.
    pub(super) fn build(
        &self,
        srcs: &[&Tensor],
        constructor: impl FnOnce(*mut sys::ggml_context) -> *mut sys::ggml_tensor,
    ) -> Tensor {
        let parts = &mut *self.parts.borrow_mut();
        for src in srcs.iter().filter(|src| !src.belongs_to(parts.id)) {
            let buffer = src
                .buffer()
                .expect("a tensor of this graph or a stored one");
            parts.stored.insert(src.id(), buffer.clone());
        }
        let raw = parts.arena.append(constructor);
        // SAFETY: of our arena, which we have borrowed.
        unsafe { Tensor::new(raw, Home::Graph(parts.id)) }
    }

    /// The description of a tensor, to be written.
    ///
    /// # Panics
    /// If the tensor is not of this graph.
    fn description(&self, t: &Tensor) -> *mut sys::ggml_tensor {
        assert!(
            t.belongs_to(self.parts.borrow().id),
            "a tensor of this graph"
        );
        t.raw()
    }

    /// Names the tensor `name`, or `name-layer`, as llama.cpp does, so that a test can find it.
    pub(crate) fn named(&self, name: &str, layer: Option<usize>, t: Tensor) -> Tensor {
        let name = match layer {
            Some(il) => format!("{name}-{il}\0"),
            None => format!("{name}\0"),
        };
        // SAFETY: NUL-terminated; ggml truncates to its own capacity.
        unsafe { sys::ggml_set_name(self.description(&t), name.as_ptr().cast()) };
        t
    }

    /// The tensor called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<Tensor> {
        let name = CString::new(name).ok()?;
        let parts = self.parts.borrow();
        let raw = parts.arena.find(&name)?;
        // SAFETY: of our arena, which we have borrowed.
        Some(unsafe { Tensor::new(raw, Home::Graph(parts.id)) })
    }

    /// Marks memory that is read after the graph ran; for a view, that of the tensor it looks into.
    pub(crate) fn output(&self, t: Tensor) -> Tensor {
        let raw = self.description(&t);
        let source = self.source(raw);
        // SAFETY: valid descriptions, of this graph.
        unsafe { sys::ggml_set_output(raw) };
        // Memory of stored tensors stays what it is.
        if !self.parts.borrow().stored.contains_key(&(source as usize)) {
            // SAFETY: as above.
            unsafe { sys::ggml_set_output(source) };
        }
        t
    }

    /// The tensor whose memory `t` is in: its own, or the one that it is a view of, which is no view itself.
    fn source(&self, t: *mut sys::ggml_tensor) -> *mut sys::ggml_tensor {
        // SAFETY: a description of this graph or a stored one, as `build` sees to.
        NonNull::new(unsafe { (*t).view_src }).map_or(t, NonNull::as_ptr)
    }

    /// # Panics
    /// If an operation must not write to the memory of `t`: that is stored.
    pub(super) fn check_writable(&self, t: &Tensor) {
        let stored = t.buffer().is_some() || {
            let source = self.source(self.description(t)) as usize;
            self.parts.borrow().stored.contains_key(&source)
        };
        assert!(!stored, "graphs never write what is stored");
    }

    /// An input: memory that is written before the graph runs and is not used for anything else within it.
    pub(crate) fn input(&self, ty: GgmlType, ne: &[usize], name: &str) -> Tensor {
        let t = self.named(name, None, self.new_tensor(ty, ne));
        // SAFETY: a valid description.
        unsafe { sys::ggml_set_input(self.description(&t)) };
        t
    }

    /// A tensor that is not computed.
    pub(super) fn new_tensor(&self, ty: GgmlType, ne: &[usize]) -> Tensor {
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
            pub(crate) fn $name(&self, $($t: &Tensor),+ $(, $($p: $ty),+)?) -> Tensor {
                // SAFETY: valid descriptions; shapes were validated upstream (module comment).
                self.build(&[$($t),+], |c| unsafe { sys::$ggml(c, $($t.raw()),+ $(, $($conv),+)?) })
            })*
        }
    };
}

verbs! {
    /// `b` times `w` transposed: w `ne = [K, N]`, b `ne = [K, T]` -> `ne = [N, T]`. `w` may be quantized.
    mul_mat(w, b) = ggml_mul_mat;
    /// Swaps the first two dimensions of the view.
    transpose(a) = ggml_transpose;
}

impl Context {
    /// Reinterprets contiguous data.
    pub(crate) fn reshape(&self, a: &Tensor, ne: &[usize]) -> Tensor {
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
    pub(crate) fn view(&self, a: &Tensor, ne: [usize; 4], nb: [usize; 3], offset: usize) -> Tensor {
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

    /// Dimension i of `a` becomes dimension `axes[i]`.
    pub(crate) fn permute(&self, a: &Tensor, axes: [i32; 4]) -> Tensor {
        // SAFETY: valid description, a permutation of 0..4.
        self.build(&[a], |c| unsafe {
            sys::ggml_permute(c, a.raw(), axes[0], axes[1], axes[2], axes[3])
        })
    }

    /// `softmax(scale * a + mask)` over rows, and a sink of each head: a `ne = [N, T, H, S]`, mask `ne = [N, T, 1, S]`, sinks F32 `ne = [H]`.
    pub(crate) fn soft_max(
        &self,
        a: &Tensor,
        mask: &Tensor,
        sinks: Option<&Tensor>,
        scale: f32,
    ) -> Tensor {
        let srcs: Vec<_> = [a, mask].into_iter().chain(sinks).collect();
        // SAFETY: valid descriptions; no ALiBi.
        self.build(&srcs, |c| unsafe {
            let t = sys::ggml_soft_max_ext(c, a.raw(), mask.raw(), scale, 0.0);
            if let Some(sinks) = sinks {
                sys::ggml_soft_max_add_sinks(t, sinks.raw());
            }
            t
        })
    }

    /// Fused attention (Dao et al. 2022): q `ne = [d, T, H, S]`, k and v `ne = [d, N, Hk, S]`, mask F16 `ne = [N, T, 1, S]`,
    /// sinks F32 `ne = [H]` -> `ne = [d, H, T, S]`.
    pub(crate) fn flash_attn(
        &self,
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        mask: &Tensor,
        sinks: Option<&Tensor>,
        scoring: Scoring,
    ) -> Tensor {
        let srcs: Vec<_> = [q, k, v, mask].into_iter().chain(sinks).collect();
        // SAFETY: valid descriptions; shapes were validated upstream.
        self.build(&srcs, |c| unsafe {
            let t = sys::ggml_flash_attn_ext(
                c,
                q.raw(),
                k.raw(),
                v.raw(),
                mask.raw(),
                scoring.scale,
                0.0,
                scoring.softcap,
            );
            sys::ggml_prec_set_acc(t, sys::GGML_PREC_F32);
            if let Some(sinks) = sinks {
                sys::ggml_flash_attn_ext_add_sinks(t, sinks.raw());
            }
            t
        })
    }

    /// [`Context::mul_mat`] that accumulates in F32 whatever the operand types (attention scores).
    pub(crate) fn mul_mat_f32(&self, w: &Tensor, b: &Tensor) -> Tensor {
        // SAFETY: as for `mul_mat`.
        self.build(&[w, b], |c| unsafe {
            let t = sys::ggml_mul_mat(c, w.raw(), b.raw());
            sys::ggml_prec_set_acc(t, sys::GGML_PREC_F32);
            t
        })
    }
}
