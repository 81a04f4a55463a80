//! Choice of tokens, for callers that loop themselves.

use super::exclusive::Exclusive;
use super::model::ggraft_model;
use super::params::{self, Params};
use super::pointer::{array, give, handle, place, take_back};
use super::status::{Failure, call, ggraft_status};
use ggraft::infer::sampler::{Sampler, SamplerParams};

/// Seed that stands for a random one.
pub const GGRAFT_RANDOM_SEED: u32 = u32::MAX;

/// Chooses tokens. For one thread at a time.
pub struct ggraft_sampler {
    sampler: Exclusive<Sampler>,
}

/// Added to the logit of one token; -INFINITY bans it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_logit_bias {
    /// The token.
    pub token: i32,
    /// What is added.
    pub bias: f32,
}

/// How the next token is chosen. Fill it with `ggraft_sampler_params_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_sampler_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// Divides the logits; 0 takes the most likely token (greedy). Default 0.8.
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all. Default 40.
    pub top_k: u32,
    /// Keeps the smallest set of tokens whose probabilities reach p; 1 keeps all. Default 0.95.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all. Default 0.05.
    pub min_p: f32,
    /// Divides the logits (multiplies negative ones) of recent tokens; 1 does nothing. Default 1.
    pub repeat_penalty: f32,
    /// How many tokens the penalties look back on; 0 switches them off. Default 64.
    pub repeat_last_n: u32,
    /// Subtracted from the logit of a recent token for each time it occurred. Default 0.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a recent token. Default 0.
    pub presence_penalty: f32,
    /// Equal seeds give equal tokens for equal logits. Default GGRAFT_RANDOM_SEED.
    pub seed: u32,
    /// Entries of `logit_bias`. Default 0.
    pub n_logit_bias: u32,
    /// Biases of single tokens; copied. Default NULL.
    pub logit_bias: *const ggraft_logit_bias,
}

// SAFETY: `repr(C)`, numbers and a raw pointer; ten 4-byte fields keep the pointer aligned: no padding.
unsafe impl Params for ggraft_sampler_params {
    const FIRST_SIZE: usize = size_of::<Self>();
    fn defaults() -> Self {
        let d = SamplerParams::default();
        Self {
            struct_size: size_of::<Self>(),
            temperature: d.temperature,
            top_k: d.top_k,
            top_p: d.top_p,
            min_p: d.min_p,
            repeat_penalty: d.repeat_penalty,
            repeat_last_n: d.repeat_last_n,
            frequency_penalty: d.frequency_penalty,
            presence_penalty: d.presence_penalty,
            seed: d.seed.unwrap_or(GGRAFT_RANDOM_SEED),
            n_logit_bias: 0,
            logit_bias: std::ptr::null(),
        }
    }
}

/// The caller's struct as the Rust API has it.
///
/// # Safety
/// `params` is null or an initialised struct whose `logit_bias` points to `n_logit_bias` entries.
pub(crate) unsafe fn read(params: *const ggraft_sampler_params) -> Result<SamplerParams, Failure> {
    // SAFETY: the caller's promise.
    let (p, biases) = unsafe {
        let p = params::read(params, "sampler params")?;
        let n = p.n_logit_bias as usize;
        (p, array(p.logit_bias, n, "logit_bias")?)
    };
    Ok(SamplerParams {
        temperature: p.temperature,
        top_k: p.top_k,
        top_p: p.top_p,
        min_p: p.min_p,
        repeat_penalty: p.repeat_penalty,
        repeat_last_n: p.repeat_last_n,
        frequency_penalty: p.frequency_penalty,
        presence_penalty: p.presence_penalty,
        logit_bias: biases.iter().map(|b| (b.token, b.bias)).collect(),
        seed: (p.seed != GGRAFT_RANDOM_SEED).then_some(p.seed),
    })
}

/// Fills `params` with the defaults: `ggraft_sampler_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_sampler_params_init(
    params: *mut ggraft_sampler_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// A sampler for logits of `model`. `params` may be NULL.
///
/// # Safety
/// `model` is a live handle, `params` NULL or an initialised struct, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_sampler_new(
    model: *const ggraft_model,
    params: *const ggraft_sampler_params,
    out: *mut *mut ggraft_sampler,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (handle, params) = unsafe { (handle(model, "model")?, read(params)?) };
        let sampler = Sampler::new(&params, handle.model.shape().n_vocab)?;
        let object = ggraft_sampler {
            sampler: Exclusive::new(sampler),
        };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, object) };
        Ok(())
    })
}

/// Chooses a token for a row of `n_logits` logits, such as `ggraft_session_logits` gives. Then call `ggraft_sampler_accept`
/// with the token that is really used.
///
/// # Safety
/// `sampler` is a live handle, `logits` points to `n_logits` numbers, `token` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_sampler_sample(
    sampler: *mut ggraft_sampler,
    logits: *const f32,
    n_logits: usize,
    token: *mut i32,
) -> ggraft_status {
    call(|| {
        let token = place(token, "token")?;
        // SAFETY: the caller's promise.
        let (handle, logits) = unsafe {
            (
                handle(sampler, "sampler")?,
                array(logits, n_logits, "logits")?,
            )
        };
        let id = handle.sampler.lock("sampler")?.sample(logits)?;
        // SAFETY: `token` is valid by the caller's promise.
        unsafe { token.write(id) };
        Ok(())
    })
}

/// Tells the penalties that `token` is now part of the text: chosen tokens, and those of the prompt where they should count.
///
/// # Safety
/// `sampler` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_sampler_accept(
    sampler: *mut ggraft_sampler,
    token: i32,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(sampler, "sampler")? };
        handle.sampler.lock("sampler")?.accept(token);
        Ok(())
    })
}

/// Forgets the text and starts the random numbers anew from the seed.
///
/// # Safety
/// `sampler` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_sampler_reset(sampler: *mut ggraft_sampler) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { handle(sampler, "sampler")? };
        handle.sampler.lock("sampler")?.reset();
        Ok(())
    })
}

/// Frees the sampler; NULL is allowed.
///
/// # Safety
/// `sampler` is NULL or a live handle that no thread uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_sampler_free(sampler: *mut ggraft_sampler) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(sampler) };
        Ok(())
    });
}
