//! A run on disk: everything that the next step depends on, so that a resumed run equals the uninterrupted one bit for bit.
//!
//! A safetensors file. Its metadata holds one JSON text under the key `ggraft` and, under `sha256`, the hash of that text and
//! all tensors; tensors are F32, except the order of the data (U32).

mod saved;

use super::TrainError;
use super::batch::{Sequence, Slot};
use super::data::Examples;
use super::encoder::Encoder;
use super::param::Param;
use super::rng::Rng;
use super::trainer::{Best, State, Trainer};
use super::{Init, TrainOptions};
use crate::error::{Error, Result};
use crate::file::atomic::write_atomic;
use crate::file::read::read_capped;
use crate::model::{Model, hex};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use saved::Saved;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;

/// Grows when the meaning of anything in the file changes.
const VERSION: u32 = 3;
/// Keys of the metadata: the JSON text, and the hash of it and all tensors.
const KEY: &str = "ggraft";
const HASH: &str = "sha256";
/// Largest file that is read: far beyond any run.
const MAX_BYTES: u64 = 16 << 30;

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

    /// Continues the run that [`Trainer::save_checkpoint`] wrote to `path`, with the same base and the same data.
    ///
    /// # Errors
    /// [`Error::Io`], [`TrainError::Checkpoint`], [`TrainError::OtherRun`], and as [`Trainer::new`].
    pub fn resume(
        model: &Model,
        path: &Path,
        train: impl Into<Examples>,
        valid: impl Into<Examples>,
    ) -> Result<Self> {
        let too_large = |size| unusable(path, format!("{size} bytes")).into();
        let bytes = read_capped(path, MAX_BYTES, too_large)?;
        let (saved, file) = parse(path, &bytes)?;
        let tensors = Tensors { file: &file };
        check_base(path, &saved, model)?;
        let unusable = |why: String| unusable(path, why);
        let state_error = |e: super::StateError| unusable(e.to_string());
        let options = TrainOptions {
            // The rows come from the file.
            init: Some(Init::Random),
            ..saved.options.clone()
        };
        let params = tensors.params(options.freeze_first).map_err(unusable)?;
        let mut encoder = Encoder::from_params(saved.encoder, params).map_err(state_error)?;
        if let Some(base) = tensors.f32(BASE).map_err(unusable)? {
            encoder = encoder.with_base(base).map_err(state_error)?;
        }
        let mut trainer =
            Self::prepare(model, options, [train.into(), valid.into()], Some(encoder))?;
        let what = ["other training data", "other validation data"];
        for ((found, saved), what) in trainer.identity().data.iter().zip(&saved.data).zip(what) {
            if found != saved {
                let path = path.to_owned();
                return Err(TrainError::OtherRun { path, what }.into());
            }
        }
        let n = trainer.train.len();
        trainer
            .state
            .restore(saved, &tensors, n)
            .map_err(unusable)?;
        Ok(trainer)
    }

    /// They stay what they are, and hashing them takes longer than many a step.
    pub(super) fn identity(&self) -> &Identity {
        self.identity.get_or_init(|| Identity {
            data: [&self.train, &self.valid].map(|set| hash(set.iter(&self.layout))),
            weights: self.model.weights_checksum(),
        })
    }
}

/// Hashes of what a run must find again to go on.
pub(super) struct Identity {
    /// The training and the validation rows.
    data: [String; 2],
    /// Of the base.
    weights: String,
}

impl State {
    /// What was saved, but for the encoder, whose rows it has to fit; over `n` training rows.
    fn restore(&mut self, saved: Saved, tensors: &Tensors<'_>, n: usize) -> Result<(), String> {
        let rows = self.good.len();
        let rows_of = |name: &str| match tensors.f32(name)? {
            Some(values) if values.len() == rows => Ok(values),
            _ => Err(format!("tensor {name} is missing or of the wrong size")),
        };
        let ids_of = |name: &str| {
            let ids = tensors.u32(name)?;
            match ids.iter().find(|&&id| id as usize >= n) {
                Some(id) => Err(format!("tensor {name}: there is no row {id}")),
                None => Ok(ids),
            }
        };
        let (order, drawn) = (ids_of(ORDER)?, ids_of(DRAWN)?);
        if saved.used > order.len() || !(order.is_empty() || order.len() == n) {
            return Err("the order of the data does not fit the data".to_owned());
        }
        self.optimizer
            .load_state(saved.optimizer_steps, tensors.prefixed(OPTIMIZER)?)
            .map_err(|e| e.to_string())?;
        self.best = match saved.best {
            Some((step, loss)) => Some(Best {
                step,
                loss,
                rows: rows_of(BEST)?,
            }),
            None => None,
        };
        self.good = rows_of(GOOD)?;
        self.step = saved.step;
        self.shuffle = Rng::from_state(saved.shuffle);
        self.dropout = Rng::from_state(saved.dropout);
        self.order = order;
        self.used = saved.used;
        self.drawn = drawn;
        self.stale = saved.stale;
        self.first_loss = saved.first_loss;
        self.last_loss = saved.last_loss;
        self.tokens = saved.tokens;
        self.seconds = saved.seconds;
        self.broken = saved.broken;
        self.unevaluated = saved.unevaluated;
        self.base_loss = saved.base_loss;
        Ok(())
    }
}

fn unusable(path: &Path, why: String) -> TrainError {
    TrainError::Checkpoint {
        path: path.to_owned(),
        why,
    }
}

/// What a checkpoint says and its tensors, if it is whole.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Saved, SafeTensors<'a>), TrainError> {
    let unusable = |why: String| unusable(path, why);
    let wrong = |e: safetensors::SafeTensorError| unusable(e.to_string());
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(wrong)?;
    let json = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get(KEY))
        .ok_or_else(|| unusable("it was not written by ggraft".to_owned()))?;
    let version: Version = serde_json::from_str(json).map_err(|e| unusable(e.to_string()))?;
    if version.version != VERSION {
        let why = format!("format version {}, expected {VERSION}", version.version);
        return Err(unusable(why));
    }
    let file = SafeTensors::deserialize(bytes).map_err(wrong)?;
    let found = file.tensors();
    let sum = checksum(json, found.iter().map(|(name, view)| (name.as_str(), view)));
    if header.metadata().as_ref().and_then(|m| m.get(HASH)) != Some(&sum) {
        return Err(unusable("it is damaged: its checksum is wrong".to_owned()));
    }
    let saved = serde_json::from_str(json).map_err(|e| unusable(e.to_string()))?;
    Ok((saved, file))
}

/// The run was one on this base, with these weights.
fn check_base(path: &Path, saved: &Saved, model: &Model) -> Result<(), TrainError> {
    let what = if saved.base != model.fingerprint().to_string() {
        "another base model"
    } else if saved.weights != model.weights_checksum() {
        "another file of this base model, whose weights are rounded differently"
    } else {
        return Ok(());
    };
    let path = path.to_owned();
    Err(TrainError::OtherRun { path, what })
}

/// What is read first.
#[derive(Deserialize)]
struct Version {
    version: u32,
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

/// Identifies sequences: what is computed, what is predicted, and with which weight. A target counts as the token that follows
/// in the text, whatever a teacher says of it: the context is among the options, and the teacher may not have spoken yet.
fn hash(sequences: impl Iterator<Item = Sequence>) -> String {
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
