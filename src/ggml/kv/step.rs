//! Which keys and values a step reads and writes.

use super::{KvLayout, KvRows};
use crate::kernels::{PAGE, Rows, Text};
use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// The part that a text has in a step: its next tokens.
pub(crate) struct KvSequence<'a> {
    /// Rows in front of the text, of each class; none without.
    pub(crate) prefix: Option<&'a [Arc<KvRows>]>,
    /// The text's own pages of each class, with room for the next tokens. Those that no token sees any more may be missing.
    pub(crate) pages: &'a mut [Vec<Option<Arc<KvRows>>>],
    /// Of the first of the tokens.
    pub(crate) position: usize,
    /// How many tokens.
    pub(crate) n: usize,
}

/// What the kernels of a graph read and write while it is computed: the graph stays, this is another one for each step.
#[derive(Default)]
pub(crate) struct KvStep(RwLock<State>);

#[derive(Default)]
pub(crate) struct State {
    classes: Vec<ClassStep>,
    /// See [`Layer::n_records`](crate::kernels::Layer::n_records); the kernels share it.
    records: UnsafeCell<Vec<f32>>,
}

// SAFETY: the records are written by who computes an operation, each its own, and read when that is over.
unsafe impl Sync for State {}

/// The same for layers of one class.
#[derive(Default)]
pub(crate) struct ClassStep {
    pub(crate) texts: Vec<Text>,
    /// Where the keys and values of each token of the step go to, and at which place.
    pub(crate) writes: Vec<(Rows, usize)>,
    /// What all these rows belong to.
    _keep: Vec<Arc<KvRows>>,
}

// SAFETY: rows are those of what is kept.
unsafe impl Send for ClassStep {}
// SAFETY: read, and the rows written by who computes an operation, each its own.
unsafe impl Sync for ClassStep {}

impl ClassStep {
    fn new(class: usize, sequences: &mut [KvSequence<'_>]) -> Self {
        let mut step = Self::default();
        for sequence in sequences {
            let prefix = sequence.prefix.map(|prefix| &prefix[class]);
            let before = prefix.map_or(0, |rows| rows.room());
            let pages = &mut sequence.pages[class];
            let first = step.writes.len();
            for at in sequence.position - before..sequence.position - before + sequence.n {
                let page = pages[at / PAGE].as_mut().expect("room for the next tokens");
                let own = Arc::get_mut(page).expect("a page that is written is nobody else's");
                step.writes.push((own.rows(), at % PAGE));
            }
            step.texts.push(Text {
                prefix: prefix.map_or(Rows::EMPTY, |rows| rows.rows()),
                pages: pages
                    .iter()
                    .map(|page| page.as_ref().map_or(Rows::EMPTY, |rows| rows.rows()))
                    .collect(),
                tokens: first..step.writes.len(),
                position: sequence.position,
            });
            step._keep.extend(prefix.cloned());
            step._keep.extend(pages.iter().flatten().cloned());
        }
        step
    }
}

impl KvStep {
    /// What is computed next is these texts' next tokens, in this order. Until [`KvStep::end`] nobody else may write the pages.
    ///
    /// # Panics
    /// If a page that is written is missing or shared.
    pub(crate) fn begin(&self, layout: &KvLayout, sequences: &mut [KvSequence<'_>]) {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        state.classes = (0..layout.n_classes())
            .map(|class| ClassStep::new(class, sequences))
            .collect();
        let records = |il| {
            let (class, layer) = layout.layer(il);
            layer.n_records(&state.classes[class].texts)
        };
        let most = (0..layout.n_layers()).map(records).max().unwrap_or(0);
        let records = state.records.get_mut();
        if records.len() < most {
            records.resize(most, 0.0);
        }
    }

    /// It was computed, or was not.
    pub(crate) fn end(&self) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .classes
            .clear();
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    pub(crate) fn class(&self, class: usize) -> &ClassStep {
        &self.classes[class]
    }

    /// Room for the records of any layer.
    pub(crate) fn records(&self) -> *mut f32 {
        // SAFETY: the vector itself is changed under the lock for writing only.
        unsafe { (*self.records.get()).as_mut_ptr() }
    }

    /// The first `n` values of it.
    ///
    /// # Safety
    /// Nobody writes them.
    pub(crate) unsafe fn written_records(&self, n: usize) -> &[f32] {
        // SAFETY: the caller's promise.
        unsafe { &(&*self.records.get())[..n] }
    }
}

impl ClassStep {
    /// The one text of a step, and how many keys it has behind it.
    pub(crate) fn only(&self) -> (&Text, usize) {
        let [text] = &self.texts[..] else {
            panic!("{} texts in a step for one", self.texts.len());
        };
        let Range { start, end } = text.tokens;
        (text, text.position + end - start)
    }
}
