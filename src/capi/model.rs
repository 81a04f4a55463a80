//! Base models, text to tokens and back.

use super::params::{self, Params, choose};
use super::pointer::{array, fill, fill_text, give, handle, path, place, take_back, text};
use super::status::{Failure, c_string, call, call_number, ggraft_status};
use ggraft::model::chat::ChatMessage;
use ggraft::model::vocab::ChatOptions;
use ggraft::model::{DecoderChoice, Kernels, Model, ModelOptions, PerLayer};
use std::ffi::{CString, c_char};

/// A frozen base model, mapped from its file. May be used by any number of threads at once.
pub struct ggraft_model {
    pub(crate) model: Model,
    architecture: CString,
    fingerprint: CString,
    chat_template: Option<CString>,
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<ggraft_model>();
};

/// How to open a model. Fill it with `ggraft_model_params_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_model_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// Not 0: copy matrices into layouts for ggml's kernels, for a second copy of the weights in memory and seconds
    /// at start; slower than ggraft's own with AVX-512 VNNI. Default 0: nothing is copied.
    pub repack: i32,
    /// Not 0: the text of control tokens ("<|im_end|>") inside messages becomes those tokens. Default 0: whoever may write a message
    /// could otherwise end it, and speak for somebody else.
    pub parse_special: i32,
    /// Chat template instead of the file's: Jinja source, or chatml, gemma, llama2, llama3, phi3 or zephyr. NULL: the file's.
    pub chat_template: *const c_char,
    /// A `ggraft_kernels`. Default GGRAFT_KERNELS_AUTO.
    pub kernels: i32,
    /// A `ggraft_decoder`. Default GGRAFT_DECODER_OWN.
    pub decoder: i32,
}

/// Whose decoder computes a model.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_decoder {
    /// ggraft's own; a model of an architecture that it does not know is an error.
    GGRAFT_DECODER_OWN = 0,
    /// ggraft's own, and llama.cpp's for architectures that only that one knows.
    GGRAFT_DECODER_AUTO = 1,
    /// llama.cpp's, whatever the architecture: memory for the whole context is taken at once, and texts share no beginnings.
    GGRAFT_DECODER_LLAMA = 2,
}

/// Whose kernels multiply with the weights and compute attention.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_kernels {
    /// ggraft's own where they are faster than ggml's on this CPU, by type and number of tokens.
    GGRAFT_KERNELS_AUTO = 0,
    /// ggraft's own where the CPU has them.
    GGRAFT_KERNELS_OWN = 1,
    /// ggml's only: the logits are llama.cpp's, bit for bit.
    GGRAFT_KERNELS_GGML = 2,
}

// SAFETY: `repr(C)`, numbers and a pointer, 4 + 4 bytes in front of the pointer and behind it: no padding.
unsafe impl Params for ggraft_model_params {
    const FIRST_SIZE: usize = std::mem::offset_of!(Self, chat_template);
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            repack: 0,
            parse_special: 0,
            chat_template: std::ptr::null(),
            kernels: ggraft_kernels::GGRAFT_KERNELS_AUTO as i32,
            decoder: ggraft_decoder::GGRAFT_DECODER_OWN as i32,
        }
    }
}

/// Facts about a model. The strings belong to the model.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_model_info {
    /// `general.architecture` of the file, for example "llama".
    pub architecture: *const c_char,
    /// Identifies the model whatever its quantization: 64 hexadecimal digits.
    pub fingerprint: *const c_char,
    /// Source of the chat template (Jinja), NULL if there is none.
    pub chat_template: *const c_char,
    /// Layers.
    pub n_layer: u32,
    /// Embedding width.
    pub n_embd: u32,
    /// Attention heads; 0 if layers differ.
    pub n_head: u32,
    /// Key and value heads; 0 if layers differ.
    pub n_head_kv: u32,
    /// Width of a head; 0 if layers differ.
    pub head_dim: u32,
    /// Rows of the embedding table: the number of logits.
    pub n_vocab: u32,
    /// Tokens of the tokenizer; 0 if the file has none, and then only functions on token ids work.
    pub n_tokens: u32,
    /// Context length of the training, in tokens.
    pub n_ctx_train: u32,
    /// The token that begins a text, -1 if there is none.
    pub bos: i32,
    /// The token that ends a text, -1 if there is none.
    pub eos: i32,
    /// 1 if the file asks for the beginning token in front of each text.
    pub add_bos: i32,
    /// 1 if the file asks for the ending token behind each text.
    pub add_eos: i32,
    /// Bytes of weights that were copied; 0 without `repack`.
    pub repacked_bytes: u64,
}

/// One message of a conversation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_chat_message {
    /// "system", "user" or "assistant".
    pub role: *const c_char,
    /// What was said.
    pub content: *const c_char,
}

