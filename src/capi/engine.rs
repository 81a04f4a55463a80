//! Engines: many users at once.

use super::adapter::ggraft_adapter;
use super::exclusive::Exclusive;
use super::model::ggraft_model;
use super::params::{self, Params, choose};
use super::pointer::{array, give, handle, place, take_back, text};
use super::session::{
    flash_attention, generate_options, generate_result, ggraft_flash_attention,
    ggraft_generate_params, ggraft_generate_result, ggraft_kv_type, ggraft_token_callback, kv_type,
    show, write_result,
};
use super::status::{Failure, call, ggraft_status, ggraft_status::GGRAFT_ERROR_STATE};
use ggraft::infer::engine::{Canceller, Engine, EngineOptions, Event, Reply, Request, WhenFull};
use ggraft::infer::{Combine, Ensemble, Generated, StopReason};
use std::ffi::{c_char, c_void};

/// Serves many requests at once, each with its own adapter, on a thread of its own. For any number of threads at the same time.
pub struct ggraft_engine {
    engine: Engine,
}

/// The answer to a request, as it comes. For one thread at a time, except for `ggraft_reply_cancel`, which any thread may call at any time.
pub struct ggraft_reply {
    /// `None` once it is over.
    reply: Exclusive<Option<Reply>>,
    /// Outside of the lock: it is for other threads.
    cancel: Canceller,
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<ggraft_engine>();
    shared_between_threads::<ggraft_reply>();
};

/// How an engine computes, and for how many. Fill it with `ggraft_engine_params_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_engine_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// Bytes of keys and values at most. Default 0: as much as it takes.
    pub kv_bytes: u64,
    /// Bytes of them that are kept of texts that are over, for those that begin with the same under the same adapter. Default 256 MiB.
    pub prefix_bytes: u64,
    /// Positions of one text, the adapter's included. Default 0: what the model was trained on.
    pub n_ctx: u32,
    /// Threads that compute. Default 0: one for each physical core that this process may use.
    pub n_threads: u32,
    /// Texts at most that are computed at a time. Default 64.
    pub max_running: u32,
    /// Requests at most that wait. Default 1024.
    pub max_waiting: u32,
    /// Tokens of prompts at most in a step that nobody waits for. Default 512.
    pub n_batch: u32,
    /// The same beside texts that are being written. Default 0: as many as about double the time between their tokens.
    pub n_batch_beside: u32,
    /// A `ggraft_kv_type`. Default GGRAFT_KV_F16.
    pub kv_type: i32,
    /// A `ggraft_flash_attention`. Default GGRAFT_FLASH_ATTENTION_AUTO.
    pub flash_attention: i32,
    /// Not 0: when memory is short the youngest text ends with an error, instead of waiting and being computed anew. Default 0.
    pub refuse_when_full: i32,
    /// Not 0: take adapters whose fingerprint names another base of the same shape. Default 0.
    pub accept_other_base: i32,
}

// SAFETY: `repr(C)`, numbers only, three of 8 bytes, then ten of 4: no padding.
unsafe impl Params for ggraft_engine_params {
    const FIRST_SIZE: usize = size_of::<Self>();
    fn defaults() -> Self {
        let d = EngineOptions::default();
        // The defaults are far below the limits of the fields.
        Self {
            struct_size: size_of::<Self>(),
            kv_bytes: 0,
            prefix_bytes: d.prefix_bytes as u64,
            n_ctx: 0,
            n_threads: 0,
            max_running: d.max_running as u32,
            max_waiting: d.max_waiting as u32,
            n_batch: d.n_batch as u32,
            n_batch_beside: 0,
            kv_type: ggraft_kv_type::GGRAFT_KV_F16 as i32,
            flash_attention: ggraft_flash_attention::GGRAFT_FLASH_ATTENTION_AUTO as i32,
            refuse_when_full: 0,
            accept_other_base: 0,
        }
    }
}

/// Fills `params` with the defaults: `ggraft_engine_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_engine_params_init(
    params: *mut ggraft_engine_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// An engine on `model`, with a thread of its own. `params` may be NULL.
///
/// # Safety
/// `model` is a live handle, `params` NULL or an initialised struct, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_engine_new(
    model: *const ggraft_model,
    params: *const ggraft_engine_params,
    out: *mut *mut ggraft_engine,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (handle, p) = unsafe { (handle(model, "model")?, params::read(params, "params")?) };
        let unless_0 = |n: u32| (n != 0).then_some(n as usize);
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let mut options = EngineOptions::default();
        options.kv_bytes = (p.kv_bytes != 0).then_some(bytes(p.kv_bytes));
        options.prefix_bytes = bytes(p.prefix_bytes);
        options.n_ctx = unless_0(p.n_ctx);
        options.n_threads = unless_0(p.n_threads);
        options.max_running = p.max_running as usize;
        options.max_waiting = p.max_waiting as usize;
        options.n_batch = p.n_batch as usize;
        options.n_batch_beside = unless_0(p.n_batch_beside);
        options.kv_type = kv_type(p.kv_type)?;
        options.flash_attention = flash_attention(p.flash_attention)?;
        options.when_full = match p.refuse_when_full {
            0 => WhenFull::Recompute,
            _ => WhenFull::Refuse,
        };
        options.accept_other_base = p.accept_other_base != 0;
        let engine = Engine::new(&handle.model, &options)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_engine { engine }) };
        Ok(())
    })
}

