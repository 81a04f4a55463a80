//! Training: an application's idle time becomes an adapter.

mod params;
mod report;
#[cfg(test)]
mod tests;

pub use params::*;
pub use report::*;

use crate::adapter::ggraft_adapter;
use crate::exclusive::Exclusive;
use crate::model::ggraft_model;
use crate::pointer::{give, handle, path, place, take_back, text};
use crate::status::{Failure, call, ggraft_status};
use ggraft::adapter::Precision;
use ggraft::model::Model;
use ggraft::train::data::Examples;
use ggraft::train::{CancelToken, Trainer};
use params::options;
use report::state;
use std::ffi::c_char;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Trains one adapter on a model that others share. For one thread at a time, except for `ggraft_trainer_poll`,
/// `ggraft_trainer_cancel` and `ggraft_trainer_clear_cancel`, which any thread may call at any time.
pub struct ggraft_trainer {
    trainer: Exclusive<Trainer>,
    /// Outside of the lock, as `last`: they are for other threads.
    cancel: CancelToken,
    /// What `ggraft_trainer_poll` returns; locked for as long as a copy takes.
    last: Mutex<ggraft_train_report>,
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<ggraft_trainer>();
};

impl ggraft_trainer {
    fn new(trainer: Trainer) -> Self {
        Self {
            cancel: trainer.cancel_token(),
            last: Mutex::new(ggraft_train_report::start(&trainer)),
            trainer: Exclusive::new(trainer),
        }
    }

    /// The last report: numbers that are replaced in one piece, so that a panic cannot leave half of them.
    fn last(&self) -> MutexGuard<'_, ggraft_train_report> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where rows come from: the function that reads a file or a text.
type Read = unsafe fn(*const c_char, &str, &Model) -> Result<Examples, Failure>;

/// # Safety
/// `ptr` is null or points to a NUL-terminated string.
unsafe fn read_file(ptr: *const c_char, name: &str, model: &Model) -> Result<Examples, Failure> {
    // SAFETY: the caller's promise.
    Ok(Examples::read_jsonl(unsafe { path(ptr, name)? }, model)?)
}

/// # Safety
/// As [`read_file`].
unsafe fn read_text(ptr: *const c_char, name: &str, model: &Model) -> Result<Examples, Failure> {
    // SAFETY: the caller's promise.
    let text = unsafe { text(ptr, name)? };
    Ok(Examples::from_reader(text.as_bytes(), name, model)?)
}

/// Examples of both sets; a null `valid` stands for an empty one.
///
/// # Safety
/// Both are null or what `read` promises.
unsafe fn examples(
    model: &Model,
    read: Read,
    train: *const c_char,
    valid: *const c_char,
) -> Result<[Examples; 2], Failure> {
    // SAFETY: the caller's promise.
    let train = unsafe { read(train, "train", model)? };
    let valid = match valid.is_null() {
        true => Examples::default(),
        // SAFETY: the caller's promise.
        false => unsafe { read(valid, "valid", model)? },
    };
    Ok([train, valid])
}

/// # Safety
/// As `ggraft_trainer_new`.
unsafe fn start(
    model: *const ggraft_model,
    params: *const ggraft_train_params,
    read: Read,
    [train, valid]: [*const c_char; 2],
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (model, options, [train, valid]) = unsafe {
            let model = &handle(model, "model")?.model;
            // What can be refused at once comes before the rows are tokenized.
            (
                model,
                options(params)?,
                examples(model, read, train, valid)?,
            )
        };
        let trainer = Trainer::new(model, options, train, valid)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_trainer::new(trainer)) };
        Ok(())
    })
}

/// # Safety
/// As `ggraft_trainer_resume`.
unsafe fn resume(
    model: *const ggraft_model,
    checkpoint: *const c_char,
    read: Read,
    [train, valid]: [*const c_char; 2],
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (model, checkpoint, [train, valid]) = unsafe {
            let model = &handle(model, "model")?.model;
            (
                model,
                path(checkpoint, "checkpoint")?,
                examples(model, read, train, valid)?,
            )
        };
        let trainer = Trainer::resume(model, checkpoint, train, valid)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_trainer::new(trainer)) };
        Ok(())
    })
}

