//! A computation graph with its memory and its plan: built once, run many times.

use super::arena::Chunk;
use super::context::{Context, Parts};
use super::tensor::Tensor;
use super::threadpool::ThreadPool;
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why a graph did not finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ComputeError {
    /// The cancel flag was raised.
    Cancelled,
    /// Memory ran out.
    OutOfMemory,
}

/// Memory for intermediate results. A new graph in the same memory replaces the one before it.
pub(crate) struct GraphMemory {
    raw: NonNull<sys::ggml_gallocr>,
}

// SAFETY: an allocator is used through `&mut` only.
unsafe impl Send for GraphMemory {}

impl GraphMemory {
    /// No memory yet; it grows to the largest graph.
    pub(crate) fn new() -> Self {
        // SAFETY: the CPU buffer type is static.
        let raw = unsafe { sys::ggml_gallocr_new(sys::ggml_backend_cpu_buffer_type()) };
        Self {
            raw: NonNull::new(raw).expect("an empty allocator"),
        }
    }
}

impl Drop for GraphMemory {
    fn drop(&mut self) {
        // SAFETY: graphs own their memory, so none is left that points into it.
        unsafe { sys::ggml_gallocr_free(self.raw.as_ptr()) }
    }
}

/// A graph without memory: what is to be computed, in which order. [`Graph::allocate`] gives it some.
pub(crate) struct GraphShape {
    parts: Parts,
    raw: NonNull<sys::ggml_cgraph>,
    /// Where the graph itself lies.
    _chunk: Chunk,
    /// Whether what ggml computes of it is so little that one thread does it: a [team](super::team) helps with the rest.
    suits_team: bool,
}

// SAFETY: the graph and the tensors that it consists of are ours alone; of the stored ones that it reads nobody writes the
// descriptions.
unsafe impl Send for GraphShape {}

impl GraphShape {
    /// The graph that computes `outputs`, in this order, which were built in `ctx`. What was built besides is no part of it.
    pub(crate) fn new(ctx: Context, outputs: &[Tensor]) -> Self {
        let parts = ctx.into_parts();
        let size = parts.len();
        // SAFETY: a pure size function.
        let chunk = Chunk::new(unsafe { sys::ggml_graph_overhead_custom(size, false) });
        // SAFETY: a chunk for a graph of this size, which all that the outputs can depend on fits into; they are ours, and
        // stored tensors have names, so that ggml gives them none.
        let raw = unsafe {
            let raw = sys::ggml_new_graph_custom(chunk.raw(), size, false);
            for t in outputs {
                assert!(t.belongs_to(parts.id), "an output of another graph");
                sys::ggml_build_forward_expand(raw, t.raw());
            }
            raw
        };
        let raw = NonNull::new(raw).expect("the chunk has room for the graph");
        // SAFETY: all nodes of a graph that is complete.
        let suits_team = unsafe {
            let n = sys::ggml_graph_n_nodes(raw.as_ptr());
            (0..n).all(|i| is_little(&*sys::ggml_graph_node(raw.as_ptr(), i)))
        };
        Self {
            parts,
            raw,
            _chunk: chunk,
            suits_team,
        }
    }

    /// Bytes that the graph's inputs and intermediate results take at most at one time.
    pub(crate) fn memory_needed(&self) -> usize {
        let memory = GraphMemory::new();
        let mut bytes = 0;
        // SAFETY: a complete graph without memory, planned by an allocator of its own; one buffer, one size.
        unsafe {
            sys::ggml_gallocr_reserve_n_size(
                memory.raw.as_ptr(),
                self.raw.as_ptr(),
                std::ptr::null(),
                std::ptr::null(),
                &mut bytes,
            );
        }
        bytes
    }
}

/// Elements that an operation of ggml's may read or write to be [little](is_little): it takes a dozen microseconds then.
const LITTLE: i64 = 32_768;

