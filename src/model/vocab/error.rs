//! What is wrong with a tokenizer or a text.

use crate::file::gguf::GgufError;
use crate::model::chat::ChatError;

/// A tokenizer that cannot be used, one variant per cause.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabError {
    /// A key of the tokenizer has the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The algorithm is not one of those that are validated here.
    #[error(
        "tokenizer kind {kind:?} is not supported, only gpt2 (byte-level BPE) and llama (SentencePiece BPE) are"
    )]
    UnsupportedKind {
        /// `tokenizer.ggml.model`.
        kind: String,
    },
    /// The rule that cuts text into words is not known.
    #[error("pre-tokenizer {pre:?} is not supported")]
    UnsupportedPre {
        /// `tokenizer.ggml.pre`.
        pre: String,
    },
    /// A key that this kind of tokenizer needs is absent.
    #[error("{key} is missing")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// A list or text is larger than any real one.
    #[error("{key} has {got} {unit}, at most {max} are accepted")]
    TooLarge {
        /// The key.
        key: &'static str,
        /// What is counted.
        unit: &'static str,
        /// How many there are.
        got: usize,
        /// How many may be.
        max: usize,
    },
    /// A list that belongs to the tokens has another length.
    #[error("{key} has {got} entries for {expected} tokens")]
    ListLength {
        /// The key.
        key: &'static str,
        /// The number of tokens.
        expected: usize,
        /// The number of entries.
        got: usize,
    },
    /// Two tokens have the same text.
    #[error("tokens {first} and {second} are both {text:?}")]
    DuplicateToken {
        /// The first of the two.
        first: usize,
        /// The second.
        second: usize,
        /// Their text, with U+FFFD for invalid bytes.
        text: String,
    },
    /// A score is NaN.
    #[error("the score of token {id} is not a number")]
    ScoreNotANumber {
        /// The token.
        id: usize,
    },
    /// A token type outside of 0 to 6.
    #[error("token {id} has type {got}, expected 0 to 6")]
    TokenType {
        /// The token.
        id: usize,
        /// Its type.
        got: i64,
    },
    /// A token of type byte is not called `<0x00>` to `<0xFF>`.
    #[error("token {id} is of type byte, but called {text:?}, expected the form <0x0A>")]
    MalformedByteToken {
        /// The token.
        id: usize,
        /// Its text.
        text: String,
    },
    /// SentencePiece falls back to bytes for unknown characters, and one of them has no token.
    #[error("there is no token for byte 0x{byte:02X} (expected <0x{byte:02X}>)")]
    MissingByteToken {
        /// The byte.
        byte: u8,
    },
    /// A merge is not two parts with a space between.
    #[error("merge {index} is {text:?}, expected two parts with a space between")]
    MalformedMerge {
        /// Position in the list.
        index: usize,
        /// Its text.
        text: String,
    },
    /// A special token lies outside of the vocabulary.
    #[error("{key} is {id}, but there are {n_tokens} tokens")]
    SpecialToken {
        /// The key.
        key: &'static str,
        /// The id.
        id: u32,
        /// The number of tokens.
        n_tokens: usize,
    },
    /// The file asks for a token to be added that it does not name.
    #[error("the file asks for {what} to be added to each text, but has no such token")]
    MissingSpecial {
        /// `BOS` or `EOS`.
        what: &'static str,
    },
    /// libllama refused the tokenizer for a reason that is not checked here.
    #[error("libllama refused the tokenizer, see its log lines for the reason")]
    Refused,
    /// The model has no tokenizer: only token ids can be used.
    #[error("the model has no tokenizer, use token ids")]
    NoTokenizer,
    /// The text is too long to be tokenized or formatted in one piece.
    #[error("the text has {len} bytes, at most {max} can be used at once")]
    TextTooLong {
        /// Its length.
        len: usize,
        /// The longest possible.
        max: usize,
    },
    /// A word, or a stretch of white space, is too long for the recursive pattern of this pre-tokenizer.
    #[error(
        "the text has {run} characters without a break, this tokenizer can take {max}: insert spaces"
    )]
    RunTooLong {
        /// Length of the word with the space around it, in characters.
        run: usize,
        /// The longest possible.
        max: usize,
    },
    /// No conversation can be formatted.
    #[error(
        "the model has no chat template: it continues text, it does not chat (one can be chosen with --chat-template)"
    )]
    NoChatTemplate,
    /// A conversation cannot be formatted.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The system gave no thread for a pre-tokenizer that needs a large stack.
    #[error("cannot start a thread to tokenize: {kind}")]
    Thread {
        /// What the system said.
        kind: std::io::ErrorKind,
    },
}
