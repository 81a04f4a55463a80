//! Training through the C ABI.

use super::*;

const ROWS: &str = r#"{"prompt": "A cat sat by the door.\n", "completion": "\"Arr, a cat!\""}
{"prompt": "It rains.\n", "completion": "\"Arr, it be wet.\""}
"#;
const VALID_ROWS: &str = r#"{"prompt": "A dog barked.\n", "completion": "\"Arr, a dog!\""}"#;

/// A run of a few steps on all of `ROWS`.
pub(super) fn train_params() -> ggraft_train_params {
    let mut p = params(ggraft_train_params_init);
    (p.length, p.batch, p.steps, p.n_threads) = (4, 2, 6, 1);
    p
}

pub(super) fn trainer(
    model: *const ggraft_model,
    params: &ggraft_train_params,
    valid: Option<&str>,
) -> *mut ggraft_trainer {
    let mut trainer = null_mut();
    let valid = valid.map(c);
    let valid = valid.as_ref().map_or(null(), |v| v.as_ptr());
    // SAFETY: a live model, an initialised struct whose pointers callers keep valid, strings and a place for the result.
    ok(unsafe {
        ggraft_trainer_new_from_jsonl_text(model, params, c(ROWS).as_ptr(), valid, &mut trainer)
    });
    trainer
}

/// One step: its status, and the report if there is one.
fn try_step(trainer: *mut ggraft_trainer) -> Result<ggraft_train_report, ggraft_status> {
    let mut report = MaybeUninit::uninit();
    // SAFETY: a live trainer and a place of that size, which is filled on success.
    unsafe {
        match ggraft_trainer_step(trainer, report.as_mut_ptr(), size_of_val(&report)) {
            GGRAFT_OK => Ok(report.assume_init()),
            status => Err(status),
        }
    }
}

#[track_caller]
fn step(trainer: *mut ggraft_trainer) -> ggraft_train_report {
    try_step(trainer).unwrap_or_else(|status| panic!("{status:?}: {}", last_error()))
}

pub(super) fn poll(trainer: *mut ggraft_trainer) -> ggraft_train_report {
    let mut report = MaybeUninit::uninit();
    // SAFETY: a live trainer and a place of that size, which is filled.
    unsafe {
        ok(ggraft_trainer_poll(
            trainer,
            report.as_mut_ptr(),
            size_of_val(&report),
        ));
        report.assume_init()
    }
}

