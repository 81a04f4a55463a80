//! Sessions: one text, one adapter.

use super::adapter::ggraft_adapter;
use super::exclusive::Exclusive;
use super::model::ggraft_model;
use super::params::{self, Params, choose};
use super::pointer::{array, fill, give, handle, place, take_back, text};
use super::sampler::{self, ggraft_sampler_params};
use super::status::{Failure, call, call_number, ggraft_status};
use ggraft::infer::{
    CancelToken, ExistingText, FlashAttention, GenerateOptions, Generated, KvType, Session,
    SessionOptions, StopReason,
};
use std::ffi::{CString, c_char, c_void};
use std::ops::ControlFlow;

/// One text with at most one adapter, on a model that others share. For one thread at a time, except for
/// `ggraft_session_cancel` and `ggraft_session_clear_cancel`, which any thread may call at any time.
pub struct ggraft_session {
    session: Exclusive<Session>,
    /// Outside of the lock: it is for other threads.
    cancel: CancelToken,
    /// That came with the text that was loaded last.
    pub(crate) note: Exclusive<CString>,
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<ggraft_session>();
};

/// Type of the KV cache.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_kv_type {
    /// Two bytes a value.
    GGRAFT_KV_F16 = 0,
    /// Four bytes a value.
    GGRAFT_KV_F32 = 1,
    /// 34 bytes for 32 values; the head size must be a multiple of 32 and flash attention on.
    GGRAFT_KV_Q8_0 = 2,
}

/// Whether attention runs in one fused kernel.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_flash_attention {
    /// What is faster on this CPU.
    GGRAFT_FLASH_ATTENTION_AUTO = 0,
    /// Fused.
    GGRAFT_FLASH_ATTENTION_ON = 1,
    /// Separate products and softmax.
    GGRAFT_FLASH_ATTENTION_OFF = 2,
}

/// What happens to text that was computed under another adapter.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_existing_text {
    /// Compute it again under the new adapter; the conversation goes on.
    GGRAFT_TEXT_RECOMPUTE = 0,
    /// Forget it; the session starts empty.
    GGRAFT_TEXT_DROP = 1,
}

/// Why a generation ended.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_stop_reason {
    /// The model ended the text.
    GGRAFT_STOP_END = 0,
    /// `max_tokens` were generated.
    GGRAFT_STOP_MAX_TOKENS = 1,
    /// A stop string was found.
    GGRAFT_STOP_STRING = 2,
    /// The callback said so.
    GGRAFT_STOP_CALLBACK = 3,
    /// The context is full; of an engine's answers, a session fails instead.
    GGRAFT_STOP_CONTEXT_FULL = 4,
}

/// How a session computes. Fill it with `ggraft_session_params_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_session_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// Positions, the adapter's included. Default 0: what the model was trained on.
    pub n_ctx: u32,
    /// Threads that compute. Default 0: one for each physical core that this process may use. Sessions of one model with equal
    /// counts share one pool and take turns.
    pub n_threads: u32,
    /// Tokens per prefill step. Default 512.
    pub n_batch: u32,
    /// A `ggraft_kv_type`. Default GGRAFT_KV_F16.
    pub kv_type: i32,
    /// A `ggraft_flash_attention`. Default GGRAFT_FLASH_ATTENTION_AUTO.
    pub flash_attention: i32,
    /// Not 0: attach adapters whose fingerprint names another base of the same shape. Default 0.
    pub accept_other_base: i32,
}

// SAFETY: `repr(C)`, numbers only, six times 4 bytes behind the size: no padding.
unsafe impl Params for ggraft_session_params {
    const FIRST_SIZE: usize = size_of::<Self>();
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            n_ctx: 0,
            n_threads: 0,
            // The default is far below the limit of the field.
            n_batch: SessionOptions::default().n_batch as u32,
            kv_type: ggraft_kv_type::GGRAFT_KV_F16 as i32,
            flash_attention: ggraft_flash_attention::GGRAFT_FLASH_ATTENTION_AUTO as i32,
            accept_other_base: 0,
        }
    }
}

/// How text is generated. Fill it with `ggraft_generate_params_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_generate_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// How the next token is chosen. Default NULL: the defaults of `ggraft_sampler_params_init`.
    pub sampler: *const ggraft_sampler_params,
    /// Strings that end the generation; they are not shown. Default NULL.
    pub stop: *const *const c_char,
    /// Entries of `stop`. Default 0.
    pub n_stop: usize,
    /// Tokens at most. Default 0: until the model ends the text or the context is full (an error).
    pub max_tokens: u32,
    /// Not 0: go on behind a token that ends the text. Default 0.
    pub ignore_end: i32,
}

