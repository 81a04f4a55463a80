//! libllama in the same process: the reference for logits, intermediates and speed.

use ggml_sys as sys;
use ggraft::file::types::GgmlType;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Once;

/// Why libllama did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The model file was refused.
    #[error("libllama cannot load {}: {reason}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What libllama logged.
        reason: String,
    },
    /// No context could be made.
    #[error("libllama cannot make a context: {0}")]
    Context(String),
    /// `llama_decode` failed.
    #[error("libllama decode failed with code {code} at position {position}")]
    Decode {
        /// What it returned.
        code: i32,
        /// First position of the batch.
        position: usize,
    },
    /// A batch does not fit.
    #[error("{n} rows at position {position} do not fit a context of {n_ctx}")]
    ContextFull {
        /// Rows asked for.
        n: usize,
        /// First position.
        position: usize,
        /// Positions the context has.
        n_ctx: usize,
    },
    /// An exported cache, or a prefix, is not of the expected form.
    #[error("cache state: {0}")]
    State(String),
    /// Intermediates were asked of a context made without [`Options::capture`].
    #[error("make the context with capture = true to see intermediates")]
    NoCapture,
}

/// How to make a context.
#[derive(Clone, Debug)]
pub struct Options {
    /// Positions.
    pub n_ctx: usize,
    /// Threads of the persistent pool.
    pub n_threads: usize,
    /// Rows computed at once.
    pub n_ubatch: usize,
    /// Type of K and V in the cache.
    pub kv_type: GgmlType,
    /// `None` lets libllama decide.
    pub flash_attention: Option<bool>,
    /// Copy weights into ggml's interleaved layouts where it has them (libllama's own default is on).
    pub repack: bool,
    /// Sequences that [`Llama::step_sequences`] can go on with.
    pub n_sequences: usize,
    /// One cache for all sequences, instead of one for each.
    pub kv_unified: bool,
    /// Keep every position of layers with a sliding window, so that a whole prefix can be put in; the mask is the same.
    pub swa_full: bool,
    /// Allow [`Llama::logits_with_intermediates`]; computes node by node, so not for timing.
    pub capture: bool,
}

impl Default for Options {
    /// The most exact settings: F32 cache, no flash attention, weights as mapped; 256 positions, one thread.
    fn default() -> Self {
        Self {
            n_ctx: 256,
            n_threads: 1,
            n_ubatch: 512,
            kv_type: GgmlType::F32,
            flash_attention: Some(false),
            repack: false,
            n_sequences: 1,
            kv_unified: false,
            swa_full: true,
            capture: false,
        }
    }
}

/// A loaded model, freed when dropped.
#[derive(Debug)]
pub struct Model {
    raw: NonNull<sys::llama_model>,
    /// For each layer, whether it attends to a sliding window only.
    sliding: Vec<bool>,
}

impl Model {
    /// Maps `path`; with `repack`, copies weights into interleaved layouts.
    pub fn load(path: &Path, repack: bool) -> Result<Self, OracleError> {
        start();
        let c_path = c_path(path)?;
        // SAFETY: returns plain data.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.use_extra_bufts = repack;
        // SAFETY: `c_path` is a C string that outlives the call; the parameters hold no pointers but libllama's defaults.
        let raw = unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) };
        let raw = NonNull::new(raw).ok_or_else(|| OracleError::Load {
            path: path.to_owned(),
            reason: logged(),
        })?;
        let mut model = Self {
            raw,
            sliding: Vec::new(),
        };
        model.sliding = sliding_layers(&c_path, model.n_layer());
        Ok(model)
    }

    /// L.
    pub fn n_layer(&self) -> usize {
        // SAFETY: `raw` is a live model until drop.
        unsafe { sys::llama_model_n_layer(self.raw.as_ptr()) as usize }
    }

    /// D.
    pub fn n_embd(&self) -> usize {
        // SAFETY: `raw` is a live model until drop.
        unsafe { sys::llama_model_n_embd(self.raw.as_ptr()) as usize }
    }

    /// V.
    pub fn n_vocab(&self) -> usize {
        // SAFETY: `raw` is a live model until drop, and so is its vocabulary.
        unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(self.raw.as_ptr())) as usize }
    }

    /// Ids of `text`, special tokens parsed; with bos if the file asks for it and `add_special`.
    pub fn tokenize(&self, text: &str, add_special: bool) -> Vec<i32> {
        let mut ids = vec![0; text.len() + 8];
        // SAFETY: the vocabulary lives as long as the model; text and buffer are given with their lengths.
        let n = unsafe {
            sys::llama_tokenize(
                sys::llama_model_get_vocab(self.raw.as_ptr()),
                text.as_ptr().cast(),
                text.len() as i32,
                ids.as_mut_ptr(),
                ids.len() as i32,
                add_special,
                true,
            )
        };
        assert!(
            n >= 0,
            "a text of n bytes has at most n tokens, plus bos and eos"
        );
        ids.truncate(n as usize);
        ids
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: `raw` came from llama_model_load_from_file, is freed once, and contexts hold an Rc of this.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}