/// Fills `params` with the defaults: `ggraft_model_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_model_params_init(
    params: *mut ggraft_model_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// Maps the GGUF model at `path` (any part of a split one) and checks it. `params` may be NULL. On success `*out` is a model
/// to be freed with `ggraft_model_free`. The file must not be changed while the model is open.
///
/// # Safety
/// `path` is a NUL-terminated string, `params` NULL or an initialised struct whose strings are NUL-terminated, `out` valid for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_model_open(
    path: *const c_char,
    params: *const ggraft_model_params,
    out: *mut *mut ggraft_model,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (path, params) =
            unsafe { (self::path(path, "path")?, params::read(params, "params")?) };
        let mut chat = ChatOptions::default().parse_special(params.parse_special != 0);
        if !params.chat_template.is_null() {
            // SAFETY: the caller's promise.
            chat.template =
                Some(unsafe { self::text(params.chat_template, "chat_template")? }.to_owned());
        }
        let kernels = choose!(params.kernels, ggraft_kernels {
            GGRAFT_KERNELS_AUTO => Kernels::Auto,
            GGRAFT_KERNELS_OWN => Kernels::Own,
            GGRAFT_KERNELS_GGML => Kernels::Ggml,
        })?;
        let decoder = choose!(params.decoder, ggraft_decoder {
            GGRAFT_DECODER_OWN => DecoderChoice::Own,
            GGRAFT_DECODER_AUTO => DecoderChoice::Auto,
            GGRAFT_DECODER_LLAMA => DecoderChoice::Llama,
        })?;
        let options = ModelOptions::default()
            .repack(params.repack != 0)
            .kernels(kernels)
            .decoder(decoder)
            .chat(chat);
        let model = Model::open(path, &options)?;
        let object = ggraft_model {
            architecture: c_string(&model.shape().architecture),
            fingerprint: c_string(&model.fingerprint().to_string()),
            chat_template: model.vocab().chat_template().map(c_string),
            model,
        };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, object) };
        Ok(())
    })
}

/// Frees the handle; NULL is allowed. Sessions on the model go on and keep it in memory.
///
/// # Safety
/// `model` is NULL or a handle from `ggraft_model_open` that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_model_free(model: *mut ggraft_model) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(model) };
        Ok(())
    });
}

/// Stores facts about `model`: `ggraft_model_get_info(model, &info, sizeof info)`.
///
/// # Safety
/// `model` is a live handle, `info` valid for writes of `size` bytes. The strings live as long as the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_model_get_info(
    model: *const ggraft_model,
    info: *mut ggraft_model_info,
    size: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(model, "model")? };
        let (shape, vocab) = (handle.model.shape(), handle.model.vocab());
        let value = ggraft_model_info {
            architecture: handle.architecture.as_ptr(),
            fingerprint: handle.fingerprint.as_ptr(),
            chat_template: handle
                .chat_template
                .as_ref()
                .map_or(std::ptr::null(), |t| t.as_ptr()),
            n_layer: count(shape.n_layer),
            n_embd: count(shape.n_embd),
            n_head: per_layer(&shape.n_head),
            n_head_kv: per_layer(&shape.n_head_kv),
            head_dim: per_layer(&shape.head_dim),
            n_vocab: count(shape.n_vocab),
            n_tokens: count(vocab.n_tokens()),
            n_ctx_train: count(handle.model.n_ctx_train()),
            bos: vocab.bos().unwrap_or(-1),
            eos: vocab.eos().unwrap_or(-1),
            add_bos: vocab.add_bos().into(),
            add_eos: vocab.add_eos().into(),
            repacked_bytes: handle.model.repacked_bytes() as u64,
        };
        // SAFETY: the caller's promise.
        unsafe { params::write(info, size, value) }
    })
}

/// A size of all layers, 0 if they differ.
fn per_layer(sizes: &PerLayer) -> u32 {
    sizes.uniform().map_or(0, count)
}

/// Sizes of a model come from 32-bit fields of its file.
fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Stores the token ids of `text` in `tokens` and their number in `*n_tokens`. If there are more than `capacity`, nothing but
/// their number is stored and GGRAFT_ERROR_BUFFER returned; so `tokens = NULL, capacity = 0` asks for the size.
///
/// `add_special`: not 0 adds the beginning and ending tokens that the file asks for. `parse_special`: not 0 turns the text of
/// control tokens ("<|im_end|>") into those tokens; do not do this with text from strangers.
///
/// # Safety
/// `model` is a live handle, `text` a NUL-terminated string, `tokens` NULL or valid for writes of `capacity` ids, `n_tokens`
/// valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_tokenize(
    model: *const ggraft_model,
    text: *const c_char,
    add_special: i32,
    parse_special: i32,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
) -> ggraft_status {
    call(|| {
        let n_tokens = place(n_tokens, "n_tokens")?;
        // SAFETY: the caller's promise.
        let (handle, text) = unsafe { (handle(model, "model")?, self::text(text, "text")?) };
        let vocab = handle.model.vocab();
        let ids = vocab.tokenize(text, add_special != 0, parse_special != 0)?;
        // SAFETY: the caller's promise.
        unsafe { fill(&ids, tokens, capacity, n_tokens) }
    })
}

