//! A run on disk: everything that the next step depends on, so that a resumed run equals the uninterrupted one bit for bit.
//!
//! A safetensors file. Its metadata holds one JSON text under the key `ggraft` and, under `sha256`, the hash of that text and
//! all tensors; tensors are F32, except the order of the data (U32).

use super::batch::{Sequence, Slot};
use super::data::Example;
use super::encoder::{Encoder, EncoderKind};
use super::param::Param;
use super::report::Report;
use super::rng::{Rng, RngState};
use super::trainer::{Best, Trainer};
use super::{Init, Objective, OptimizerKind, Reparam, Schedule, TrainError, TrainOptions};
use crate::adapter::{AdapterKind, Template};
use crate::error::{Error, Result};
use crate::file::atomic::write_atomic;
use crate::model::Model;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;

/// Grows when the meaning of anything in the file changes.
const VERSION: u32 = 2;
/// Keys of the metadata: the JSON text, and the hash of it and all tensors.
const KEY: &str = "ggraft";
const HASH: &str = "sha256";
/// Largest file that is read: far beyond any run, and an endless device ends here.
const MAX_BYTES: u64 = 16 << 30;

/// Floating-point numbers by their bits: JSON would round some.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
struct Bits(u64);

impl From<f64> for Bits {
    fn from(x: f64) -> Self {
        Self(x.to_bits())
    }
}

impl From<Bits> for f64 {
    fn from(x: Bits) -> Self {
        Self::from_bits(x.0)
    }
}

/// Options without what only matters before the first step.
#[derive(Serialize, Deserialize)]
struct SavedOptions {
    method: String,
    length: usize,
    reparam: Reparam,
    hidden: Option<usize>,
    lstm_layers: usize,
    template: Option<String>,
    freeze_first: usize,
    loss: SavedObjective,
    label_smoothing: Bits,
    steps: u64,
    batch: usize,
    accum: usize,
    max_len: Option<usize>,
    lr: Bits,
    schedule: Schedule,
    warmup: u64,
    optimizer: OptimizerKind,
    betas: [Bits; 2],
    weight_decay: Bits,
    clip: Bits,
    dropout: Bits,
    eval_every: u64,
    patience: Option<usize>,
    seed: u64,
    threads: Option<usize>,
    memory: Option<u64>,
    n_ctx: Option<usize>,
    name: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SavedObjective {
    Completion,
    All,
    Distill { context: String, top_k: usize },
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    /// Hexadecimal.
    base: String,
    /// Of the base's weights as they are in its file, see [`weights`].
    weights: String,
    /// Of training and validation set.
    data: [String; 2],
    options: SavedOptions,
    encoder: EncoderKind,
    step: u64,
    optimizer_steps: u64,
    shuffle: RngState,
    dropout: RngState,
    used: usize,
    best: Option<(u64, Bits)>,
    stale: u64,
    first_loss: Option<Bits>,
    last_loss: Option<Bits>,
    tokens: u64,
    seconds: Bits,
    broken: bool,
    unevaluated: Option<SavedReport>,
    base_loss: Option<Bits>,
}

/// A report that has no validation loss yet.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct SavedReport {
    step: u64,
    steps: u64,
    loss: Bits,
    lr: Bits,
    grad_norm: Bits,
    tokens: u64,
    targets: u64,
    seconds: Bits,
    epoch: Bits,
}

impl From<Report> for SavedReport {
    fn from(r: Report) -> Self {
        Self {
            step: r.step,
            steps: r.steps,
            loss: r.loss.into(),
            lr: r.lr.into(),
            grad_norm: r.grad_norm.into(),
            tokens: r.tokens,
            targets: r.targets,
            seconds: r.seconds.into(),
            epoch: r.epoch.into(),
        }
    }
}