// SAFETY: `repr(C)`, numbers and raw pointers, the two 4-byte fields at the end: no padding.
unsafe impl Params for ggraft_generate_params {
    const FIRST_SIZE: usize = size_of::<Self>();
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            sampler: std::ptr::null(),
            stop: std::ptr::null(),
            n_stop: 0,
            max_tokens: 0,
            ignore_end: 0,
        }
    }
}

/// What `ggraft_session_generate` did, or an engine.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ggraft_generate_result {
    /// Tokens that were generated, one that ends the text included.
    pub n_tokens: u64,
    /// Tokens that were computed one by one: usually one less than were generated, the first one comes from the prompt.
    pub decode_tokens: u64,
    /// Time of those in seconds, sampling included.
    pub decode_seconds: f64,
    /// A `ggraft_stop_reason`.
    pub reason: i32,
}

/// Receives generated text as soon as it is complete: UTF-8, NUL-terminated, never part of a character. `length` counts its
/// bytes without the NUL; the text lives until the callback returns. Returning anything but 0 ends the generation.
///
/// The session is in use while the callback runs: of its functions only `ggraft_session_cancel` works. The callback must not
/// free it, and no exception and no longjmp may leave it.
pub type ggraft_token_callback =
    Option<unsafe extern "C" fn(text: *const c_char, length: usize, user_data: *mut c_void) -> i32>;

pub(crate) fn kv_type(value: i32) -> Result<KvType, Failure> {
    choose!(value, ggraft_kv_type {
        GGRAFT_KV_F16 => KvType::F16,
        GGRAFT_KV_F32 => KvType::F32,
        GGRAFT_KV_Q8_0 => KvType::Q8_0,
    })
}

pub(crate) fn flash_attention(value: i32) -> Result<FlashAttention, Failure> {
    choose!(value, ggraft_flash_attention {
        GGRAFT_FLASH_ATTENTION_AUTO => FlashAttention::On,
        GGRAFT_FLASH_ATTENTION_ON => FlashAttention::On,
        GGRAFT_FLASH_ATTENTION_OFF => FlashAttention::Off,
    })
}

fn existing_text(value: i32) -> Result<ExistingText, Failure> {
    choose!(value, ggraft_existing_text {
        GGRAFT_TEXT_RECOMPUTE => ExistingText::Recompute,
        GGRAFT_TEXT_DROP => ExistingText::Drop,
    })
}

/// Runs `work` on the session behind a handle.
///
/// # Safety
/// `session` is null or a live handle.
pub(crate) unsafe fn with<T>(
    session: *mut ggraft_session,
    work: impl FnOnce(&mut Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    // SAFETY: the caller's promise; the handle itself never changes, the session in it is locked.
    let handle = unsafe { handle(session, "session")? };
    work(&mut *handle.session.lock("session")?)
}

/// Fills `params` with the defaults: `ggraft_session_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_params_init(
    params: *mut ggraft_session_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// An empty session on `model`. `params` may be NULL.
///
/// # Safety
/// `model` is a live handle, `params` NULL or an initialised struct, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_new(
    model: *const ggraft_model,
    params: *const ggraft_session_params,
    out: *mut *mut ggraft_session,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (handle, p) = unsafe { (handle(model, "model")?, params::read(params, "params")?) };
        let mut options = SessionOptions::default()
            .kv_type(kv_type(p.kv_type)?)
            .flash_attention(flash_attention(p.flash_attention)?)
            .n_batch(p.n_batch as usize)
            .accept_other_base(p.accept_other_base != 0);
        if p.n_ctx != 0 {
            options = options.n_ctx(p.n_ctx as usize);
        }
        if p.n_threads != 0 {
            options = options.n_threads(p.n_threads as usize);
        }
        let session = Session::new(&handle.model, &options)?;
        let object = ggraft_session {
            cancel: session.cancel_token(),
            session: Exclusive::new(session),
            note: Exclusive::new(CString::default()),
        };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, object) };
        Ok(())
    })
}

/// Frees the session; NULL is allowed.
///
/// # Safety
/// `session` is NULL or a live handle that no thread uses now or later, not even to cancel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_free(session: *mut ggraft_session) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(session) };
        Ok(())
    });
}

/// Puts `adapter` in front of the text; GGRAFT_ERROR_STATE if one is attached already. `existing` is a `ggraft_existing_text`.
/// The session holds the adapter: its handle may be freed.
///
/// # Safety
/// `session` and `adapter` are live handles.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_attach(
    session: *mut ggraft_session,
    adapter: *const ggraft_adapter,
    existing: i32,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let adapter = unsafe { handle(adapter, "adapter")? };
        let existing = existing_text(existing)?;
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.attach(&adapter.adapter, existing)?)) }
    })
}

