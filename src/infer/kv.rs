//! Keys and values of everything a session has seen, one row per token, layer and head.

use super::kv_block::Rows;
use crate::file::types::GgmlType;
use crate::ggml::{
    Heads, KV_PAGE, KvFull, KvLayout, KvPart, KvPool, KvRows, KvSequence, KvStep, Scoring, Tensor,
    quantize_rows, rotate,
};
use crate::graph::{Builder, KeyValues, Masks};
use crate::model::{HParams, LayerShape};
use half::f16;
use std::ops::Range;
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

    /// Where keys and values of a model lie; that heads are whole blocks was checked when the session was made.
    pub(crate) fn layout(self, hp: &HParams) -> KvLayout {
        let layer = |l: &LayerShape| {
            let (d, h, hk) = (l.head_dim, l.n_head, l.n_head_kv);
            (Heads { d, h, hk }, l.window)
        };
        KvLayout::new(self.ggml(), hp.layers.iter().map(layer))
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

    /// Converts rows of a layer, `ne = [d, Hk, n]`, into the cache's own form, rotated and rounded as the graph's own writes
    /// are: rows of heads in the same order.
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
            Self::Q8_0 => quantize_rows(GgmlType::Q8_0, &values, layer.head_dim, &mut out),
        }
        out
    }
}

/// Values that are rotated together at least; libllama's choice for V.
const MIN_ROTATION: usize = 64;

/// Keys and values of one text: rows of an adapter that others read as well, then pages.
pub(crate) struct PagedText {
    pool: Arc<KvPool>,
    /// In front of the text.
    block: Option<Arc<Rows>>,
    /// Of each class, pages of [`KV_PAGE`] tokens; `None` are those that no token sees any more.
    pages: Vec<Vec<Option<Arc<KvRows>>>>,
    /// Positions that are computed, the block's included.
    n: usize,
}

impl PagedText {
    /// Nothing yet.
    pub(crate) fn new(pool: Arc<KvPool>) -> Self {
        let pages = (0..pool.layout().n_classes()).map(|_| Vec::new()).collect();
        Self {
            pool,
            block: None,
            pages,
            n: 0,
        }
    }

    /// Where its rows lie.
    pub(crate) fn layout(&self) -> &KvLayout {
        self.pool.layout()
    }

    /// Itself with the number of each of its layers.
    pub(crate) fn each_layer(&self) -> impl Iterator<Item = (&Self, usize)> {
        (0..self.layout().n_layers()).map(move |il| (self, il))
    }

    /// Positions that are computed.
    pub(crate) fn len(&self) -> usize {
        self.n
    }

    fn block_rows(&self) -> usize {
        self.block.as_ref().map_or(0, |block| block.n_rows())
    }

    /// Forgets everything; `block` stands in front of what comes.
    pub(crate) fn restart(&mut self, block: Option<Arc<Rows>>) {
        self.block = block;
        self.truncate(0);
    }

    /// The same text. Pages are shared until one of the two writes into them.
    pub(crate) fn fork(&self) -> Self {
        Self {
            pool: self.pool.clone(),
            block: self.block.clone(),
            pages: self.pages.clone(),
            n: self.n,
        }
    }

    /// Forgets all behind the first `n` positions, but for the block.
    pub(crate) fn truncate(&mut self, n: usize) {
        self.n = n.max(self.block_rows());
        let pages = (self.n - self.block_rows()).div_ceil(KV_PAGE);
        for own in &mut self.pages {
            own.truncate(pages);
        }
    }

    /// Makes room for `n` more tokens, in pages of its own. Nothing is lost if there is none.
    pub(crate) fn reserve(&mut self, n: usize) -> Result<(), KvFull> {
        let first = self.n - self.block_rows();
        let needed = (first + n).div_ceil(KV_PAGE);
        for (class, pages) in self.pages.iter_mut().enumerate() {
            // The first of them may go into a page that others read.
            if let Some(Some(page)) = pages.get_mut(first / KV_PAGE)
                && Arc::get_mut(page).is_none()
            {
                let mut own = self.pool.page(class)?;
                own.copy_from(self.pool.layout(), class, page, first % KV_PAGE);
                *page = Arc::new(own);
            }
            while pages.len() < needed {
                pages.push(Some(Arc::new(self.pool.page(class)?)));
            }
        }
        Ok(())
    }

