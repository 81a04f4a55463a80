//! Passes by libllama's decoder, which has no way back: losses at two opposite points tell how steep the loss is between them (MeZO, Malladi et al. 2023).

use super::{Goal, Outcome};
use crate::adapter::Payload;
use crate::error::{Error, Result};
use crate::file::types::GgmlType;
use crate::ggml::{expected_logit, rows_to_f32};
use crate::host::{Fed, HostError, Llama, LlamaOptions, LlamaPart, Piece};
use crate::kernels::log_sum_exp;
use crate::model::{LlamaModel, Model, ModelError};
use crate::train::batch::{Packed, Slot};
use crate::train::rng::{Rng, RngState, Stream};
use crate::train::variables::Variables;
use crate::train::{Mezo, TrainError};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Words of the generator that a step draws at most, as a power of two: each step begins at a multiple of it, whatever was drawn before.
const STEP_WORDS: u32 = 36;
/// Texts that are computed at a time: more share no more of the weights' way through the caches.
const MAX_TEXTS: usize = 64;
/// Rows of a point at a time.
const MAX_ROWS: usize = 32;
/// Tokens of all texts at a time, if one alone is not longer: each attends to the cells of all of them.
const MAX_TOKENS: usize = 1024;
/// Bytes of logits at a time.
const LOGIT_BYTES: usize = 64 << 20;
/// Matrices of smaller values are looked at from this far.
const LEAST_SCALE: f32 = 1e-2;

/// Runs passes over one base by libllama.
pub(crate) struct Blind {
    model: Model,
    llama: Arc<LlamaModel>,
    /// Made when a batch needs it, and made anew when one needs more.
    context: Option<Room>,
    n_threads: usize,
    mezo: Mezo,
    rng: Rng,
}

/// A context, and what it has room for.
struct Room {
    llama: Llama,
    cells: usize,
}

/// Slots of one kind, all with logits or none, as a step takes them.
struct Run {
    piece: Piece,
    /// Of the slots in the batch.
    slots: Range<usize>,
    position: usize,
    wanted: bool,
}

impl Blind {
    pub(super) fn new(model: &Model, mezo: Mezo, seed: u64, n_threads: usize) -> Result<Self> {
        let llama = match model.computed_by() {
            Ok(_) => Arc::new(LlamaModel::load(model.file(), false)?),
            Err(llama) => llama.clone(),
        };
        Ok(Self {
            model: model.clone(),
            llama,
            context: None,
            n_threads,
            mezo,
            rng: Rng::new(seed, Stream::Direction),
        })
    }

    pub(super) fn set_threads(&mut self, n: usize) {
        self.n_threads = n;
        self.context = None;
    }

    /// Directions depend on the seed and on how many steps were taken, and on nothing else: a run that is resumed looks where it would have looked.
    pub(super) fn begin_step(&mut self, step: u64) {
        self.rng = Rng::from_state(RngState {
            word_pos: step << STEP_WORDS,
            ..self.rng.state()
        });
    }

    pub(super) fn run(
        &mut self,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
        smoothing: f32,
        goal: Goal,
        cancel: Option<&AtomicBool>,
    ) -> Result<Outcome> {
        let (losses, gradients) = match goal {
            Goal::Gradients => {
                let (losses, gradient) =
                    self.estimate(batch, variables, scale, smoothing, cancel)?;
                (losses, Some(gradient))
            }
            _ => {
                let all = self.losses(batch, std::slice::from_ref(variables), smoothing, cancel)?;
                (all.into_iter().next().unwrap_or_default(), None)
            }
        };
        Ok(Outcome {
            losses,
            gradients,
            predictions: Vec::new(),
            recomputed: 0,
        })
    }

