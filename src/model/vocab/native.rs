//! libllama's vocabulary, and the metadata that it is made from.

use super::check::{KEY_MERGES, KEY_MODEL, KEY_PRE, KEY_SCORES, KEY_TOKENS, KEY_TYPES, Tokenizer};
use super::{MAX_INPUT_BYTES, VocabError};
use crate::ggml;
use ggml_sys as sys;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;

/// Loading allocates and frees many small strings; glibc keeps the pages. For a vocabulary of 128 thousand tokens and
/// 280 thousand merges, 21 of 89 MB of anonymous memory are given back.
fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Owns a `llama_model` that holds nothing but a vocabulary.
#[derive(Debug)]
pub(super) struct Native {
    model: NonNull<sys::llama_model>,
    vocab: NonNull<sys::llama_vocab>,
}

// SAFETY: the model is plain heap data with one owner; nothing in it is tied to a thread.
unsafe impl Send for Native {}
// SAFETY: libllama only reads the vocabulary after it is loaded (its functions take `const llama_vocab *`, and
// tokenization keeps its state in a session object per call); its lazily built static tables are C++11 statics, which
// are initialised once under a lock.
unsafe impl Sync for Native {}

impl Native {
    /// libllama's tables, from a tokenizer that passed the gate.
    pub(super) fn build(tokenizer: Tokenizer<'_>) -> Result<Self, VocabError> {
        let native = Self::load(&tokenizer)?;
        drop(tokenizer);
        return_freed_memory();
        // libllama asserts this whenever a text is tokenized.
        match (
            native.add_bos() && native.bos().is_none(),
            native.add_eos() && native.eos().is_none(),
        ) {
            (true, _) => Err(VocabError::MissingSpecial { what: "BOS" }),
            (_, true) => Err(VocabError::MissingSpecial { what: "EOS" }),
            _ => Ok(native),
        }
    }

    /// Hands the accepted values to libllama.
    fn load(tokenizer: &Tokenizer<'_>) -> Result<Self, VocabError> {
        ggml::log::init();
        let metadata = Metadata::new();
        // Any architecture that libllama knows: its name only decides how tensors would be read.
        metadata.set_str("general.architecture", "llama");
        if tokenizer.phi3 {
            metadata.set_str("general.name", "phi-3");
        }
        metadata.set_str(KEY_MODEL, tokenizer.kind);
        if let Some(pre) = tokenizer.pre {
            metadata.set_str(KEY_PRE, pre.name);
        }
        metadata.set_strs(KEY_TOKENS, tokenizer.tokens.iter().map(|t| t.as_ref()));
        if let Some(scores) = &tokenizer.scores {
            metadata.set_array(KEY_SCORES, sys::GGUF_TYPE_FLOAT32, scores);
        }
        if let Some(types) = &tokenizer.types {
            metadata.set_array(KEY_TYPES, sys::GGUF_TYPE_INT32, types);
        }
        if tokenizer.pre.is_some() {
            metadata.set_strs(KEY_MERGES, tokenizer.merges.iter().copied());
        }
        for &(key, id) in &tokenizer.special {
            metadata.set_u32(key, id);
        }
        for &(key, on) in &tokenizer.flags {
            metadata.set_bool(key, on);
        }
        // SAFETY: returns a plain struct.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.vocab_only = true;
        // SAFETY: `metadata` lives until the end of this function and libllama copies what it keeps. Without weights
        // the tensor callback is never called, so it may be absent. C++ exceptions are caught inside.
        let model = unsafe {
            sys::llama_model_init_from_user(metadata.0.as_ptr(), None, std::ptr::null_mut(), params)
        };
        let model = NonNull::new(model).ok_or(VocabError::Refused)?;
        // SAFETY: `model` was just made; the vocabulary is a part of it and lives as long.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        let vocab =
            NonNull::new(vocab.cast_mut()).expect("the vocabulary is a member of the model");
        Ok(Self { model, vocab })
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        self.vocab.as_ptr()
    }

    /// A special token, by libllama's function for it.
    fn special(&self, get: unsafe extern "C" fn(*const sys::llama_vocab) -> i32) -> Option<i32> {
        // SAFETY: the vocabulary lives as long as `self`.
        let id = unsafe { get(self.vocab()) };
        (id >= 0).then_some(id)
    }

    pub(super) fn bos(&self) -> Option<i32> {
        self.special(sys::llama_vocab_bos)
    }

    pub(super) fn eos(&self) -> Option<i32> {
        self.special(sys::llama_vocab_eos)
    }

    pub(super) fn eot(&self) -> Option<i32> {
        self.special(sys::llama_vocab_eot)
    }

    /// Whether the token's text is found in a text only where special tokens are asked for. `id` is within the vocabulary.
    pub(super) fn is_control(&self, id: i32) -> bool {
        // SAFETY: the id is within the vocabulary, which lives as long as `self`.
        let attributes = unsafe { sys::llama_vocab_get_attr(self.vocab(), id) };
        attributes & (sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_UNKNOWN) != 0
    }

    pub(super) fn add_bos(&self) -> bool {
        // SAFETY: the vocabulary lives as long as `self`.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab()) }
    }

    pub(super) fn add_eos(&self) -> bool {
        // SAFETY: the vocabulary lives as long as `self`.
        unsafe { sys::llama_vocab_get_add_eos(self.vocab()) }
    }