    /// Begins with `n` tokens of another text under the same block, which `pages` hold, of each class.
    ///
    /// # Panics
    /// If there is anything but the block.
    pub(crate) fn adopt(&mut self, pages: Vec<Vec<Arc<KvRows>>>, n: usize) {
        assert_eq!(self.n, self.block_rows(), "a text that has not begun");
        assert_eq!(pages.len(), n.div_ceil(KV_PAGE));
        self.truncate(0);
        for page in pages {
            for (own, rows) in self.pages.iter_mut().zip(page) {
                own.push(Some(rows));
            }
        }
        self.n += n;
    }

    /// Its page number `i` of each class, if all are there.
    pub(crate) fn page(&self, i: usize) -> Option<Vec<Arc<KvRows>>> {
        let of_class = |pages: &Vec<Option<Arc<KvRows>>>| pages.get(i)?.clone();
        self.pages.iter().map(of_class).collect()
    }

    /// As part of a step that computes its next `n` tokens, for which there is room.
    pub(crate) fn sequence(&mut self, n: usize) -> KvSequence<'_> {
        KvSequence {
            prefix: self.block.as_ref().map(|block| block.rows()),
            pages: &mut self.pages,
            position: self.n,
            n,
        }
    }

    /// The next `n` tokens are computed.
    pub(crate) fn advance(&mut self, n: usize) {
        self.n += n;
    }

    /// Where, behind the block, begins what a token behind the first `n` positions sees in a class.
    pub(crate) fn seen(&self, class: usize, n: usize) -> usize {
        let window = self.pool.layout().window(class);
        let first = window.map_or(0, |window| (n + 1).saturating_sub(window));
        first.saturating_sub(self.block_rows())
    }

    /// Gives back what none of the next tokens sees. There is no way back to those that would.
    pub(crate) fn forget_unseen(&mut self) {
        for class in 0..self.pages.len() {
            let gone = self.seen(class, self.n) / KV_PAGE;
            // Behind those that went before.
            for page in self.pages[class][..gone].iter_mut().rev() {
                if page.take().is_none() {
                    break;
                }
            }
        }
    }

    /// Whether the text can go on behind its first `n` positions: nothing that a token sees there was given back.
    pub(crate) fn reaches(&self, n: usize) -> bool {
        let end = (n - self.block_rows()).div_ceil(KV_PAGE);
        (0..self.pages.len()).all(|class| {
            let first = self.seen(class, n) / KV_PAGE;
            self.pages[class][first..end].iter().all(Option::is_some)
        })
    }

    /// The tokens behind the block whose keys and values a class has.
    pub(crate) fn kept(&self, class: usize) -> Range<usize> {
        let gone = self.pages[class].iter().take_while(|page| page.is_none());
        gone.count() * KV_PAGE..self.n - self.block_rows()
    }

    /// A head of some tokens, counted behind the block, as they lie in memory.
    pub(crate) fn head(
        &self,
        il: usize,
        part: KvPart,
        head: usize,
        tokens: Range<usize>,
    ) -> Vec<u8> {
        let (class, layer) = self.pool.layout().layer(il);
        let mut out = Vec::new();
        for (i, of_page) in pages_of(tokens) {
            let page = self.pages[class][i].as_ref().expect("tokens that are kept");
            out.extend_from_slice(page.head(layer, part, head, of_page));
        }
        out
    }

    /// A text of `n` tokens behind this one's block, of which each class has those from `first` on: they are there once
    /// [`PagedText::put`] has put them. Whole pages are missing or there.
    pub(crate) fn with_room(&self, n: usize, first: &[usize]) -> Result<Self, KvFull> {
        let mut text = Self::new(self.pool.clone());
        text.block.clone_from(&self.block);
        text.n = text.block_rows() + n;
        for (class, (pages, &first)) in text.pages.iter_mut().zip(first).enumerate() {
            pages.resize(first / KV_PAGE, None);
            for _ in pages.len()..n.div_ceil(KV_PAGE) {
                pages.push(Some(Arc::new(self.pool.page(class)?)));
            }
        }
        Ok(text)
    }

    /// Sets keys or values of a layer: of each head those of all tokens that [`PagedText::kept`] counts, one head behind the other.
    ///
    /// # Panics
    /// If it is another number of bytes, or others read the pages.
    pub(crate) fn put(&mut self, il: usize, part: KvPart, bytes: &[u8]) {
        let (class, layer) = self.pool.layout().layer(il);
        let (tokens, row_bytes) = (self.kept(class), layer.row_bytes());
        assert_eq!(bytes.len(), layer.heads.hk * tokens.len() * row_bytes);
        let mut rest = bytes;
        for head in 0..layer.heads.hk {
            for (i, of_page) in pages_of(tokens.clone()) {
                let page = self.pages[class][i].as_mut().expect("tokens that are kept");
                let page = Arc::get_mut(page).expect("a text of its own");
                let (rows, behind) = rest.split_at(of_page.len() * row_bytes);
                page.head_mut(layer, part, head, of_page)
                    .copy_from_slice(rows);
                rest = behind;
            }
        }
    }
}