/// Whether one thread computes a node as fast as several, which would have to meet.
///
/// # Safety
/// The description must be valid, and those of its operands.
unsafe fn is_little(node: &sys::ggml_tensor) -> bool {
    // SAFETY: valid descriptions.
    let elements = |t: &sys::ggml_tensor| unsafe { sys::ggml_nelements(t) };
    // SAFETY: as above.
    let mut operands = (node.src.iter()).map_while(|&t| unsafe { t.as_ref() }.map(elements));
    match node.op {
        // Not ggml's.
        sys::GGML_OP_CUSTOM => true,
        // Of its table it reads what it writes.
        sys::GGML_OP_GET_ROWS => elements(node) <= LITTLE,
        // There is nothing to do.
        sys::GGML_OP_NONE
        | sys::GGML_OP_RESHAPE
        | sys::GGML_OP_VIEW
        | sys::GGML_OP_PERMUTE
        | sys::GGML_OP_TRANSPOSE => true,
        _ => elements(node) <= LITTLE && operands.all(|n| n <= LITTLE),
    }
}

/// A graph with memory. It owns that of its intermediate results, so the data of its tensors is only reachable through it.
pub(crate) struct Graph {
    shape: GraphShape,
    memory: GraphMemory,
    /// Scratch of the kernels (quantized activations and the like), sized by the plan.
    work: Vec<u8>,
    plan: Option<Plan>,
}

struct Plan {
    raw: sys::ggml_cplan,
    n_threads: usize,
}

// SAFETY: as for `GraphShape`; the plan points into what is ours as well, and is set anew before it is used.
unsafe impl Send for Graph {}

impl Graph {
    /// As [`GraphShape::new`], with memory.
    pub(crate) fn new(
        ctx: Context,
        outputs: &[Tensor],
        memory: GraphMemory,
    ) -> Result<Self, ComputeError> {
        Self::allocate(GraphShape::new(ctx, outputs), memory)
    }

    /// Gives a graph its memory.
    pub(crate) fn allocate(
        shape: GraphShape,
        mut memory: GraphMemory,
    ) -> Result<Self, ComputeError> {
        // SAFETY: a complete graph; `memory` is exclusively ours.
        if !unsafe { sys::ggml_gallocr_alloc_graph(memory.raw.as_mut(), shape.raw.as_ptr()) } {
            return Err(ComputeError::OutOfMemory);
        }
        Ok(Self {
            shape,
            memory,
            work: Vec::new(),
            plan: None,
        })
    }

    /// Takes the memory back for the next graph.
    pub(crate) fn into_memory(self) -> GraphMemory {
        self.memory
    }

    /// Takes the memory back for the next graph, and the graph without it, which [`Graph::allocate`] takes again.
    pub(crate) fn into_parts(mut self) -> (GraphShape, GraphMemory) {
        self.shape.parts.arena.forget_memory();
        (self.shape, self.memory)
    }

    /// Runs the graph on `pool`, until done or `cancel` is raised.
    pub(crate) fn compute(
        &mut self,
        pool: &ThreadPool,
        cancel: Option<&AtomicBool>,
    ) -> Result<(), ComputeError> {
        let _turn = pool.turn();
        let team = (self.shape.suits_team).then(|| pool.team()).flatten();
        let (n_threads, threads) = match team {
            Some(_) => (1, std::ptr::null_mut()),
            None => (pool.n_threads(), pool.ggml()),
        };
        if self.plan.as_ref().is_none_or(|p| p.n_threads != n_threads) {
            // SAFETY: a complete, allocated graph.
            let raw =
                unsafe { sys::ggml_graph_plan(self.shape.raw.as_ptr(), n_threads as i32, threads) };
            self.work.resize(raw.work_size, 0);
            self.plan = Some(Plan { raw, n_threads });
        }
        let plan = &mut self.plan.as_mut().expect("set above").raw;
        plan.work_data = self.work.as_mut_ptr();
        plan.threadpool = threads;
        if let Some(cancel) = cancel {
            plan.abort_callback = Some(is_raised);
            plan.abort_callback_data = std::ptr::from_ref(cancel).cast_mut().cast();
        } else {
            plan.abort_callback = None;
        }
        // SAFETY: graph, memory and work buffer are exclusively ours; the pool is ours for this turn; `cancel` outlives
        // the call.
        let mut compute = || unsafe { sys::ggml_graph_compute(self.shape.raw.as_ptr(), plan) };
        let status = match team {
            Some(team) => team.help_with(compute),
            None => compute(),
        };
        match status {
            sys::GGML_STATUS_SUCCESS => Ok(()),
            sys::GGML_STATUS_ABORTED => Err(ComputeError::Cancelled),
            _ => Err(ComputeError::OutOfMemory),
        }
    }