/// A LoRA adapter of libllama's. Freed with its model.
#[derive(Debug)]
pub struct Lora {
    raw: NonNull<sys::llama_adapter_lora>,
    model: Rc<Model>,
}

impl Lora {
    /// Reads a GGUF file of an adapter for `model`.
    pub fn load(model: &Rc<Model>, path: &Path) -> Result<Self, OracleError> {
        let c_path = c_path(path)?;
        // SAFETY: a live model and a C string that outlives the call.
        let raw = unsafe { sys::llama_adapter_lora_init(model.raw.as_ptr(), c_path.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| OracleError::Load {
            path: path.to_owned(),
            reason: logged(),
        })?;
        Ok(Self {
            raw,
            model: model.clone(),
        })
    }
}

/// Intermediate tensors of a decode by libllama's name, elements in ggml order.
pub type Intermediates = BTreeMap<String, Vec<f32>>;

/// K and V rows of one layer, each P rows of Hk * d, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct KvRows {
    /// As cached: after rope and norms.
    pub k: Vec<f32>,
    /// As cached.
    pub v: Vec<f32>,
}

/// A model with a context, of one sequence but for [`Llama::step_sequences`]. All methods that take tokens or rows append them to what is there already.
#[derive(Debug)]
pub struct Llama {
    ctx: NonNull<sys::llama_context>,
    pool: NonNull<sys::ggml_threadpool>,
    capture: Option<NonNull<Capture>>,
    options: Options,
    n_past: usize,
    model: Rc<Model>,
}

impl Llama {
    /// Loads `path` and makes a context.
    pub fn load(path: &Path, options: &Options) -> Result<Self, OracleError> {
        Self::new(Rc::new(Model::load(path, options.repack)?), options)
    }

    /// Makes a context for a loaded model (`options.repack` has no effect here).
    pub fn new(model: Rc<Model>, options: &Options) -> Result<Self, OracleError> {
        // SAFETY: returns plain data.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = options.n_ctx as u32;
        params.n_batch = options.n_ctx as u32;
        params.n_ubatch = options.n_ubatch.min(options.n_ctx) as u32;
        params.n_seq_max = options.n_sequences as u32;
        params.kv_unified = options.kv_unified;
        params.n_threads = options.n_threads as i32;
        params.n_threads_batch = options.n_threads as i32;
        params.type_k = options.kv_type as sys::ggml_type;
        params.type_v = options.kv_type as sys::ggml_type;
        params.flash_attn_type = match options.flash_attention {
            None => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
            Some(false) => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            Some(true) => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
        };
        params.swa_full = options.swa_full;
        let capture = options
            .capture
            .then(|| NonNull::from(Box::leak(Box::<Capture>::default())));
        if let Some(capture) = capture {
            params.cb_eval = Some(on_node);
            params.cb_eval_user_data = capture.as_ptr().cast();
        }
        // SAFETY: the model is live and kept so by `model`; `capture` is freed after the context.
        let ctx = unsafe { sys::llama_init_from_model(model.raw.as_ptr(), params) };
        let Some(ctx) = NonNull::new(ctx) else {
            free_capture(capture);
            return Err(OracleError::Context(logged()));
        };
        // SAFETY: `params` is initialised by the first call; the pool is freed after the context it is attached to.
        let pool = unsafe {
            let mut params = sys::ggml_threadpool_params_default(options.n_threads as i32);
            let pool = sys::ggml_threadpool_new(&mut params);
            sys::llama_attach_threadpool(ctx.as_ptr(), pool, std::ptr::null_mut());
            NonNull::new(pool).expect("ggml aborts rather than return no pool")
        };
        Ok(Self {
            ctx,
            pool,
            capture,
            options: options.clone(),
            n_past: 0,
            model,
        })
    }

