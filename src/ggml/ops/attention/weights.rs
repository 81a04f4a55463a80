//! From queries and keys to the attention weights of a few queries.

use super::operands::Operands;
use super::spans::{Scoring, Spans, Tile};
use crate::kernels::{RowMajor, Strided, exp_sub_sum, gemm, largest, room, tanh, vectorized};
use std::ops::Range;

/// The weights P of a tile's queries for one head, `ne = [keys, queries]`, given the span's keys `k_t`, `ne = [N, d]`: `p` and
/// `slopes` are memory for them and for the derivatives of the soft cap, which [`softmax_back`] reads.
pub(super) fn weights<'a>(
    x: &Operands<'_>,
    spans: &Spans,
    (tile, head): (&Tile, usize),
    k_t: &[f32],
    p: &'a mut Vec<f32>,
    slopes: &mut Vec<f32>,
) -> &'a mut [f32] {
    let p = room(p, tile.n * tile.keys.len());
    scores(x, tile, head, k_t, p);
    let capped = spans.scoring.softcap > 0.0;
    let slopes = room(slopes, if capped { p.len() } else { 0 });
    softmax(spans, (tile, x.sink(head)), p, slopes);
    p
}

/// `S = Q K^T`, not scaled.
fn scores(x: &Operands<'_>, tile: &Tile, head: usize, k_t: &[f32], s: &mut [f32]) {
    let (d, width) = (x.q.ne[0], tile.keys.len());
    let n_keys = k_t.len() / d;
    gemm(
        false,
        [tile.n, width, d],
        Strided::rows(x.queries(head, tile.token), x.query_stride()),
        RowMajor(&k_t[tile.keys.start..], n_keys),
        RowMajor(s, width),
    );
}

/// Replaces S by `P = softmax(cap(scale S))` over what each query sees, and the head's sink if there is one, and 0 elsewhere. `slopes` takes the derivative of the
/// cap, where there is one, at what is seen.
fn softmax(spans: &Spans, (tile, sink): (&Tile, Option<f32>), s: &mut [f32], slopes: &mut [f32]) {
    let Scoring { scale, softcap } = spans.scoring;
    let width = tile.keys.len();
    for (j, row) in s.chunks_exact_mut(width).enumerate() {
        let seen = seen(spans, tile, j);
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        if softcap > 0.0 {
            let slopes = &mut slopes[j * width..][..width];
            cap(
                &mut row[seen.clone()],
                &mut slopes[seen.clone()],
                scale,
                softcap,
            );
        } else {
            row[seen.clone()].iter_mut().for_each(|s| *s *= scale);
        }
        let row = &mut row[seen];
        let max = sink.map_or(largest(row), |sink| sink.max(largest(row)));
        let of_sink = sink.map_or(0.0, |sink| (sink - max).exp());
        let sum = exp_sub_sum(row, max) + of_sink;
        row.iter_mut().for_each(|w| *w /= sum);
    }
}

vectorized! {
    /// Replaces scores by `softcap tanh(scale score / softcap)`; the slopes are tanh's.
    fn cap(scores: &mut [f32], slopes: &mut [f32], scale: f32, softcap: f32) {
        for (s, slope) in scores.iter_mut().zip(slopes) {
            let t = tanh::<FUSED>(*s * scale / softcap);
            *s = softcap * t;
            *slope = 1.0 - t * t;
        }
    }
}

/// Columns of S that query `j` of a tile sees.
fn seen(spans: &Spans, tile: &Tile, j: usize) -> Range<usize> {
    let seen = spans.visible(tile.at + j);
    seen.start - tile.keys.start..seen.end - tile.keys.start
}

/// The way back through [`softmax`], where a sink changes nothing but P: replaces dP by `dS = P (dP - sum(P dP)) scale slope`.
pub(super) fn softmax_back(spans: &Spans, tile: &Tile, p: &[f32], slopes: &[f32], dp: &mut [f32]) {
    let Scoring { scale, softcap } = spans.scoring;
    let width = tile.keys.len();
    let rows = p.chunks_exact(width).zip(dp.chunks_exact_mut(width));
    for (j, (p, dp)) in rows.enumerate() {
        row_back(p, scale, dp);
        if softcap > 0.0 {
            let slopes = &slopes[j * width..][..width];
            for ((ds, slope), &p) in dp.iter_mut().zip(slopes).zip(p) {
                // Slopes of keys out of sight were never computed.
                *ds *= if p > 0.0 { *slope } else { 0.0 };
            }
        }
    }
}

vectorized! {
    /// Replaces dP by `dS = P (dP - sum(P dP)) scale`. The sum is in 16 interleaved parts, which become vector instructions.
    fn row_back(p: &[f32], scale: f32, dp: &mut [f32]) {
        let mut parts = [0.0f32; 16];
        let ((p16, p_rest), (dp16, dp_rest)) = (p.as_chunks::<16>(), dp.as_chunks::<16>());
        for (p, dp) in p16.iter().zip(dp16) {
            for ((part, p), dp) in parts.iter_mut().zip(p).zip(dp) {
                *part += p * dp;
            }
        }
        let rest: f32 = p_rest.iter().zip(dp_rest).map(|(p, dp)| p * dp).sum();
        let dot = parts.iter().sum::<f32>() + rest;
        for (p, dp) in p.iter().zip(dp) {
            *dp = p * (*dp - dot) * scale;
        }
    }
}
