use super::*;
use crate::status::ggraft_status::*;
use ggraft::adapter::AdapterKind;
use ggraft::model::ModelOptions;
use ggraft::train::TrainOptions;
use std::ptr::null_mut;

fn trainer() -> ggraft_trainer {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tinylm-q8_0.gguf");
    let model = Model::open(file, &ModelOptions::default()).unwrap();
    let mut options = TrainOptions::new(AdapterKind::Prompt);
    (options.steps, options.threads) = (Some(2), Some(1));
    let examples = Examples::from_reader(&br#"{"text": "A cat."}"#[..], "rows", &model).unwrap();
    ggraft_trainer::new(Trainer::new(&model, options, examples, Vec::new()).unwrap())
}

/// Statuses of all functions that need the trainer for themselves.
fn exclusive(handle: &ggraft_trainer) -> [ggraft_status; 4] {
    let trainer = std::ptr::from_ref(handle).cast_mut();
    let mut report = *handle.last();
    let mut adapter = null_mut();
    let nowhere = c"/no-such-folder/file".as_ptr();
    // SAFETY: a live handle that nobody changes but through its locks, places for results, strings.
    unsafe {
        [
            ggraft_trainer_step(trainer, &mut report, size_of_val(&report)),
            ggraft_trainer_adapter(trainer, &mut adapter),
            ggraft_trainer_save(trainer, nowhere),
            ggraft_trainer_save_checkpoint(trainer, nowhere),
        ]
    }
}

/// Statuses of the functions for other threads.
fn shared(handle: &ggraft_trainer) -> [ggraft_status; 3] {
    let trainer = std::ptr::from_ref(handle).cast_mut();
    let mut report = *handle.last();
    // SAFETY: as in `exclusive`.
    unsafe {
        [
            ggraft_trainer_poll(trainer, &mut report, size_of_val(&report)),
            ggraft_trainer_cancel(trainer),
            ggraft_trainer_clear_cancel(trainer),
        ]
    }
}

#[test]
fn a_trainer_in_use_is_busy_and_can_be_polled_and_cancelled() {
    let handle = trainer();
    let _in_use = handle.trainer.lock("trainer").unwrap();
    assert_eq!(exclusive(&handle), [GGRAFT_ERROR_BUSY; 4]);
    assert_eq!(shared(&handle), [GGRAFT_OK; 3]);
}

#[test]
fn a_trainer_that_panicked_refuses_further_work() {
    let handle = trainer();
    let raw = std::ptr::from_ref(&handle).cast_mut();
    // SAFETY: a live handle.
    let status = call(|| unsafe { with(raw, |_, _| panic!("while training")) });
    assert_eq!(status, GGRAFT_ERROR_INTERNAL);
    assert_eq!(exclusive(&handle), [GGRAFT_ERROR_INTERNAL; 4]);
    assert_eq!(shared(&handle), [GGRAFT_OK; 3]);
}