    /// The model.
    pub fn model(&self) -> &Rc<Model> {
        &self.model
    }

    /// The `llama_context *`, for whoever uses it as an application's.
    pub fn context(&self) -> *mut c_void {
        self.ctx.as_ptr().cast()
    }

    /// Says that others have filled `n` positions of the first sequence.
    pub fn go_on_at(&mut self, n: usize) {
        self.n_past = n;
    }

    /// Positions in use: the next token goes to this one.
    pub fn n_past(&self) -> usize {
        self.n_past
    }

    /// Applies this adapter, and no other, to what is decoded from now on. What is cached stays as it was computed.
    ///
    /// # Panics
    /// If it is one for another loaded model.
    pub fn set_lora(&mut self, lora: &Lora) {
        assert!(Rc::ptr_eq(&lora.model, &self.model), "another model's");
        let (mut adapters, mut scales) = ([lora.raw.as_ptr()], [1.0]);
        // SAFETY: the context is live, the adapter lives as long as the model, and one of each is given.
        let code = unsafe {
            sys::llama_set_adapters_lora(
                self.ctx.as_ptr(),
                adapters.as_mut_ptr(),
                1,
                scales.as_mut_ptr(),
            )
        };
        assert_eq!(code, 0, "libllama takes one adapter of its own model");
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        // SAFETY: the context is live, and owns its memory.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.ctx.as_ptr()), true) };
        self.n_past = 0;
    }

    /// Forgets all positions from `n` on: 0 < n <= [`Llama::n_past`].
    ///
    /// # Panics
    /// If `n` is out of that range.
    pub fn truncate(&mut self, n: usize) {
        assert!(
            0 < n && n <= self.n_past,
            "cannot keep {n} of {} positions",
            self.n_past
        );
        // SAFETY: the context is live, and owns its memory.
        let removed = unsafe {
            sys::llama_memory_seq_rm(sys::llama_get_memory(self.ctx.as_ptr()), 0, n as i32, -1)
        };
        assert!(removed, "an attention cache can drop its last positions");
        self.n_past = n;
    }

    /// Appends `tokens`; logits of each, V values per row.
    pub fn logits(&mut self, tokens: &[i32]) -> Result<Vec<Vec<f32>>, OracleError> {
        self.decode(Input::Tokens(tokens), true)?;
        Ok((0..tokens.len())
            .map(|i| self.row(i as isize).to_vec())
            .collect())
    }

    /// Appends rows of D values in place of token embeddings; logits of each.
    ///
    /// libllama scales raw rows as it scales those of tokens for gemma and gemma2, not for gemma3.
    pub fn logits_embd(&mut self, rows: &[f32]) -> Result<Vec<Vec<f32>>, OracleError> {
        let n = rows.len() / self.model.n_embd();
        self.decode(Input::Embeddings(rows), true)?;
        Ok((0..n).map(|i| self.row(i as isize).to_vec()).collect())
    }

    /// Appends `tokens`; logits of the last, without a copy. What prefill is timed with.
    pub fn prefill(&mut self, tokens: &[i32]) -> Result<&[f32], OracleError> {
        self.decode(Input::Tokens(tokens), false)?;
        Ok(self.row(-1))
    }

    /// Appends one token; its logits, without a copy. What decoding is timed with.
    pub fn step(&mut self, token: i32) -> Result<&[f32], OracleError> {
        self.prefill(&[token])
    }

