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
//! Data flows one way: `file -> model -> adapter -> graph -> {infer, train} -> {capi, bin}`.

pub mod adapter;
#[cfg(feature = "capi")]
pub mod capi;
mod error;
pub mod file;
mod ggml;
mod graph;
pub mod infer;
pub mod model;
pub mod train;

/// The code in docs/TRAINING.md compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../docs/TRAINING.md")]
struct TrainingPage;

#[doc(hidden)]
pub use ggml::kernels::measure;

pub use adapter::Adapter;
pub use error::{Error, Result};
pub use ggml::default_threads;
pub use infer::{Session, SessionOptions};
pub use model::{Model, ModelOptions};
