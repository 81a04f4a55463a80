//! Keys and values of everything a session has seen, one row per token and layer.

use crate::file::types::GgmlType;
use crate::ggml::{Buffer, Scoring, Tensor, quantize_rows, rotate};
use crate::graph::{AttentionKernel, Builder, CacheInputs, KeyValues, Topology};
use crate::model::{HParams, Kernels, LayerShape};
use half::f16;
use memmap2::MmapMut;
use std::sync::Arc;

/// Type of the rows in the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Two bytes a value, llama.cpp's default.
    #[default]
    F16,
    /// Four bytes a value.
    F32,
    /// 34 bytes for 32 values; the head size must be a multiple of 32 and flash attention on. Where the head size is a
    /// multiple of 64, keys and values are rotated before they are rounded, as libllama does it: the rounding of a block
    /// follows its largest value, and rotated values are of about equal size.
    Q8_0,
}

impl KvType {
    pub(crate) fn ggml(self) -> GgmlType {
        match self {
            Self::F16 => GgmlType::F16,
            Self::F32 => GgmlType::F32,
            Self::Q8_0 => GgmlType::Q8_0,
        }
    }

    /// Bytes of a row of `width` values; the width was checked against the block size when the session was made.
    pub(crate) fn row_bytes(self, width: usize) -> usize {
        let bytes = self
            .ggml()
            .row_bytes(width as u64)
            .expect("a multiple of the block size");
        bytes as usize
    }

    /// How values of heads of `head_dim` values are rotated before they are stored; `None`: not at all.
    fn rotation(self, part: KvPart, head_dim: usize) -> Option<usize> {
        if self != Self::Q8_0 || !head_dim.is_multiple_of(MIN_ROTATION) {
            return None;
        }
        Some(match part {
            // The largest power of two that divides the head.
            KvPart::K => 1 << head_dim.trailing_zeros(),
            KvPart::V => MIN_ROTATION,
        })
    }

    /// Converts rows of a layer, `ne = [Hk d, n]`, into the cache's own form, rotated and rounded as the graph's own writes
    /// are.
    pub(crate) fn encode(self, part: KvPart, layer: &LayerShape, mut values: Vec<f32>) -> Vec<u8> {
        if let Some(n) = self.rotation(part, layer.head_dim) {
            rotate(&mut values, n);
        }
        let mut out = Vec::new();
        match self {
            Self::F32 => out.extend_from_slice(bytemuck::cast_slice(&values)),
            Self::F16 => values
                .iter()
                .for_each(|&v| out.extend_from_slice(&f16::from_f32(v).to_le_bytes())),
            Self::Q8_0 => quantize_rows(GgmlType::Q8_0, &values, layer.kv_width(), &mut out),
        }
        out
    }
}

/// Values that are rotated together at least; libllama's choice for V.
const MIN_ROTATION: usize = 64;

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvPart {
    K,
    V,
}

/// Room for `streams` independent texts of up to `cells` tokens each. A stream's cell i holds position i.
///
/// Tensors per layer: K and V `ne = [Hk d, cells, streams]`. Attention reads any run of streams, so one graph step can
/// serve many sessions; a single session is one stream.
pub(crate) struct KvCache {
    ty: KvType,
    cells: usize,
    streams: usize,
    layers: Vec<LayerRows>,
    /// First byte of the memory behind the tensors, which these keep.
    base: *mut u8,
    bytes: usize,
}

/// The rows of one layer: K, then V.
struct LayerRows {
    tensors: [Tensor; 2],
    /// Where they start in the cache's memory.
    starts: [usize; 2],
    row_bytes: usize,
}

// SAFETY: the memory is exclusively this cache's: it is written here and by graphs that the owning session runs, both of
// which need `&mut` of their owner.
unsafe impl Send for KvCache {}

/// Rows start on cache lines.
const ALIGN: usize = 64;

impl KvCache {
    /// Zeroed memory; pages are touched as text fills them.
    pub(crate) fn new(
        hp: &HParams,
        ty: KvType,
        cells: usize,
        streams: usize,
    ) -> std::io::Result<Self> {
        let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        // Where K and V of each layer start, and where the last one ends.
        let mut bytes = 0usize;
        let mut starts = Vec::with_capacity(hp.n_layer());
        for layer in &hp.layers {
            let part_bytes = ty
                .row_bytes(layer.kv_width())
                .checked_mul(cells)
                .and_then(|n| n.checked_mul(streams))
                .and_then(|n| n.checked_next_multiple_of(ALIGN))
                .ok_or_else(too_large)?;
            let mut next = || {
                let start = bytes;
                bytes = bytes.checked_add(part_bytes)?;
                Some(start)
            };
            starts.push([next().ok_or_else(too_large)?, next().ok_or_else(too_large)?]);
        }
        let mut map = MmapMut::map_anon(bytes)?;
        let (base, size) = (map.as_mut_ptr(), map.len());
        // SAFETY: the map moves into the owner without moving its pages and lives as long as the buffer. The tensors are this
        // cache's alone: see `Send` for who uses their bytes.
        let buffer = unsafe { Buffer::writable(base, size, Arc::new(map)) };
        let layer = |(il, starts): (usize, [usize; 2])| {
            let width = hp.layers[il].kv_width();
            let tensor = |part: &str, start: usize| {
                let (ne, name) = ([width, cells, streams], format!("cache_{part}-{il}"));
                buffer.tensor(ty.ggml(), &ne, &name, start)
            };
            LayerRows {
                tensors: [tensor("k", starts[0]), tensor("v", starts[1])],
                starts,
                row_bytes: ty.row_bytes(width),
            }
        };
        let layers = starts.into_iter().enumerate().map(layer).collect();
        Ok(Self {
            ty,
            cells,
            streams,
            layers,
            base,
            bytes,
        })
    }

