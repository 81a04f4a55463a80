//! Memory for keys and values: which of a layer lies where ([`KvLayout`]), in rows of some tokens ([`KvRows`]) that come from a pool ([`KvPool`]), and which of
//! them a step reads and writes ([`KvStep`]).

mod pool;
mod step;

pub(crate) use pool::{KvFull, KvPool};
pub(crate) use step::{KvSequence, KvStep};

use crate::file::types::GgmlType;
use crate::kernels::{Heads, Layer, Rows};
use std::alloc::{alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvPart {
    K,
    V,
}

impl KvPart {
    pub(crate) const BOTH: [Self; 2] = [Self::K, Self::V];
}

/// Where keys and values of a model's layers lie. Layers with the same window have memory of their own, a class, because their texts need the same tokens.
#[derive(Debug)]
pub(crate) struct KvLayout {
    classes: Vec<Class>,
    /// And the class of each.
    layers: Vec<(usize, Layer)>,
}

#[derive(Debug)]
struct Class {
    window: Option<usize>,
    /// Keys and values of one token.
    token_bytes: usize,
}

impl KvLayout {
    /// For layers with these heads and windows, in order, whose rows are of type `ty`.
    pub(crate) fn new(
        ty: GgmlType,
        layers: impl IntoIterator<Item = (Heads, Option<usize>)>,
    ) -> Self {
        let mut classes: Vec<Class> = Vec::new();
        let place = |(heads, window): (Heads, Option<usize>)| {
            let found = classes.iter().position(|c| c.window == window);
            let class = found.unwrap_or_else(|| {
                let token_bytes = 0;
                classes.push(Class {
                    window,
                    token_bytes,
                });
                classes.len() - 1
            });
            let first = classes[class].token_bytes;
            let mut layer = Layer {
                heads,
                ty,
                behind: [first; 2],
                window,
            };
            let bytes = heads.hk * layer.row_bytes();
            layer.behind[KvPart::V as usize] += bytes;
            classes[class].token_bytes += 2 * bytes;
            (class, layer)
        };
        let layers = layers.into_iter().map(place).collect();
        Self { classes, layers }
    }

    /// How many kinds of memory a text has.
    pub(crate) fn n_classes(&self) -> usize {
        self.classes.len()
    }

    /// The window of a class's layers.
    pub(crate) fn window(&self, class: usize) -> Option<usize> {
        self.classes[class].window
    }

    /// Bytes of the keys and values of a token in all layers of a class.
    pub(crate) fn token_bytes(&self, class: usize) -> usize {
        self.classes[class].token_bytes
    }

    /// Bytes of so many tokens, of all classes.
    pub(crate) fn bytes(&self, tokens: usize) -> usize {
        let token: usize = self.classes.iter().map(|class| class.token_bytes).sum();
        token.saturating_mul(tokens)
    }

    /// Layer `il`, and its class.
    pub(crate) fn layer(&self, il: usize) -> (usize, &Layer) {
        let (class, layer) = &self.layers[il];
        (*class, layer)
    }

    pub(crate) fn n_layers(&self) -> usize {
        self.layers.len()
    }
}

/// Keys and values of some tokens in all layers of a class, as [`Rows`] says.
///
/// Who has one to itself writes it, or lets a graph write it (`KvStep::begin`); who shares one reads it.
pub(crate) struct KvRows {
    /// There until the end.
    memory: Option<Memory>,
    room: usize,
    /// Where the memory goes to when nobody needs the rows any more, and its class.
    home: Option<(Arc<KvPool>, usize)>,
}

/// Bytes on the heap.
struct Memory {
    first: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: memory of its own.
unsafe impl Send for Memory {}
// SAFETY: read through `&`, written through `&mut` or by graphs of who has it to itself.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeros; large ones become resident as they are used. `None` if there is no memory.
    fn new(bytes: usize) -> Option<Self> {
        /// Rows start on cache lines.
        const ALIGN: usize = 64;
        let layout = std::alloc::Layout::from_size_align(bytes.max(1), ALIGN).ok()?;
        // SAFETY: not of size 0.
        let first = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { first, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.first.as_ptr(), self.layout) }
    }
}

impl KvRows {
    /// Room for `room` tokens, of `token_bytes` bytes each, outside of any pool. `None` if there is no memory.
    pub(crate) fn new(token_bytes: usize, room: usize) -> Option<Self> {
        Some(Self {
            memory: Some(Memory::new(token_bytes.checked_mul(room)?)?),
            room,
            home: None,
        })
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("given back at the end only")
    }

    /// Tokens that there is room for.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// Bytes of all of it.
    pub(crate) fn bytes(&self) -> usize {
        self.memory().layout.size()
    }

    fn rows(&self) -> Rows {
        Rows {
            first: self.memory().first.as_ptr(),
            room: self.room,
        }
    }

    /// Where a head of some tokens lies, from the first byte on.
    fn range(
        &self,
        layer: &Layer,
        part: KvPart,
        head: usize,
        tokens: Range<usize>,
    ) -> Range<usize> {
        assert!(head < layer.heads.hk && tokens.end <= self.room);
        let bytes = layer.row_bytes();
        let behind = layer.behind[part as usize];
        let first = self.rows().at(behind, bytes, head, tokens.start);
        let range = first..first + tokens.len() * bytes;
        assert!(range.end <= self.bytes(), "a layer of this class");
        range
    }

    /// Some tokens' rows of a head, one behind the other.
    pub(crate) fn head(
        &self,
        layer: &Layer,
        part: KvPart,
        head: usize,
        tokens: Range<usize>,
    ) -> &[u8] {
        let range = self.range(layer, part, head, tokens);
        // SAFETY: inside the memory (asserted). Graphs that write it have it to themselves.
        unsafe {
            let first = self.memory().first.as_ptr().add(range.start);
            std::slice::from_raw_parts(first, range.len())
        }
    }

    /// Takes over the first `n` tokens of other rows of the same class and room.
    pub(crate) fn copy_from(&mut self, layout: &KvLayout, class: usize, other: &Self, n: usize) {
        assert_eq!(self.room, other.room);
        let layers = layout.layers.iter().filter(|(of, _)| *of == class);
        for (_, layer) in layers {
            for part in KvPart::BOTH {
                for head in 0..layer.heads.hk {
                    let from = other.head(layer, part, head, 0..n);
                    self.head_mut(layer, part, head, 0..n).copy_from_slice(from);
                }
            }
        }
    }

    /// Some tokens' rows of a head, to be overwritten.
    pub(crate) fn head_mut(
        &mut self,
        layer: &Layer,
        part: KvPart,
        head: usize,
        tokens: Range<usize>,
    ) -> &mut [u8] {
        let range = self.range(layer, part, head, tokens);
        // SAFETY: inside the memory (asserted), which is ours alone.
        unsafe {
            let first = self.memory().first.as_ptr().add(range.start);
            std::slice::from_raw_parts_mut(first, range.len())
        }
    }
}

impl Drop for KvRows {
    fn drop(&mut self) {
        if let (Some((pool, class)), Some(memory)) = (self.home.take(), self.memory.take()) {
            pool.take_back(class, memory);
        }
    }
}