    /// Losses around `variables`, and what stands for the gradient.
    fn estimate(
        &mut self,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
        smoothing: f32,
        cancel: Option<&AtomicBool>,
    ) -> Result<(Vec<f32>, Variables)> {
        let Mezo {
            directions: n,
            epsilon,
        } = self.mezo;
        // The same share of what is there, whatever its size.
        let mut scales = Vec::new();
        variables.map(|values| {
            let squares: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
            let rms = (squares / values.len() as f64).sqrt() as f32;
            scales.push(rms.max(LEAST_SCALE));
            Vec::new()
        });
        let mut directions = Vec::with_capacity(n);
        let mut points = Vec::with_capacity(2 * n);
        for _ in 0..n {
            let rng = &mut self.rng;
            let direction = variables.map(|values| values.iter().map(|_| rng.normal()).collect());
            for sign in [epsilon, -epsilon] {
                let mut point = scaled(&direction, |matrix| sign * scales[matrix]);
                point.add(variables);
                points.push(point);
            }
            directions.push(direction);
        }
        let losses = self.losses(batch, &points, smoothing, cancel)?;
        let weighted = |losses: &[f32]| -> f64 {
            let pairs = losses.iter().zip(&batch.weights);
            let sum: f64 = pairs.map(|(&l, &w)| f64::from(l) * f64::from(w)).sum();
            sum * scale
        };
        let mut gradient = variables.zeros();
        for (direction, pair) in directions.iter().zip(losses.chunks_exact(2)) {
            let rise = weighted(&pair[0]) - weighted(&pair[1]);
            let steep = (rise / (2.0 * f64::from(epsilon) * n as f64)) as f32;
            gradient.add(&scaled(direction, |matrix| steep / scales[matrix]));
        }
        let mean = |i: usize| {
            let sum: f32 = losses.iter().map(|of_point| of_point[i]).sum();
            sum / losses.len() as f32
        };
        Ok(((0..batch.outputs.len()).map(mean).collect(), gradient))
    }

    /// The loss of each target, at each point.
    fn losses(
        &mut self,
        batch: &Packed,
        points: &[Variables],
        smoothing: f32,
        cancel: Option<&AtomicBool>,
    ) -> Result<Vec<Vec<f32>>> {
        let texts = texts(batch);
        let prefix = points[0].prefix_length();
        let tokens = batch.n_tokens() + prefix;
        let at_once = (MAX_TEXTS / texts).min(MAX_TOKENS / tokens).max(1);
        let at_once = at_once.min(points.len());
        let mut all = Vec::with_capacity(points.len());
        for points in points.chunks(at_once) {
            let room = self.room(at_once * texts, at_once * tokens)?;
            let found = room.losses(batch, points, smoothing, cancel);
            // What is left of an interrupted step must not stand in the next one's way.
            let cleared = (0..(points.len() * texts) as i32).try_for_each(|s| room.llama.clear(s));
            all.extend(found?);
            cleared?;
        }
        Ok(all)
    }

    /// A context for so many texts of so many tokens together.
    fn room(&mut self, texts: usize, cells: usize) -> Result<&mut Room> {
        let texts = texts.max(MAX_TEXTS + 1);
        let is_enough = |room: &Room| room.cells >= cells && room.texts() >= texts;
        if !self.context.as_ref().is_some_and(is_enough) {
            let cells = cells.next_power_of_two().max(MAX_TOKENS);
            let options = LlamaOptions {
                n_ctx: cells,
                n_sequences: texts,
                kv_unified: true,
                type_k: GgmlType::F32,
                type_v: GgmlType::F32,
                flash_attention: None,
                swa_full: true,
                n_threads: Some(self.n_threads),
            };
            let base = self.model.base().clone();
            let llama = Llama::new(&self.llama, base, &options)?;
            self.context = Some(Room { llama, cells });
        }
        Ok(self.context.as_mut().expect("just made"))
    }

    /// Bytes of keys, values and logits.
    pub(super) fn memory(&self, batch: &Packed, variables: &Variables) -> usize {
        let widths: usize = self.model.shape().kv_widths().sum();
        let tokens = (batch.n_tokens() + variables.prefix_length()).max(MAX_TOKENS);
        8 * widths * tokens.next_power_of_two() + LOGIT_BYTES
    }