/// Runs `work` on the trainer behind a handle.
///
/// # Safety
/// `trainer` is null or a live handle.
unsafe fn with<T>(
    trainer: *mut ggraft_trainer,
    work: impl FnOnce(&ggraft_trainer, &mut Trainer) -> Result<T, Failure>,
) -> Result<T, Failure> {
    // SAFETY: the caller's promise; the handle itself never changes, the trainer in it is locked.
    let handle = unsafe { handle(trainer, "trainer")? };
    work(handle, &mut *handle.trainer.lock("trainer")?)
}

/// Prepares a run on `model`, which stays as it is: no step is taken yet. `params` may be NULL. `train` is the path of a JSONL
/// file, whose rows are learned: each line an object with `prompt` and `completion`, with `messages` of `role` and `content`, or
/// with `text`, and perhaps a `weight`. `valid` is such a file, too, whose rows decide which step's adapter is kept; NULL: that
/// of the last step. Both are read before the function returns. To compute the initial rows can take as long as a step.
///
/// # Safety
/// `model` is a live handle, `params` NULL or an initialised struct whose pointers are valid, `train` a NUL-terminated string,
/// `valid` NULL or one, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_new(
    model: *const ggraft_model,
    params: *const ggraft_train_params,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { start(model, params, read_file, [train, valid], out) }
}

/// As `ggraft_trainer_new`, with the rows themselves in `train` and `valid` instead of paths: private data need not touch a disk.
///
/// # Safety
/// As `ggraft_trainer_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_new_from_jsonl_text(
    model: *const ggraft_model,
    params: *const ggraft_train_params,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { start(model, params, read_text, [train, valid], out) }
}

/// Goes on with the run that `ggraft_trainer_save_checkpoint` wrote to `checkpoint`, with the same model and the same data
/// (GGRAFT_ERROR_CHECKPOINT otherwise): the adapter will be that of a run that was never interrupted, bit for bit.
///
/// # Safety
/// `model` is a live handle, `checkpoint` and `train` are NUL-terminated strings, `valid` is NULL or one, `out` is valid for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_resume(
    model: *const ggraft_model,
    checkpoint: *const c_char,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { resume(model, checkpoint, read_file, [train, valid], out) }
}

/// As `ggraft_trainer_resume`, with the rows themselves in `train` and `valid`. `checkpoint` is a path all the same: a checkpoint
/// holds no rows, but the `context` of GGRAFT_OBJECTIVE_DISTILL.
///
/// # Safety
/// As `ggraft_trainer_resume`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_resume_from_jsonl_text(
    model: *const ggraft_model,
    checkpoint: *const c_char,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { resume(model, checkpoint, read_text, [train, valid], out) }
}

/// Takes one step, and stores what it did: `ggraft_trainer_step(trainer, &report, sizeof report)`. `report.state` tells whether
/// there are more; when the run is over, nothing is computed and the last report stored again. Before its first step a run with
/// GGRAFT_OBJECTIVE_DISTILL computes what `context` makes the model predict in all rows.
///
/// GGRAFT_ERROR_CANCELLED: the step was not taken, or only its evaluation is missing; the next call takes up what was left.
/// GGRAFT_ERROR_NON_FINITE: the run is over (GGRAFT_TRAIN_FAILED), a lower learning rate may help.
///
/// # Safety
/// `trainer` is a live handle, `report` valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_step(
    trainer: *mut ggraft_trainer,
    report: *mut ggraft_train_report,
    size: usize,
) -> ggraft_status {
    call(|| {
        let report = place(report, "report")?;
        let step = |handle: &ggraft_trainer, trainer: &mut Trainer| {
            let taken = trainer.step();
            let mut last = handle.last();
            match (&taken, trainer.finished()) {
                (Ok(Some(report)), finished) => *last = ggraft_train_report::new(report, finished),
                (_, finished) => last.state = state(finished) as i32,
            }
            taken?;
            Ok(*last)
        };
        // SAFETY: the caller's promise.
        unsafe { crate::params::write(report, size, with(trainer, step)?) }
    })
}

