//! Where texts are kept while they are computed: in pages of our own, or in a context of libllama's.

use super::kv::PagedText;
use super::kv_block::KvBlock;
use super::llama::{LlamaMemory, LlamaText};
use crate::ggml::{KvFull, KvPool, KvRows};
use crate::model::Native;
use std::sync::Arc;

/// Where texts are kept. Clones are one memory.
#[derive(Clone)]
pub(crate) enum Memory {
    /// What our own decoder reads and writes.
    Pages {
        native: Arc<Native>,
        pool: Arc<KvPool>,
    },
    Llama(Arc<LlamaMemory>),
}

impl Memory {
    /// A text of which there is nothing yet.
    pub(crate) fn text(&self) -> KvText {
        match self {
            Self::Pages { pool, .. } => KvText::Pages(PagedText::new(pool.clone())),
            Self::Llama(memory) => KvText::Llama(LlamaText::new(memory)),
        }
    }

    /// Bytes that keys and values of so many tokens of a text take, a whole number of pages.
    pub(crate) fn bytes(&self, n: usize) -> usize {
        match self {
            Self::Pages { pool, .. } => pool.layout().bytes(n),
            Self::Llama(memory) => memory.bytes(n),
        }
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        match self {
            Self::Pages { pool, .. } => pool.used(),
            Self::Llama(memory) => memory.used(),
        }
    }
}

/// Keys and values of one text, behind rows of an adapter.
pub(crate) enum KvText {
    Pages(PagedText),
    Llama(LlamaText),
}

/// The same method of either.
macro_rules! either {
    ($self:ident, $text:ident => $do:expr) => {
        match $self {
            KvText::Pages($text) => $do,
            KvText::Llama($text) => $do,
        }
    };
}

impl KvText {
    /// Positions that are computed, the block's included.
    pub(crate) fn len(&self) -> usize {
        either!(self, text => text.len())
    }

    /// Forgets everything; `block` stands in front of what comes.
    ///
    /// # Panics
    /// If it is a block for another memory.
    pub(crate) fn restart(&mut self, block: Option<&KvBlock>) {
        match (self, block) {
            (Self::Pages(text), None) => text.restart(None),
            (Self::Pages(text), Some(KvBlock::Rows(rows))) => text.restart(Some(rows.clone())),
            (Self::Llama(text), None) => text.restart(None),
            (Self::Llama(text), Some(KvBlock::Graft(graft))) => text.restart(Some(graft.clone())),
            _ => panic!("a block for another memory"),
        }
    }

    /// The same text.
    pub(crate) fn fork(&self) -> Self {
        match self {
            Self::Pages(text) => Self::Pages(text.fork()),
            Self::Llama(text) => Self::Llama(text.fork()),
        }
    }

    /// Forgets all behind the first `n` positions, but for the block.
    pub(crate) fn truncate(&mut self, n: usize) {
        either!(self, text => text.truncate(n));
    }

    /// Makes room for `n` more tokens. Nothing is lost if there is none.
    pub(crate) fn reserve(&mut self, n: usize) -> Result<(), KvFull> {
        either!(self, text => text.reserve(n))
    }

    /// Whether others can begin with what this has computed.
    pub(crate) fn is_shareable(&self) -> bool {
        matches!(self, Self::Pages(_))
    }

    /// Begins with `n` tokens of another text under the same block, which `pages` hold, of each class.
    ///
    /// # Panics
    /// If there is anything but the block, or texts of its memory share nothing and there are pages.
    pub(crate) fn adopt(&mut self, pages: Vec<Vec<Arc<KvRows>>>, n: usize) {
        match self {
            Self::Pages(text) => text.adopt(pages, n),
            Self::Llama(_) => assert!(pages.is_empty(), "pages of another memory"),
        }
    }

    /// Its page number `i` of each class, if all are there.
    pub(crate) fn page(&self, i: usize) -> Option<Vec<Arc<KvRows>>> {
        self.paged().and_then(|text| text.page(i))
    }

    /// Gives back what none of the next tokens sees, where that is ours to do.
    pub(crate) fn forget_unseen(&mut self) {
        if let Self::Pages(text) = self {
            text.forget_unseen();
        }
    }

    /// Whether the text can go on behind its first `n` positions with what is there.
    pub(crate) fn reaches(&self, n: usize) -> bool {
        // What libllama has given back is computed again when it is needed.
        self.paged().is_none_or(|text| text.reaches(n))
    }

    /// What it is in pages of our own.
    pub(crate) fn paged(&self) -> Option<&PagedText> {
        match self {
            Self::Pages(text) => Some(text),
            Self::Llama(_) => None,
        }
    }

    /// The same, to be computed.
    ///
    /// # Panics
    /// If it is a text of libllama's memory.
    pub(crate) fn paged_mut(&mut self) -> &mut PagedText {
        match self {
            Self::Pages(text) => text,
            Self::Llama(_) => panic!("a text of another memory"),
        }
    }

    /// The same for libllama.
    ///
    /// # Panics
    /// If it is a text in pages.
    pub(crate) fn llama_mut(&mut self) -> &mut LlamaText {
        match self {
            Self::Llama(text) => text,
            Self::Pages(_) => panic!("a text of another memory"),
        }
    }
}