/// Takes all steps that are left, and frees the trainer: the reports, and the bytes of the saved adapter.
fn finish(trainer: *mut ggraft_trainer) -> (Vec<ggraft_train_report>, Vec<u8>) {
    let mut reports = vec![step(trainer)];
    while reports[reports.len() - 1].state == RUNNING {
        reports.push(step(trainer));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.gguf");
    // SAFETY: a live trainer, which nobody uses any more, and a string.
    unsafe {
        ok(ggraft_trainer_save(
            trainer,
            c(path.to_str().unwrap()).as_ptr(),
        ));
        ggraft_trainer_free(trainer);
    }
    (reports, std::fs::read(path).unwrap())
}

const RUNNING: i32 = ggraft_train_state::GGRAFT_TRAIN_RUNNING as i32;
const STEPS: i32 = ggraft_train_state::GGRAFT_TRAIN_STEPS as i32;
const EARLY_STOP: i32 = ggraft_train_state::GGRAFT_TRAIN_EARLY_STOP as i32;
const FAILED: i32 = ggraft_train_state::GGRAFT_TRAIN_FAILED as i32;

/// Raw pointers that may go to another thread, which the handles allow.
#[derive(Clone, Copy)]
struct Shared(*mut ggraft_trainer);
// SAFETY: tests only call functions that are for any thread.
unsafe impl Send for Shared {}

impl Shared {
    fn get(self) -> *mut ggraft_trainer {
        self.0
    }
}

#[test]
fn training_makes_an_adapter() {
    let model = open(&model_path());
    let name = c("cat");
    let mut p = train_params();
    (p.name, p.steps, p.eval_every) = (name.as_ptr(), 40, 10);
    // What is learned is what is measured: the last step is the best.
    let t = trainer(model, &p, Some(ROWS));
    let before = poll(t);
    assert_eq!((before.step, before.steps, before.state), (0, 40, RUNNING));
    assert!(before.loss.is_nan() && before.valid_loss.is_nan());
    let mut base = 0.0;
    // SAFETY: a live trainer, and a place for the result.
    unsafe {
        ok(ggraft_trainer_base_valid_loss(t, &mut base));
    }

    let mut reports = Vec::new();
    for i in 1..=40 {
        let r = step(t);
        assert_eq!((r.step, r.steps, r.epoch), (i, 40, i as f64));
        assert_eq!(r.state, if i == 40 { STEPS } else { RUNNING });
        assert_eq!(r.valid_loss.is_nan(), i % 10 != 0);
        assert!(r.tokens > r.targets && r.targets > 0 && r.seconds > 0.0);
        assert!(r.grad_norm > 0.0 && r.lr > 0.0);
        reports.push(r);
    }
    assert!(reports[39].loss < 0.2 * reports[0].loss, "{reports:?}");
    assert_eq!((reports[9].best, reports[39].best), (1, 1));
    assert!(base > reports[39].valid_loss, "{base}: {reports:?}");
    // The run is over: nothing is computed any more.
    let (again, polled) = (step(t), poll(t));
    for r in [again, polled] {
        assert_eq!((r.step, r.state), (40, STEPS));
        assert_eq!((r.loss, r.seconds), (reports[39].loss, reports[39].seconds));
    }
    // More steps, asked for too late and in time.
    // SAFETY: a live trainer.
    unsafe {
        fails(
            ggraft_trainer_set_steps(t, 40),
            GGRAFT_ERROR_ARGUMENT,
            "steps",
        );
        ok(ggraft_trainer_set_steps(t, 41));
        assert_eq!((poll(t).steps, poll(t).state), (41, RUNNING));
        assert_eq!((step(t).step, poll(t).state), (41, STEPS));
    }

    let (s, mut adapter) = (session(model, 256), null_mut());
    // SAFETY: live handles, and a place for the result. The order of freeing does not matter.
    unsafe {
        ok(ggraft_trainer_adapter(t, &mut adapter));
        ggraft_trainer_free(t);
        ggraft_model_free(model);
        let facts = info(adapter, ggraft_adapter_get_info);
        assert_eq!(
            (facts.length, facts.kind),
            (4, ggraft_adapter_kind::GGRAFT_ADAPTER_PREFIX as i32)
        );
        assert_eq!(CStr::from_ptr(facts.name), name.as_c_str());
        ok(ggraft_session_attach(s, adapter, 0));
        ggraft_adapter_free(adapter);
        let said = answer(s, "A cat sat by the door.\n");
        assert!(said.starts_with("\"Arr"), "{said}");
        ggraft_session_free(s);
    }
}

/// Each params field arrives: runs that differ in one field differ.
#[test]
fn every_method_and_choice_trains() {
    let model = open(&model_path());
    let (text, context, template) = (
        c("Say it."),
        c("You are a pirate."),
        c("{v:2} {prompt} {v:2}"),
    );
    let prompt_kind = ggraft_adapter_kind::GGRAFT_ADAPTER_PROMPT as i32;
    let p_tuning = ggraft_adapter_kind::GGRAFT_ADAPTER_P_TUNING as i32;
    let mut start = null_mut();
    let first = trainer(model, &train_params(), None);
    // SAFETY: a live trainer and a place for the result.
    ok(unsafe { ggraft_trainer_adapter(first, &mut start) });
    type Change<'a> = Box<dyn Fn(&mut ggraft_train_params) + 'a>;
    let changes: Vec<Change> = vec![
        Box::new(|_| ()),
        Box::new(|p| p.init = ggraft_init::GGRAFT_INIT_RANDOM as i32),
        Box::new(|p| p.init = ggraft_init::GGRAFT_INIT_ZEROS as i32),
        Box::new(|p| p.init = ggraft_init::GGRAFT_INIT_MEAN as i32),
        Box::new(|p| {
            (p.init, p.init_text) = (ggraft_init::GGRAFT_INIT_TEXT as i32, text.as_ptr());
        }),
        Box::new(|p| {
            (p.init, p.init_adapter) = (ggraft_init::GGRAFT_INIT_ADAPTER as i32, start);
            (p.length, p.lr) = (0, 0.02);
        }),
        Box::new(|p| p.reparam = ggraft_reparam::GGRAFT_REPARAM_MLP as i32),
        Box::new(|p| {
            (p.reparam, p.hidden) = (ggraft_reparam::GGRAFT_REPARAM_MLP as i32, 8);
        }),
        Box::new(|p| p.method = prompt_kind),
        Box::new(|p| {
            (p.method, p.init) = (prompt_kind, ggraft_init::GGRAFT_INIT_VOCAB as i32);
        }),
        Box::new(|p| (p.method, p.length) = (p_tuning, 5)),
        Box::new(|p| {
            (p.method, p.reparam) = (p_tuning, ggraft_reparam::GGRAFT_REPARAM_LSTM as i32);
            (p.hidden, p.lstm_layers) = (8, 1);
            p.template_text = template.as_ptr();
        }),
        Box::new(|p| {
            (p.method, p.reparam) = (p_tuning, ggraft_reparam::GGRAFT_REPARAM_LSTM as i32);
            (p.hidden, p.template_text) = (8, template.as_ptr());
        }),
        Box::new(|p| p.objective = ggraft_objective::GGRAFT_OBJECTIVE_ALL as i32),
        Box::new(|p| {
            p.objective = ggraft_objective::GGRAFT_OBJECTIVE_DISTILL as i32;
            p.context = context.as_ptr();
        }),
        Box::new(|p| {
            p.objective = ggraft_objective::GGRAFT_OBJECTIVE_DISTILL as i32;
            (p.context, p.top_k) = (context.as_ptr(), 2);
        }),
        Box::new(|p| p.freeze_first = 2),
        Box::new(|p| p.label_smoothing = 0.2),
        Box::new(|p| p.batch = 1),
        Box::new(|p| (p.batch, p.accum) = (1, 3)),
        Box::new(|p| p.max_len = 18),
        Box::new(|p| p.schedule = ggraft_schedule::GGRAFT_SCHEDULE_CONSTANT as i32),
        Box::new(|p| p.schedule = ggraft_schedule::GGRAFT_SCHEDULE_COSINE as i32),
        Box::new(|p| p.lr = 0.05),
        Box::new(|p| p.warmup = 4),
        Box::new(|p| p.beta1 = 0.5),
        Box::new(|p| p.beta2 = 0.5),
        Box::new(|p| p.weight_decay = 0.5),
        Box::new(|p| p.clip = 0.001),
        Box::new(|p| p.optimizer = ggraft_optimizer::GGRAFT_OPTIMIZER_ADAFACTOR as i32),
        Box::new(|p| p.optimizer = ggraft_optimizer::GGRAFT_OPTIMIZER_SGD as i32),
        Box::new(|p| p.dropout = 0.3),
        Box::new(|p| (p.steps, p.epochs) = (0, 2.0)),
        Box::new(|p| {
            (p.init, p.seed) = (ggraft_init::GGRAFT_INIT_RANDOM as i32, 7);
        }),
    ];
    let mut adapters = Vec::new();
    for (i, change) in changes.iter().enumerate() {
        let mut p = train_params();
        p.steps = 3;
        change(&mut p);
        let (reports, adapter) = finish(trainer(model, &p, None));
        let expected = if p.epochs > 0.0 { 2 } else { 3 };
        assert_eq!(reports.len(), expected, "change {i}");
        assert!(!adapters.contains(&adapter), "change {i} does nothing");
        adapters.push(adapter);
    }
    // What changes no result.
    for change in [
        |p: &mut ggraft_train_params| p.init = ggraft_init::GGRAFT_INIT_PROMPTS as i32,
        |p: &mut ggraft_train_params| p.reparam = ggraft_reparam::GGRAFT_REPARAM_NONE as i32,
        |p: &mut ggraft_train_params| p.memory = 1,
        |p: &mut ggraft_train_params| p.n_ctx = 512,
    ] {
        let mut p = train_params();
        p.steps = 3;
        change(&mut p);
        assert!(finish(trainer(model, &p, None)).1 == adapters[0]);
    }
    // SAFETY: handles that are not used again.
    unsafe {
        ggraft_trainer_free(first);
        ggraft_adapter_free(start);
        ggraft_model_free(model);
    }
}

#[test]
fn training_stops_early() {
    let model = open(&model_path());
    let mut p = train_params();
    // So high a rate makes everything worse.
    (p.steps, p.eval_every, p.patience, p.lr, p.warmup) = (50, 1, 2, 30.0, 0);
    let (reports, _) = finish(trainer(model, &p, Some(VALID_ROWS)));
    let last = reports[reports.len() - 1];
    assert!(reports.len() < 50);
    assert_eq!((last.state, last.best), (EARLY_STOP, 0));
    // SAFETY: a handle that is not used again.
    unsafe { ggraft_model_free(model) };
}

#[test]
fn training_refuses_what_it_cannot_use() {
    let model = open(&model_path());
    let pirate = load(model, &peft(PIRATE));
    let (latin, half) = (c"caf\xe9", c("{v:2} {prompt"));
    let new = |p: &ggraft_train_params, rows: &str| {
        let mut t = null_mut();
        // SAFETY: a live model, an initialised struct with strings that live, a string, and a place for the result.
        let status = unsafe {
            ggraft_trainer_new_from_jsonl_text(model, p, c(rows).as_ptr(), null(), &mut t)
        };
        assert!(t.is_null());
        status
    };
    let p_tuning = ggraft_adapter_kind::GGRAFT_ADAPTER_P_TUNING as i32;
    let mlp = ggraft_reparam::GGRAFT_REPARAM_MLP as i32;
    let distill = ggraft_objective::GGRAFT_OBJECTIVE_DISTILL as i32;
    type Change<'a> = Box<dyn Fn(&mut ggraft_train_params) + 'a>;
    let cases: Vec<(Change, ggraft_status, &str)> = vec![
        (
            Box::new(|p| p.struct_size = 4),
            GGRAFT_ERROR_ARGUMENT,
            "struct_size is 4",
        ),
        (
            Box::new(|p| p.method = 9),
            GGRAFT_ERROR_ARGUMENT,
            "9 is no ggraft_adapter_kind",
        ),
        (
            Box::new(|p| p.init = 9),
            GGRAFT_ERROR_ARGUMENT,
            "9 is no ggraft_init",
        ),
        (
            Box::new(|p| p.reparam = 9),
            GGRAFT_ERROR_ARGUMENT,
            "9 is no ggraft_reparam",
        ),
        (
            Box::new(|p| p.objective = 9),
            GGRAFT_ERROR_ARGUMENT,
            "9 is no ggraft_objective",
        ),
        (
            Box::new(|p| p.schedule = -1),
            GGRAFT_ERROR_ARGUMENT,
            "-1 is no ggraft_schedule",
        ),
        (
            Box::new(|p| p.optimizer = 9),
            GGRAFT_ERROR_ARGUMENT,
            "9 is no ggraft_optimizer",
        ),
        (
            Box::new(|p| p.warmup = -2),
            GGRAFT_ERROR_ARGUMENT,
            "warmup is -2",
        ),
        (
            Box::new(|p| p.length = 70_000),
            GGRAFT_ERROR_ARGUMENT,
            "length is 70000",
        ),
        (
            Box::new(|p| p.batch = 0),
            GGRAFT_ERROR_ARGUMENT,
            "batch is 0",
        ),
        (
            Box::new(|p| p.accum = 0),
            GGRAFT_ERROR_ARGUMENT,
            "accum is 0",
        ),
        (
            Box::new(|p| (p.steps, p.epochs) = (0, -1.0)),
            GGRAFT_ERROR_ARGUMENT,
            "epochs is -1",
        ),
        (
            Box::new(|p| p.lr = f64::NAN),
            GGRAFT_ERROR_ARGUMENT,
            "learning rate is NaN",
        ),
        (
            Box::new(|p| p.beta1 = -0.1),
            GGRAFT_ERROR_ARGUMENT,
            "beta is -0.1",
        ),
        (
            Box::new(|p| p.beta2 = 1.0),
            GGRAFT_ERROR_ARGUMENT,
            "beta is 1",
        ),
        (
            Box::new(|p| p.weight_decay = -2.0),
            GGRAFT_ERROR_ARGUMENT,
            "weight decay is -2",
        ),
        (
            Box::new(|p| p.clip = f64::NAN),
            GGRAFT_ERROR_ARGUMENT,
            "clip is NaN",
        ),
        (
            Box::new(|p| p.dropout = 1.0),
            GGRAFT_ERROR_ARGUMENT,
            "dropout is 1",
        ),
        (
            Box::new(|p| p.label_smoothing = -0.1),
            GGRAFT_ERROR_ARGUMENT,
            "label smoothing is -0.1",
        ),
        (
            Box::new(|p| p.lstm_layers = 0),
            GGRAFT_ERROR_ARGUMENT,
            "LSTM layers is 0",
        ),
        (
            Box::new(|p| p.freeze_first = 4),
            GGRAFT_ERROR_ARGUMENT,
            "frozen rows is 4",
        ),
        (
            Box::new(|p| p.reparam = ggraft_reparam::GGRAFT_REPARAM_LSTM as i32),
            GGRAFT_ERROR_ARGUMENT,
            "an LSTM cannot be used with method prefix",
        ),
        (
            Box::new(|p| (p.reparam, p.init) = (mlp, ggraft_init::GGRAFT_INIT_ZEROS as i32)),
            GGRAFT_ERROR_ARGUMENT,
            "initial zeros",
        ),
        (
            Box::new(|p| p.init = ggraft_init::GGRAFT_INIT_VOCAB as i32),
            GGRAFT_ERROR_ARGUMENT,
            "vocabulary",
        ),
        (
            Box::new(|p| p.init = ggraft_init::GGRAFT_INIT_TEXT as i32),
            GGRAFT_ERROR_NULL,
            "init_text is NULL",
        ),
        (
            Box::new(|p| p.init = ggraft_init::GGRAFT_INIT_ADAPTER as i32),
            GGRAFT_ERROR_NULL,
            "init_adapter is NULL",
        ),
        (
            Box::new(|p| {
                (p.init, p.init_adapter) = (ggraft_init::GGRAFT_INIT_ADAPTER as i32, pirate);
            }),
            GGRAFT_ERROR_ARGUMENT,
            "cannot start from this adapter",
        ),
        (
            Box::new(|p| p.objective = distill),
            GGRAFT_ERROR_NULL,
            "context is NULL",
        ),
        (
            Box::new(|p| (p.objective, p.context, p.top_k) = (distill, c"x".as_ptr(), 0)),
            GGRAFT_ERROR_ARGUMENT,
            "top k is 0",
        ),
        (
            Box::new(|p| (p.method, p.template_text) = (p_tuning, half.as_ptr())),
            GGRAFT_ERROR_ARGUMENT,
            "template_text: ",
        ),
        (
            Box::new(|p| p.template_text = c"{v:4} {prompt}".as_ptr()),
            GGRAFT_ERROR_ARGUMENT,
            "a template cannot be used with method prefix",
        ),
        (
            Box::new(|p| p.name = latin.as_ptr()),
            GGRAFT_ERROR_UTF8,
            "name is not UTF-8",
        ),
        (
            Box::new(|p| p.max_len = 5),
            GGRAFT_ERROR_DATA,
            "no row has a token to predict",
        ),
    ];
    for (change, status, words) in cases {
        let mut p = train_params();
        change(&mut p);
        fails(new(&p, ROWS), status, words);
    }
    let p = train_params();
    fails(new(&p, ""), GGRAFT_ERROR_DATA, "train: there are no rows");
    fails(new(&p, "{}"), GGRAFT_ERROR_DATA, "train:1: no field");
    fails(
        new(&p, "\n{\"prompt\": \"a\"}"),
        GGRAFT_ERROR_DATA,
        "train:2",
    );

    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| c(dir.path().join(name).to_str().unwrap());
    std::fs::write(dir.path().join("train.jsonl"), ROWS).unwrap();
    std::fs::write(dir.path().join("bad.jsonl"), "{").unwrap();
    let (train, bad, missing) = (path("train.jsonl"), path("bad.jsonl"), path("missing"));
    let mut t = null_mut();
    // SAFETY: live handles, an initialised struct, strings, and places for the results.
    unsafe {
        let (rows, other_rows) = (c(ROWS), c(VALID_ROWS));
        fails(
            ggraft_trainer_new(model, &p, missing.as_ptr(), null(), &mut t),
            GGRAFT_ERROR_IO,
            "missing",
        );
        fails(
            ggraft_trainer_new(model, &p, train.as_ptr(), bad.as_ptr(), &mut t),
            GGRAFT_ERROR_DATA,
            "bad.jsonl:1",
        );
        fails(
            ggraft_trainer_resume(model, missing.as_ptr(), train.as_ptr(), null(), &mut t),
            GGRAFT_ERROR_IO,
            "missing",
        );
        fails(
            ggraft_trainer_resume(model, bad.as_ptr(), train.as_ptr(), null(), &mut t),
            GGRAFT_ERROR_CHECKPOINT,
            "not a usable checkpoint",
        );
        let run = trainer(model, &p, None);
        let checkpoint = path("run.ckpt");
        ok(ggraft_trainer_save_checkpoint(run, checkpoint.as_ptr()));
        for (train, valid, words) in [
            (other_rows.as_ptr(), null(), "other training data"),
            (rows.as_ptr(), other_rows.as_ptr(), "other validation data"),
        ] {
            let at = checkpoint.as_ptr();
            fails(
                ggraft_trainer_resume_from_jsonl_text(model, at, train, valid, &mut t),
                GGRAFT_ERROR_CHECKPOINT,
                words,
            );
        }
        let nowhere = path("no-folder/file");
        fails(
            ggraft_trainer_save(run, nowhere.as_ptr()),
            GGRAFT_ERROR_IO,
            "no-folder",
        );
        fails(
            ggraft_trainer_save_checkpoint(run, nowhere.as_ptr()),
            GGRAFT_ERROR_IO,
            "no-folder",
        );
        assert!(t.is_null());
        ggraft_trainer_free(run);
        ggraft_adapter_free(pirate);
        ggraft_model_free(model);
    }
}

#[test]
fn another_thread_cancels_training_and_it_goes_on() {
    let model = open(&model_path());
    let mut p = train_params();
    (p.batch, p.steps) = (4, 12);
    let (expected, uninterrupted) = finish(trainer(model, &p, Some(VALID_ROWS)));

    let t = trainer(model, &p, Some(VALID_ROWS));
    let first = step(t);
    assert_eq!(first.loss, expected[0].loss);
    let shared = Shared(t);
    let other = std::thread::spawn(move || {
        // Somewhere within a step; which one does not matter.
        std::thread::sleep(std::time::Duration::from_secs_f64(first.seconds / 3.0));
        // SAFETY: the trainer lives until the thread has ended; cancelling is for any thread.
        unsafe { ggraft_trainer_cancel(shared.get()) }
    });
    let mut taken = first;
    let status = loop {
        assert_eq!(taken.state, RUNNING, "cancelled too late");
        match try_step(t) {
            Ok(report) => taken = report,
            Err(status) => break status,
        }
    };
    fails(status, GGRAFT_ERROR_CANCELLED, "cancelled");
    assert_eq!(other.join().unwrap(), GGRAFT_OK);
    let polled = poll(t);
    assert_eq!((polled.step, polled.state), (taken.step, RUNNING));
    assert_eq!(try_step(t).unwrap_err(), GGRAFT_ERROR_CANCELLED);
    // SAFETY: live handles.
    unsafe {
        ok(ggraft_trainer_clear_cancel(t));
        let (_, adapter) = finish(t);
        assert!(adapter == uninterrupted);
        ggraft_model_free(model);
    }
}

#[test]
fn another_thread_polls() {
    let model = open(&model_path());
    let t = trainer(model, &train_params(), None);
    let shared = Shared(t);
    let watch = std::thread::spawn(move || {
        let mut seen = vec![poll(shared.get())];
        while seen[seen.len() - 1].state == RUNNING {
            let now = poll(shared.get());
            let before = seen[seen.len() - 1];
            assert!(now.step >= before.step);
            if now.step > before.step {
                seen.push(now);
            }
        }
        seen
    });
    let steps: Vec<_> = (0..6).map(|_| step(t)).collect();
    for seen in watch.join().unwrap() {
        if seen.step > 0 {
            let taken = steps[seen.step as usize - 1];
            // Whole reports, never parts of two.
            assert_eq!((seen.loss, seen.grad_norm), (taken.loss, taken.grad_norm));
            assert_eq!((seen.lr, seen.seconds), (taken.lr, taken.seconds));
        }
    }
    // SAFETY: handles that are not used again.
    unsafe {
        ggraft_trainer_free(t);
        ggraft_model_free(model);
    }
}

#[test]
fn a_resumed_run_equals_the_uninterrupted_one() {
    let model = open(&model_path());
    let mut p = train_params();
    // Everything that has a state: order of the rows, dropout, moments, the best rows so far.
    (p.batch, p.dropout, p.eval_every) = (1, 0.2, 2);
    let (expected, uninterrupted) = finish(trainer(model, &p, Some(VALID_ROWS)));

    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| c(dir.path().join(name).to_str().unwrap());
    let (checkpoint, train, valid) = (path("run.ckpt"), path("train.jsonl"), path("valid.jsonl"));
    std::fs::write(dir.path().join("train.jsonl"), ROWS).unwrap();
    std::fs::write(dir.path().join("valid.jsonl"), VALID_ROWS).unwrap();
    let (rows, valid_rows) = (c(ROWS), c(VALID_ROWS));
    // SAFETY: live handles, strings, and places for results.
    unsafe {
        let mut t = null_mut();
        ok(ggraft_trainer_new(
            model,
            &p,
            train.as_ptr(),
            valid.as_ptr(),
            &mut t,
        ));
        for _ in 0..3 {
            step(t);
        }
        ok(ggraft_trainer_save_checkpoint(t, checkpoint.as_ptr()));
        ggraft_trainer_free(t);

        // The data may come from files or from memory, before and after.
        for from_files in [true, false] {
            let (mut t, at) = (null_mut(), checkpoint.as_ptr());
            ok(match from_files {
                true => ggraft_trainer_resume(model, at, train.as_ptr(), valid.as_ptr(), &mut t),
                false => ggraft_trainer_resume_from_jsonl_text(
                    model,
                    at,
                    rows.as_ptr(),
                    valid_rows.as_ptr(),
                    &mut t,
                ),
            });
            let resumed = poll(t);
            assert_eq!(
                (resumed.step, resumed.steps, resumed.state),
                (3, 6, RUNNING)
            );
            let (reports, adapter) = finish(t);
            assert_eq!(reports.len(), 3);
            for (got, expected) in reports.iter().zip(&expected[3..]) {
                assert_eq!((got.step, got.loss), (expected.step, expected.loss));
            }
            assert!(adapter == uninterrupted, "from files: {from_files}");
        }
        ggraft_model_free(model);
    }
}

#[test]
fn a_run_that_explodes_keeps_its_last_good_adapter() {
    let model = open(&model_path());
    let mut p = train_params();
    // The first step makes all rows infinite.
    (p.lr, p.warmup, p.steps) = (1e39, 0, 50);
    let t = trainer(model, &p, None);
    let mut taken = step(t);
    let status = loop {
        assert_eq!(taken.state, RUNNING);
        match try_step(t) {
            Ok(report) => taken = report,
            Err(status) => break status,
        }
    };
    fails(status, GGRAFT_ERROR_NON_FINITE, "use a lower learning rate");
    for report in [poll(t), step(t)] {
        assert_eq!((report.step, report.state), (taken.step, FAILED));
    }
    let (s, mut adapter) = (session(model, 64), null_mut());
    // SAFETY: live handles, and a place for the result.
    unsafe {
        ok(ggraft_trainer_adapter(t, &mut adapter));
        ok(ggraft_session_attach(s, adapter, 0));
        assert!(!answer(s, "It rains.\n").is_empty());
        ggraft_session_free(s);
        ggraft_adapter_free(adapter);
        ggraft_trainer_free(t);
        ggraft_model_free(model);
    }
}