/// Makes the run one of `steps` steps in all, also one that is over: what was learned and the optimizer's memory stay, and the
/// learning rate follows the schedule of a run of that length.
///
/// # Safety
/// `trainer` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_set_steps(
    trainer: *mut ggraft_trainer,
    steps: u64,
) -> ggraft_status {
    call(|| {
        let set = |handle: &ggraft_trainer, trainer: &mut Trainer| {
            trainer.set_steps(steps).map_err(ggraft::Error::from)?;
            let mut last = handle.last();
            last.steps = steps;
            last.state = state(trainer.finished()) as i32;
            Ok(())
        };
        // SAFETY: the caller's promise.
        unsafe { with(trainer, set) }
    })
}

/// Stores the validation loss of the model without an adapter, which one must stay below to be of use; NaN without validation
/// rows. Computed once in a run.
///
/// # Safety
/// `trainer` is a live handle, `loss` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_base_valid_loss(
    trainer: *mut ggraft_trainer,
    loss: *mut f64,
) -> ggraft_status {
    call(|| {
        let loss = place(loss, "loss")?;
        // SAFETY: the caller's promise.
        let base = unsafe { with(trainer, |_, t| Ok(t.base_valid_loss()?))? };
        // SAFETY: the caller's promise.
        unsafe { loss.write(base.unwrap_or(f64::NAN)) };
        Ok(())
    })
}

/// Stores the last report, and computes nothing: `ggraft_trainer_poll(trainer, &report, sizeof report)`. Any thread may call it
/// at any time, also while another one is inside a function of the trainer.
///
/// # Safety
/// `trainer` is a live handle, `report` valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_poll(
    trainer: *mut ggraft_trainer,
    report: *mut ggraft_train_report,
    size: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise; only the report is touched, which is made for other threads.
        let last = *unsafe { handle(trainer, "trainer")? }.last();
        // SAFETY: the caller's promise.
        unsafe { crate::params::write(report, size, last) }
    })
}

/// Stops the step that runs, and refuses those that follow, with GGRAFT_ERROR_CANCELLED, until `ggraft_trainer_clear_cancel`. Any
/// thread may call it at any time, also while another one is inside a function of the trainer.
///
/// # Safety
/// `trainer` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_cancel(trainer: *mut ggraft_trainer) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise; only the token is touched, which is made for other threads.
        unsafe { handle(trainer, "trainer")? }.cancel.cancel();
        Ok(())
    })
}

/// Allows steps again after `ggraft_trainer_cancel`. Any thread may call it.
///
/// # Safety
/// `trainer` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_clear_cancel(
    trainer: *mut ggraft_trainer,
) -> ggraft_status {
    call(|| {
        // SAFETY: as in `ggraft_trainer_cancel`.
        unsafe { handle(trainer, "trainer")? }.cancel.reset();
        Ok(())
    })
}

/// Makes an adapter of what was learned so far: that of the lowest validation loss, or without a validation set the latest. The
/// run can go on, the adapter stays as it is.
///
/// # Safety
/// `trainer` is a live handle, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_adapter(
    trainer: *mut ggraft_trainer,
    out: *mut *mut ggraft_adapter,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let adapter = unsafe { with(trainer, |_, t| Ok(t.adapter()?))? };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_adapter::new(adapter)) };
        Ok(())
    })
}

/// Writes the adapter of `ggraft_trainer_adapter` as a GGUF adapter file in half precision, which is what the KV cache makes of
/// it anyway; it appears at `path` complete or not at all.
///
/// # Safety
/// `trainer` is a live handle, `path` a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_save(
    trainer: *mut ggraft_trainer,
    path: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        // SAFETY: the caller's promise.
        let adapter = unsafe { with(trainer, |_, t| Ok(t.adapter()?))? };
        adapter.save(path, Precision::F16)?;
        Ok(())
    })
}

/// Writes everything that the next step depends on, for `ggraft_trainer_resume`; the file appears at `path` complete or not at
/// all.
///
/// # Safety
/// `trainer` is a live handle, `path` a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_save_checkpoint(
    trainer: *mut ggraft_trainer,
    path: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        // SAFETY: the caller's promise.
        unsafe { with(trainer, |_, t| Ok(t.save_checkpoint(path)?)) }
    })
}

/// Frees the trainer; NULL is allowed. Adapters that it made stay.
///
/// # Safety
/// `trainer` is NULL or a live handle that no thread uses now or later, not even to poll or to cancel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_free(trainer: *mut ggraft_trainer) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(trainer) };
        Ok(())
    });
}
