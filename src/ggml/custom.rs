//! Operations that ggml does not have, computed by kernels of ours within its graphs.

use super::context::Context;
pub(crate) use super::team::Parts;
use super::team::share_out;
use super::tensor::Tensor;
use crate::file::types::GgmlType;
use ggml_sys as sys;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// `GGML_N_TASKS_MAX`, a macro in ggml.h that the bindings leave out: as many tasks as threads.
const ALL_THREADS: i32 = -1;

/// Parts that so many elements are worth, of a few instructions each.
pub(super) fn small_parts(elements: usize) -> Parts {
    small_parts_of(usize::MAX, elements)
}

/// The same where a part is at least one of `n` rows.
pub(super) fn small_parts_of(n: usize, elements: usize) -> Parts {
    /// A thread computes so many in the time that it takes to call for help.
    const ELEMENTS: usize = 8192;
    Parts::AtMost(n.min(elements / ELEMENTS))
}

/// What computes an operation: [`Kernel::run`] is called once for each part of it, by the threads of the pool or of a [team](super::team).
pub(crate) trait Kernel: Send + Sync + 'static {
    /// Computes the part of the result `out` that belongs to `op.ith` of `op.nth`. There is no barrier within an operation:
    /// a part must not read what another one writes.
    fn run(&self, op: &Op<'_>, out: Output<'_>);

    /// Parts that an operation is worth: unless a kernel says otherwise, an element of the result is a few instructions.
    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(op.ne().iter().product())
    }
}

/// One part's view of an operation: its operands.
pub(crate) struct Op<'a> {
    dst: &'a sys::ggml_tensor,
    /// This part.
    pub(super) ith: usize,
    /// Of so many.
    pub(super) nth: usize,
}

/// The right to write one part of the contiguous result, F32 or I32. There is one for each part and operation, and
/// whoever takes a slice of the result gives it up for that, so no two slices are the same memory.
pub(crate) struct Output<'a> {
    dst: &'a sys::ggml_tensor,
    ith: usize,
    nth: usize,
}

impl<'a> Output<'a> {
    /// This part's share of the result as `n` items of equal length, a number that all parts must agree on: the first
    /// item's number and the elements.
    pub(super) fn share(self, n: usize) -> (usize, &'a mut [f32]) {
        let range = share(n, self.ith, self.nth);
        (range.start, self.items(n, range, sys::GGML_TYPE_F32))
    }

    /// As [`Output::share`], of an I32 result.
    pub(super) fn share_ids(self, n: usize) -> (usize, &'a mut [i32]) {
        let range = share(n, self.ith, self.nth);
        (range.start, self.items(n, range, sys::GGML_TYPE_I32))
    }

    /// All of an I32 result, for the first part, which does all of the work.
    ///
    /// # Panics
    /// If it is another part's.
    pub(super) fn all_ids(self) -> &'a mut [i32] {
        assert_eq!(self.ith, 0, "the first part");
        self.items(1, 0..1, sys::GGML_TYPE_I32)
    }

    /// Some of `n` items, as `T`s, which is what type `ty` has: those that are this part's, or all if the other parts take none.
    fn items<T: bytemuck::Pod>(
        self,
        n: usize,
        range: Range<usize>,
        ty: sys::ggml_type,
    ) -> &'a mut [T] {
        assert_eq!(self.dst.type_, ty);
        let len = self.dst.ne.iter().product::<i64>() as usize / n;
        let first = self.dst.data.cast::<T>();
        // SAFETY: inside the result, and the shares of all parts are disjoint. No operand is the same memory
        // (`Op::operand`), and `self` was the only way to it.
        unsafe { std::slice::from_raw_parts_mut(first.add(range.start * len), range.len() * len) }
    }

    /// First element of the result, for kernels that divide it otherwise.
    pub(super) fn as_mut_ptr(&self) -> *mut f32 {
        self.dst.data.cast()
    }
}

/// Part `ith` of `nth` of `n` items.
fn share(n: usize, ith: usize, nth: usize) -> Range<usize> {
    n * ith / nth..n * (ith + 1) / nth
}

/// An F32 operand, possibly a view with gaps between its rows.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    /// From the first to the last element.
    pub(super) values: &'a [f32],
    /// Elements per dimension.
    pub(super) ne: [usize; 4],
    /// Elements from one row, plane or cube to the next; the elements of a row are neighbours.
    pub(super) stride: [usize; 4],
}

