//! What an adapter is at run time: K and V rows of every layer in the cache's own type, which all texts behind it read.

use super::core::{Input, Mode, Part};
use super::error::SessionError;
use super::kv::{KvType, PagedText};
use super::memory::Memory;
use super::own::OwnDecoder;
use crate::adapter::{Adapter, Matrix, Payload, PrefixLayer};
use crate::error::Result;
use crate::ggml::{KvLayout, KvPart, KvPool, KvRows};
use crate::host::Graft;
use crate::model::{HParams, Model, Native};
use std::sync::Arc;

/// What stands in front of texts.
#[derive(Clone)]
pub(crate) enum KvBlock {
    Rows(Arc<Rows>),
    /// In the form of libllama's memory.
    Graft(Arc<Graft>),
}

impl KvBlock {
    /// The block of `adapter` on `model`, for texts in `memory`: made on first use and then kept with the adapter.
    pub(crate) fn of(
        adapter: &Adapter,
        model: &Model,
        mode: Mode,
        n_threads: usize,
        memory: &Memory,
    ) -> Result<Self> {
        match memory {
            Memory::Pages { native, .. } => {
                let virtual_rows =
                    |rows: &_| Rows::from_virtual_tokens(rows, model, native, mode, n_threads);
                let rows = adapter.compiled((model.id(), mode.key()), || {
                    Ok(Arc::new(match adapter.payload() {
                        Payload::Prefix { layers } => {
                            Rows::from_prefix(layers, mode.ty, &native.hp)?
                        }
                        Payload::VirtualTokens(rows) => virtual_rows(rows)?,
                    }))
                });
                rows.map(Self::Rows)
            }
            Memory::Llama(llama) => llama.prepare(adapter).map(Self::Graft),
        }
    }

    /// P.
    pub(crate) fn n_rows(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.n_rows(),
            Self::Graft(graft) => graft.length(),
        }
    }
}

/// P rows of K and V per layer.
pub(crate) struct Rows {
    n_rows: usize,
    /// Of each class.
    rows: Vec<Arc<KvRows>>,
}

impl Rows {
    /// From what `bytes(il, part)` gives of each layer, rows of heads `ne = [d, Hk, P]`.
    fn new(
        layout: &KvLayout,
        n_rows: usize,
        bytes: impl Fn(usize, KvPart) -> Vec<u8>,
    ) -> Result<Self> {
        let memory = |class| KvRows::new(layout.token_bytes(class), n_rows);
        let rows: Option<Vec<_>> = (0..layout.n_classes()).map(memory).collect();
        let mut rows = rows.ok_or(SessionError::OutOfMemory)?;
        for il in 0..layout.n_layers() {
            let (class, layer) = layout.layer(il);
            for part in KvPart::BOTH {
                let bytes = bytes(il, part);
                let head_bytes = bytes.len() / (n_rows * layer.heads.hk);
                for (i, row) in bytes.chunks_exact(head_bytes).enumerate() {
                    let (head, token) = (i % layer.heads.hk, i / layer.heads.hk);
                    let to = rows[class].head_mut(layer, part, head, token..token + 1);
                    to.copy_from_slice(row);
                }
            }
        }
        let rows = rows.into_iter().map(Arc::new).collect();
        Ok(Self { n_rows, rows })
    }

    fn from_prefix(layers: &[PrefixLayer], ty: KvType, hp: &HParams) -> Result<Self> {
        Self::new(&ty.layout(hp), layers[0].k.n_rows(), |il, part| {
            let rows = match part {
                KvPart::K => &layers[il].k,
                KvPart::V => &layers[il].v,
            };
            match (ty, rows.as_f16()) {
                (KvType::F16, Some(values)) => bytemuck::cast_slice(values).to_vec(),
                _ => ty.encode(part, &hp.layers[il], rows.to_f32()),
            }
        })
    }

    /// Virtual tokens at the start of the text: attention is causal, so their K and V depend on nothing that follows.
    /// One forward pass over them, and the rows are what a prefix adapter would have held.
    fn from_virtual_tokens(
        rows: &Matrix,
        model: &Model,
        native: &Arc<Native>,
        mode: Mode,
        n_threads: usize,
    ) -> Result<Self> {
        // Positions of a step.
        const N_BATCH: usize = 512;
        let n_rows = rows.n_rows();
        let mut decoder = OwnDecoder::new(model, native, mode, n_threads);
        let mut text = PagedText::new(KvPool::new(decoder.layout().clone(), usize::MAX));
        let values = rows.to_f32();
        for (input, _) in Input::Virtual(&values).pieces(N_BATCH, rows.width()) {
            decoder.step(&mut [Part {
                text: &mut text,
                input,
                outputs: 0..0,
            }])?;
        }
        let layout = decoder.layout();
        Self::new(layout, n_rows, |il, part| {
            let heads: Vec<_> = (0..layout.layer(il).1.heads.hk)
                .map(|head| text.head(il, part, head, 0..n_rows))
                .collect();
            let row_bytes = heads[0].len() / n_rows;
            let row =
                |i: usize| &heads[i % heads.len()][i / heads.len() * row_bytes..][..row_bytes];
            (0..n_rows * heads.len()).flat_map(row).copied().collect()
        })
    }

    /// P.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Of each class.
    pub(crate) fn rows(&self) -> &[Arc<KvRows>] {
        &self.rows
    }
}
