//! Attention of sessions over a cache ([`cached`]), and of training: several rows of text packed into one sequence, each behind the same prefix, without seeing each
//! other ([`spans`]); forward ([`forward`]) and its derivative ([`backward`]). Nothing of size T x T is kept: both compute the
//! weights ([`weights`]) a few queries at a time (Dao et al. 2022).

mod backward;
mod cached;
mod forward;
mod operands;
mod spans;
mod weights;

pub(crate) use spans::{Scoring, Spans};

use crate::ggml::custom::Output;
use crate::ggml::tensor::Tensor;
use operands::KeysValues;
use std::cell::RefCell;

/// Memory that a thread keeps between operations. Letters as in the paper: scores S, weights P, output O.
#[derive(Default)]
struct Scratch {
    /// Keys and values of a span.
    kv: KeysValues,
    /// S, then P of some queries: `ne = [keys, queries]`.
    p: Vec<f32>,
    /// Derivative of the soft cap at each of S.
    slopes: Vec<f32>,
    /// dP, then dS.
    ds: Vec<f32>,
    /// O or dQ of some queries: `ne = [d, queries]`.
    rows: Vec<f32>,
    /// `ne = [d, keys]` of a span.
    dk: Vec<f32>,
    /// `ne = [d, keys]` of a span.
    dv: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes `rows`, `ne = [d, n]`, of head `head` of `h` to a result `ne = [d, h, T]`, from token `token` on.
///
/// # Safety
/// No other thread may write these values of this head.
unsafe fn store_head(
    out: &Output<'_>,
    d: usize,
    (head, h): (usize, usize),
    token: usize,
    rows: &[f32],
) {
    for (t, row) in (token..).zip(rows.chunks_exact(d)) {
        let at = (t * h + head) * d;
        // SAFETY: inside the result; the caller's promise.
        unsafe {
            let to = out.as_mut_ptr().add(at);
            to.copy_from_nonoverlapping(row.as_ptr(), d);
        }
    }
}

/// What attention over packed rows reads.
#[derive(Clone, Copy)]
pub(crate) struct PackedAttention<'a> {
    /// `ne = [d, H, T]`.
    pub(crate) q: &'a Tensor,
    /// `ne = [d, Hk, T]`.
    pub(crate) k: &'a Tensor,
    /// `ne = [d, Hk, T]`.
    pub(crate) v: &'a Tensor,
    /// Keys and values of the prefix, `ne = [d, Hk, P]`.
    pub(crate) prefix: Option<[&'a Tensor; 2]>,
    /// Of each head a score of nothing, F32 `ne = [H]`, see [`Attention::sinks`](crate::kernels::Attention::sinks).
    pub(crate) sinks: Option<&'a Tensor>,
}

impl<'a> PackedAttention<'a> {
    /// What there is of it, as operands: q, k, v, with a prefix its k and v, with sinks these.
    pub(crate) fn operands(&self) -> Vec<&'a Tensor> {
        let mut all = vec![self.q, self.k, self.v];
        all.extend(self.prefix.into_iter().flatten());
        all.extend(self.sinks);
        all
    }
}
