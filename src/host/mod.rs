//! Adapters inside an application that runs llama.cpp itself: prefix rows go into the cells of one of its sequences, virtual tokens through its decoder.
//!
//! A [`Host`] works on a `llama_context` of the application's through public functions of llama.h only, which come as a table ([`Api`]): nothing here needs a libllama of
//! its own. How the context keeps keys and values is read from a state that it writes itself, and refused if any of it is not understood.
//!
//! ```no_run
//! use ggraft::Adapter;
//! use ggraft::host::{Api, Host};
//! use ggraft::model::Base;
//!
//! # fn application(ctx: *mut std::ffi::c_void) -> ggraft::Result<()> {
//! let base = Base::open("base.gguf")?;
//! let pirate = Adapter::load("pirate.gguf".as_ref())?;
//! // SAFETY: `ctx` is a live llama_context, which nobody else uses meanwhile.
//! let mut host = unsafe { Host::new(Api::loaded()?, ctx, base, 0)? };
//! let graft = host.prepare(&pirate, 0)?;
//! // Sequence 0 begins with the adapter: decode the text from this position on.
//! let position = host.attach(&graft, 0)?;
//! # let _ = position;
//! # Ok(())
//! # }
//! ```

mod api;
mod context;
mod encode;
mod error;
mod graft;
#[cfg(feature = "runtime")]
mod llama;
mod slot;
mod state;

pub use api::{Api, Batch};
pub use error::HostError;
pub use graft::{Graft, Piece};
pub use slot::SLOT_VERSION;

#[cfg(feature = "runtime")]
pub(crate) use llama::{Fed, LlamaPart};
#[cfg(feature = "runtime")]
pub use llama::{Llama, LlamaOptions};

use crate::adapter::{Adapter, ControlVector, Item, Payload, Words, arrange};
use crate::error::Result;
use crate::model::Base;
use context::{Context, Input};
use state::Layout;
use std::ffi::c_void;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// A `llama_context` of an application, and the base that it runs.
///
/// It owns nothing of the context's: dropping it leaves the context, and what was attached, as they are.
#[derive(Debug)]
pub struct Host {
    id: u64,
    context: Context,
    base: Base,
    /// How keys and values are kept, or why prefixes cannot be.
    layout: Result<Layout, HostError>,
}