impl From<SavedReport> for Report {
    fn from(r: SavedReport) -> Self {
        Self {
            step: r.step,
            steps: r.steps,
            loss: r.loss.into(),
            lr: r.lr.into(),
            grad_norm: r.grad_norm.into(),
            tokens: r.tokens,
            targets: r.targets,
            seconds: r.seconds.into(),
            valid_loss: None,
            best: false,
            epoch: r.epoch.into(),
        }
    }
}

const PARAM: &str = "param.";
const OPTIMIZER: &str = "optimizer.";
const BASE: &str = "encoder_base";
const BEST: &str = "best";
const GOOD: &str = "good";
const ORDER: &str = "order";
const DRAWN: &str = "drawn";

impl Trainer {
    /// Writes everything that the next step depends on to `path`, which is replaced when the file is complete.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_checkpoint(&self, path: &Path) -> Result<()> {
        let state = &self.state;
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, values: &[f32]| {
            tensors.push((
                name,
                Dtype::F32,
                shape,
                bytemuck::cast_slice(values).to_vec(),
            ));
        };
        for p in state.encoder.params() {
            add(format!("{PARAM}{}", p.name), p.shape.clone(), &p.value);
        }
        for (name, values) in state.optimizer.state() {
            add(format!("{OPTIMIZER}{name}"), vec![values.len()], &values);
        }
        if let Some(base) = state.encoder.base() {
            add(BASE.to_owned(), vec![base.len()], base);
        }
        if let Some(best) = &state.best {
            add(BEST.to_owned(), vec![best.rows.len()], &best.rows);
        }
        add(GOOD.to_owned(), vec![state.good.len()], &state.good);
        for (name, ids) in [(ORDER, &state.order), (DRAWN, &state.drawn)] {
            let bytes = bytemuck::cast_slice(ids).to_vec();
            tensors.push((name.to_owned(), Dtype::U32, vec![ids.len()], bytes));
        }
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, ty, shape, bytes)| {
                let view = TensorView::new(*ty, shape.clone(), bytes);
                (
                    name.as_str(),
                    view.expect("as many bytes as the shape says"),
                )
            })
            .collect();
        let json = serde_json::to_string(&self.saved()).expect("plain data");
        let sum = checksum(&json, views.iter().map(|(name, view)| (*name, view)));
        let metadata = HashMap::from([(KEY.to_owned(), json), (HASH.to_owned(), sum)]);
        let bytes = safetensors::serialize(views, Some(metadata)).expect("names are unique");
        write_atomic(path, |out| out.write_all(&bytes)).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })
    }

    fn saved(&self) -> Saved {
        let (state, o) = (&self.state, &self.options);
        Saved {
            version: VERSION,
            base: self.model.fingerprint().to_string(),
            weights: weights(&self.model),
            data: [hash(&self.train), hash(&self.valid)],
            options: SavedOptions {
                method: o.method.name().to_owned(),
                length: self.length,
                reparam: o.effective_reparam(),
                hidden: o.hidden,
                lstm_layers: o.lstm_layers,
                template: o.template.as_ref().map(ToString::to_string),
                freeze_first: o.freeze_first,
                loss: match &o.loss {
                    Objective::Completion => SavedObjective::Completion,
                    Objective::All => SavedObjective::All,
                    Objective::Distill { context, top_k } => SavedObjective::Distill {
                        context: context.clone(),
                        top_k: *top_k,
                    },
                },
                label_smoothing: f64::from(o.label_smoothing).into(),
                steps: self.steps,
                batch: o.batch,
                accum: o.accum,
                max_len: o.max_len,
                lr: self.lr.into(),
                schedule: o.schedule,
                warmup: self.warmup,
                optimizer: o.optimizer,
                betas: [o.betas.0.into(), o.betas.1.into()],
                weight_decay: state.optimizer.options().weight_decay.into(),
                clip: o.clip.into(),
                dropout: f64::from(o.dropout).into(),
                eval_every: self.eval_every,
                patience: o.patience,
                seed: o.seed,
                threads: o.threads,
                memory: o.memory,
                n_ctx: o.n_ctx,
                name: o.name.clone(),
            },
            encoder: state.encoder.kind(),
            step: state.step,
            optimizer_steps: state.optimizer.steps(),
            shuffle: state.shuffle.state(),
            dropout: state.dropout.state(),
            used: state.used,
            best: state.best.as_ref().map(|b| (b.step, b.loss.into())),
            stale: state.stale,
            first_loss: state.first_loss.map(Into::into),
            last_loss: state.last_loss.map(Into::into),
            tokens: state.tokens,
            seconds: state.seconds.into(),
            broken: state.broken,
            unevaluated: state.unevaluated.map(Into::into),
            base_loss: state.base_loss.map(Into::into),
        }
    }

    /// Continues the run that [`Trainer::save_checkpoint`] wrote to `path`, with the same base and the same data.
    ///
    /// # Errors
    /// [`Error::Io`], [`TrainError::Checkpoint`], [`TrainError::OtherRun`], and as [`Trainer::new`].
    pub fn resume(
        model: &Model,
        path: &Path,
        train: Vec<Example>,
        valid: Vec<Example>,
    ) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let unusable = |why: String| TrainError::Checkpoint {
            path: path.to_owned(),
            why,
        };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > MAX_BYTES {
            return Err(unusable(format!("{size} bytes")).into());
        }
        let bytes = std::fs::read(path).map_err(io)?;
        let wrong = |e: safetensors::SafeTensorError| unusable(e.to_string());
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(wrong)?;
        let json = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get(KEY))
            .ok_or_else(|| unusable("it was not written by ggraft".to_owned()))?;
        let version: Version = serde_json::from_str(json).map_err(|e| unusable(e.to_string()))?;
        if version.version != VERSION {
            let why = format!("format version {}, expected {VERSION}", version.version);
            return Err(unusable(why).into());
        }
        let file = SafeTensors::deserialize(&bytes).map_err(wrong)?;
        let found = file.tensors();
        let sum = checksum(json, found.iter().map(|(name, view)| (name.as_str(), view)));
        if header.metadata().as_ref().and_then(|m| m.get(HASH)) != Some(&sum) {
            return Err(unusable("it is damaged: its checksum is wrong".to_owned()).into());
        }
        let saved: Saved = serde_json::from_str(json).map_err(|e| unusable(e.to_string()))?;
        let tensors = Tensors { file: &file };
        let other = |what| TrainError::OtherRun {
            path: path.to_owned(),
            what,
        };
        if saved.base != model.fingerprint().to_string() {
            return Err(other("another base model").into());
        }
        if saved.weights != weights(model) {
            return Err(other(
                "another file of this base model, whose weights are rounded differently",
            )
            .into());
        }

        let options = saved.options.restore().map_err(unusable)?;
        let state_error = |e: super::StateError| unusable(e.to_string());
        let params = tensors.params(options.freeze_first).map_err(unusable)?;
        let mut encoder = Encoder::from_params(saved.encoder, params).map_err(state_error)?;
        if let Some(base) = tensors.f32(BASE).map_err(unusable)? {
            encoder = encoder.with_base(base).map_err(state_error)?;
        }
        let mut trainer = Self::prepare(model, options, train, valid, Some(encoder))?;
        for (sequences, hashed, what) in [
            (&trainer.train, &saved.data[0], "other training data"),
            (&trainer.valid, &saved.data[1], "other validation data"),
        ] {
            if hash(sequences) != *hashed {
                return Err(other(what).into());
            }
        }
        let rows = trainer.state.good.len();
        let rows_of = |name: &str| -> Result<Vec<f32>, TrainError> {
            match tensors.f32(name).map_err(unusable)? {
                Some(values) if values.len() == rows => Ok(values),
                _ => Err(unusable(format!(
                    "tensor {name} is missing or of the wrong size"
                ))),
            }
        };
        let n = trainer.train.len();
        let ids_of = |name: &str| -> Result<Vec<u32>, TrainError> {
            let ids = tensors.u32(name).map_err(unusable)?;
            match ids.iter().find(|&&id| id as usize >= n) {
                Some(id) => Err(unusable(format!("tensor {name}: there is no row {id}"))),
                None => Ok(ids),
            }
        };
        let (order, drawn) = (ids_of(ORDER)?, ids_of(DRAWN)?);
        if saved.used > order.len() || !(order.is_empty() || order.len() == n) {
            return Err(unusable("the order of the data does not fit the data".to_owned()).into());
        }
        let state = &mut trainer.state;
        state
            .optimizer
            .load_state(
                saved.optimizer_steps,
                tensors.prefixed(OPTIMIZER).map_err(unusable)?,
            )
            .map_err(state_error)?;
        state.best = match saved.best {
            Some((step, loss)) => Some(Best {
                step,
                loss: loss.into(),
                rows: rows_of(BEST)?,
            }),
            None => None,
        };
        state.good = rows_of(GOOD)?;
        state.step = saved.step;
        state.shuffle = Rng::from_state(saved.shuffle);
        state.dropout = Rng::from_state(saved.dropout);
        state.order = order;
        state.used = saved.used;
        state.drawn = drawn;
        state.stale = saved.stale;
        state.first_loss = saved.first_loss.map(Into::into);
        state.last_loss = saved.last_loss.map(Into::into);
        state.tokens = saved.tokens;
        state.seconds = saved.seconds.into();
        state.broken = saved.broken;
        state.unevaluated = saved.unevaluated.map(Into::into);
        state.base_loss = saved.base_loss.map(Into::into);
        Ok(trainer)
    }
}