    /// Restores the first sequence from a file of `llama_state_seq_save_file`, or one of its form, as llama-server does; its tokens.
    pub fn load_slot(&mut self, path: &Path) -> Result<Vec<i32>, OracleError> {
        let path = c_path(path)?;
        let mut tokens = vec![0; self.options.n_ctx];
        let mut n = 0;
        // SAFETY: the context is live, the path a C string, the buffer is given with its length.
        let read = unsafe {
            let (at, room) = (tokens.as_mut_ptr(), tokens.len());
            sys::llama_state_seq_load_file(self.ctx.as_ptr(), path.as_ptr(), 0, at, room, &mut n)
        };
        if read == 0 {
            return Err(OracleError::State(logged()));
        }
        tokens.truncate(n);
        self.n_past = n;
        Ok(tokens)
    }

    /// Logits of what was decoded last, by whomever.
    pub fn last_logits(&mut self) -> &[f32] {
        self.row(-1)
    }

    /// Puts each of `tokens`, of a sequence and at a position, into the cache, in one step; `each` gets the logits of the last one of each sequence in the step.
    ///
    /// # Errors
    /// [`OracleError::Decode`].
    pub fn step_sequences(
        &mut self,
        tokens: &[(usize, usize, i32)],
        mut each: impl FnMut(&[f32]),
    ) -> Result<(), OracleError> {
        let mut ids: Vec<i32> = tokens.iter().map(|t| t.2).collect();
        let mut positions: Vec<i32> = tokens.iter().map(|t| t.1 as i32).collect();
        let mut sequences: Vec<i32> = tokens.iter().map(|t| t.0 as i32).collect();
        let mut of_each: Vec<*mut i32> = sequences.iter_mut().map(|s| s as *mut i32).collect();
        let mut counts = vec![1; tokens.len()];
        let is_last = |i: usize| tokens[i + 1..].iter().all(|t| t.0 != tokens[i].0);
        let mut wanted: Vec<i8> = (0..tokens.len()).map(|i| i8::from(is_last(i))).collect();
        let batch = sys::llama_batch {
            n_tokens: tokens.len() as i32,
            token: ids.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: positions.as_mut_ptr(),
            n_seq_id: counts.as_mut_ptr(),
            seq_id: of_each.as_mut_ptr(),
            logits: wanted.as_mut_ptr(),
        };
        // SAFETY: the context is live; each array of the batch has an entry for each token, with one sequence, and outlives the call.
        let code = unsafe { sys::llama_decode(self.ctx.as_ptr(), batch) };
        if code != 0 {
            let position = tokens[0].1;
            return Err(OracleError::Decode { code, position });
        }
        for i in (0..tokens.len()).filter(|&i| wanted[i] == 1) {
            each(self.row(i as isize));
        }
        Ok(())
    }

    /// As [`Llama::logits`], and every F32 tensor of the graph by libllama's name (`embd`, `attn_norm-0`, `Qcur-1`, `l_out-1`,
    /// `result_norm`), elements in ggml order. Of names that libllama gives more than once, the last one computed: `Qcur-0` is after rope.
    pub fn logits_with_intermediates(
        &mut self,
        tokens: &[i32],
    ) -> Result<(Vec<Vec<f32>>, Intermediates), OracleError> {
        let capture = self.capture.ok_or(OracleError::NoCapture)?;
        // SAFETY: the box lives until drop; only the callback touches it during decode, on this thread.
        unsafe { (*capture.as_ptr()).enabled = true };
        let logits = self.logits(tokens);
        // SAFETY: as above; decode has returned.
        let tensors = unsafe {
            (*capture.as_ptr()).enabled = false;
            std::mem::take(&mut (*capture.as_ptr()).tensors)
        };
        Ok((logits?, tensors))
    }

    /// Replaces everything by cached K and V rows at positions 0..P, one entry per layer in order. Needs an F32 or F16 cache.
    pub fn set_prefix(&mut self, layers: &[KvRows], p: usize) -> Result<(), OracleError> {
        self.clear();
        let state = self.prefix_state(layers, p)?;
        // SAFETY: the buffer is given with its length; libllama checks the contents.
        let read = unsafe {
            sys::llama_state_seq_set_data(self.ctx.as_ptr(), state.as_ptr(), state.len(), 0)
        };
        if read != state.len() {
            return Err(OracleError::State(format!(
                "libllama took {read} of {} bytes",
                state.len()
            )));
        }
        self.n_past = p;
        Ok(())
    }