    /// Rows of the embedding table, as they enter the first layer.
    pub(super) fn embeddings(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let name = "token_embd.weight";
        let (file, shape) = (self.model.file(), self.model.shape());
        let missing = || Error::Model {
            path: self.model.path().to_owned(),
            source: ModelError::MissingTensor {
                tensor: name.to_owned(),
            },
        };
        let (_, info) = file.tensor(name).ok_or_else(missing)?;
        let bytes = file.tensor_bytes(name).ok_or_else(missing)?;
        let row_bytes = bytes.len() / shape.n_vocab;
        // What Gemma multiplies its tokens by, virtual ones have in them.
        let factor = match shape.architecture.starts_with("gemma") {
            true => (shape.n_embd as f32).sqrt(),
            false => 1.0,
        };
        let row = |&id: &i32| {
            let row = &bytes[id as usize * row_bytes..][..row_bytes];
            rows_to_f32(info.ty, row, shape.n_embd)
        };
        Ok(ids.iter().flat_map(row).map(|x| factor * x).collect())
    }

    /// Keys and values that the base computes for a text, for each layer keys, then values `ne = [Hk d, n]`.
    pub(super) fn keys_values(&mut self, ids: &[i32]) -> Result<Vec<[Vec<f32>; 2]>> {
        let room = self.room(1, ids.len())?;
        Ok(room.llama.host().rows_of(ids, 0)?)
    }
}

/// Texts of a point: one for what all rows begin with, and as many rows as are computed at a time.
fn texts(batch: &Packed) -> usize {
    1 + batch.rows.len().min(MAX_ROWS)
}

impl Room {
    fn texts(&self) -> usize {
        self.llama.n_sequences()
    }

    /// The loss of each target, at each point. Text 0 of a point is what all rows begin with, the others are the rows.
    fn losses(
        &mut self,
        batch: &Packed,
        points: &[Variables],
        smoothing: f32,
        cancel: Option<&AtomicBool>,
    ) -> Result<Vec<Vec<f32>>> {
        let texts = texts(batch);
        let text = |point: usize, i: usize| (point * texts + i) as i32;
        let mut logits = Logits::new(batch, points.len(), smoothing);
        let mut begins = Vec::new();
        for (p, point) in points.iter().enumerate() {
            if let Variables::Prefix { .. } = point {
                let shape = self.llama.host().base().shape().clone();
                let payload: Payload = point.clone().into_payload(&shape)?;
                let graft = self.llama.host().graft_of(&payload, text(p, 0))?;
                self.llama.put(&graft, text(p, 0))?;
            }
            let runs = runs(batch, &logits.targets, 0..batch.shared, point);
            begins.extend(runs.into_iter().map(|run| (p, text(p, 0), run)));
        }
        let prefix = points[0].prefix_length();
        self.compute(&begins, prefix, &mut logits, cancel)?;
        for now in batch.rows.chunks(texts - 1) {
            let mut rows = Vec::new();
            for (p, point) in points.iter().enumerate() {
                for (i, row) in now.iter().enumerate() {
                    let seq = text(p, 1 + i);
                    self.llama.clear(seq)?;
                    if prefix + batch.shared > 0 {
                        self.llama.host().copy(text(p, 0), seq)?;
                    }
                    let runs = runs(batch, &logits.targets, row.clone(), point);
                    rows.extend(runs.into_iter().map(|run| (p, seq, run)));
                }
            }
            self.compute(&rows, prefix, &mut logits, cancel)?;
        }
        Ok(logits.losses)
    }

    /// Computes runs of texts in order, as many at a time as there is room for their logits.
    fn compute(
        &mut self,
        runs: &[(usize, i32, Run)],
        prefix: usize,
        logits: &mut Logits<'_>,
        cancel: Option<&AtomicBool>,
    ) -> Result<()> {
        let width = self.llama.host().base().shape().n_embd;
        let most = (LOGIT_BYTES / size_of::<f32>() / self.llama.n_vocab()).max(1);
        let mut rest = runs;
        let mut found = Vec::new();
        while !rest.is_empty() {
            if cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(TrainError::Cancelled.into());
            }
            let mut outputs = 0;
            let n = rest.iter().take_while(|(.., run)| {
                outputs += if run.wanted { run.slots.len() } else { 0 };
                outputs <= most
            });
            let (now, later) = rest.split_at(n.count().max(1));
            let parts = now.iter().map(|(_, seq, run)| LlamaPart {
                seq: *seq,
                position: prefix + run.position,
                fed: match &run.piece {
                    Piece::Tokens(tokens) => Fed::Tokens(tokens),
                    Piece::Rows(rows) => Fed::Rows(rows),
                },
                outputs: 0..if run.wanted { run.piece.len(width) } else { 0 },
            });
            let parts: Vec<_> = parts.collect();
            found.clear();
            self.llama.step(&parts, &mut found).map_err(|e| match e {
                HostError::Decode { code: 1, .. } => Error::from(TrainError::OutOfMemory),
                e => e.into(),
            })?;
            logits.take(now, &found);
            rest = later;
        }
        Ok(())
    }
}