impl<'a> Operand<'a> {
    /// Row (i1, i2) of a tensor of at most three dimensions.
    pub(super) fn row(&self, i1: usize, i2: usize) -> &'a [f32] {
        &self.values[i1 * self.stride[1] + i2 * self.stride[2]..][..self.ne[0]]
    }

    /// Row `i` of all, one plane after the other, of a tensor of at most three dimensions.
    pub(super) fn nth_row(&self, i: usize) -> &'a [f32] {
        self.row(i % self.ne[1], i / self.ne[1])
    }

    /// All elements of an operand without gaps.
    pub(super) fn contiguous(&self) -> &'a [f32] {
        assert_eq!(self.values.len(), self.ne.iter().product::<usize>());
        self.values
    }
}

/// An operand of any type.
pub(super) struct Memory {
    /// Its first byte.
    pub(super) first: *const u8,
    pub(super) ty: GgmlType,
    /// Elements per dimension.
    pub(super) ne: [usize; 4],
    /// Bytes from one element (or block), row, plane or cube to the next.
    pub(super) nb: [usize; 4],
}

impl<'a> Op<'a> {
    fn src(&self, i: usize) -> &'a sys::ggml_tensor {
        // SAFETY: the constructors below set the sources that kernels ask for; ggml keeps them alive.
        unsafe { self.dst.src[i].as_ref() }.expect("the operation has this operand")
    }

    /// Operand `i`, which the operation does not write: of one in place not the first.
    pub(super) fn operand(&self, i: usize) -> Operand<'a> {
        let t = self.src(i);
        assert_eq!(t.type_, sys::GGML_TYPE_F32);
        assert_eq!(t.nb[0], size_of::<f32>());
        assert_ne!(t.data, self.dst.data, "an operation in place writes it");
        let ne = t.ne.map(|n| n as usize);
        let stride = t.nb.map(|n| n / size_of::<f32>());
        let span = 1 + (0..4).map(|i| (ne[i] - 1) * stride[i]).sum::<usize>();
        // SAFETY: the graph's allocator, or the owner of the weights, provides these elements; no part of this operation
        // writes them (trait contract).
        let values = unsafe { std::slice::from_raw_parts(t.data.cast::<f32>(), span) };
        Operand { values, ne, stride }
    }

    /// Operands that there are.
    pub(super) fn n_operands(&self) -> usize {
        self.dst.src.iter().take_while(|t| !t.is_null()).count()
    }

    /// Operand `i`, contiguous I32.
    pub(super) fn ids(&self, i: usize) -> &'a [i32] {
        self.contiguous(i, sys::GGML_TYPE_I32)
    }

    /// Operand `i`, contiguous and of type `ty`, whose values are `T`s.
    fn contiguous<T: bytemuck::AnyBitPattern>(&self, i: usize, ty: sys::ggml_type) -> &'a [T] {
        let t = self.src(i);
        assert_eq!(t.type_, ty);
        let n = t.ne.iter().product::<i64>() as usize;
        // SAFETY: a pure query of a valid description.
        let bytes = unsafe { sys::ggml_nbytes(t) };
        assert_eq!(bytes, n * size_of::<T>());
        // SAFETY: as in `operand`.
        unsafe { std::slice::from_raw_parts(t.data.cast::<T>(), n) }
    }

    /// Operand `i`, of any type, as it lies in memory.
    pub(super) fn memory(&self, i: usize) -> Memory {
        Memory::of(self.src(i))
    }

    /// The result, of any type, as it lies in memory.
    pub(super) fn result(&self) -> Memory {
        Memory::of(self.dst)
    }

    /// First element of operand `i`, which the kernel writes besides its result.
    pub(super) fn second_dst(&self, i: usize) -> *mut f32 {
        self.src(i).data.cast()
    }

    /// Elements of the result.
    pub(super) fn ne(&self) -> [usize; 4] {
        self.dst.ne.map(|n| n as usize)
    }

    /// This part's share of `n` items.
    pub(super) fn share(&self, n: usize) -> Range<usize> {
        share(n, self.ith, self.nth)
    }
}

