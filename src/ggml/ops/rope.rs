//! Rotary position embedding (Su et al. 2021) and its derivative.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts, small_parts};
use crate::ggml::tensor::Tensor;
use crate::kernels::vectorized;
use crate::operation::{Rope, RopeKind};
use ggml_sys as sys;
use std::f32::consts::TAU;

/// `GGML_ROPE_TYPE_NEOX`, a macro in ggml.h that the bindings leave out.
const ROPE_TYPE_NEOX: i32 = 2;

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

/// Cosines and sines of some positions, which all layers share.
pub(in crate::ggml) struct RopeTable {
    /// What they were computed from: [`Tensor::id`] of positions and factors.
    of: (Rope, usize, Option<usize>),
    table: Tensor,
}

/// How a pair of values is rotated by position.
#[derive(Clone, Copy)]
struct Angle {
    /// Radians per position.
    frequency: f64,
    /// How much of the angle stays as it was trained, instead of being scaled to a longer context: 0 to 1 (YaRN, Peng et al. 2023).
    kept: f64,
}

/// Cosines, then sines of each position's angles, times the attention factor. Operands: positions, divisors of the frequencies if there are any.
struct Table {
    angles: Vec<Angle>,
    /// Of positions, in the scaled part.
    scale: f64,
    /// Of the values.
    magnitude: f64,
}

impl Table {
    fn new(rope: &Rope) -> Self {
        let n = rope.n_rot as f32;
        // Pairs that turn so often within the original context, as llama.cpp computes it: those that turn more are kept, those that turn less are scaled.
        let pair = |turns: f32| {
            n * (rope.n_ctx_orig as f32 / (turns * TAU)).ln() / (2.0 * rope.freq_base.ln())
        };
        let low = pair(rope.beta_fast).floor().max(0.0);
        let high = pair(rope.beta_slow).ceil().min(n - 1.0);
        let angles = (0..rope.n_rot / 2).map(|i| {
            let scaled = ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            let kept = match rope.ext_factor {
                0.0 => 0.0,
                factor => (1.0 - scaled) * factor,
            };
            Angle {
                frequency: f64::from(rope.freq_base).powf(-2.0 * i as f64 / rope.n_rot as f64),
                kept: f64::from(kept),
            }
        });
        let scale = f64::from(rope.freq_scale);
        let stretched = match rope.ext_factor {
            0.0 => 1.0,
            _ => 1.0 + 0.1 * (1.0 / scale).ln(),
        };
        Self {
            angles: angles.collect(),
            scale,
            magnitude: f64::from(rope.attn_factor) * stretched,
        }
    }
}

impl Kernel for Table {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let positions = op.ids(0);
        let divisors = (op.n_operands() > 1).then(|| op.operand(1).contiguous());
        let half = self.angles.len();
        let (first, rows) = out.share(positions.len());
        for (&position, row) in positions[first..]
            .iter()
            .zip(rows.chunks_exact_mut(2 * half))
        {
            let (cos, sin) = row.split_at_mut(half);
            for (i, (angle, (cos, sin))) in
                self.angles.iter().zip(cos.iter_mut().zip(sin)).enumerate()
            {
                let divisor = divisors.map_or(1.0, |d| f64::from(d[i]));
                let trained = f64::from(position) * angle.frequency / divisor;
                let share = self.scale + (1.0 - self.scale) * angle.kept;
                let (s, c) = (trained * share).sin_cos();
                *cos = (c * self.magnitude) as f32;
                *sin = (s * self.magnitude) as f32;
            }
        }
    }

    /// An element takes as long as a dozen of other operations.
    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(16 * op.ne().iter().product::<usize>())
    }
}

/// Heads rotated by their token's angles, forth or back. Operands: heads `ne = [d, H, T]`, [`Table`] `ne = [n_rot, T]`.
struct Rotate {
    kind: RopeKind,
    back: bool,
}

impl Kernel for Rotate {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, table) = (op.operand(0), op.operand(1));
        let [d, h, t, _] = x.ne;
        let n_rot = table.ne[0];
        let (first, rows) = out.share(h * t);
        for (i, to) in (first..).zip(rows.chunks_exact_mut(d)) {
            let (head, token) = (i % h, i / h);
            let (cos, sin) = table.row(token, 0).split_at(n_rot / 2);
            let (from, rest) = x.row(head, token).split_at(n_rot);
            let (to, to_rest) = to.split_at_mut(n_rot);
            to_rest.copy_from_slice(rest);
            let sign = if self.back { -1.0 } else { 1.0 };
            match self.kind {
                RopeKind::Neox => rotate_halves(cos, sin, sign, from, to),
                RopeKind::Interleaved => rotate_neighbours(cos, sin, sign, from, to),
            }
        }
    }
}

vectorized! {
    /// Rotates pairs (i, i + n/2).
    fn rotate_halves(cos: &[f32], sin: &[f32], sign: f32, from: &[f32], to: &mut [f32]) {
        let half = cos.len();
        let (x, y) = from.split_at(half);
        let (to_x, to_y) = to.split_at_mut(half);
        for i in 0..half {
            let (cos, sin) = (cos[i], sign * sin[i]);
            to_x[i] = x[i] * cos - y[i] * sin;
            to_y[i] = x[i] * sin + y[i] * cos;
        }
    }
}