    /// Cached K and V rows of every layer for all positions. Needs an F32 or F16 cache.
    ///
    /// Positions that no later token of a sliding-window layer can see are not exported: an error if there are such.
    pub fn kv_rows(&mut self) -> Result<Vec<KvRows>, OracleError> {
        let state = self.export();
        let mut r = Reader(&state);
        r.skip(8)?;
        let mut out: Vec<Option<KvRows>> = vec![None; self.model.n_layer()];
        for cache in self.caches() {
            r.expect(1, "streams")?;
            r.expect(self.n_past as u32, "cells")?;
            r.skip(self.n_past * CELL_BYTES)?;
            let transposed = r.u32()? != 0;
            r.expect(cache.len() as u32, "layers")?;
            r.expect(0, "key rotation")?;
            r.expect(0, "value rotation")?;
            let mut keys = Vec::new();
            for _ in &cache {
                r.expect(self.options.kv_type as u32, "key type")?;
                let bytes = r.u64()? as usize;
                keys.push(self.floats(r.take(bytes * self.n_past)?)?);
            }
            for (&layer, k) in cache.iter().zip(keys) {
                r.expect(self.options.kv_type as u32, "value type")?;
                let v = if transposed {
                    let size = r.u32()? as usize;
                    let width = r.u32()? as usize;
                    transpose(
                        &self.floats(r.take(size * width * self.n_past)?)?,
                        self.n_past,
                    )
                } else {
                    let bytes = r.u64()? as usize;
                    self.floats(r.take(bytes * self.n_past)?)?
                };
                out[layer] = Some(KvRows { k, v });
            }
        }
        out.into_iter()
            .map(|rows| rows.ok_or_else(|| OracleError::State("a layer is missing".into())))
            .collect()
    }

    fn decode(&mut self, input: Input<'_>, all: bool) -> Result<(), OracleError> {
        let (tokens, rows, n) = match input {
            Input::Tokens(t) => (t.as_ptr().cast_mut(), std::ptr::null_mut(), t.len()),
            Input::Embeddings(r) => {
                assert!(
                    r.len().is_multiple_of(self.model.n_embd()),
                    "{} floats are not rows of {}",
                    r.len(),
                    self.model.n_embd()
                );
                (
                    std::ptr::null_mut(),
                    r.as_ptr().cast_mut(),
                    r.len() / self.model.n_embd(),
                )
            }
        };
        assert!(n > 0, "nothing to decode");
        let position = self.n_past;
        if position + n > self.options.n_ctx {
            return Err(OracleError::ContextFull {
                n,
                position,
                n_ctx: self.options.n_ctx,
            });
        }
        let mut positions: Vec<i32> = (position as i32..(position + n) as i32).collect();
        let mut wanted = vec![i8::from(all); n];
        wanted[n - 1] = 1;
        let batch = sys::llama_batch {
            n_tokens: n as i32,
            token: tokens,
            embd: rows,
            pos: positions.as_mut_ptr(),
            n_seq_id: std::ptr::null_mut(),
            seq_id: std::ptr::null_mut(),
            logits: wanted.as_mut_ptr(),
        };
        // SAFETY: the context is live; each array of the batch has n entries (rows: n * D) and outlives the call, which only
        // reads tokens and rows; absent sequence ids mean sequence 0.
        let code = unsafe { sys::llama_decode(self.ctx.as_ptr(), batch) };
        if code != 0 {
            return Err(OracleError::Decode { code, position });
        }
        self.n_past += n;
        Ok(())
    }

