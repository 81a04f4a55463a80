//! Why an adapter is refused.

use super::{AdapterKind, TemplateError};
use crate::model::Fingerprint;

/// An adapter that is malformed or does not fit, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    // Control vectors.
    /// A file of something else.
    #[error("this is a GGUF file of '{found}', not a control vector")]
    NotAControlVector {
        /// `general.architecture`.
        found: String,
    },
    /// A tensor that no control vector has.
    #[error("tensor {tensor} is no direction: those are called direction.N, and are rows of F32")]
    DirectionTensor {
        /// Its name.
        tensor: String,
    },
    /// A direction of a layer that has none.
    #[error("there is a direction for layer {layer}: layers 1 to 1023 can have one")]
    DirectionLayer {
        /// The layer.
        layer: usize,
    },
    /// Nothing in it.
    #[error("the control vector has no directions")]
    NoDirections,
    // Contents.
    /// Values that do not make up whole rows.
    #[error("{values} values are not one or more whole rows of {width}")]
    RaggedRows {
        /// Values per row.
        width: usize,
        /// Number of values.
        values: usize,
    },
    /// P is zero or too large.
    #[error("adapter length is {got}, it must be 1 to {max}")]
    Length {
        /// P.
        got: usize,
        /// The limit.
        max: usize,
    },
    /// A prefix adapter with embedding rows, or the reverse.
    #[error(
        "a {kind} adapter cannot hold this payload: prefix adapters hold layers, the others hold embedding rows"
    )]
    PayloadKind {
        /// The declared kind.
        kind: AdapterKind,
    },
    /// A prefix with too few, too many or no layers.
    #[error("prefix has {got} layers, its base has {declared}")]
    LayerCount {
        /// L of the signature.
        declared: usize,
        /// Layers of the payload.
        got: usize,
    },
    /// A tensor of the wrong shape.
    #[error("tensor {tensor}: shape is {got:?}, expected {expected:?} (width, rows)")]
    TensorShape {
        /// Its name.
        tensor: String,
        /// ne.
        expected: [usize; 2],
        /// ne.
        got: [usize; 2],
    },
    /// An infinite value or not a number.
    #[error(
        "tensor {tensor}: value {index} is {value}; adapters must be finite, retrain or re-export it"
    )]
    NonFinite {
        /// Its name.
        tensor: String,
        /// Index of the value, rows contiguous.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The shape signature lacks what this kind needs.
    #[error("a {kind} adapter must state the {field} of its base (key ggraft.base.{field})")]
    SignatureIncomplete {
        /// The kind.
        kind: AdapterKind,
        /// What is missing.
        field: &'static str,
    },
    /// A size of the shape signature that no model has.
    #[error("the {field} of the base is {got}, which is too large")]
    SignatureTooLarge {
        /// Which size.
        field: &'static str,
        /// Its value.
        got: usize,
    },
    /// Sizes of layers that are more or fewer than the layers.
    #[error("the base has {declared} layers, but its {field} is stated for {got}")]
    SignatureLayers {
        /// Which size.
        field: &'static str,
        /// L of the signature.
        declared: usize,
        /// Layers that the size is stated for.
        got: usize,
    },
    /// A template on a kind that has none.
    #[error("a {kind} adapter has no template, only p_tuning adapters do")]
    TemplateKind {
        /// The kind.
        kind: AdapterKind,
    },
    /// A malformed template, or one that does not fit the length.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A provenance key with other characters, empty or too long.
    #[error("provenance key {key:?} must be 1 to {max} of a-z, 0-9, `_` and `.`")]
    ProvenanceKey {
        /// The key.
        key: String,
        /// The limit in bytes.
        max: usize,
    },
    /// Too many provenance entries.
    #[error("{got} provenance entries, at most {max} are allowed")]
    ProvenanceTooLong {
        /// Number of entries.
        got: usize,
        /// The limit.
        max: usize,
    },

    // The GGUF adapter format.
    /// Larger than any adapter.
    #[error("file of {size} bytes is too large for an adapter (limit {max}); is it a model?")]
    FileTooLarge {
        /// Size in bytes.
        size: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// A GGUF file of something else, mostly a model.
    #[error("not an adapter: general.type is {found}; pass models with -m, adapters with -a")]
    NotAnAdapter {
        /// What general.type says.
        found: String,
    },
    /// A LoRA adapter of llama.cpp.
    #[error(
        "this is a LoRA adapter, which ggraft does not run; it runs prefix, prompt and p_tuning adapters"
    )]
    Lora,
    /// A file of a later version of the format.
    #[error(
        "adapter format version {found} is newer than {supported}, the latest this build reads; update ggraft"
    )]
    NewerVersion {
        /// The file's version.
        found: u32,
        /// The latest version this build reads.
        supported: u32,
    },
    /// A format version that never existed.
    #[error("adapter format version {found} does not exist")]
    BadVersion {
        /// The file's version.
        found: u32,
    },
    /// Some other `adapter.type`.
    #[error("unknown adapter.type {found:?}; supported are prefix, prompt and p_tuning")]
    UnknownKind {
        /// What it says.
        found: String,
    },
    /// A fingerprint that is not 64 hexadecimal digits.
    #[error("ggraft.fingerprint {found:?} is not 64 hexadecimal digits")]
    BadFingerprint {
        /// What it says.
        found: String,
    },
    /// A provenance value that is no string.
    #[error("{key} is not a string")]
    ProvenanceValue {
        /// The metadata key.
        key: String,
    },
    /// A tensor is absent.
    #[error("tensor {tensor} is missing")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor that has no place in an adapter of this kind.
    #[error("unexpected tensor {tensor}")]
    UnknownTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor of a type that adapters do not use.
    #[error("tensor {tensor} has type {found}; adapters use f16, f32 or bf16")]
    TensorType {
        /// Its name.
        tensor: String,
        /// ggml's name of the type.
        found: &'static str,
    },

    // Fit.
    /// Another architecture.
    #[error(
        "adapter is for architecture {adapter}, the base is {base}; use the base it was trained on"
    )]
    ArchitectureMismatch {
        /// Of the adapter.
        adapter: String,
        /// Of the base.
        base: String,
    },
    /// Another number of layers.
    #[error("adapter is for {adapter} layers, the base has {base}; use the base it was trained on")]
    LayerMismatch {
        /// L of the adapter.
        adapter: usize,
        /// L of the base.
        base: usize,
    },
    /// Another embedding width.
    #[error(
        "adapter is for embedding width {adapter}, the base has {base}; use the base it was trained on"
    )]
    EmbeddingMismatch {
        /// D of the adapter.
        adapter: usize,
        /// D of the base.
        base: usize,
    },
    /// Another width of K and V rows.
    #[error(
        "adapter is for key/value width {adapter}, the base has {base}; use the base it was trained on"
    )]
    KvWidthMismatch {
        /// Hk*d of the adapter.
        adapter: usize,
        /// Hk*d of the base.
        base: usize,
    },
    /// The same width, divided into other heads.
    #[error(
        "adapter is for {adapter} key/value heads, the base has {base}; use the base it was trained on"
    )]
    KvHeadMismatch {
        /// Hk of the adapter.
        adapter: usize,
        /// Hk of the base.
        base: usize,
    },
    /// Another number of attention heads.
    #[error(
        "adapter is for {adapter} attention heads, the base has {base}; use the base it was trained on"
    )]
    HeadMismatch {
        /// H of the adapter.
        adapter: usize,
        /// H of the base.
        base: usize,
    },
    /// Same shape, other weights.
    #[error(
        "adapter was trained on another model of the same shape (fingerprint {adapter}, base {base}); use the base it was \
         trained on, or override the fingerprint check if you know that they match"
    )]
    FingerprintMismatch {
        /// Of the adapter.
        adapter: Fingerprint,
        /// Of the base.
        base: Fingerprint,
    },

    // PEFT import and export.
    /// A multi-task adapter without a task.
    #[error("multitask prompt adapter: choose a task, 0 to {} ({tasks} tasks)", tasks - 1)]
    TaskRequired {
        /// Number of tasks in the adapter.
        tasks: usize,
    },
    /// A task the adapter does not have.
    #[error("multitask prompt adapter: no task {task}, it has {tasks} (0 to {})", tasks - 1)]
    TaskOutOfRange {
        /// What was asked for.
        task: usize,
        /// Number of tasks in the adapter.
        tasks: usize,
    },
    /// A task for an adapter without tasks.
    #[error("a {peft_type} adapter has no tasks; import it without a task")]
    TaskNotApplicable {
        /// PEFT's name of the method.
        peft_type: &'static str,
    },
    /// A row factor that is zero or not finite.
    #[error("row factor {factor} must be finite and not zero")]
    BadRowFactor {
        /// What was asked for.
        factor: f32,
    },
    /// A row factor for an adapter without embedding rows.
    #[error("a {peft_type} adapter has no embedding rows; import it without a row factor")]
    RowFactorNotApplicable {
        /// PEFT's name of the method.
        peft_type: &'static str,
    },
    /// A base with interleaved rope pairs cannot have odd heads.
    #[error("base with permuted keys has the odd head size {head_dim}")]
    OddHeadSize {
        /// d.
        head_dim: usize,
    },
    /// PEFT's prefixes have one width for all layers.
    #[error(
        "PEFT's prefixes are equally wide in all layers, and the layers of this base differ in their key/value heads; \
         its prefix adapters stay in ggraft's own format"
    )]
    LayersDiffer,
    /// PEFT has no templates.
    #[error(
        "PEFT cannot place virtual tokens by a template ({template}); only adapters with all tokens in front export"
    )]
    ExportTemplate {
        /// The adapter's template.
        template: String,
    },

    // Concatenation.
    /// Two kinds.
    #[error("cannot concatenate a {first} and a {second} adapter; both must be of one kind")]
    ConcatKinds {
        /// Kind of the first.
        first: AdapterKind,
        /// Kind of the second.
        second: AdapterKind,
    },
    /// An adapter with a template.
    #[error("cannot concatenate adapters with templates")]
    ConcatTemplate,
    /// Two models of the same shape.
    #[error("cannot concatenate adapters of different bases (fingerprints {first} and {second})")]
    ConcatFingerprints {
        /// Of the first.
        first: Fingerprint,
        /// Of the second.
        second: Fingerprint,
    },
    /// Two shapes.
    #[error("cannot concatenate adapters of different bases: {source}")]
    ConcatBases {
        /// Where they differ: `adapter` is the second one, `base` the first.
        source: Box<AdapterError>,
    },
}

impl AdapterError {
    /// The adapter was made for a base of another shape: no consent to another base
    /// ([`crate::SessionOptions::accept_other_base`]) makes it fit.
    pub fn is_shape_mismatch(&self) -> bool {
        matches!(
            self,
            Self::ArchitectureMismatch { .. }
                | Self::LayerMismatch { .. }
                | Self::EmbeddingMismatch { .. }
                | Self::KvWidthMismatch { .. }
                | Self::KvHeadMismatch { .. }
                | Self::HeadMismatch { .. }
        )
    }
}
