//! The encoder before the first step.

use super::data::Examples;
use super::encoder::{Encoder, normal_rows};
use super::pass::Passes;
use super::rng::{Rng, Stream};
use super::variables::Variables;
use super::{Init, Objective, Reparam, TrainError, TrainOptions};
use crate::adapter::{Adapter, AdapterKind};
use crate::error::Result;
use crate::model::Model;

/// Tokens whose keys and values [`Init::Mean`] looks at: enough for a mean, and less than a step costs.
const MEAN_TOKENS: usize = 512;

/// Noise of [`Init::Mean`] as a part of the deviation of the tokens' values.
const MEAN_NOISE: f32 = 0.2;

/// [`TrainOptions::init`] if it is not given, for a run of so many steps and passes over the data.
pub(super) fn default_init(o: &TrainOptions, steps: u64, epochs: f64) -> Init {
    match (o.method, o.effective_reparam(), &o.loss) {
        // Few directions are looked in: what the base knows already is a better place to start from.
        (_, Reparam::None, _) if o.mezo.is_some() => Init::Prompts,
        (AdapterKind::Prefix, Reparam::None, Objective::Distill { context, .. })
            if !context.is_empty() =>
        {
            Init::Text(context.clone())
        }
        // Frozen rows have to mean something.
        (AdapterKind::Prefix, Reparam::None, _)
            if steps >= TrainOptions::DEFAULT_STEPS && o.freeze_first == 0 =>
        {
            if epochs >= TrainOptions::MANY_EPOCHS {
                Init::Random
            } else {
                Init::Mean
            }
        }
        (AdapterKind::Prefix, Reparam::Mlp | Reparam::Lstm, _) => Init::Random,
        _ => Init::Prompts,
    }
}

/// The encoder before the first step.
pub(super) fn start(
    model: &Model,
    o: &TrainOptions,
    init: &Init,
    length: usize,
    passes: &mut Passes,
    train: &Examples,
) -> Result<Encoder> {
    let shape = model.shape();
    let mut rng = Rng::new(o.seed, Stream::Init);
    let reparam = o.effective_reparam();
    let width = match o.method {
        AdapterKind::Prefix => 2 * shape.kv_widths().sum::<usize>(),
        AdapterKind::Prompt | AdapterKind::PTuning => shape.n_embd,
    };
    let variables = match init {
        Init::Random => None,
        Init::Zeros => Some(Variables::from_encoder(
            o.method,
            shape,
            &vec![0.0; length * width],
        )?),
        Init::Adapter(adapter) => Some(adapter_rows(model, o, length, adapter)?),
        Init::Vocab => {
            let n = shape.n_vocab as f32;
            let ids: Vec<i32> = (0..length).map(|_| rng.uniform(0.0, n) as i32).collect();
            Some(Variables::virtual_tokens(shape, passes.embeddings(&ids)?))
        }
        Init::Text(text) => {
            // With BOS, as PEFT tokenizes it.
            let ids = model
                .vocab()
                .tokenize(text, o.method != AdapterKind::Prefix, true)?;
            Some(text_rows(model, o.method, length, &ids, passes)?)
        }
        Init::Prompts => {
            let ids = &train.ids()[..length.min(train.ids().len())];
            Some(text_rows(model, o.method, length, ids, passes)?)
        }
        Init::Mean => Some(mean_rows(model, length, train, passes, &mut rng)?),
    };
    // Encoders have PEFT's order.
    let rows = variables.map(|v| v.into_encoder(shape)).transpose()?;
    let encoder = match (o.method, reparam) {
        (_, Reparam::None) => {
            let rows = rows.unwrap_or_else(|| normal_rows(length, width, &mut rng));
            return Ok(Encoder::rows(rows, length, width, o.freeze_first));
        }
        (AdapterKind::Prefix, _) => {
            // PEFT's width of a layer.
            let input = shape.kv_widths().max().expect("a model has layers");
            Encoder::prefix_mlp(length, input, o.hidden.unwrap_or(input), width, &mut rng)
        }
        (_, Reparam::Mlp) => {
            Encoder::ptuning_mlp(length, width, o.hidden.unwrap_or(width), &mut rng)
        }
        (_, Reparam::Lstm) => {
            let hidden = o.hidden.unwrap_or(width);
            Encoder::ptuning_lstm(length, width, hidden, o.lstm_layers, &mut rng)
        }
    };
    Ok(match rows {
        Some(rows) => encoder.starting_at(&rows),
        None => encoder,
    })
}