    /// First byte of the memory of `t`, if `t` is part of the graph.
    fn data(&self, t: &Tensor) -> Option<NonNull<u8>> {
        assert!(t.belongs_to(self.shape.parts.id), "a tensor of this graph");
        // SAFETY: the description is ours.
        NonNull::new(unsafe { (*t.raw()).data }.cast())
    }

    /// Whether `t` is part of the graph: an input that no node reads gets no memory.
    pub(crate) fn has_memory(&self, t: &Tensor) -> bool {
        self.data(t).is_some()
    }

    /// The bytes of `t`, from its first element to its last.
    fn bytes(&self, t: &Tensor) -> &[u8] {
        let data = self.data(t).expect(NOT_COMPUTED);
        // SAFETY: the graph's memory holds `nbytes` at `data`, and only `&mut self` writes it.
        unsafe { std::slice::from_raw_parts(data.as_ptr(), t.nbytes()) }
    }

    /// The bytes of an input, to be filled before [`Graph::compute`].
    pub(crate) fn bytes_mut(&mut self, t: &Tensor) -> &mut [u8] {
        let data = self.data(t).expect(NOT_COMPUTED);
        // SAFETY: as in `bytes`; inputs are contiguous, and the graph is exclusively ours.
        unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), t.nbytes()) }
    }

    /// An input as values of type `T`.
    pub(crate) fn slice_mut<T: bytemuck::Pod>(&mut self, t: &Tensor) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut(t))
    }

    /// Elements of an F32 output that may be a view with gaps, in ggml order. For tests: one by one.
    pub(crate) fn gather_f32(&self, t: &Tensor) -> Vec<f32> {
        assert_eq!(t.ty(), GgmlType::F32);
        let ([n0, n1, n2, n3], [b0, b1, b2, b3]) = (t.ne(), t.nb());
        let bytes = self.bytes(t);
        let mut out = Vec::with_capacity(n0 * n1 * n2 * n3);
        for i3 in 0..n3 {
            for i2 in 0..n2 {
                for i1 in 0..n1 {
                    for i0 in 0..n0 {
                        let at = i0 * b0 + i1 * b1 + i2 * b2 + i3 * b3;
                        out.push(bytemuck::pod_read_unaligned(&bytes[at..at + 4]));
                    }
                }
            }
        }
        out
    }

    /// An output, as I32 values, or the bits of F32 values.
    pub(crate) fn read_i32(&self, t: &Tensor) -> &[i32] {
        bytemuck::cast_slice(self.bytes(t))
    }

    /// An output, as F32 values.
    pub(crate) fn read_f32(&self, t: &Tensor) -> &[f32] {
        assert_eq!(t.ty(), GgmlType::F32);
        bytemuck::cast_slice(self.bytes(t))
    }
}

const NOT_COMPUTED: &str = "a tensor that some output depends on";