/// Frees the engine; NULL is allowed. Requests that are not over end with GGRAFT_ERROR_STATE; replies stay until they are freed.
///
/// # Safety
/// `engine` is NULL or a live handle that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_engine_free(engine: *mut ggraft_engine) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(engine) };
        Ok(())
    });
}

/// Takes a request to complete `prompt` behind `adapter` (NULL: none), and returns at once. `params` may be NULL. Who waits with a higher `priority` begins first.
/// The engine holds the adapter: its handle may be freed. GGRAFT_ERROR_BUSY if as many wait as may; what is wrong with the request itself is said here, too.
///
/// # Safety
/// `engine` is a live handle, `prompt` a NUL-terminated string, `adapter` NULL or a live handle, `params` NULL or an initialised struct whose pointers are
/// valid, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_engine_submit(
    engine: *const ggraft_engine,
    prompt: *const c_char,
    adapter: *const ggraft_adapter,
    params: *const ggraft_generate_params,
    priority: i32,
    out: *mut *mut ggraft_reply,
) -> ggraft_status {
    call(|| {
        let member = match adapter.is_null() {
            true => None,
            // SAFETY: the caller's promise.
            false => Some(unsafe { handle(adapter, "adapter")? }.adapter.clone()),
        };
        // SAFETY: the caller's promise.
        unsafe {
            submit(
                engine,
                prompt,
                &Ensemble::of_one(member),
                params,
                priority,
                out,
            )
        }
    })
}

/// How distributions of the next token become one. `w` are the weights.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_combine {
    /// The weighted mean of the probabilities.
    GGRAFT_COMBINE_MEAN_PROB = 0,
    /// The weighted mean of the logits: what one member rules out is ruled out.
    GGRAFT_COMBINE_MEAN_LOGIT = 1,
    /// The most votes for the most likely token, by weight; of equally many the token of larger mean probability.
    GGRAFT_COMBINE_VOTE = 2,
    /// The product of the probabilities to the power of the weights: members who agree make each other surer.
    GGRAFT_COMBINE_PRODUCT = 3,
}

/// As `ggraft_engine_submit`, for `n_adapters` members that speak as one: they get the same tokens, in the same steps, and each token comes from what they say together. A NULL
/// among `adapters` is the model without one. `weights` has as many elements, or is NULL: all the same. `combine` is a `ggraft_combine`.
///
/// # Safety
/// As for `ggraft_engine_submit`; `adapters` has `n_adapters` elements, each NULL or a live handle, and so has `weights` unless it is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_engine_submit_ensemble(
    engine: *const ggraft_engine,
    prompt: *const c_char,
    adapters: *const *const ggraft_adapter,
    weights: *const f32,
    n_adapters: usize,
    combine: i32,
    params: *const ggraft_generate_params,
    priority: i32,
    out: *mut *mut ggraft_reply,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let adapters = unsafe { array(adapters, n_adapters, "adapters")? };
        let member = |&adapter: &*const ggraft_adapter| match adapter.is_null() {
            true => Ok(None),
            // SAFETY: the caller's promise.
            false => Ok(Some(unsafe { handle(adapter, "adapter")? }.adapter.clone())),
        };
        let members: Vec<_> = adapters
            .iter()
            .map(member)
            .collect::<Result<_, Failure>>()?;
        let combine = choose!(combine, ggraft_combine {
            GGRAFT_COMBINE_MEAN_PROB => Combine::MeanProb,
            GGRAFT_COMBINE_MEAN_LOGIT => Combine::MeanLogit,
            GGRAFT_COMBINE_VOTE => Combine::Vote,
            GGRAFT_COMBINE_PRODUCT => Combine::Product,
        })?;
        let mut ensemble = Ensemble::new(members, combine)?;
        if !weights.is_null() {
            // SAFETY: the caller's promise.
            ensemble = ensemble.weights(unsafe { array(weights, n_adapters, "weights")? })?;
        }
        // SAFETY: the caller's promise.
        unsafe { submit(engine, prompt, &ensemble, params, priority, out) }
    })
}

/// # Safety
/// As for `ggraft_engine_submit`.
unsafe fn submit(
    engine: *const ggraft_engine,
    prompt: *const c_char,
    ensemble: &Ensemble,
    params: *const ggraft_generate_params,
    priority: i32,
    out: *mut *mut ggraft_reply,
) -> Result<(), Failure> {
    let out = place(out, "out")?;
    // SAFETY: the caller's promise.
    let (engine, prompt, options) = unsafe {
        (
            handle(engine, "engine")?,
            text(prompt, "prompt")?,
            generate_options(params)?,
        )
    };
    let request = Request::text(prompt)
        .ensemble(ensemble)
        .generate(options)
        .priority(priority);
    let reply = engine.engine.submit(request)?;
    let object = ggraft_reply {
        cancel: reply.canceller(),
        reply: Exclusive::new(Some(reply)),
    };
    // SAFETY: `out` is valid by the caller's promise.
    unsafe { give(out, object) };
    Ok(())
}