/// What is read first.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl SavedOptions {
    fn restore(self) -> Result<TrainOptions, String> {
        let method = AdapterKind::from_name(&self.method)
            .ok_or_else(|| format!("unknown method '{}'", self.method))?;
        let template = self.template.map(|t| Template::parse(&t)).transpose();
        let mut o = TrainOptions::new(method);
        o.length = Some(self.length);
        // The rows come from the file.
        o.init = Some(Init::Random);
        o.reparam = Some(self.reparam);
        o.hidden = self.hidden;
        o.lstm_layers = self.lstm_layers;
        o.template = template.map_err(|e| e.to_string())?;
        o.freeze_first = self.freeze_first;
        o.loss = match self.loss {
            SavedObjective::Completion => Objective::Completion,
            SavedObjective::All => Objective::All,
            SavedObjective::Distill { context, top_k } => Objective::Distill { context, top_k },
        };
        o.label_smoothing = f64::from(self.label_smoothing) as f32;
        o.steps = Some(self.steps);
        o.batch = self.batch;
        o.accum = self.accum;
        o.max_len = self.max_len;
        o.lr = Some(self.lr.into());
        o.schedule = self.schedule;
        o.warmup = Some(self.warmup);
        o.optimizer = self.optimizer;
        o.betas = (self.betas[0].into(), self.betas[1].into());
        o.weight_decay = Some(self.weight_decay.into());
        o.clip = self.clip.into();
        o.dropout = f64::from(self.dropout) as f32;
        o.eval_every = Some(self.eval_every);
        o.patience = self.patience;
        o.seed = self.seed;
        o.threads = self.threads;
        o.memory = self.memory;
        o.n_ctx = self.n_ctx;
        o.name = self.name;
        Ok(o)
    }
}