    /// Logits of batch row `i`, -1 the last one.
    fn row(&mut self, i: isize) -> &[f32] {
        // SAFETY: row `i` of the last batch had its logits asked for, so libllama returns V floats that it keeps until the
        // next decode, which needs `&mut self`.
        unsafe {
            let logits = sys::llama_get_logits_ith(self.ctx.as_ptr(), i as i32);
            assert!(!logits.is_null(), "row {i} has no logits");
            std::slice::from_raw_parts(logits, self.model.n_vocab())
        }
    }

    /// Layers of each KV cache in the order of the state: models with sliding windows keep two, full attention first.
    fn caches(&self) -> Vec<Vec<usize>> {
        let of = |kind: bool| {
            (0..self.model.n_layer())
                .filter(|&i| self.model.sliding[i] == kind)
                .collect::<Vec<_>>()
        };
        if self.model.sliding.contains(&true) {
            vec![of(false), of(true)]
        } else {
            vec![of(false)]
        }
    }

    fn export(&mut self) -> Vec<u8> {
        // SAFETY: the context is live; the buffer is given with its length.
        unsafe {
            let mut state = vec![0; sys::llama_state_seq_get_size(self.ctx.as_ptr(), 0)];
            let written = sys::llama_state_seq_get_data(
                self.ctx.as_ptr(),
                state.as_mut_ptr(),
                state.len(),
                0,
            );
            state.truncate(written);
            state
        }
    }

    /// A sequence state (version 4) as `state_write` of llama-kv-cache.cpp writes it, with `p` cells at positions 0..p.
    fn prefix_state(&mut self, layers: &[KvRows], p: usize) -> Result<Vec<u8>, OracleError> {
        if layers.len() != self.model.n_layer() || p == 0 {
            return Err(OracleError::State(format!(
                "{p} rows of {} layers, the model has {}",
                layers.len(),
                self.model.n_layer()
            )));
        }
        // An empty sequence exports the magic number and the sequence id.
        let mut out = self.export();
        out.truncate(8);
        // libllama keeps V transposed unless flash attention is on.
        let flash = self.options.flash_attention;
        let flash = flash.ok_or_else(|| {
            OracleError::State("choose flash attention on or off to set a prefix".into())
        })?;
        let ty = self.options.kv_type as u32;
        for cache in self.caches() {
            out.extend(1u32.to_le_bytes());
            out.extend((p as u32).to_le_bytes());
            for cell in 0..p as i32 {
                for value in [cell, 1, 0] {
                    out.extend(value.to_le_bytes());
                }
            }
            for value in [u32::from(!flash), cache.len() as u32, 0, 0] {
                out.extend(value.to_le_bytes());
            }
            for &layer in &cache {
                let k = self.bytes(&layers[layer].k)?;
                out.extend(ty.to_le_bytes());
                out.extend(((k.len() / p) as u64).to_le_bytes());
                out.extend(k);
            }
            for &layer in &cache {
                let v = &layers[layer].v;
                out.extend(ty.to_le_bytes());
                if flash {
                    let v = self.bytes(v)?;
                    out.extend(((v.len() / p) as u64).to_le_bytes());
                    out.extend(v);
                } else {
                    let width = v.len() / p;
                    out.extend((self.options.kv_type.type_size() as u32).to_le_bytes());
                    out.extend((width as u32).to_le_bytes());
                    out.extend(self.bytes(&transpose(v, width))?);
                }
            }
        }
        Ok(out)
    }

    fn bytes(&self, values: &[f32]) -> Result<Vec<u8>, OracleError> {
        match self.options.kv_type {
            GgmlType::F32 | GgmlType::F16 => Ok(crate::quantize::quantize(
                self.options.kv_type,
                values,
                values.len(),
            )),
            other => Err(OracleError::State(format!(
                "the cache is {}, expected f32 or f16",
                other.name()
            ))),
        }
    }

    fn floats(&self, bytes: &[u8]) -> Result<Vec<f32>, OracleError> {
        match self.options.kv_type {
            GgmlType::F32 => Ok(bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()),
            GgmlType::F16 => Ok(bytes
                .chunks_exact(2)
                // SAFETY: a pure function.
                .map(|b| unsafe { sys::ggml_fp16_to_fp32(u16::from_le_bytes([b[0], b[1]])) })
                .collect()),
            other => Err(OracleError::State(format!(
                "the cache is {}, expected f32 or f16",
                other.name()
            ))),
        }
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: both came from their constructors and are freed once, the context first because it uses the pool.
        unsafe {
            sys::llama_free(self.ctx.as_ptr());
            sys::ggml_threadpool_free(self.pool.as_ptr());
        }
        free_capture(self.capture);
    }
}