impl Host {
    /// The context `ctx`, which runs the model of `base`. To see how it keeps keys and values one token is decoded into `seq`, which must be empty, and taken out again.
    ///
    /// # Safety
    /// `ctx` must be a live `llama_context *` of the library that the functions of `api` belong to, and live as long as methods of this are called. Nobody else may use it
    /// during a call.
    ///
    /// # Errors
    /// [`HostError::NoContext`], [`HostError::OtherBase`] if the context runs another model, [`HostError::NoMemory`] if it has no memory of texts,
    /// [`HostError::SequenceRange`], [`HostError::NotEmpty`], [`HostError::Decode`].
    pub unsafe fn new(api: Api, ctx: *mut c_void, base: Base, seq: i32) -> Result<Self> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let ctx = NonNull::new(ctx).ok_or(HostError::NoContext)?;
        // SAFETY: as the caller promises.
        let mut context = unsafe { Context::new(api, ctx, base.shape().n_embd) };
        context.check_runs(&base)?;
        context.check_empty(seq)?;
        let layout = match context.check_attends() {
            Ok(()) => learn(&mut context, &base, seq)?,
            Err(why) => Err(why),
        };
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            context,
            base,
            layout,
        })
    }

    /// The base that it was made for.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The token that begins a text, if the base's texts begin with one.
    pub fn leading_bos(&self) -> Option<i32> {
        Words::leading_bos(&self.context)
    }

    /// Rows in the context's own form, or what its decoder makes of virtual tokens: an adapter is prepared once and attached often.
    ///
    /// Virtual tokens are decoded into `seq`, which must be empty, and taken out again; a prefix does not need it.
    ///
    /// # Errors
    /// If the adapter is one for another base, or the context cannot hold it: [`HostError::Recurrent`], [`HostError::Encoder`] and [`HostError::UnknownState`] for a prefix,
    /// [`HostError::Template`] if virtual tokens stand among the text ([`Host::compose`] is for these), [`HostError::NoRoom`], [`HostError::Decode`].
    pub fn prepare(&mut self, adapter: &Adapter, seq: i32) -> Result<Graft> {
        self.check_fits(adapter)?;
        self.graft(adapter, seq)
    }

    /// As [`Host::prepare`], for an adapter of which the base is known to fit.
    pub(crate) fn graft(&mut self, adapter: &Adapter, seq: i32) -> Result<Graft> {
        match adapter.template() {
            Some(_) => Err(HostError::Template.into()),
            None => Ok(self.graft_of(adapter.payload(), seq)?),
        }
    }

    /// What stands in front of a text, in the context's own form; virtual tokens are decoded into `seq`, which must be empty, and taken out again.
    pub(crate) fn graft_of(&mut self, payload: &Payload, seq: i32) -> Result<Graft, HostError> {
        let n_rows = payload.length();
        self.check_room(n_rows)?;
        let state = match payload {
            Payload::Prefix { layers } => {
                let layout = self.layout.as_ref().map_err(Clone::clone)?;
                layout.prefix(layers, self.base.shape(), n_rows)?
            }
            Payload::VirtualTokens(rows) => {
                self.context.check_empty(seq)?;
                let rows = self.input(rows.to_f32());
                let state = (self.context)
                    .decode(Input::Rows(&rows), 0, seq)
                    .and_then(|()| self.context.state(seq));
                self.context.remove(seq)?;
                state?
            }
        };
        Ok(Graft {
            host: self.id,
            n_rows,
            state,
        })
    }

    /// Puts an adapter at the beginning of `seq`, which must be empty; returns the position of the first token behind it.
    ///
    /// # Errors
    /// [`HostError::OtherHost`] if it was prepared by another one, [`HostError::SequenceRange`], [`HostError::NotEmpty`], [`HostError::NoRoom`] if too few cells are free.
    pub fn attach(&mut self, graft: &Graft, seq: i32) -> Result<usize> {
        self.context.check_empty(seq)?;
        self.swap(graft, seq)
    }

    /// As [`Host::attach`], in place of what `seq` has, text and all.
    ///
    /// # Errors
    /// As [`Host::attach`]; the sequence is empty if there is no room.
    pub fn swap(&mut self, graft: &Graft, seq: i32) -> Result<usize> {
        self.put(graft, seq)?;
        Ok(graft.n_rows)
    }

    fn put(&mut self, graft: &Graft, seq: i32) -> Result<(), HostError> {
        if graft.host != self.id {
            return Err(HostError::OtherHost);
        }
        match self.context.set_state(&graft.state, seq)? {
            true => Ok(()),
            false => Err(self.no_room(graft.n_rows)),
        }
    }

    /// As [`Host::swap`], and decodes `tokens` behind the adapter, so that the text goes on under it. Returns the position behind them; the logits are those of the last one.
    ///
    /// # Errors
    /// As [`Host::swap`], and [`HostError::Decode`].
    pub fn swap_and_recompute(&mut self, graft: &Graft, seq: i32, tokens: &[i32]) -> Result<usize> {
        let position = self.swap(graft, seq)?;
        (self.context).decode(Input::Tokens(tokens), position, seq)?;
        Ok(position + tokens.len())
    }

    /// Empties `seq`.
    ///
    /// # Errors
    /// [`HostError::SequenceRange`].
    pub fn detach(&mut self, seq: i32) -> Result<()> {
        Ok(self.context.remove(seq)?)
    }

    /// Lets `to`, which must be empty, begin with all that `from` has: its cells are shared where the context has one cache for all sequences (`kv_unified`), and copied
    /// elsewhere.
    ///
    /// # Errors
    /// [`HostError::SequenceRange`], [`HostError::NotEmpty`].
    pub fn copy(&mut self, from: i32, to: i32) -> Result<()> {
        self.context.check_empty(to)?;
        Ok(self.context.copy(from, to)?)
    }

    /// A prompt under an adapter whose template places virtual tokens: tokens, and rows for batches of embeddings, in the order of the template. `prompt` has no BOS, which
    /// is put where it belongs.
    ///
    /// # Errors
    /// If the adapter is one for another base; [`HostError::NoVirtualTokens`], [`HostError::Tokenize`].
    pub fn compose(&self, adapter: &Adapter, prompt: &[i32]) -> Result<Vec<Piece>> {
        self.check_fits(adapter)?;
        let Payload::VirtualTokens(rows) = adapter.payload() else {
            return Err(HostError::NoVirtualTokens.into());
        };
        let width = rows.width();
        let rows = self.input(rows.to_f32());
        let mut items = arrange(&self.context, adapter.template(), prompt, true)?;
        if adapter.template().is_none() {
            // In front of everything.
            items.insert(0, Item::Virtual(0..adapter.length()));
        }
        let piece = |item| match item {
            Item::Tokens(tokens) => Piece::Tokens(tokens),
            Item::Virtual(at) => Piece::Rows(rows[at.start * width..at.end * width].to_vec()),
        };
        Ok(items.into_iter().map(piece).collect())
    }

    /// Decodes pieces of [`Host::compose`] into `seq` from `position` on; returns the position behind them. The logits are those of the last one.
    ///
    /// # Errors
    /// [`HostError::SequenceRange`], [`HostError::Decode`].
    pub fn decode(&mut self, pieces: &[Piece], mut position: usize, seq: i32) -> Result<usize> {
        for piece in pieces {
            let input = match piece {
                Piece::Tokens(tokens) => Input::Tokens(tokens),
                Piece::Rows(rows) => Input::Rows(rows),
            };
            self.context.decode(input, position, seq)?;
            position += piece.len(self.base.shape().n_embd);
        }
        Ok(position)
    }

    /// Decodes a prompt under an adapter of virtual tokens into `seq`, which must be empty: [`Host::compose`] and [`Host::decode`].
    ///
    /// # Errors
    /// As theirs, and [`HostError::NotEmpty`].
    pub fn prompt(&mut self, adapter: &Adapter, prompt: &[i32], seq: i32) -> Result<usize> {
        self.context.check_empty(seq)?;
        let pieces = self.compose(adapter, prompt)?;
        self.decode(&pieces, 0, seq)
    }

    /// Keys and values that the base computes for `tokens`, for each layer keys, then values `ne = [Hk d, n]`, in a context that keeps them in F32. They are decoded into
    /// `seq`, which must be empty, and taken out again.
    ///
    /// # Errors
    /// [`HostError::UnknownState`] if they are kept in another way, or some of them not at all; [`HostError::Decode`].
    pub(crate) fn rows_of(
        &mut self,
        tokens: &[i32],
        seq: i32,
    ) -> Result<Vec<[Vec<f32>; 2]>, HostError> {
        let layout = self.layout.as_ref().map_err(Clone::clone)?;
        self.context.check_empty(seq)?;
        let state = (self.context)
            .decode(Input::Tokens(tokens), 0, seq)
            .and_then(|()| self.context.state(seq));
        self.context.remove(seq)?;
        layout.rows(&state?, self.base.shape().n_layer, tokens.len())
    }

    /// Steers all of the context's sequences from the next decode on: `vector`, or nothing, is added to the outputs of `layers`, those that it has a direction for. A context
    /// has one such vector; [`ControlVector::plus`] makes one of two.
    ///
    /// # Errors
    /// [`HostError::ControlWidth`], [`HostError::ControlLayers`] if it steers none of the layers or there are not so many, [`HostError::MissingFunction`],
    /// [`HostError::ControlRefused`]: the context is steered as before.
    pub fn steer(
        &mut self,
        vector: Option<&ControlVector>,
        layers: RangeInclusive<usize>,
    ) -> Result<()> {
        let Some(vector) = vector else {
            return Ok(self.context.steer(None, 0..=0)?);
        };
        let shape = self.base.shape();
        if vector.width() != shape.n_embd {
            return Err(HostError::ControlWidth {
                vector: vector.width(),
                base: shape.n_embd,
            }
            .into());
        }
        let last = (*layers.end()).min(shape.n_layer - 1);
        let layers = *layers.start()..=last;
        let has_all = vector.directions().keys().all(|&il| il < shape.n_layer);
        let steers = vector.directions().keys().any(|il| layers.contains(il));
        if !has_all || !steers {
            return Err(HostError::ControlLayers {
                n: shape.n_layer,
                first: *layers.start(),
            }
            .into());
        }
        // From layer 1 on, as llama.h wants them.
        let mut data = vec![0.0; shape.n_embd * (shape.n_layer - 1)];
        for (&layer, direction) in vector.directions() {
            data[(layer - 1) * shape.n_embd..][..shape.n_embd].copy_from_slice(direction);
        }
        Ok(self.context.steer(Some(&data), layers)?)
    }

    fn check_fits(&self, adapter: &Adapter) -> Result<()> {
        Ok(adapter.check_fits(self.base.shape(), &self.base.fingerprint(), false)?)
    }

    fn check_room(&self, rows: usize) -> Result<(), HostError> {
        match rows > self.context.n_ctx() {
            true => Err(self.no_room(rows)),
            false => Ok(()),
        }
    }

    fn no_room(&self, rows: usize) -> HostError {
        let n_ctx = self.context.n_ctx();
        HostError::NoRoom { rows, n_ctx }
    }

    /// Virtual tokens as the context's decoder takes them: Gemma's first two multiply what is given by sqrt(D), as they do with their own.
    fn input(&self, mut rows: Vec<f32>) -> Vec<f32> {
        let shape = self.base.shape();
        if ["gemma", "gemma2"].contains(&shape.architecture.as_str()) {
            let scale = (shape.n_embd as f32).sqrt();
            rows.iter_mut().for_each(|x| *x /= scale);
        }
        rows
    }
}

/// How the context keeps keys and values: a token is put in, and taken out again when its state is read.
fn learn(
    context: &mut Context,
    base: &Base,
    seq: i32,
) -> Result<Result<Layout, HostError>, HostError> {
    let state = context
        .decode(Input::Tokens(&[0]), 0, seq)
        .and_then(|()| context.state(seq));
    context.remove(seq)?;
    Ok(Layout::read(&state?, seq, base, context.window()))
}
