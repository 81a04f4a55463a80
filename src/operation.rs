//! Operations that architectures differ in: what the table of architectures says, and ggml computes.

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)`, tanh approximation.
    Gelu,
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
