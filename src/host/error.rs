//! Why a host cannot take an adapter.

/// What a host refused, or cannot do, one variant per cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// libllama makes no context with the options that were given.
    #[error("{}: libllama refused a context with these options (-v shows what it says)", path.display())]
    Options {
        /// The model.
        path: std::path::PathBuf,
    },
    /// The context is a null pointer.
    #[error("there is no context: the pointer is null")]
    NoContext,
    /// A function of llama.h is not found.
    #[error(
        "'{name}' is not found: the application's libllama has another version, or is linked so that the dynamic linker does not see it"
    )]
    MissingFunction {
        /// Its name in llama.h.
        name: &'static str,
    },
    /// The context runs another model than the file that the adapters are checked against.
    #[error("the context runs another base: its {what} is {host}, the file's is {base}")]
    OtherBase {
        /// What differs.
        what: &'static str,
        /// The file's.
        base: String,
        /// The context's.
        host: String,
    },
    /// The context keeps nothing of a text: a model of embeddings.
    #[error("the context keeps no keys and values: there is nothing to put a prefix into")]
    NoMemory,
    /// There is no such sequence.
    #[error("there is no sequence {seq}: the context has {n} (n_seq_max), counted from 0")]
    SequenceRange {
        /// The sequence.
        seq: i32,
        /// Sequences.
        n: u32,
    },
    /// An adapter stands in front of a text.
    #[error("sequence {seq} has a text up to position {last}: detach it first, or swap")]
    NotEmpty {
        /// The sequence.
        seq: i32,
        /// Its last position.
        last: i32,
    },
    /// Rows of keys and values mean nothing to a recurrent layer.
    #[error(
        "the base has recurrent layers, which have no keys and values: a prefix cannot be attached, virtual tokens can"
    )]
    Recurrent,
    /// The text is not only in the decoder.
    #[error("the base has an encoder: a prefix of the decoder's keys and values is not enough")]
    Encoder,
    /// llama.cpp writes keys and values in a form that is not known here.
    #[error(
        "the context's state is not understood ({why}): its llama.cpp has another version, or keeps keys and values in another way"
    )]
    UnknownState {
        /// What is not.
        why: String,
    },
    /// No rows can be made in the type of the cache.
    #[error(
        "the cache is of type {ty}, which rows cannot be written in: make the context with type_k and type_v of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1"
    )]
    CacheType {
        /// ggml's name of it, or its number.
        ty: String,
    },
    /// The context gives no state.
    #[error("the context wrote no state of the sequence")]
    NoState,
    /// More rows than free cells.
    #[error("{rows} rows do not fit: the context has {n_ctx} cells, and others are in use")]
    NoRoom {
        /// Rows.
        rows: usize,
        /// Cells of the context.
        n_ctx: usize,
    },
    /// Rows have the form that one context asked for.
    #[error("the adapter was prepared for another context: prepare it for this one")]
    OtherHost,
    /// Virtual tokens stand among the text.
    #[error(
        "the adapter's template places virtual tokens among the text: compose each prompt with it"
    )]
    Template,
    /// A prefix has none.
    #[error("a prefix adapter has no virtual tokens to compose a prompt of: attach it")]
    NoVirtualTokens,
    /// The template's text cannot be tokenized.
    #[error("the application's tokenizer refused a text of the template")]
    Tokenize,
    /// A control vector of another base.
    #[error("the control vector has {vector} values a layer, the base's embeddings have {base}")]
    ControlWidth {
        /// D of the vector.
        vector: usize,
        /// D of the base.
        base: usize,
    },
    /// A control vector that steers none of the layers, or layers that the base does not have.
    #[error(
        "the control vector has no direction for the base's layers from {first} on, or one beyond its {n} layers"
    )]
    ControlLayers {
        /// The first layer that was to be steered.
        first: usize,
        /// Layers of the base.
        n: usize,
    },
    /// `llama_set_adapter_cvec` failed.
    #[error("llama_set_adapter_cvec returned {code}")]
    ControlRefused {
        /// What it returned.
        code: i32,
    },
    /// `llama_decode` failed.
    #[error("llama_decode returned {code} at position {position}{}", match code { 1 => ": no room in the cache", 2 => ": aborted", _ => "" })]
    Decode {
        /// What it returned.
        code: i32,
        /// The first position of the batch.
        position: usize,
    },
}