    /// Tokens per stream.
    pub(crate) fn cells(&self) -> usize {
        self.cells
    }

    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn tensor(&self, part: KvPart, il: usize) -> &Tensor {
        &self.layers[il].tensors[part as usize]
    }

    /// Byte range of `n` rows from `cell` on.
    fn offset(
        &self,
        part: KvPart,
        il: usize,
        stream: usize,
        cell: usize,
        n: usize,
    ) -> (usize, usize) {
        assert!(stream < self.streams && cell + n <= self.cells);
        let layer = &self.layers[il];
        let row = stream * self.cells + cell;
        let start = layer.starts[part as usize] + row * layer.row_bytes;
        (start, n * layer.row_bytes)
    }

    /// Rows of a layer.
    pub(crate) fn rows(
        &self,
        part: KvPart,
        il: usize,
        stream: usize,
        cell: usize,
        n: usize,
    ) -> &[u8] {
        let (start, len) = self.offset(part, il, stream, cell, n);
        // SAFETY: inside the map (checked in `offset`), and no graph runs while `&self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.base.add(start), len) }
    }

    /// Rows of a layer, to be overwritten.
    pub(crate) fn rows_mut(
        &mut self,
        part: KvPart,
        il: usize,
        stream: usize,
        cell: usize,
        n: usize,
    ) -> &mut [u8] {
        let (start, len) = self.offset(part, il, stream, cell, n);
        // SAFETY: inside the map (checked in `offset`), exclusively ours through `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }

    /// Row of the cache, over all streams, that holds `cell` of `stream`: the index that graphs write to.
    pub(crate) fn row_index(&self, stream: usize, cell: usize) -> i64 {
        (stream * self.cells + cell) as i64
    }
}

/// The cache as the decoder's source of keys and values.
pub(crate) struct Cached<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) hp: &'a HParams,
    pub(crate) inputs: &'a CacheInputs,
    pub(crate) topology: Topology,
    /// Fused attention.
    pub(crate) flash: bool,
    pub(crate) kernels: Kernels,
}

impl Cached<'_> {
    /// `x`, whose rows are heads or consist of them, turned as the cache's `part` is. Rotations keep scalar products:
    /// scores of rotated queries with rotated keys are those of the queries and keys themselves.
    fn rotated(&self, b: &Builder, part: KvPart, il: usize, x: &Tensor) -> Tensor {
        let head_dim = self.hp.layers[il].head_dim;
        match self.cache.ty.rotation(part, head_dim) {
            Some(n) => b.ctx().rotate_runs(x, n),
            None => x.clone(),
        }
    }

    /// What attention reads of a layer: `ne = [d, Hk, N, S]`.
    fn read(&self, b: &Builder, part: KvPart, il: usize) -> Tensor {
        let (c, shape) = (self.cache, &self.hp.layers[il]);
        let Topology {
            n_kv,
            stream,
            n_streams,
            ..
        } = self.topology;
        let head_bytes = c.ty.row_bytes(shape.head_dim);
        let row_bytes = c.layers[il].row_bytes;
        let stream_bytes = c.cells * row_bytes;
        b.ctx().view(
            c.tensor(part, il),
            [shape.head_dim, shape.n_head_kv, n_kv, n_streams],
            [head_bytes, row_bytes, stream_bytes],
            stream * stream_bytes,
        )
    }
}

impl KeyValues for Cached<'_> {
    fn store(&mut self, b: &mut Builder, il: usize, k: &Tensor, v: &Tensor) {
        let c = self.cache;
        let width = self.hp.layers[il].kv_width();
        for (part, rows) in [(KvPart::K, k), (KvPart::V, v)] {
            let rows = self.rotated(b, part, il, rows);
            let nb = rows.nb();
            let rows = b
                .ctx()
                .view(&rows, [width, rows.ne()[2], 1, 1], [nb[2], nb[3], nb[3]], 0);
            // All streams as one list of rows, so that one write serves tokens of several streams.
            let all = b
                .ctx()
                .reshape(c.tensor(part, il), &[width, c.cells * c.streams]);
            let written = b.ctx().set_rows(&all, &rows, &self.inputs.cells);
            b.demand(&written);
        }
    }

    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor) -> Tensor {
        let (hp, layer) = (self.hp, &self.hp.layers[il]);
        let (k, v) = (self.read(b, KvPart::K, il), self.read(b, KvPart::V, il));
        let [d, h, t, _] = q.ne();
        let s = self.topology.n_streams;
        let q = self.rotated(b, KvPart::K, il, q);
        let nb = q.nb();
        let q = b
            .ctx()
            .view(&q, [d, h, t / s, s], [nb[1], nb[2], nb[2] * (t / s)], 0);
        let mask = self.inputs.mask(layer.window);
        let scoring = Scoring {
            scale: layer.score_scale,
            softcap: hp.attn_softcap,
        };
        let kernel = match self.flash {
            true if self.kernels.attend(self.cache.ty.ggml(), d) => AttentionKernel::Own,
            true => AttentionKernel::Ggml,
            false => AttentionKernel::InSteps,
        };
        let a = b.attention(&q, &k, &v, mask, scoring, kernel);
        // A sum of rotated values is the rotated sum of the values: rotating again turns it back.
        let a = b.named("kqv_out", Some(il), self.rotated(b, KvPart::V, il, &a));
        b.demand(&a);
        a
    }
}
