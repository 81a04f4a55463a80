//! Operations that architectures differ in: what the table of architectures says, and ggml computes.

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)`, tanh approximation.
    Gelu,
    /// `x sigmoid(1.702 x)` of x up to 7, as a gate of what is clamped to -7 to 7, plus 1 (gpt-oss).
    SwigluOai,
}

impl Activation {
    /// [`Activation::SwigluOai`]'s factor in the sigmoid.
    pub(crate) const OAI_ALPHA: f32 = 1.702;
    /// What [`Activation::SwigluOai`] clamps to.
    pub(crate) const OAI_LIMIT: f32 = 7.0;
}

/// How RoPE pairs the values of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeKind {
    /// Neighbours (2i, 2i+1), llama's permuted rows.
    Interleaved,
    /// (i, i + n_rot/2), GPT-NeoX and Hugging Face.
    Neox,
}

/// Parameters of a rotary embedding, as `ggml_rope_ext` takes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rope {
    pub(crate) kind: RopeKind,
    /// Rotated values per head, from the front.
    pub(crate) n_rot: usize,
    /// Context length of the original training (YaRN).
    pub(crate) n_ctx_orig: usize,
    pub(crate) freq_base: f32,
    pub(crate) freq_scale: f32,
    pub(crate) ext_factor: f32,
    pub(crate) attn_factor: f32,
    pub(crate) beta_fast: f32,
    pub(crate) beta_slow: f32,
}