/// Stores the text of `tokens` in `text`, with a NUL behind it, and its length in bytes without the NUL in `*length`. If
/// `capacity` is less than `*length + 1`, nothing but the length is stored and GGRAFT_ERROR_BUFFER returned. Control tokens
/// have no text; U+FFFD stands for bytes that are not UTF-8.
///
/// # Safety
/// `model` is a live handle, `tokens` points to `n_tokens` ids, `text` is NULL or valid for writes of `capacity` bytes, `length`
/// valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_detokenize(
    model: *const ggraft_model,
    tokens: *const i32,
    n_tokens: usize,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> ggraft_status {
    call(|| {
        let length = place(length, "length")?;
        // SAFETY: the caller's promise.
        let (handle, ids) =
            unsafe { (handle(model, "model")?, array(tokens, n_tokens, "tokens")?) };
        let result = handle.model.vocab().detokenize(ids);
        // SAFETY: the caller's promise.
        unsafe { fill_text(&result, text, capacity, length) }
    })
}

/// 1 if generation ends with this token, 0 if not, a negative status on failure.
///
/// # Safety
/// `model` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_token_is_end(model: *const ggraft_model, token: i32) -> i64 {
    call_number(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(model, "model")? };
        Ok(handle.model.vocab().is_eog(token).into())
    })
}

/// The messages of a conversation.
///
/// # Safety
/// `messages` points to `n_messages` structs of NUL-terminated strings.
unsafe fn conversation(
    messages: *const ggraft_chat_message,
    n_messages: usize,
) -> Result<Vec<ChatMessage>, Failure> {
    // SAFETY: the caller's promise.
    let messages = unsafe { array(messages, n_messages, "messages")? };
    let mut chat = Vec::with_capacity(messages.len());
    for message in messages {
        // SAFETY: the caller's promise.
        let (role, content) = unsafe {
            (
                self::text(message.role, "role")?,
                self::text(message.content, "content")?,
            )
        };
        chat.push(ChatMessage::new(role, content));
    }
    Ok(chat)
}

/// Writes a conversation as the model's chat template does; `add_assistant`: not 0 ends the text where the answer begins. The
/// buffer works as in `ggraft_detokenize`. To compute the conversation use `ggraft_tokenize_chat`: in the text alone, control
/// tokens of the template and those that somebody wrote into a message look the same. A conversation that the template refuses,
/// and a model without one, are errors.
///
/// # Safety
/// `model` is a live handle, `messages` points to `n_messages` structs of NUL-terminated strings, `text` is NULL or valid for
/// writes of `capacity` bytes, `length` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_apply_chat(
    model: *const ggraft_model,
    messages: *const ggraft_chat_message,
    n_messages: usize,
    add_assistant: i32,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> ggraft_status {
    call(|| {
        let length = place(length, "length")?;
        // SAFETY: the caller's promise.
        let (handle, chat) =
            unsafe { (handle(model, "model")?, conversation(messages, n_messages)?) };
        let result = handle.model.vocab().apply_chat(&chat, add_assistant != 0)?;
        // SAFETY: the caller's promise.
        unsafe { fill_text(&result, text, capacity, length) }
    })
}

/// The tokens of a conversation as the model's chat template writes it, for `ggraft_session_prompt_tokens`: without the
/// beginning token that a session adds. The template's control tokens are tokens, their text inside messages stays text.
/// `add_assistant` as in `ggraft_apply_chat`, the buffer works as in `ggraft_tokenize`.
///
/// # Safety
/// `model` is a live handle, `messages` points to `n_messages` structs of NUL-terminated strings, `tokens` is NULL or valid for
/// writes of `capacity` ids, `n_tokens` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_tokenize_chat(
    model: *const ggraft_model,
    messages: *const ggraft_chat_message,
    n_messages: usize,
    add_assistant: i32,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
) -> ggraft_status {
    call(|| {
        let n_tokens = place(n_tokens, "n_tokens")?;
        // SAFETY: the caller's promise.
        let (handle, chat) =
            unsafe { (handle(model, "model")?, conversation(messages, n_messages)?) };
        let ids = handle
            .model
            .vocab()
            .tokenize_chat(&chat, add_assistant != 0)?;
        // SAFETY: the caller's promise.
        unsafe { fill(&ids, tokens, capacity, n_tokens) }
    })
}
