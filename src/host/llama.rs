//! A context of the libllama that ggraft is linked with: a host for those who have no application.

use super::{Api, Host, HostError};
use crate::error::Result;
use crate::file::types::GgmlType;
use crate::ggml::{default_threads, log};
use crate::model::Base;
use ggml_sys as sys;
use std::ffi::CString;
use std::path::Path;
use std::ptr::NonNull;

/// How the context keeps keys and values, by llama-server's names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LlamaOptions {
    /// Positions of a sequence (`--ctx-size`).
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
    model: NonNull<sys::llama_model>,
}

// SAFETY: any one thread at a time may use a context and its model, and what uses them takes this exclusively.
unsafe impl Send for Llama {}

impl Llama {
    /// Maps the model at `path`, of any architecture that libllama knows, and makes a context.
    ///
    /// # Errors
    /// If the file is no model ([`Base::open`]), [`HostError::Load`] if libllama refuses it or the options, and as [`Host::new`].
    pub fn open(path: impl AsRef<Path>, options: &LlamaOptions) -> Result<Self> {
        let path = path.as_ref();
        let base = Base::open(path)?;
        let refused = |what| HostError::Load {
            path: path.to_owned(),
            what,
        };
        let c_path = path.to_str().and_then(|path| CString::new(path).ok());
        let c_path = c_path.ok_or_else(|| refused("the path, which is no UTF-8"))?;
        log::init();
        // SAFETY: the defaults are plain data; the path is a C string that outlives the call.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            // Rows are put in once, or a few texts are computed: no second copy of the weights.
            params.use_extra_bufts = false;
            sys::llama_model_load_from_file(c_path.as_ptr(), params)
        };
        let model = NonNull::new(model).ok_or_else(|| refused("the model"))?;
        // SAFETY: as above; the model is live.
        let ctx = unsafe {
            let mut params = sys::llama_context_default_params();
            let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let threads = options.n_threads.unwrap_or_else(default_threads);
            params.n_ctx = number(options.n_ctx.saturating_mul(options.n_sequences));
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
        let Some(ctx) = NonNull::new(ctx) else {
            // SAFETY: live, and nobody else has it.
            unsafe { sys::llama_model_free(model.as_ptr()) };
            return Err(refused("a context with these options").into());
        };
        // SAFETY: the context is live until this is dropped, and the host, which is lent exclusively, with it.
        match unsafe { Host::new(Api::linked(), ctx.as_ptr().cast(), base, 0) } {
            Ok(host) => Ok(Self { host, ctx, model }),
            Err(e) => {
                // SAFETY: live, and nobody else has them.
                unsafe {
                    sys::llama_free(ctx.as_ptr());
                    sys::llama_model_free(model.as_ptr());
                }
                Err(e)
            }
        }
    }

    /// The context as a host of adapters.
    pub fn host(&mut self) -> &mut Host {
        &mut self.host
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: live, freed once, the context first; the host does not touch its context when it is dropped.
        unsafe {
            sys::llama_free(self.ctx.as_ptr());
            sys::llama_model_free(self.model.as_ptr());
        }
    }
}