/// `ggml_abort_callback` over an `AtomicBool`.
///
/// # Safety
/// `data` must point to a live `AtomicBool`.
unsafe extern "C" fn is_raised(data: *mut std::ffi::c_void) -> bool {
    // SAFETY: the caller's promise.
    unsafe { &*data.cast::<AtomicBool>() }.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::super::context::Operations;
    use super::super::memory::Buffer;
    use super::*;
    use std::sync::Arc;

    #[test]
    fn arenas_grow_and_graphs_are_as_large_as_they_must() {
        let ctx = Context::new(Operations::Own);
        let x = ctx.input(GgmlType::F32, &[4], "x");
        let mut y = x.clone();
        // Several chunks of descriptions, and more nodes than ggml's default graph has.
        for _ in 0..3000 {
            y = ctx.scale(&y, -1.0);
        }
        let y = ctx.output(ctx.add(&y, &x));
        assert_eq!(ctx.find("x").unwrap().id(), x.id());
        assert!(ctx.find("y").is_none());
        let pool = ThreadPool::new(1);
        let mut memory = GraphMemory::new();
        let mut shape = GraphShape::new(ctx, std::slice::from_ref(&y));
        assert_eq!(shape.parts.len(), 3002);
        // The same graph in memory that another one had in between.
        for factor in [1.0, 3.0] {
            let mut graph = Graph::allocate(shape, memory).unwrap();
            let values = [1.0, 2.0, 3.0, 4.0].map(|v| factor * v);
            graph.slice_mut(&x).copy_from_slice(&values);
            graph.compute(&pool, None).unwrap();
            assert_eq!(graph.read_f32(&y), values.map(|v| 2.0 * v));
            (shape, memory) = graph.into_parts();
            let other = Context::new(Operations::Own);
            let z = other.input(GgmlType::F32, &[1 << 16], "z");
            let sum = other.output(other.add(&z, &z));
            let graph = Graph::new(other, &[sum], memory).unwrap();
            memory = graph.into_memory();
        }
    }

    /// A stored tensor `ne = [4]` with the values 1, 2, 3, 4.
    fn stored() -> Tensor {
        #[repr(align(64))]
        struct Values([f32; 4]);
        let values = Arc::new(Values([1.0, 2.0, 3.0, 4.0]));
        let (base, size) = (values.0.as_ptr().cast(), size_of::<Values>());
        // SAFETY: the owner keeps the values in place; no graph of these tests writes them.
        let buffer = unsafe { Buffer::read_only(base, size, values) };
        buffer.tensor(GgmlType::F32, &[4], "w", 0)
    }

    #[test]
    fn stored_tensors_outlive_who_made_them_and_are_counted_once() {
        let w = stored();
        let ctx = Context::new(Operations::Own);
        let row = ctx.view(&w, [2, 1, 1, 1], [8, 8, 8], 8);
        let x = ctx.input(GgmlType::F32, &[2], "x");
        let sum = ctx.output(ctx.add(&ctx.add(&x, &row), &ctx.view(&w, [2, 1, 1, 1], [8; 3], 0)));
        drop(w);
        let shape = GraphShape::new(ctx, std::slice::from_ref(&sum));
        // x, both sums and both views, and what these look into.
        assert_eq!(shape.parts.len(), 6);
        let mut graph = Graph::allocate(shape, GraphMemory::new()).unwrap();
        graph.slice_mut(&x).copy_from_slice(&[0.5f32, 0.25]);
        graph.compute(&ThreadPool::new(1), None).unwrap();
        assert_eq!(graph.read_f32(&sum), [4.5, 6.25]);
    }

    #[test]
    #[should_panic(expected = "a tensor of this graph or a stored one")]
    fn graphs_do_not_read_each_other() {
        let (one, other) = (Context::new(Operations::Own), Context::new(Operations::Own));
        let x = one.input(GgmlType::F32, &[2], "x");
        other.scale(&x, 2.0);
    }

    #[test]
    #[should_panic(expected = "a tensor of this graph")]
    fn what_is_stored_has_its_name_for_good() {
        Context::new(Operations::Own).named("v", None, stored());
    }

    #[test]
    #[should_panic(expected = "graphs never write what is stored")]
    fn graphs_do_not_write_weights() {
        let ctx = Context::new(Operations::Own);
        let write = |x: &Tensor| ctx.softcap(x, 1.0, 2.0);
        write(&ctx.input(GgmlType::F32, &[4], "x"));
        write(&stored());
    }
}
