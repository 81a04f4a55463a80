//! A context of the libllama that ggraft is linked with: a host for those who have no application.

use super::context::Input;
use super::{Api, Graft, Host, HostError};
use crate::error::Result;
use crate::file::mmap::MappedGguf;
use crate::file::types::GgmlType;
use crate::ggml::{CancelToken, default_threads};
use crate::model::{Base, LlamaModel};
use ggml_sys as sys;
use std::ffi::c_void;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the context keeps keys and values, by llama-server's names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LlamaOptions {
    /// Positions of a sequence; of all together with [`LlamaOptions::kv_unified`] (`--ctx-size` is that of all together).
    pub n_ctx: usize,
    /// Sequences (`--parallel`).
    pub n_sequences: usize,
    /// One cache for all of them (`--kv-unified`), instead of one for each.
    pub kv_unified: bool,
    /// Type of keys (`--cache-type-k`).
    pub type_k: GgmlType,
    /// Type of values (`--cache-type-v`).
    pub type_v: GgmlType,
    /// Fused attention (`--flash-attn`); `None` lets libllama decide. Without it values are kept transposed.
    pub flash_attention: Option<bool>,
    /// Keep all positions of layers that see windows (`--swa-full`).
    pub swa_full: bool,
    /// Threads; `None`: the physical cores.
    pub n_threads: Option<usize>,
}

impl Default for LlamaOptions {
    fn default() -> Self {
        Self {
            n_ctx: 4096,
            n_sequences: 1,
            kv_unified: true,
            type_k: GgmlType::F16,
            type_v: GgmlType::F16,
            flash_attention: None,
            swa_full: false,
            n_threads: None,
        }
    }
}

/// A model and a context of libllama's.
#[derive(Debug)]
pub struct Llama {
    host: Host,
    ctx: NonNull<sys::llama_context>,
    /// Whether a step is to stop; libllama looks at it.
    cancel: Option<CancelToken>,
    /// V.
    n_vocab: usize,
    /// Outlives the context.
    _model: Arc<LlamaModel>,
}

// SAFETY: any one thread at a time may use a context, and what uses it takes this exclusively.
unsafe impl Send for Llama {}

/// What is computed of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fed<'a> {
    Tokens(&'a [i32]),
    /// Virtual tokens, `ne = [D, n]`.
    Rows(&'a [f32]),
}

/// A sequence's part of a step.
#[derive(Clone, Debug)]
pub(crate) struct LlamaPart<'a> {
    pub(crate) seq: i32,
    /// Of the first.
    pub(crate) position: usize,
    pub(crate) fed: Fed<'a>,
    /// Which of these need logits.
    pub(crate) outputs: Range<usize>,
}

impl Llama {
    /// Maps the model at `path`, of any architecture that libllama knows, and makes a context.
    ///
    /// # Errors
    /// If the file is no model ([`Base::open`]) or libllama refuses it, [`HostError::Options`] if it refuses the options, and as [`Host::new`].
    pub fn open(path: impl AsRef<Path>, options: &LlamaOptions) -> Result<Self> {
        let path = path.as_ref();
        let base = Base::open(path)?;
        // Rows are put in once, or a few texts are computed: no second copy of the weights.
        let model = LlamaModel::load(&MappedGguf::open(path)?, false)?;
        Self::new(&Arc::new(model), base, options)
    }

    /// A context of `model`, which is that of `base`.
    ///
    /// # Errors
    /// [`HostError::Options`] if libllama refuses them, and as [`Host::new`].
    pub(crate) fn new(model: &Arc<LlamaModel>, base: Base, options: &LlamaOptions) -> Result<Self> {
        // SAFETY: the defaults are plain data; the model is live.
        let ctx = unsafe {
            let mut params = sys::llama_context_default_params();
            let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let threads = options.n_threads.unwrap_or_else(default_threads);
            let cells = match options.kv_unified {
                true => options.n_ctx,
                false => options.n_ctx.saturating_mul(options.n_sequences),
            };
            params.n_ctx = number(cells);
            params.n_seq_max = number(options.n_sequences);
            params.kv_unified = options.kv_unified;
            params.n_threads = i32::try_from(threads).unwrap_or(i32::MAX);
            params.n_threads_batch = params.n_threads;
            params.type_k = options.type_k as sys::ggml_type;
            params.type_v = options.type_v as sys::ggml_type;
            params.flash_attn_type = match options.flash_attention {
                None => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
                Some(false) => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
                Some(true) => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
            };
            params.swa_full = options.swa_full;
            sys::llama_init_from_model(model.as_ptr(), params)
        };
        let ctx = NonNull::new(ctx).ok_or_else(|| HostError::Options {
            path: model.path().clone(),
        })?;
        let n_vocab = base.shape().n_vocab;
        // SAFETY: the context is live until this is dropped, and the host, which is lent exclusively, with it.
        match unsafe { Host::new(Api::linked(), ctx.as_ptr().cast(), base, 0) } {
            Ok(host) => Ok(Self {
                host,
                ctx,
                cancel: None,
                n_vocab,
                _model: model.clone(),
            }),
            Err(e) => {
                // SAFETY: live, and nobody else has it.
                unsafe { sys::llama_free(ctx.as_ptr()) };
                Err(e)
            }
        }
    }

