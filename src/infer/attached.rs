//! An adapter at work on a text.

use super::core::Mode;
use super::kv_block::KvBlock;
use super::memory::Memory;
use crate::adapter::{Adapter, Item, Payload, arrange};
use crate::error::Result;
use crate::model::Model;
use std::ops::Range;
use std::sync::Arc;

/// An adapter at work. Clones share what it holds.
#[derive(Clone)]
pub(super) struct Attached {
    adapter: Adapter,
    how: How,
}

#[derive(Clone)]
enum How {
    /// Rows in front of the text.
    Block(KvBlock),
    /// Virtual tokens at the places that the adapter's template says, `ne = [D, P]`.
    Template { rows: Arc<[f32]>, width: usize },
}

impl Attached {
    /// The adapter on `model`, for texts in `memory`.
    ///
    /// # Errors
    /// If it does not fit, or its rows cannot be computed.
    pub(super) fn new(
        adapter: &Adapter,
        model: &Model,
        mode: Mode,
        n_threads: usize,
        memory: &Memory,
        accept_other_base: bool,
    ) -> Result<Self> {
        adapter.check_fits(model.shape(), &model.fingerprint(), accept_other_base)?;
        let how = match (adapter.template(), adapter.payload()) {
            (Some(_), Payload::VirtualTokens(rows)) => How::Template {
                rows: rows.to_f32().into(),
                width: rows.width(),
            },
            _ => How::Block(KvBlock::of(adapter, model, mode, n_threads, memory)?),
        };
        Ok(Self {
            adapter: adapter.clone(),
            how,
        })
    }

    pub(super) fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// What stands in front of the text.
    pub(super) fn block(&self) -> Option<&KvBlock> {
        match &self.how {
            How::Block(block) => Some(block),
            How::Template { .. } => None,
        }
    }

    /// Some of the virtual tokens that the template places, `ne = [D, n]`.
    ///
    /// # Panics
    /// If there is no template.
    pub(super) fn placed(&self, range: Range<usize>) -> &[f32] {
        match &self.how {
            How::Block(_) => panic!("only a template places virtual tokens"),
            How::Template { rows, width } => &rows[range.start * width..range.end * width],
        }
    }

    /// Positions in front of the text.
    pub(super) fn prefix_len(&self) -> usize {
        self.block().map_or(0, |block| block.n_rows())
    }
}

/// The order in which the tokens of a prompt, the first of a text or another, and the virtual tokens of a template are computed.
pub(super) fn arranged(
    model: &Model,
    attached: Option<&Attached>,
    tokens: &[i32],
    first: bool,
) -> Result<Vec<Item>> {
    let placed = attached.filter(|a| first && a.block().is_none());
    let template = placed.and_then(|a| a.adapter.template());
    arrange(model.vocab(), template, tokens, first)
}
