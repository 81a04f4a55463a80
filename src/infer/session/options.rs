//! How a session computes.

use crate::infer::KvType;

/// What happens to text that was computed under another adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExistingText {
    /// Compute it again under the new adapter; the conversation goes on.
    Recompute,
    /// Forget it; the session starts empty.
    Drop,
}

/// Whether attention runs in one fused kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Fused: faster on every CPU.
    #[default]
    On,
    /// Separate products and softmax.
    Off,
}

/// How a session computes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SessionOptions {
    /// Positions, the adapter's included; default: what the model was trained on. Memory is touched as it fills.
    pub n_ctx: Option<usize>,
    /// Threads that compute; default: [`crate::default_threads`]. With prompts, and with kernels of ggml's, they wait for each
    /// other by spinning, so that fewer are faster where other programs keep cores busy. Sessions of one model with equal counts share one pool and take turns.
    pub n_threads: Option<usize>,
    /// Type of the KV cache.
    pub kv_type: KvType,
    /// Fused attention.
    pub flash_attention: FlashAttention,
    /// Tokens per prefill step.
    pub n_batch: usize,
    /// Attach adapters whose fingerprint names another base of the same shape.
    pub accept_other_base: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            n_ctx: None,
            n_threads: None,
            kv_type: KvType::default(),
            flash_attention: FlashAttention::default(),
            n_batch: 512,
            accept_other_base: false,
        }
    }
}

impl SessionOptions {
    /// Sets [`SessionOptions::n_ctx`].
    pub fn n_ctx(mut self, n: usize) -> Self {
        self.n_ctx = Some(n);
        self
    }

    /// Sets [`SessionOptions::n_threads`].
    pub fn n_threads(mut self, n: usize) -> Self {
        self.n_threads = Some(n);
        self
    }

    /// Sets [`SessionOptions::kv_type`].
    pub fn kv_type(mut self, ty: KvType) -> Self {
        self.kv_type = ty;
        self
    }

    /// Sets [`SessionOptions::flash_attention`].
    pub fn flash_attention(mut self, mode: FlashAttention) -> Self {
        self.flash_attention = mode;
        self
    }

    /// Sets [`SessionOptions::n_batch`].
    pub fn n_batch(mut self, n: usize) -> Self {
        self.n_batch = n;
        self
    }

    /// Sets [`SessionOptions::accept_other_base`].
    pub fn accept_other_base(mut self, accept: bool) -> Self {
        self.accept_other_base = accept;
        self
    }
}