enum Input<'a> {
    Tokens(&'a [i32]),
    Embeddings(&'a [f32]),
}

/// Bytes of a cell in the state: position, number of sequence ids, one id.
const CELL_BYTES: usize = 12;

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], OracleError> {
        let (head, tail) = self
            .0
            .split_at_checked(n)
            .ok_or_else(|| OracleError::State("too short".into()))?;
        self.0 = tail;
        Ok(head)
    }
    fn skip(&mut self, n: usize) -> Result<(), OracleError> {
        self.take(n).map(|_| ())
    }
    fn u32(&mut self) -> Result<u32, OracleError> {
        self.take(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }
    fn u64(&mut self) -> Result<u64, OracleError> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }
    fn expect(&mut self, want: u32, what: &str) -> Result<(), OracleError> {
        let got = self.u32()?;
        if got == want {
            Ok(())
        } else {
            Err(OracleError::State(format!(
                "{what}: expected {want}, got {got}"
            )))
        }
    }
}

/// Rows of `width` values become `width` rows.
fn transpose(rows: &[f32], width: usize) -> Vec<f32> {
    let n = rows.len() / width;
    (0..rows.len())
        .map(|i| rows[i % n * width + i / n])
        .collect()
}

/// Intermediates of one decode.
#[derive(Debug, Default)]
struct Capture {
    enabled: bool,
    tensors: Intermediates,
}

fn free_capture(capture: Option<NonNull<Capture>>) {
    if let Some(capture) = capture {
        // SAFETY: leaked from a box in `Llama::new`, freed once, after the context that points to it.
        drop(unsafe { Box::from_raw(capture.as_ptr()) });
    }
}

/// Asked before each node whether its result is wanted, then called with the result.
unsafe extern "C" fn on_node(node: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    // SAFETY: `user` is the context's `Capture`; libllama calls from the thread that decodes, which does not touch it meanwhile.
    let capture = unsafe { &mut *user.cast::<Capture>() };
    // SAFETY: ggml passes a live node whose name is a C string.
    let (t, name) = unsafe {
        (
            &*node,
            CStr::from_ptr((*node).name.as_ptr()).to_string_lossy(),
        )
    };
    // Views made on the way ("Qcur-0 (reshaped)") repeat what their source shows; "node_7" has no name.
    let named = !name.contains('(') && !name.starts_with("node_");
    let wanted = capture.enabled && t.type_ == sys::GGML_TYPE_F32 && named;
    if wanted && !ask {
        // SAFETY: the node is computed, F32 and in host memory (only the CPU backend is compiled in); its strides keep every
        // element inside its buffer.
        let values = unsafe { strided(t) };
        capture.tensors.insert(name.into_owned(), values);
    }
    // When asked: whether to call again with the result. Afterwards: go on.
    !ask || wanted
}

/// Elements in ggml order.
///
/// # Safety
/// `t` must be a computed F32 tensor in host memory.
unsafe fn strided(t: &sys::ggml_tensor) -> Vec<f32> {
    let mut out = Vec::with_capacity(t.ne.iter().product::<i64>() as usize);
    for i3 in 0..t.ne[3] as usize {
        for i2 in 0..t.ne[2] as usize {
            for i1 in 0..t.ne[1] as usize {
                for i0 in 0..t.ne[0] as usize {
                    let offset = i0 * t.nb[0] + i1 * t.nb[1] + i2 * t.nb[2] + i3 * t.nb[3];
                    // SAFETY: an element of the tensor by its own strides (see above).
                    out.push(unsafe { t.data.byte_add(offset).cast::<f32>().read_unaligned() });
                }
            }
        }
    }
    out
}