/// The tensors of a checkpoint.
struct Tensors<'a> {
    file: &'a SafeTensors<'a>,
}

impl Tensors<'_> {
    fn f32(&self, name: &str) -> Result<Option<Vec<f32>>, String> {
        self.file
            .tensor(name)
            .ok()
            .map(|t| floats(name, &t))
            .transpose()
    }

    fn u32(&self, name: &str) -> Result<Vec<u32>, String> {
        let t = self.file.tensor(name).map_err(|e| e.to_string())?;
        if t.dtype() != Dtype::U32 {
            return Err(format!("tensor {name} has type {:?}", t.dtype()));
        }
        let ids = t.data().chunks_exact(4);
        Ok(ids
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }

    /// Tensors whose names begin with `prefix`, which is taken off.
    fn prefixed(&self, prefix: &str) -> Result<Vec<(String, Vec<f32>)>, String> {
        self.file
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix(prefix)?, t)))
            .map(|(name, t)| Ok((name.to_owned(), floats(name, &t)?)))
            .collect()
    }

    fn params(&self, frozen: usize) -> Result<Vec<Param>, String> {
        let param = |(name, t): (&str, TensorView<'_>)| {
            let rows = t.shape().first().copied().unwrap_or(0);
            if frozen > rows {
                return Err(format!(
                    "tensor {name} has {rows} rows, {frozen} of them frozen"
                ));
            }
            Ok(Param::new(name, t.shape(), floats(name, &t)?).with_frozen(frozen))
        };
        self.file
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix(PARAM)?, t)))
            .map(param)
            .collect()
    }
}