vectorized! {
    /// Rotates pairs (2i, 2i + 1).
    fn rotate_neighbours(cos: &[f32], sin: &[f32], sign: f32, from: &[f32], to: &mut [f32]) {
        let pairs = from.as_chunks::<2>().0.iter().zip(to.as_chunks_mut::<2>().0);
        for ((&[x, y], to), (&cos, &sin)) in pairs.zip(cos.iter().zip(sin)) {
            let sin = sign * sin;
            *to = [x * cos - y * sin, x * sin + y * cos];
        }
    }
}

impl Context {
    /// Rotary position embedding: a `ne = [d, H, T]`, pos I32 `ne = [T]`, factors F32 `ne = [n_rot/2]` divide the frequencies.
    pub(crate) fn rope(
        &self,
        a: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        r: &Rope,
    ) -> Tensor {
        self.rotate(false, a, pos, factors, r)
    }

    /// The derivative of [`Context::rope`]: rotates the gradient back.
    pub(crate) fn rope_back(
        &self,
        dy: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        r: &Rope,
    ) -> Tensor {
        self.rotate(true, dy, pos, factors, r)
    }

    fn rotate(
        &self,
        back: bool,
        a: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        r: &Rope,
    ) -> Tensor {
        if self.is_own() {
            let table = self.rope_table(pos, factors, r);
            let kind = r.kind;
            return self.custom(Rotate { kind, back }, &[a, &table], a.ne());
        }
        let function: RopeFn = match back {
            false => sys::ggml_rope_ext,
            true => sys::ggml_rope_ext_back,
        };
        let mode = match r.kind {
            RopeKind::Interleaved => 0,
            RopeKind::Neox => ROPE_TYPE_NEOX,
        };
        let mut srcs = vec![a, pos];
        srcs.extend(factors);
        // SAFETY: valid descriptions; shapes were validated upstream.
        self.build(&srcs, |c| unsafe {
            function(
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

    /// The table of these positions, which is computed once: cosines, then sines, `ne = [n_rot, T]`.
    fn rope_table(&self, pos: &Tensor, factors: Option<&Tensor>, r: &Rope) -> Tensor {
        let of = (*r, pos.id(), factors.map(Tensor::id));
        let mut tables = self.rope_tables();
        if let Some(known) = tables.iter().find(|known| known.of == of) {
            return known.table.clone();
        }
        let mut srcs = vec![pos];
        srcs.extend(factors);
        let table = self.custom(Table::new(r), &srcs, [r.n_rot, pos.ne()[0], 1, 1]);
        tables.push(RopeTable {
            of,
            table: table.clone(),
        });
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::types::GgmlType;
    use crate::ggml::{Graph, GraphMemory, Operations, ThreadPool};

    fn rotated(operations: Operations, rope: &Rope, back: bool, with_factors: bool) -> Vec<f32> {
        let positions: Vec<i32> = (0..40).map(|i| i * i).collect();
        let (d, h) = (24, 3);
        let ctx = Context::new(operations);
        let x = ctx.input(GgmlType::F32, &[d, h, positions.len()], "x");
        let pos = ctx.input(GgmlType::I32, &[positions.len()], "pos");
        let factors = ctx.input(GgmlType::F32, &[rope.n_rot / 2], "factors");
        let y = ctx.rotate(back, &x, &pos, with_factors.then_some(&factors), rope);
        let y = ctx.output(y);
        let mut graph = Graph::new(ctx, std::slice::from_ref(&y), GraphMemory::new()).unwrap();
        graph.slice_mut(&pos).copy_from_slice(&positions);
        for (i, x) in graph.slice_mut::<f32>(&x).iter_mut().enumerate() {
            *x = (i % 17) as f32 / 8.0 - 1.0;
        }
        if with_factors {
            for (i, f) in graph.slice_mut::<f32>(&factors).iter_mut().enumerate() {
                *f = 1.0 + i as f32 / 4.0;
            }
        }
        graph.compute(&ThreadPool::new(2), None).unwrap();
        graph.read_f32(&y).to_vec()
    }

    #[test]
    fn it_is_ggmls() {
        let plain = Rope {
            kind: RopeKind::Neox,
            n_rot: 24,
            n_ctx_orig: 512,
            freq_base: 10_000.0,
            freq_scale: 1.0,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        };
        let yarn = Rope {
            freq_scale: 0.25,
            ext_factor: 1.0,
            attn_factor: 1.25,
            ..plain
        };
        let part = Rope {
            n_rot: 16,
            freq_scale: 0.5,
            ..plain
        };
        for rope in [plain, yarn, part] {
            for kind in [RopeKind::Neox, RopeKind::Interleaved] {
                for (back, factors) in [(false, false), (false, true), (true, false), (true, true)]
                {
                    let rope = Rope { kind, ..rope };
                    let [own, ggml] = [Operations::Own, Operations::Ggml]
                        .map(|operations| rotated(operations, &rope, back, factors));
                    let worst = (own.iter().zip(&ggml)).map(|(a, b)| (a - b).abs());
                    let worst = worst.fold(0.0, f32::max);
                    // ggml multiplies angles up, in single precision: of 1521 radians some 1e-3 are left.
                    assert!(
                        worst < 2e-3,
                        "{rope:?} back {back} factors {factors}: {worst}"
                    );
                }
            }
        }
    }
}
