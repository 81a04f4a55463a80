//! What an adapter is at run time: K and V rows of every layer in the cache's own type and layout, ready to be copied.

use super::engine::{Core, Mode};
use super::kv_cache::{KvCache, KvPart, KvType};
use crate::adapter::{Adapter, Matrix, Payload, PrefixLayer};
use crate::error::Result;
use crate::model::{HParams, Model};
use std::sync::Arc;

/// P rows of K and V per layer, as they lie in a cache of type `ty`.
pub(crate) struct KvBlock {
    n_rows: usize,
    /// K then V, layer by layer.
    halves: Vec<[Vec<u8>; 2]>,
}

impl KvBlock {
    /// The block of `adapter` on `model`, made on first use and then kept with the adapter.
    pub(crate) fn of(
        adapter: &Adapter,
        model: &Model,
        mode: Mode,
        n_threads: usize,
    ) -> Result<Arc<Self>> {
        adapter.compiled((model.id(), mode.key()), || {
            Ok(Arc::new(match adapter.payload() {
                Payload::Prefix { layers } => Self::from_prefix(layers, mode.ty, model.hparams()),
                Payload::VirtualTokens(rows) => {
                    Self::from_virtual_tokens(rows, model, mode, n_threads)?
                }
            }))
        })
    }

    fn from_prefix(layers: &[PrefixLayer], ty: KvType, hp: &HParams) -> Self {
        let encode = |part, layer, rows: &Matrix| match (ty, rows.as_f16()) {
            (KvType::F16, Some(values)) => bytemuck::cast_slice(values).to_vec(),
            _ => ty.encode(part, layer, rows.to_f32()),
        };
        let halves = layers
            .iter()
            .zip(&hp.layers)
            .map(|(l, shape)| {
                [
                    encode(KvPart::K, shape, &l.k),
                    encode(KvPart::V, shape, &l.v),
                ]
            })
            .collect();
        Self {
            n_rows: layers[0].k.n_rows(),
            halves,
        }
    }

    /// Virtual tokens at the start of the text: attention is causal, so their K and V depend on nothing that follows.
    /// One forward pass over them, and the rows are what a prefix adapter would have held.
    fn from_virtual_tokens(
        rows: &Matrix,
        model: &Model,
        mode: Mode,
        n_threads: usize,
    ) -> Result<Self> {
        let n_rows = rows.n_rows();
        let mut core = Core::new(model, mode, n_rows, model.pool(n_threads))?;
        core.run_embeddings(&rows.to_f32(), 0)?;
        let halves = (0..model.hparams().n_layer())
            .map(|il| {
                [KvPart::K, KvPart::V].map(|part| core.cache.rows(part, il, 0, 0, n_rows).to_vec())
            })
            .collect();
        Ok(Self { n_rows, halves })
    }

    /// P.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Puts the rows into the first cells of `stream`.
    pub(crate) fn copy_into(&self, cache: &mut KvCache, stream: usize) {
        for (il, [k, v]) in self.halves.iter().enumerate() {
            cache
                .rows_mut(KvPart::K, il, stream, 0, self.n_rows)
                .copy_from_slice(k);
            cache
                .rows_mut(KvPart::V, il, stream, 0, self.n_rows)
                .copy_from_slice(v);
        }
    }
}