    pub(super) fn is_eog(&self, id: i32) -> bool {
        // SAFETY: the vocabulary lives as long as `self`; the id is looked up in a set, any value will do.
        unsafe { sys::llama_vocab_is_eog(self.vocab(), id) }
    }

    /// `text` is at most [`MAX_INPUT_BYTES`] long.
    pub(super) fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<i32>, VocabError> {
        // Enough unless SentencePiece spells spaces in bytes: hardly any text is tokenized twice.
        let mut ids: Vec<i32> = Vec::with_capacity(text.len() + 8);
        loop {
            // SAFETY: the text is passed with its length, and at most `capacity` ids are written. The vocabulary has
            // passed `validate_tokenizer` and the text is UTF-8: no assertion can fail and nothing throws.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    text.len() as i32,
                    ids.as_mut_ptr(),
                    i32::try_from(ids.capacity()).unwrap_or(i32::MAX),
                    add_special,
                    parse_special,
                )
            };
            match n {
                // The number of ids does not fit 32 bits.
                i32::MIN => {
                    return Err(VocabError::TextTooLong {
                        len: text.len(),
                        max: MAX_INPUT_BYTES,
                    });
                }
                n if n < 0 => ids.reserve(n.unsigned_abs() as usize),
                n => {
                    // SAFETY: libllama has written `n` ids, which fit.
                    unsafe { ids.set_len(n as usize) };
                    return Ok(ids);
                }
            }
        }
    }

    /// `id` is within the vocabulary.
    pub(super) fn token_bytes(&self, id: i32, special: bool) -> Vec<u8> {
        let mut piece: Vec<u8> = Vec::with_capacity(32);
        loop {
            // SAFETY: the id is within the vocabulary; at most `capacity` bytes are written.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab(),
                    id,
                    piece.as_mut_ptr().cast(),
                    i32::try_from(piece.capacity()).unwrap_or(i32::MAX),
                    0,
                    special,
                )
            };
            if n < 0 {
                piece.reserve(n.unsigned_abs() as usize);
                continue;
            }
            // SAFETY: libllama has written `n` bytes, which fit.
            unsafe { piece.set_len(n as usize) };
            return piece;
        }
    }

    /// `id` is within the vocabulary.
    pub(super) fn token_text(&self, id: i32) -> String {
        // SAFETY: the id is within the vocabulary, which lives as long as `self` and keeps a NUL-terminated text.
        let text = unsafe { CStr::from_ptr(sys::llama_vocab_get_text(self.vocab(), id)) };
        text.to_string_lossy().into_owned()
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: made by `llama_model_init_from_user`, freed once; the vocabulary goes with it.
        unsafe { sys::llama_model_free(self.model.as_ptr()) };
    }
}

/// Owns a `gguf_context` that is being filled.
struct Metadata(NonNull<sys::gguf_context>);

impl Metadata {
    fn new() -> Self {
        // SAFETY: allocates an empty object.
        let ctx = unsafe { sys::gguf_init_empty() };
        Self(NonNull::new(ctx).expect("C++ new does not return null"))
    }

    fn set_str(&self, key: &str, value: &str) {
        let (key, value) = (c_key(key), c_key(value));
        // SAFETY: both strings are NUL-terminated and are copied.
        unsafe { sys::gguf_set_val_str(self.0.as_ptr(), key.as_ptr(), value.as_ptr()) };
    }

    fn set_u32(&self, key: &str, value: u32) {
        let key = c_key(key);
        // SAFETY: the key is NUL-terminated and is copied.
        unsafe { sys::gguf_set_val_u32(self.0.as_ptr(), key.as_ptr(), value) };
    }

    fn set_bool(&self, key: &str, value: bool) {
        let key = c_key(key);
        // SAFETY: the key is NUL-terminated and is copied.
        unsafe { sys::gguf_set_val_bool(self.0.as_ptr(), key.as_ptr(), value) };
    }

    /// `T` is the Rust type of `ty`.
    fn set_array<T: bytemuck::Pod>(&self, key: &str, ty: sys::gguf_type, values: &[T]) {
        let key = c_key(key);
        // SAFETY: `values` holds that many elements of that type, which are copied.
        unsafe {
            sys::gguf_set_arr_data(
                self.0.as_ptr(),
                key.as_ptr(),
                ty,
                values.as_ptr().cast::<c_void>(),
                values.len(),
            );
        }
    }

    /// The values contain no NUL.
    fn set_strs<'a>(&self, key: &str, values: impl Iterator<Item = &'a [u8]>) {
        let key = c_key(key);
        // One allocation for all: there may be half a million.
        let mut text = Vec::new();
        let mut starts = Vec::new();
        for value in values {
            starts.push(text.len());
            text.extend_from_slice(value);
            text.push(0);
        }
        let mut pointers: Vec<*const c_char> = starts
            .iter()
            .map(|&at| text[at..].as_ptr().cast())
            .collect();
        // SAFETY: that many pointers to NUL-terminated strings in `text`, which are copied.
        unsafe {
            sys::gguf_set_arr_str(
                self.0.as_ptr(),
                key.as_ptr(),
                pointers.as_mut_ptr(),
                pointers.len(),
            )
        };
    }
}

impl Drop for Metadata {
    fn drop(&mut self) {
        // SAFETY: made by `gguf_init_empty`, freed once.
        unsafe { sys::gguf_free(self.0.as_ptr()) };
    }
}

/// A key or one of this module's own constants: they contain no NUL.
fn c_key(text: &str) -> CString {
    CString::new(text).expect("constants without NUL")
}
