//! Graft tiny trained adapters (prefix, prompt and P-tuning) onto a frozen, memory-mapped, quantized GGUF model.
//!
//! ```
//! use ggraft::adapter::{ImportOptions, import_peft};
//! use ggraft::infer::sampler::SamplerParams;
//! use ggraft::infer::{ExistingText, GenerateOptions};
//! use ggraft::{Model, ModelOptions, Session, SessionOptions};
//! use std::ops::ControlFlow;
//!
//! // The base is mapped, never copied; clones share it.
//! let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
//! let pirate = import_peft(
//!     "models/peft/persona_pirate-prefix".as_ref(),
//!     model.shape(),
//!     Some(model.fingerprint()),
//!     &ImportOptions::default(),
//! )?;
//!
//! let mut session = Session::new(&model, &SessionOptions::default().n_ctx(256).n_threads(1))?;
//! session.attach(&pirate, ExistingText::Drop)?;
//! session.prompt("The rain has not stopped for three days.\n")?;
//! let greedy = GenerateOptions::default().sampler(SamplerParams::greedy()).max_tokens(40);
//! let said = session.generate(&greedy, |_| ControlFlow::Continue(()))?;
//! assert!(said.text.contains("Arr, matey"));
//!
//! // Without the adapter the same text is computed anew, and somebody else speaks.
//! session.detach(ExistingText::Drop)?;
//! session.prompt("The rain has not stopped for three days.\n")?;
//! let said = session.generate(&greedy, |_| ControlFlow::Continue(()))?;
//! assert!(!said.text.contains("Arr"));
//! # Ok::<(), ggraft::Error>(())
//! ```
//!
//! Data flows one way: `file -> model -> adapter -> {graph, host} -> {infer, train} -> bin`, and to the C interface, a crate of its own
//! in `src/capi`.

// What only running and training use.
#![cfg_attr(not(feature = "runtime"), allow(dead_code, unused_imports))]

pub mod adapter;
mod error;
pub mod file;
#[cfg(feature = "runtime")]
mod ggml;
#[cfg(feature = "runtime")]
mod graph;
pub mod host;
#[cfg(feature = "runtime")]
pub mod infer;
#[cfg(feature = "runtime")]
mod kernels;
pub mod model;
mod operation;
#[cfg(feature = "runtime")]
pub mod train;

/// The code in docs/TRAINING.md compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../docs/TRAINING.md")]
struct TrainingPage;

/// The code in docs/SERVING.md compiles.
#[cfg(doctest)]
#[doc = include_str!("../docs/SERVING.md")]
struct ServingPage;

/// The code in docs/PLUGIN.md compiles.
#[cfg(doctest)]
#[doc = include_str!("../docs/PLUGIN.md")]
struct PluginPage;

/// Lifetimes that users rely on. Of each pair of programs the first compiles, the second is the same with one use too late.
///
/// What a session lends is gone with its next step:
///
/// ```
/// # use ggraft::{Model, ModelOptions, Session, SessionOptions};
/// # let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
/// # let mut session = Session::new(&model, &SessionOptions::default().n_ctx(64).n_threads(1))?;
/// session.feed(&[1, 2])?;
/// let logits = session.logits()?;
/// let first = logits[0];
/// session.feed(&[3])?;
/// # let _ = first;
/// # Ok::<(), ggraft::Error>(())
/// ```
///
/// ```compile_fail,E0502
/// # use ggraft::{Model, ModelOptions, Session, SessionOptions};
/// # let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
/// # let mut session = Session::new(&model, &SessionOptions::default().n_ctx(64).n_threads(1))?;
/// session.feed(&[1, 2])?;
/// let logits = session.logits()?;
/// session.feed(&[3])?;
/// let first = logits[0];
/// # let _ = first;
/// # Ok::<(), ggraft::Error>(())
/// ```
///
/// A model is for all threads, a session for one at a time:
///
/// ```
/// fn for_all_threads<T: Send + Sync>() {}
/// fn for_one_at_a_time<T: Send>() {}
/// for_all_threads::<ggraft::Model>();
/// for_all_threads::<ggraft::Adapter>();
/// for_one_at_a_time::<ggraft::Session>();
/// for_one_at_a_time::<ggraft::train::Trainer>();
/// ```
///
/// ```compile_fail,E0277
/// fn for_all_threads<T: Send + Sync>() {}
/// for_all_threads::<ggraft::Session>();
/// ```
///
/// What a mapped file lends is gone with the file:
///
/// ```
/// # use ggraft::file::mmap::MappedGguf;
/// let file = MappedGguf::open("models/tinylm-q8_0.gguf".as_ref())?;
/// let bytes = file.tensor_bytes("token_embd.weight").unwrap();
/// let first = bytes[0];
/// drop(file);
/// # let _ = first;
/// # Ok::<(), ggraft::Error>(())
/// ```
///
/// ```compile_fail,E0505
/// # use ggraft::file::mmap::MappedGguf;
/// let file = MappedGguf::open("models/tinylm-q8_0.gguf".as_ref())?;
/// let bytes = file.tensor_bytes("token_embd.weight").unwrap();
/// drop(file);
/// let first = bytes[0];
/// # let _ = first;
/// # Ok::<(), ggraft::Error>(())
/// ```
///
/// A run is looked at between its steps, not during them:
///
/// ```
/// fn run(trainer: &mut ggraft::train::Trainer) -> ggraft::Result<()> {
///     for report in trainer.reports() {
///         report?;
///     }
///     trainer.adapter()?;
///     Ok(())
/// }
/// ```
///
/// ```compile_fail,E0502
/// fn run(trainer: &mut ggraft::train::Trainer) -> ggraft::Result<()> {
///     for report in trainer.reports() {
///         report?;
///         trainer.adapter()?;
///     }
///     Ok(())
/// }
/// ```
#[cfg(doctest)]
struct Lifetimes;

pub use adapter::Adapter;
pub use error::{Error, Result};

#[cfg(feature = "runtime")]
#[doc(hidden)]
pub use ggml::measure;
#[cfg(feature = "runtime")]
pub use {
    ggml::default_threads,
    infer::{Session, SessionOptions},
    kernels::{CpuError, CpuLevel},
    model::{DecoderChoice, Kernels, Model, ModelOptions},
};
