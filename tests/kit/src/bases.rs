//! Models of every architecture, and what may stand in front of a text on each.

use crate::adapters;
use crate::fixture::{FixtureSpec, all_variants, write_fixture};
use ggraft::file::types::GgmlType;
use ggraft::infer::{ExistingText, FlashAttention, KvType};
use ggraft::{Adapter, Model, ModelOptions, Session, SessionOptions};
use std::path::Path;

/// A model, and adapters of all kinds for it.
pub struct Base {
    /// Of the architecture or the file.
    pub name: &'static str,
    /// Of [`bases`]: of random weights of type Q8_0.
    pub model: Model,
    /// None, prefixes, virtual tokens in front, and two templates: one that ends with virtual tokens, one with text.
    pub adapters: Vec<Option<Adapter>>,
    /// Some layers see the last tokens only.
    pub has_window: bool,
}

impl Base {
    /// A model with adapters.
    pub fn new(name: &'static str, model: Model, has_window: bool) -> Self {
        let p_tuning = |template, seed| Some(adapters::p_tuning(&model, template, 5, seed));
        let adapters = vec![
            None,
            Some(adapters::prefix(&model, 5, 1)),
            Some(adapters::prefix(&model, 9, 5)),
            Some(adapters::prompt(&model, 4, 2)),
            p_tuning("{v:2}{bos}{prompt}{v:3}", 3),
            p_tuning("{v:2}{bos}a{prompt}{v:3}b", 4),
        ];
        Self {
            name,
            model,
            adapters,
            has_window,
        }
    }
}

/// One of each architecture, made in `dir`.
///
/// # Panics
/// If a model cannot be made or opened.
pub fn bases(dir: &Path, options: &ModelOptions) -> Vec<Base> {
    let base = |&variant: &crate::fixture::Variant| {
        let path = dir.join(format!("{}.gguf", variant.name()));
        write_fixture(&path, &FixtureSpec::new(variant, GgmlType::Q8_0)).expect("room for a model");
        let model = Model::open(&path, options).expect("a model");
        Base::new(variant.name(), model, variant.sliding_window().is_some())
    };
    all_variants().iter().map(base).collect()
}

/// The ways to keep keys and values that a model can have, for texts of up to `n_ctx` positions.
pub fn session_options(model: &Model, n_ctx: usize) -> Vec<SessionOptions> {
    let trained = model.n_ctx_train();
    [
        (KvType::F16, FlashAttention::On),
        (KvType::F16, FlashAttention::Off),
        (KvType::F32, FlashAttention::On),
        (KvType::Q8_0, FlashAttention::On),
    ]
    .map(|(ty, flash)| {
        let options = SessionOptions::default()
            .n_ctx(n_ctx.min(trained))
            .n_threads(1);
        options.kv_type(ty).flash_attention(flash)
    })
    .into_iter()
    // Heads that are no whole blocks have no Q8_0.
    .filter(|options| Session::new(model, options).is_ok())
    .collect()
}

/// An empty session under `adapter`.
///
/// # Panics
/// If it cannot be made.
pub fn session(model: &Model, options: &SessionOptions, adapter: Option<&Adapter>) -> Session {
    let mut session = Session::new(model, options).expect("a session");
    if let Some(adapter) = adapter {
        session
            .attach(adapter, ExistingText::Drop)
            .expect("an adapter that fits");
    }
    session
}

/// Numbers in no order, from a seed.
pub struct Random(u64);

impl Random {
    /// Another seed, other numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        // Xorshift (Marsaglia 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n
    }

    /// One of several, of which there is at least one.
    pub fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// `n` tokens of a model.
    pub fn tokens(&mut self, model: &Model, n: usize) -> Vec<i32> {
        let n_vocab = model.shape().n_vocab;
        (0..n).map(|_| self.below(n_vocab) as i32).collect()
    }
}