/// Replaces the attached adapter, if any, by `adapter`, between two tokens. Otherwise as `ggraft_session_attach`.
///
/// # Safety
/// `session` and `adapter` are live handles.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_swap(
    session: *mut ggraft_session,
    adapter: *const ggraft_adapter,
    existing: i32,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let adapter = unsafe { handle(adapter, "adapter")? };
        let existing = existing_text(existing)?;
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.swap(&adapter.adapter, existing)?)) }
    })
}

/// Takes the adapter off; GGRAFT_ERROR_STATE if there is none. `existing` is a `ggraft_existing_text`.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_detach(
    session: *mut ggraft_session,
    existing: i32,
) -> ggraft_status {
    call(|| {
        let existing = existing_text(existing)?;
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.detach(existing)?)) }
    })
}

/// Tokenizes and computes a prompt. The first prompt of a session starts with the beginning token if the model wants it, and
/// goes through the adapter's template if it has one. Special tokens in the text are recognised.
///
/// # Safety
/// `session` is a live handle, `text` a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_prompt(
    session: *mut ggraft_session,
    text: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let text = unsafe { self::text(text, "text")? };
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.prompt(text)?)) }
    })
}

/// As `ggraft_session_prompt`, for tokens without the beginning token.
///
/// # Safety
/// `session` is a live handle, `tokens` points to `n_tokens` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_prompt_tokens(
    session: *mut ggraft_session,
    tokens: *const i32,
    n_tokens: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let tokens = unsafe { array(tokens, n_tokens, "tokens")? };
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.prompt_tokens(tokens)?)) }
    })
}

/// Computes exactly these tokens behind the text: nothing is added, no template applies. All of them or, on failure, none.
///
/// # Safety
/// `session` is a live handle, `tokens` points to `n_tokens` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_feed(
    session: *mut ggraft_session,
    tokens: *const i32,
    n_tokens: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let tokens = unsafe { array(tokens, n_tokens, "tokens")? };
        // SAFETY: the caller's promise.
        unsafe { with(session, |s| Ok(s.feed(tokens)?)) }
    })
}

/// Stores where the logits of the last token are, and how many (`n_vocab`); GGRAFT_ERROR_STATE if nothing was computed yet.
/// Behind `ggraft_session_generate` the last token is computed now: it was not needed until now.
/// They belong to the session and live until it computes, changes its text or its adapter, or is freed.
///
/// # Safety
/// `session` is a live handle, `logits` and `n_logits` are valid for writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_logits(
    session: *mut ggraft_session,
    logits: *mut *const f32,
    n_logits: *mut usize,
) -> ggraft_status {
    call(|| {
        let (logits, n_logits) = (place(logits, "logits")?, place(n_logits, "n_logits")?);
        let store = |s: &mut Session| {
            let row = s.logits()?;
            // SAFETY: both places are valid by the caller's promise.
            unsafe {
                logits.write(row.as_ptr());
                n_logits.write(row.len());
            }
            Ok(())
        };
        // SAFETY: the caller's promise.
        unsafe { with(session, store) }
    })
}

/// Stores the real tokens of the session's text, virtual ones left out; the buffer works as in `ggraft_tokenize`.
///
/// # Safety
/// `session` is a live handle, `tokens` NULL or valid for writes of `capacity` ids, `n_tokens` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_tokens(
    session: *mut ggraft_session,
    tokens: *mut i32,
    capacity: usize,
    n_tokens: *mut usize,
) -> ggraft_status {
    call(|| {
        let n_tokens = place(n_tokens, "n_tokens")?;
        // SAFETY: the caller's promise.
        let ids = unsafe { with(session, |s| Ok(s.tokens()))? };
        // SAFETY: the caller's promise.
        unsafe { fill(&ids, tokens, capacity, n_tokens) }
    })
}

/// Positions in use, the adapter's included; a negative status on failure.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_n_past(session: *mut ggraft_session) -> i64 {
    // SAFETY: the caller's promise.
    call_number(|| unsafe { with(session, |s| Ok(s.n_past() as i64)) })
}

/// Positions that the session can hold; a negative status on failure.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_n_ctx(session: *mut ggraft_session) -> i64 {
    // SAFETY: the caller's promise.
    call_number(|| unsafe { with(session, |s| Ok(s.n_ctx() as i64)) })
}

/// Bytes reserved for the KV cache, which become resident as the context fills; a negative status on failure.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_kv_bytes(session: *mut ggraft_session) -> i64 {
    // SAFETY: the caller's promise.
    call_number(|| unsafe { with(session, |s| Ok(s.kv_bytes() as i64)) })
}

/// Forgets the text; the adapter stays.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_reset(session: *mut ggraft_session) -> ggraft_status {
    call(|| {
        let reset = |s: &mut Session| {
            s.reset();
            Ok(())
        };
        // SAFETY: the caller's promise.
        unsafe { with(session, reset) }
    })
}