    /// The context as a host of adapters.
    pub fn host(&mut self) -> &mut Host {
        &mut self.host
    }

    /// Positions that windowed layers see; 0 if there are none.
    pub(crate) fn window(&self) -> usize {
        self.host.context.window()
    }

    /// V.
    pub(crate) fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// How many texts it can have.
    pub(crate) fn n_sequences(&self) -> usize {
        self.host.context.n_sequences()
    }

    /// Puts an adapter in place of what `seq` has.
    pub(crate) fn put(&mut self, graft: &Graft, seq: i32) -> Result<(), HostError> {
        self.host.put(graft, seq)
    }

    /// Empties `seq`.
    pub(crate) fn clear(&mut self, seq: i32) -> Result<(), HostError> {
        self.host.context.remove(seq)
    }

    /// Forgets all of `seq` behind its first `n` positions; false if its memory cannot: nothing is changed then.
    pub(crate) fn truncate(&mut self, seq: i32, n: usize) -> Result<bool, HostError> {
        self.host.context.truncate(seq, n)
    }

    /// Steps stop when the token is raised, with [`HostError::Decode`] of code 2.
    pub(crate) fn cancelled_by(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
        let flag: *const AtomicBool = token.flag();
        // SAFETY: the context is live; the flag lives as long as the token, which this keeps until another one takes its place.
        unsafe {
            let flag = flag.cast_mut().cast();
            sys::llama_set_abort_callback(self.ctx.as_ptr(), Some(is_raised), flag);
        }
    }

    /// Computes parts, each of a sequence of its own, and appends the logits of the outputs, one part behind the other, `ne = [V, outputs]`.
    ///
    /// # Errors
    /// [`HostError::SequenceRange`], [`HostError::Decode`]: what the sequences have behind the parts' first positions is not known then.
    pub(crate) fn step(
        &mut self,
        parts: &[LlamaPart<'_>],
        logits: &mut Vec<f32>,
    ) -> Result<(), HostError> {
        let n_embd = self.host.base.shape().n_embd;
        let mut tokens = Vec::new();
        let most = self.host.context.n_batch();
        for part in parts {
            let n = match part.fed {
                Fed::Tokens(tokens) => tokens.len(),
                Fed::Rows(rows) => rows.len() / n_embd,
            };
            let mut at = 0;
            while at < n {
                if tokens.len() == most {
                    self.compute_tokens(&mut tokens, logits)?;
                }
                let m = (n - at).min(most - tokens.len());
                let wanted = |i: usize| part.outputs.contains(&i);
                match part.fed {
                    Fed::Tokens(ids) => tokens.extend((at..at + m).map(|i| Entry {
                        id: ids[i],
                        position: part.position + i,
                        seq: part.seq,
                        wanted: wanted(i),
                    })),
                    Fed::Rows(rows) => {
                        self.compute_tokens(&mut tokens, logits)?;
                        let rows = rows[at * n_embd..(at + m) * n_embd].to_vec();
                        let rows = Input::Rows(&self.host.input(rows));
                        let wanted: Vec<_> = (at..at + m).map(wanted).collect();
                        let positions = part.position + at..part.position + at + m;
                        let places = positions.zip(&wanted).map(|(p, &w)| (p, part.seq, w));
                        self.host.context.decode_all(rows, places)?;
                        self.take_logits(&wanted, logits);
                    }
                }
                at += m;
            }
        }
        self.compute_tokens(&mut tokens, logits)
    }

    fn compute_tokens(
        &mut self,
        entries: &mut Vec<Entry>,
        logits: &mut Vec<f32>,
    ) -> Result<(), HostError> {
        if entries.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = entries.iter().map(|e| e.id).collect();
        let places = entries.iter().map(|e| (e.position, e.seq, e.wanted));
        (self.host.context).decode_all(Input::Tokens(&ids), places)?;
        let wanted: Vec<_> = entries.drain(..).map(|e| e.wanted).collect();
        self.take_logits(&wanted, logits);
        Ok(())
    }

    /// Those of the last batch.
    fn take_logits(&mut self, wanted: &[bool], logits: &mut Vec<f32>) {
        let n = wanted.iter().filter(|&&w| w).count() * self.n_vocab;
        if n > 0 {
            // SAFETY: the batch was computed; its logits lie in order, V for each that is wanted, and the context is not used while they are read.
            logits.extend_from_slice(unsafe {
                std::slice::from_raw_parts(sys::llama_get_logits(self.ctx.as_ptr()), n)
            });
        }
    }
}

/// A token of a batch.
struct Entry {
    id: i32,
    position: usize,
    seq: i32,
    wanted: bool,
}

/// What libllama asks during a step.
unsafe extern "C" fn is_raised(flag: *mut c_void) -> bool {
    // SAFETY: what `Llama::cancelled_by` set.
    unsafe { &*flag.cast::<AtomicBool>() }.load(Ordering::Relaxed)
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: live, freed once; the host does not touch its context when it is dropped, and the model is freed behind it.
        unsafe { sys::llama_free(self.ctx.as_ptr()) };
    }
}