impl Memory {
    fn of(t: &sys::ggml_tensor) -> Self {
        Self {
            first: t.data.cast::<u8>().cast_const(),
            ty: GgmlType::from_u32(t.type_).expect("tensors are made with known types"),
            ne: t.ne.map(|n| n as usize),
            nb: t.nb,
        }
    }
}

/// # Safety
/// `dst` is a tensor made by [`Context::custom`] or [`Context::custom_inplace`] with data, `kernel` its kernel.
unsafe extern "C" fn run(dst: *mut sys::ggml_tensor, ith: i32, nth: i32, kernel: *mut c_void) {
    // SAFETY: the caller's promise; the graph keeps the kernel.
    let (dst, kernel) = unsafe { (&*dst, &**kernel.cast::<Box<dyn Kernel>>()) };
    let (ith, nth) = (ith as usize, nth as usize);
    let operation = Operation { dst, kernel };
    if nth > 1 || !share_out(operation.parts(), |ith, nth| operation.run(ith, nth)) {
        operation.run(ith, nth);
    }
}

/// An operation that is being computed.
struct Operation<'a> {
    dst: &'a sys::ggml_tensor,
    kernel: &'a dyn Kernel,
}

// SAFETY: descriptions are not changed while operations are computed.
unsafe impl Sync for Operation<'_> {}

impl Operation<'_> {
    fn parts(&self) -> Parts {
        let (ith, nth) = (0, 1);
        self.kernel.parts(&Op {
            dst: self.dst,
            ith,
            nth,
        })
    }

    fn run(&self, ith: usize, nth: usize) {
        let dst = self.dst;
        self.kernel
            .run(&Op { dst, ith, nth }, Output { dst, ith, nth });
    }
}

impl Context {
    /// The F32 tensor, `ne` as given, that `kernel` computes from `srcs`.
    pub(crate) fn custom(&self, kernel: impl Kernel, srcs: &[&Tensor], ne: [usize; 4]) -> Tensor {
        self.custom_of(GgmlType::F32, kernel, srcs, ne)
    }

    /// The same, I32.
    pub(super) fn custom_ids(
        &self,
        kernel: impl Kernel,
        srcs: &[&Tensor],
        ne: [usize; 4],
    ) -> Tensor {
        self.custom_of(GgmlType::I32, kernel, srcs, ne)
    }

    fn custom_of(
        &self,
        ty: GgmlType,
        kernel: impl Kernel,
        srcs: &[&Tensor],
        ne: [usize; 4],
    ) -> Tensor {
        let userdata = self.keep_kernel(kernel);
        let ne = ne.map(|n| n as i64);
        let mut raw: Vec<_> = srcs.iter().map(|t| t.raw()).collect();
        // SAFETY: valid descriptions; the context keeps the kernel as long as the graph.
        self.build(srcs, |c| unsafe {
            sys::ggml_custom_4d(
                c,
                ty as u32,
                ne[0],
                ne[1],
                ne[2],
                ne[3],
                raw.as_mut_ptr(),
                raw.len() as i32,
                Some(run),
                ALL_THREADS,
                userdata,
            )
        })
    }

    /// As [`Context::custom`], but the result takes the memory of `a`, which nothing else may read any more. Operand 0 is
    /// `a`, the others follow.
    ///
    /// # Panics
    /// If `a` is a stored tensor.
    pub(crate) fn custom_inplace(
        &self,
        kernel: impl Kernel,
        a: &Tensor,
        srcs: &[&Tensor],
    ) -> Tensor {
        self.check_writable(a);
        let userdata = self.keep_kernel(kernel);
        let mut raw: Vec<_> = srcs.iter().map(|t| t.raw()).collect();
        let mut all = vec![a];
        all.extend(srcs);
        // SAFETY: as in `custom`.
        self.build(&all, |c| unsafe {
            sys::ggml_custom_inplace(
                c,
                a.raw(),
                raw.as_mut_ptr(),
                raw.len() as i32,
                Some(run),
                ALL_THREADS,
                userdata,
            )
        })
    }

    fn keep_kernel(&self, kernel: impl Kernel) -> *mut c_void {
        let kernel: Arc<Box<dyn Kernel>> = Arc::new(Box::new(kernel));
        let userdata = Arc::as_ptr(&kernel).cast_mut().cast();
        self.keep(kernel);
        userdata
    }
}