fn floats(name: &str, t: &TensorView<'_>) -> Result<Vec<f32>, String> {
    if t.dtype() != Dtype::F32 {
        return Err(format!("tensor {name} has type {:?}", t.dtype()));
    }
    let values: Vec<f32> = t
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    match values.iter().find(|v| !v.is_finite()) {
        Some(v) => Err(format!("tensor {name} holds {v}")),
        None => Ok(values),
    }
}

/// Of everything that a checkpoint says.
fn checksum<'a, 'b: 'a>(
    json: &str,
    tensors: impl Iterator<Item = (&'a str, &'a TensorView<'b>)>,
) -> String {
    let mut tensors: Vec<_> = tensors.collect();
    tensors.sort_by_key(|t| t.0);
    let mut hash = Sha256::new();
    hash.update(json);
    for (name, t) in tensors {
        hash.update(format!("\n{name} {:?} {:?}\n", t.dtype(), t.shape()));
        hash.update(t.data());
    }
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Identifies the weights of a file: other quantizations of one model share its fingerprint, but no run goes on with them to
/// the same result. All tensors count, by names, types, shapes and their first bytes: reading the rest would take longer than
/// many a step.
fn weights(model: &Model) -> String {
    let file = model.file();
    let mut tensors: Vec<_> = file.tensors().collect();
    tensors.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    let mut hash = Sha256::new();
    for (part, info) in tensors {
        hash.update(format!("\n{} {:?} {:?}\n", info.name, info.ty, info.ne));
        let bytes = &file.parts()[part].bytes()[info.range.clone()];
        hash.update(&bytes[..bytes.len().min(WEIGHT_BYTES)]);
    }
    hex(hash)
}

/// Bytes of each tensor that identify it.
const WEIGHT_BYTES: usize = 4096;

/// Identifies sequences: what is computed, what is predicted, and with which weight. A target counts as the token that follows
/// in the text, whatever a teacher says of it: the context is among the options, and the teacher may not have spoken yet.
fn hash(sequences: &[Sequence]) -> String {
    let mut hash = Sha256::new();
    for s in sequences {
        hash.update((s.slots.len() as u64).to_le_bytes());
        for slot in &s.slots {
            let id = match *slot {
                Slot::Token(id) => i64::from(id),
                Slot::Virtual(row) => -1 - row as i64,
            };
            hash.update(id.to_le_bytes());
        }
        hash.update(s.weight.to_le_bytes());
        hash.update((s.targets.len() as u64).to_le_bytes());
        for target in &s.targets {
            hash.update((target.at as u64).to_le_bytes());
            if let Slot::Token(id) = s.slots[target.at + 1] {
                hash.update(id.to_le_bytes());
                hash.update(1f32.to_le_bytes());
            }
        }
    }
    hex(hash)
}