/// The pages that hold some tokens, and which of each.
fn pages_of(tokens: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    (tokens.start / KV_PAGE..tokens.end.div_ceil(KV_PAGE)).map(move |i| {
        let of_page = |token: usize| token.clamp(i * KV_PAGE, (i + 1) * KV_PAGE) - i * KV_PAGE;
        (i, of_page(tokens.start)..of_page(tokens.end))
    })
}

/// How keys and values of a step are read.
pub(crate) enum Reads<'a> {
    /// Where they lie, by our own kernel.
    Pages,
    /// By ggml, side by side, so many; either in one operation or in several. Layers take turns in the same room.
    SideBySide {
        masks: &'a Masks,
        n_kv: usize,
        fused: bool,
        /// For heads `[d, Hk]`.
        rooms: Vec<([usize; 2], [Tensor; 2])>,
    },
}

/// A step's texts as the decoder's source of keys and values.
pub(crate) struct Cached<'a> {
    pub(crate) ty: KvType,
    pub(crate) layout: &'a KvLayout,
    pub(crate) step: &'a Arc<KvStep>,
    pub(crate) hp: &'a HParams,
    pub(crate) reads: Reads<'a>,
}

impl Cached<'_> {
    /// `x`, whose rows are heads or consist of them, turned as the cache's `part` is. Rotations keep scalar products:
    /// scores of rotated queries with rotated keys are those of the queries and keys themselves.
    fn rotated(&self, b: &Builder, part: KvPart, il: usize, x: &Tensor) -> Tensor {
        let head_dim = self.hp.layers[il].head_dim;
        match self.ty.rotation(part, head_dim) {
            Some(n) => b.ctx().rotate_runs(x, n),
            None => x.clone(),
        }
    }
}

impl KeyValues for Cached<'_> {
    fn store(&mut self, b: &mut Builder, il: usize, k: &Tensor, v: &Tensor) {
        for (part, rows) in KvPart::BOTH.into_iter().zip([k, v]) {
            let rows = self.rotated(b, part, il, rows);
            let stored = b.ctx().store_kv(self.step, self.layout, il, part, &rows);
            b.demand(&stored);
        }
    }

    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor, sinks: Option<&Tensor>) -> Tensor {
        let (hp, layer) = (self.hp, &self.hp.layers[il]);
        let scoring = Scoring {
            scale: layer.score_scale,
            softcap: hp.attn_softcap,
        };
        let q = self.rotated(b, KvPart::K, il, q);
        let (c, [d, h, t, _]) = (b.ctx(), q.ne());
        let a = match &mut self.reads {
            Reads::Pages => {
                let heads = c.cached_attention(self.step, self.layout, il, (&q, sinks), scoring);
                c.reshape(&heads, &[d * h, t])
            }
            Reads::SideBySide {
                masks,
                n_kv,
                fused,
                rooms,
            } => {
                let heads = [d, layer.n_head_kv];
                let at = rooms.iter().position(|(of, _)| *of == heads);
                let at = at.unwrap_or_else(|| {
                    let room = |name| c.input(self.ty.ggml(), &[heads[0], heads[1], *n_kv], name);
                    rooms.push((heads, ["cache_k", "cache_v"].map(room)));
                    rooms.len() - 1
                });
                let [k, v] = KvPart::BOTH.map(|part| {
                    let room = &rooms[at].1[part as usize];
                    c.gather_kv(self.step, self.layout, il, part, room)
                });
                let mask = masks.of(layer.window);
                b.attention(&q, [&k, &v], (mask, sinks), scoring, *fused)
            }
        };
        // A sum of rotated values is the rotated sum of the values: rotating again turns it back.
        let a = b.named("kqv_out", Some(il), self.rotated(b, KvPart::V, il, &a));
        b.demand(&a);
        a
    }
}