/// From logits to losses, as they come.
struct Logits<'a> {
    batch: &'a Packed,
    /// The targets of each slot that has some.
    targets: HashMap<usize, Vec<usize>>,
    smoothing: f32,
    /// Of each point.
    losses: Vec<Vec<f32>>,
}

impl<'a> Logits<'a> {
    fn new(batch: &'a Packed, points: usize, smoothing: f32) -> Self {
        Self {
            targets: targets(batch),
            batch,
            smoothing,
            losses: vec![vec![0.0; batch.outputs.len()]; points],
        }
    }

    /// What came of some runs.
    fn take(&mut self, runs: &[(usize, i32, Run)], logits: &[f32]) {
        let wanted = runs.iter().filter(|(.., run)| run.wanted);
        let slots = wanted.flat_map(|(p, _, run)| run.slots.clone().map(move |slot| (*p, slot)));
        let slots: Vec<_> = slots.collect();
        if slots.is_empty() {
            return;
        }
        let n_vocab = logits.len() / slots.len();
        for ((point, slot), row) in slots.into_iter().zip(logits.chunks_exact(n_vocab)) {
            let log_sum = log_sum_exp(row);
            for &target in &self.targets[&slot] {
                let tokens = self.batch.targets[target].iter();
                let (mass, expected) = expected_logit(row, tokens, self.smoothing);
                self.losses[point][target] = (mass * log_sum - expected) as f32;
            }
        }
    }
}

/// Variables of the same shape, each matrix multiplied by its factor.
fn scaled(variables: &Variables, factor: impl Fn(usize) -> f32) -> Variables {
    let mut matrix = 0;
    variables.map(|values| {
        let factor = factor(matrix);
        matrix += 1;
        values.iter().map(|x| factor * x).collect()
    })
}

/// The targets of each slot that has some.
fn targets(batch: &Packed) -> HashMap<usize, Vec<usize>> {
    let mut targets: HashMap<usize, Vec<usize>> = HashMap::new();
    for (target, &slot) in batch.outputs.iter().enumerate() {
        targets.entry(slot).or_default().push(target);
    }
    targets
}

/// Some slots of a batch, cut where their kind changes, or whether their logits are wanted.
fn runs(
    batch: &Packed,
    targets: &HashMap<usize, Vec<usize>>,
    slots: Range<usize>,
    point: &Variables,
) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for slot in slots {
        let wanted = targets.contains_key(&slot);
        if !runs
            .last()
            .is_some_and(|run| run.takes(batch.slots[slot], wanted))
        {
            runs.push(Run {
                piece: match batch.slots[slot] {
                    Slot::Token(_) => Piece::Tokens(Vec::new()),
                    Slot::Virtual(_) => Piece::Rows(Vec::new()),
                },
                slots: slot..slot,
                position: batch.positions[slot],
                wanted,
            });
        }
        let run = runs.last_mut().expect("just pushed");
        run.slots.end = slot + 1;
        match (&mut run.piece, batch.slots[slot], point) {
            (Piece::Tokens(tokens), Slot::Token(id), _) => tokens.push(id),
            (Piece::Rows(rows), Slot::Virtual(i), Variables::Virtual { length, values }) => {
                let width = values.len() / length;
                rows.extend_from_slice(&values[i * width..(i + 1) * width]);
            }
            _ => panic!("virtual slots are those of virtual tokens"),
        }
    }
    runs
}

impl Run {
    fn takes(&self, slot: Slot, wanted: bool) -> bool {
        let same = matches!(
            (&self.piece, slot),
            (Piece::Tokens(_), Slot::Token(_)) | (Piece::Rows(_), Slot::Virtual(_))
        );
        same && self.wanted == wanted
    }
}