/// Stops what the session computes, and refuses what follows, with GGRAFT_ERROR_CANCELLED, until
/// `ggraft_session_clear_cancel`. Any thread may call it at any time, also while another one is inside a function of the session.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_cancel(session: *mut ggraft_session) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise; only the token is touched, which is made for other threads.
        unsafe { handle(session, "session")? }.cancel.cancel();
        Ok(())
    })
}

/// Allows work again after `ggraft_session_cancel`. Any thread may call it.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_clear_cancel(
    session: *mut ggraft_session,
) -> ggraft_status {
    call(|| {
        // SAFETY: as in `ggraft_session_cancel`.
        unsafe { handle(session, "session")? }.cancel.reset();
        Ok(())
    })
}

/// Fills `params` with the defaults: `ggraft_generate_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_generate_params_init(
    params: *mut ggraft_generate_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// Generates text behind a prompt. `params`, `callback` and `result` may be NULL. What was generated is part of the session's
/// text, so that a conversation can go on; `ggraft_session_tokens` gives its tokens. Bytes at its end that are only the beginning of
/// a character are in the tokens and not in the text; a next call that goes on from there shows the character. Pass
/// `sizeof *result` as `result_size`.
///
/// # Safety
/// `session` is a live handle, `params` NULL or an initialised struct whose pointers are valid, `result` NULL or valid for
/// writes of `result_size` bytes; `callback` may be called with `user_data` until this function returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_session_generate(
    session: *mut ggraft_session,
    params: *const ggraft_generate_params,
    callback: ggraft_token_callback,
    user_data: *mut c_void,
    result: *mut ggraft_generate_result,
    result_size: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let options = unsafe { generate_options(params)? };
        let each = show(callback, user_data);
        // SAFETY: the caller's promise.
        let generated = unsafe { with(session, |s| Ok(s.generate(&options, each)?))? };
        // SAFETY: the caller's promise.
        unsafe { write_result(result, result_size, generate_result(&generated)) }
    })
}

/// Hands text to the caller's function, if there is one.
pub(crate) fn show(
    callback: ggraft_token_callback,
    user_data: *mut c_void,
) -> impl FnMut(&str) -> ControlFlow<()> {
    let mut piece = Vec::new();
    move |text| {
        let Some(callback) = callback else {
            return ControlFlow::Continue(());
        };
        piece.clear();
        piece.extend_from_slice(text.as_bytes());
        piece.push(0);
        // SAFETY: the caller's function with the caller's data; the text lives until it returns.
        match unsafe { callback(piece.as_ptr().cast(), text.len(), user_data) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// What is told of a generation.
pub(crate) fn generate_result(generated: &Generated) -> ggraft_generate_result {
    ggraft_generate_result {
        n_tokens: generated.tokens.len() as u64,
        decode_tokens: generated.timings.decode_tokens as u64,
        decode_seconds: generated.timings.decode.as_secs_f64(),
        reason: reason(generated.reason) as i32,
    }
}

pub(crate) fn reason(reason: StopReason) -> ggraft_stop_reason {
    match reason {
        StopReason::EndOfGeneration => ggraft_stop_reason::GGRAFT_STOP_END,
        StopReason::MaxTokens => ggraft_stop_reason::GGRAFT_STOP_MAX_TOKENS,
        StopReason::StopString => ggraft_stop_reason::GGRAFT_STOP_STRING,
        StopReason::Callback => ggraft_stop_reason::GGRAFT_STOP_CALLBACK,
        StopReason::ContextFull => ggraft_stop_reason::GGRAFT_STOP_CONTEXT_FULL,
    }
}

/// # Safety
/// `result` is null or valid for writes of `size` bytes.
pub(crate) unsafe fn write_result(
    result: *mut ggraft_generate_result,
    size: usize,
    value: ggraft_generate_result,
) -> Result<(), Failure> {
    if result.is_null() {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { params::write(result, size, value) }
}

/// The caller's struct as the Rust API has it.
///
/// # Safety
/// `params` is null or an initialised struct whose pointers are valid.
pub(crate) unsafe fn generate_options(
    params: *const ggraft_generate_params,
) -> Result<GenerateOptions, Failure> {
    // SAFETY: the caller's promise.
    let (p, sampler, stops) = unsafe {
        let p = params::read(params, "params")?;
        (
            p,
            sampler::read(p.sampler)?,
            array(p.stop, p.n_stop, "stop")?,
        )
    };
    let mut options = GenerateOptions::default().sampler(sampler);
    options.ignore_eog = p.ignore_end != 0;
    if p.max_tokens != 0 {
        options = options.max_tokens(p.max_tokens as usize);
    }
    for &stop in stops {
        // SAFETY: the caller's promise.
        options = options.stop(unsafe { text(stop, "stop string")? });
    }
    Ok(options)
}