/// What the caller is told of an answer that is over.
enum Over {
    Done(Generated),
    /// The callback ended it.
    Broken,
}

/// Shows what has come of the answer since the last call, without waiting. `*done` becomes not 0 when it is over, and `result` is filled then; a request that failed
/// gives its error once. After that, GGRAFT_ERROR_STATE. Otherwise as `ggraft_reply_wait`.
///
/// # Safety
/// As for `ggraft_reply_wait`; `done` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_reply_poll(
    reply: *mut ggraft_reply,
    callback: ggraft_token_callback,
    user_data: *mut c_void,
    done: *mut i32,
    result: *mut ggraft_generate_result,
    result_size: usize,
) -> ggraft_status {
    call(|| {
        let done = place(done, "done")?;
        // SAFETY: the caller's promise.
        unsafe { done.write(0) };
        let mut each = show(callback, user_data);
        let over = |reply: &mut Reply| loop {
            match reply.poll() {
                None => return Ok(None),
                Some(Event::Text(text)) if each(&text).is_break() => return Ok(Some(Over::Broken)),
                Some(Event::Text(_)) => {}
                Some(Event::Done(out)) => return Ok(Some(Over::Done(out))),
                Some(Event::Failed(e)) => return Err(e.into()),
                Some(_) => {}
            }
        };
        // SAFETY: the caller's promise.
        if let Some(over) = unsafe { with(reply, over)? } {
            // SAFETY: the caller's promise.
            unsafe {
                done.write(1);
                write_over(over, result, result_size)?;
            }
        }
        Ok(())
    })
}

/// Waits for all of the answer. `callback` gets its text as it comes, and ends it by returning anything but 0; it and `result` may be NULL. Pass `sizeof *result` as
/// `result_size`.
///
/// # Safety
/// `reply` is a live handle, `result` NULL or valid for writes of `result_size` bytes; `callback` may be called with `user_data` until this function returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_reply_wait(
    reply: *mut ggraft_reply,
    callback: ggraft_token_callback,
    user_data: *mut c_void,
    result: *mut ggraft_generate_result,
    result_size: usize,
) -> ggraft_status {
    call(|| {
        let mut each = show(callback, user_data);
        let over = |reply: &mut Reply| {
            for piece in &mut *reply {
                if each(&piece?).is_break() {
                    return Ok(Some(Over::Broken));
                }
            }
            Ok(Some(Over::Done(reply.take_end()?)))
        };
        // SAFETY: the caller's promise.
        let over = unsafe { with(reply, over)? };
        // SAFETY: the caller's promise.
        over.map_or(Ok(()), |over| unsafe {
            write_over(over, result, result_size)
        })
    })
}

/// Ends the request as soon as the step that is being computed is over: `ggraft_reply_wait` returns GGRAFT_ERROR_CANCELLED. Any thread may call it.
///
/// # Safety
/// `reply` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_reply_cancel(reply: *mut ggraft_reply) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise; the canceller is for all threads.
        unsafe { handle(reply, "reply")? }.cancel.cancel();
        Ok(())
    })
}

/// Frees the reply; NULL is allowed. A request that is not over is cancelled.
///
/// # Safety
/// `reply` is NULL or a live handle that no thread uses now or later, not even to cancel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_reply_free(reply: *mut ggraft_reply) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(reply) };
        Ok(())
    });
}

/// Runs `work` on an answer that is not over. It is, if an end comes out or an error.
///
/// # Safety
/// `reply` is null or a live handle.
unsafe fn with(
    reply: *mut ggraft_reply,
    work: impl FnOnce(&mut Reply) -> Result<Option<Over>, Failure>,
) -> Result<Option<Over>, Failure> {
    // SAFETY: the caller's promise.
    let mut reply = unsafe { handle(reply, "reply")? }.reply.lock("reply")?;
    let Some(live) = &mut *reply else {
        return Err(Failure::new(
            GGRAFT_ERROR_STATE,
            "the answer is over".to_owned(),
        ));
    };
    let outcome = work(live);
    if !matches!(outcome, Ok(None)) {
        *reply = None;
    }
    outcome
}

/// # Safety
/// `result` is null or valid for writes of `size` bytes.
unsafe fn write_over(
    over: Over,
    result: *mut ggraft_generate_result,
    size: usize,
) -> Result<(), Failure> {
    let value = match over {
        Over::Done(out) => generate_result(&out),
        Over::Broken => ggraft_generate_result {
            reason: super::session::reason(StopReason::Callback) as i32,
            ..Default::default()
        },
    };
    // SAFETY: the caller's promise.
    unsafe { write_result(result, size, value) }
}