/// The rows of an adapter to go on with.
fn adapter_rows(
    model: &Model,
    o: &TrainOptions,
    length: usize,
    adapter: &Adapter,
) -> Result<Variables> {
    adapter.check_fits(model.shape(), &model.fingerprint(), false)?;
    let describe =
        |kind: AdapterKind, length: usize| format!("a {kind} adapter of {length} virtual tokens");
    // Prompt and P-tuning rows are the same thing in different places.
    let same = (adapter.kind() == AdapterKind::Prefix) == (o.method == AdapterKind::Prefix);
    if !same || adapter.length() != length {
        return Err(TrainError::InitAdapter {
            got: describe(adapter.kind(), adapter.length()),
            expected: describe(o.method, length),
        }
        .into());
    }
    Ok(Variables::from_payload(adapter.payload(), model.shape()))
}

/// Rows of a prefix for [`Init::Mean`].
fn mean_rows(
    model: &Model,
    length: usize,
    train: &Examples,
    passes: &mut Passes,
    rng: &mut Rng,
) -> Result<Variables> {
    let shape = model.shape();
    // Keys, then values of each layer, one token behind the other.
    let mut seen: Vec<[Vec<f32>; 2]> = vec![Default::default(); shape.n_layer];
    for example in train.iter() {
        let left = MEAN_TOKENS - seen[0][0].len() / shape.kv_width(0);
        if left == 0 {
            break;
        }
        let first = model.vocab().leading_bos_if(example.bos);
        let longest = model.n_ctx_train().min(1 + left);
        let ids: Vec<i32> = first
            .into_iter()
            .chain(example.ids())
            .take(longest)
            .collect();
        if ids.len() < 2 {
            continue;
        }
        // The first token is the attention sink, like no other.
        let found = seen.iter_mut().zip(passes.keys_values(&ids)?);
        for ((all, new), width) in found.zip(shape.kv_widths()) {
            for (all, new) in all.iter_mut().zip(new) {
                all.extend(&new[width..]);
            }
        }
    }
    if seen[0][0].is_empty() {
        return Err(TrainError::EmptyInit.into());
    }
    let layers = seen.into_iter().zip(shape.kv_widths()).map(|(kv, width)| {
        let [k, v] = kv.map(|tokens| Moments::of(&tokens, width));
        let mut rows = |around: &[f32], deviation: f32| -> Vec<f32> {
            let around = around.iter().cycle().take(length * width);
            around
                .map(|x| x + MEAN_NOISE * deviation * rng.normal())
                .collect()
        };
        let k = rows(&k.mean, k.deviation);
        [k, rows(&[0.0], v.deviation)]
    });
    Ok(Variables::prefix(shape, layers.collect()))
}

/// Mean and spread of rows.
struct Moments {
    mean: Vec<f32>,
    /// Root mean square distance of a value from the mean of its column; of a single row, from 0.
    deviation: f32,
}

impl Moments {
    /// Of rows of `width` values, one behind the other; at least one.
    fn of(rows: &[f32], width: usize) -> Self {
        let n = (rows.len() / width) as f64;
        let (mut sum, mut squares) = (vec![0.0; width], 0.0);
        for row in rows.chunks_exact(width) {
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += f64::from(x);
                squares += f64::from(x) * f64::from(x);
            }
        }
        let of_means: f64 = match n {
            1.0 => 0.0,
            _ => sum.iter().map(|s| s * s / n).sum(),
        };
        Self {
            mean: sum.iter().map(|s| (s / n) as f32).collect(),
            deviation: ((squares - of_means).max(0.0) / rows.len() as f64).sqrt() as f32,
        }
    }
}

/// Rows made from a text, cut or repeated to `length` tokens.
fn text_rows(
    model: &Model,
    method: AdapterKind,
    length: usize,
    ids: &[i32],
    passes: &mut Passes,
) -> Result<Variables> {
    if ids.is_empty() {
        return Err(TrainError::EmptyInit.into());
    }
    match method {
        AdapterKind::Prompt | AdapterKind::PTuning => {
            let ids: Vec<i32> = ids.iter().cycle().take(length).copied().collect();
            Ok(Variables::virtual_tokens(
                model.shape(),
                passes.embeddings(&ids)?,
            ))
        }
        AdapterKind::Prefix => {
            // The base expects its attention sink first.
            let bos = model.vocab().leading_bos();
            let text = ids.iter().cycle();
            let ids: Vec<i32> = bos.iter().chain(text).take(length).copied().collect();
            Ok(Variables::prefix(model.shape(), passes.keys_values(&ids)?))
        }
    }
}