thread_local! {
    /// Errors that libllama logged on this thread since [`logged`] was called last.
    static LOGGED: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Takes what libllama logged as errors on this thread, as one line.
fn logged() -> String {
    LOGGED
        .take()
        .lines()
        .map(str::trim)
        .collect::<Vec<_>>()
        .join("; ")
}

/// Initialises libllama once and keeps its log off the terminal.
fn start() {
    static START: Once = Once::new();
    START.call_once(|| {
        // SAFETY: called once, before any other use by this crate; the callback needs no data.
        unsafe {
            sys::llama_log_set(Some(keep_errors), std::ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

unsafe extern "C" fn keep_errors(
    level: sys::ggml_log_level,
    text: *const c_char,
    _user: *mut c_void,
) {
    if level == sys::GGML_LOG_LEVEL_ERROR {
        // SAFETY: libllama passes a C string.
        let text = unsafe { CStr::from_ptr(text) };
        LOGGED.with_borrow_mut(|log| log.push_str(&text.to_string_lossy()));
    }
}

fn c_path(path: &Path) -> Result<CString, OracleError> {
    let text = path.to_str().and_then(|p| CString::new(p).ok());
    text.ok_or_else(|| OracleError::Load {
        path: path.to_owned(),
        reason: "the path is no UTF-8 C string".into(),
    })
}

/// Which layers have a sliding window, by the file's keys and libllama's default patterns (`load_arch_hparams` of
/// gemma2, gemma3, gpt-oss and olmo2; phi3 ignores its window).
fn sliding_layers(path: &CStr, n_layer: usize) -> Vec<bool> {
    let params = sys::gguf_init_params {
        no_alloc: true,
        ctx: std::ptr::null_mut(),
    };
    // SAFETY: the path is a C string; the file was loaded before, so it parses, and the result is freed below. Values are read only
    // after a check of their type.
    unsafe {
        let file = sys::gguf_init_from_file(path.as_ptr(), params);
        assert!(!file.is_null(), "a file that libllama loaded parses");
        let find = |key: &str| {
            let key = CString::new(key).expect("keys have no NUL");
            let id = sys::gguf_find_key(file, key.as_ptr());
            (id >= 0).then(|| (id, sys::gguf_get_kv_type(file, id)))
        };
        let arch = match find("general.architecture") {
            Some((id, sys::GGUF_TYPE_STRING)) => CStr::from_ptr(sys::gguf_get_val_str(file, id))
                .to_string_lossy()
                .into_owned(),
            _ => String::new(),
        };
        let default = match arch.as_str() {
            "gemma2" | "gpt-oss" => Some(2),
            "gemma3" => Some(6),
            "olmo2" => Some(4),
            _ => None,
        };
        let window = match find(&format!("{arch}.attention.sliding_window")) {
            Some((id, sys::GGUF_TYPE_UINT32)) => sys::gguf_get_val_u32(file, id) > 0,
            _ => arch == "gemma2",
        };
        let sliding = match (
            default.filter(|_| window),
            find(&format!("{arch}.attention.sliding_window_pattern")),
        ) {
            (None, _) => vec![false; n_layer],
            (Some(_), Some((id, sys::GGUF_TYPE_ARRAY)))
                if sys::gguf_get_arr_type(file, id) == sys::GGUF_TYPE_BOOL =>
            {
                assert!(
                    sys::gguf_get_arr_n(file, id) >= n_layer,
                    "the pattern covers all layers"
                );
                std::slice::from_raw_parts(sys::gguf_get_arr_data(file, id).cast::<i8>(), n_layer)
                    .iter()
                    .map(|&b| b != 0)
                    .collect()
            }
            (Some(_), Some((id, sys::GGUF_TYPE_UINT32))) => {
                every(sys::gguf_get_val_u32(file, id) as usize, n_layer)
            }
            (Some(pattern), _) => every(pattern, n_layer),
        };
        sys::gguf_free(file);
        sliding
    }
}

/// All layers but every `pattern`-th.
fn every(pattern: usize, n_layer: usize) -> Vec<bool> {
    (0..n_layer)
        .map(|i| pattern == 0 || i % pattern < pattern - 1)
        .collect()
}
