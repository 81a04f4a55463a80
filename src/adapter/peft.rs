//! PEFT folders to adapters and back: row layout, key permutation, task composition.

use super::{
    Adapter, AdapterError, AdapterKind, BaseSignature, Matrix, Parts, Payload, PrefixLayer,
    check_length, differ,
};
use crate::Result;
use crate::file::peft::{PeftConfig, PeftFolder, PeftType, TaskFactors, write_folder};
use crate::model::{BaseShape, Fingerprint};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of PEFT whose folders [`export_peft`] writes.
const PEFT_VERSION: &str = "0.21.2";

/// Architectures whose models in Transformers before version 5 scaled virtual tokens by sqrt(D), as they scale embeddings.
const SCALED_ROWS: [&str; 2] = ["gemma", "gemma2"];

/// Choices of [`import_peft`]. Whoever imports virtual tokens for gemma or gemma2 without `row_factor` is warned in the log.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Which task of a MULTITASK_PROMPT_TUNING adapter, from 0; required there, refused elsewhere.
    pub task: Option<usize>,
    /// Multiplies embedding rows. Transformers before version 5 multiplied the rows of gemma and gemma2 adapters by sqrt(D)
    /// inside the model: give that factor for adapters trained there. Refused for prefixes.
    pub row_factor: Option<f32>,
    /// Name of the new adapter.
    pub name: Option<String>,
}

/// Imports the PEFT folder `dir` for the base of shape `base`: PREFIX_TUNING and CARTRIDGE become prefix adapters,
/// P_TUNING a P-tuning adapter without template (all virtual tokens in front), PROMPT_TUNING, MULTITASK_PROMPT_TUNING (one
/// task of it) and CPT prompt adapters. Values stay in single precision. PEFT does not say which weights an adapter was trained
/// on: `fingerprint` is the caller's statement.
///
/// # Errors
/// [`crate::Error::Peft`] if the folder is malformed or of another type, [`crate::Error::Adapter`] if it does not fit the base or
/// the options do not fit the type, [`crate::Error::Io`].
pub fn import_peft(
    dir: &Path,
    base: &BaseShape,
    fingerprint: Option<Fingerprint>,
    options: &ImportOptions,
) -> Result<Adapter> {
    let folder = PeftFolder::read(dir)?;
    Ok(Adapter::from_peft(folder, base, fingerprint, options)?)
}

impl Adapter {
    /// As [`import_peft`], from a folder that was read before.
    pub fn from_peft(
        folder: PeftFolder,
        base: &BaseShape,
        fingerprint: Option<Fingerprint>,
        options: &ImportOptions,
    ) -> Result<Self, AdapterError> {
        check_base(&folder.config, base)?;
        check_length(folder.config.num_virtual_tokens)?;
        let peft_type = folder.config.peft_type;
        let mut values = folder.prompt_embeddings.data;
        match (&folder.tasks, options.task) {
            (None, None) => {}
            (None, Some(_)) => {
                return Err(AdapterError::TaskNotApplicable {
                    peft_type: peft_type.name(),
                });
            }
            (Some(factors), task) => compose_task(&mut values, factors, task)?,
        }
        match options.row_factor {
            Some(_) if peft_type.is_prefix() => {
                return Err(AdapterError::RowFactorNotApplicable {
                    peft_type: peft_type.name(),
                });
            }
            Some(factor) if factor == 0.0 || !factor.is_finite() => {
                return Err(AdapterError::BadRowFactor { factor });
            }
            Some(factor) => values.iter_mut().for_each(|x| *x *= factor),
            None if !peft_type.is_prefix() && SCALED_ROWS.contains(&&*base.architecture) => {
                tracing::warn!(
                    "virtual tokens for {} that were trained with Transformers before version 5 need a row factor of {} \
                     (--row-factor); those of later versions are right as they are (--row-factor 1)",
                    base.architecture,
                    (base.n_embd as f32).sqrt()
                );
            }
            None => {}
        }
        let (kind, payload) = match peft_type {
            PeftType::PrefixTuning | PeftType::Cartridge => {
                let layers = layers_from_peft(&values, base)?;
                (AdapterKind::Prefix, Payload::prefix(layers, base)?)
            }
            PeftType::PTuning => (
                AdapterKind::PTuning,
                Payload::VirtualTokens(Matrix::from_f32(base.n_embd, values)?),
            ),
            PeftType::PromptTuning | PeftType::MultitaskPromptTuning | PeftType::Cpt => (
                AdapterKind::Prompt,
                Payload::VirtualTokens(Matrix::from_f32(base.n_embd, values)?),
            ),
        };
        Self::new(Parts {
            kind,
            payload,
            template: None,
            name: options.name.clone(),
            fingerprint,
            base: BaseSignature::from(base),
            provenance: provenance(&folder.config, options.task),
        })
    }
}

/// Writes `adapter` as a folder that PEFT 0.21 loads: PREFIX_TUNING, PROMPT_TUNING or P_TUNING, in single precision, for the
/// base of shape `base` that Transformers knows as `base_name`. Importing the folder gives the same rows back.
///
/// # Errors
/// [`AdapterError::ExportTemplate`] for an adapter with a template, the mismatch if `base` is not the adapter's,
/// [`crate::Error::Io`].
pub fn export_peft(adapter: &Adapter, base: &BaseShape, dir: &Path, base_name: &str) -> Result<()> {
    adapter.base().check_agrees(&BaseSignature::from(base))?;
    if let Some(template) = adapter.template() {
        return Err(AdapterError::ExportTemplate {
            template: template.to_string(),
        }
        .into());
    }
    let peft_type = match adapter.kind() {
        AdapterKind::Prefix => PeftType::PrefixTuning,
        AdapterKind::Prompt => PeftType::PromptTuning,
        AdapterKind::PTuning => PeftType::PTuning,
    };
    let (token_dim, heads, values) = match adapter.payload() {
        Payload::Prefix { layers } => {
            let (width, heads) = prefix_width(base)?;
            let layers: Vec<_> = layers.iter().map(PrefixLayer::to_f32).collect();
            (width, heads, layers_to_peft(&layers, base)?)
        }
        Payload::VirtualTokens(rows) => {
            // Only prefixes depend on it; PEFT wants a number.
            let heads = base.n_head.get(0).unwrap_or(1);
            (base.n_embd, heads, rows.to_f32())
        }
    };
    let config = PeftConfig {
        peft_type,
        num_virtual_tokens: adapter.length(),
        num_layers: base.n_layer,
        num_attention_heads: heads,
        token_dim,
        num_frozen_tokens: None,
        base_model_name_or_path: Some(base_name.to_owned()),
        peft_version: Some(PEFT_VERSION.to_owned()),
    };
    write_folder(dir, &config, &values)
}

/// Compares the configuration, with which the tensors agree, with the base.
fn check_base(config: &PeftConfig, base: &BaseShape) -> Result<(), AdapterError> {
    let check = |adapter, base| differ(Some(adapter), Some(base));
    if let Some((adapter, base)) = check(config.num_layers, base.n_layer) {
        return Err(AdapterError::LayerMismatch { adapter, base });
    }
    if config.peft_type.is_prefix() {
        let (width, heads) = prefix_width(base)?;
        if let Some((adapter, base)) = check(config.token_dim, width) {
            return Err(AdapterError::KvWidthMismatch { adapter, base });
        }
        if let Some((adapter, base)) = check(config.num_attention_heads, heads) {
            return Err(AdapterError::KvHeadMismatch { adapter, base });
        }
    } else {
        if let Some((adapter, base)) = check(config.token_dim, base.n_embd) {
            return Err(AdapterError::EmbeddingMismatch { adapter, base });
        }
        let heads = base.n_head.uniform();
        if let Some((adapter, base)) = differ(Some(config.num_attention_heads), heads) {
            return Err(AdapterError::HeadMismatch { adapter, base });
        }
    }
    Ok(())
}

fn provenance(config: &PeftConfig, task: Option<usize>) -> BTreeMap<String, String> {
    let source = match &config.peft_version {
        Some(version) => format!("peft {version}"),
        None => "peft".to_owned(),
    };
    let facts = [
        ("method", Some(config.peft_type.name().to_ascii_lowercase())),
        ("source", Some(source)),
        ("base_name", config.base_model_name_or_path.clone()),
        (
            "frozen_tokens",
            config.num_frozen_tokens.map(|n| n.to_string()),
        ),
        ("task", task.map(|n| n.to_string())),
    ];
    facts
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect()
}

/// rows[t] *= cols[task][t] @ rows[task], element-wise; `values` `ne = [D, P]` (Wang 2023, multitask prompt tuning).
fn compose_task(
    values: &mut [f32],
    factors: &TaskFactors,
    task: Option<usize>,
) -> Result<(), AdapterError> {
    let &[tasks, p, rank] = factors.cols.shape.as_slice() else {
        unreachable!("PeftFolder checks the shape")
    };
    let task = match task {
        None => return Err(AdapterError::TaskRequired { tasks }),
        Some(task) if task >= tasks => return Err(AdapterError::TaskOutOfRange { task, tasks }),
        Some(task) => task,
    };
    let width = values.len() / p;
    let cols = &factors.cols.data[task * p * rank..][..p * rank];
    let rows = &factors.rows.data[task * rank * width..][..rank * width];
    for (out, col) in values.chunks_exact_mut(width).zip(cols.chunks_exact(rank)) {
        for (i, x) in out.iter_mut().enumerate() {
            *x *= col
                .iter()
                .zip(rows[i..].iter().step_by(width))
                .map(|(c, r)| c * r)
                .sum::<f32>();
        }
    }
    Ok(())
}

/// W `ne = [sum of 2*Hk*d over the layers, P]` to keys and values `ne = [Hk*d, P]` of each layer in the base's order: each row of
/// W holds the first layer's keys, its values, the second layer's keys and so on. In PEFT all layers are of one width.
pub(crate) fn layers_from_peft(
    values: &[f32],
    base: &BaseShape,
) -> Result<Vec<[Vec<f32>; 2]>, AdapterError> {
    let row_width = 2 * base.kv_widths().sum::<usize>();
    let mut start = 0;
    let mut layers = Vec::with_capacity(base.n_layer);
    for (il, width) in base.kv_widths().enumerate() {
        let order = key_order(base, il)?;
        let take = |start: usize, order: &dyn Fn(usize) -> usize| -> Vec<f32> {
            let rows = values.chunks_exact(row_width);
            let rows = rows.map(|row| &row[start..][..width]);
            rows.flat_map(|row| (0..width).map(|i| row[order(i)]))
                .collect()
        };
        layers.push([take(start, &|i| order[i]), take(start + width, &|i| i)]);
        start += 2 * width;
    }
    Ok(layers)
}

/// The inverse of [`layers_from_peft`].
pub(crate) fn layers_to_peft(
    layers: &[[Vec<f32>; 2]],
    base: &BaseShape,
) -> Result<Vec<f32>, AdapterError> {
    let row_width = 2 * base.kv_widths().sum::<usize>();
    let mut out = vec![0.0; layers.iter().flatten().map(Vec::len).sum()];
    let mut start = 0;
    for (il, ([keys, values], width)) in layers.iter().zip(base.kv_widths()).enumerate() {
        let order = key_order(base, il)?;
        let pairs = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (row, (k, v)) in out.chunks_exact_mut(row_width).zip(pairs) {
            let (k_out, v_out) = row[start..][..2 * width].split_at_mut(width);
            order.iter().zip(k).for_each(|(&from, &x)| k_out[from] = x);
            v_out.copy_from_slice(v);
        }
        start += 2 * width;
    }
    Ok(out)
}

/// Width of a K or V row, and the heads it consists of: PEFT knows one of each for all layers.
fn prefix_width(base: &BaseShape) -> Result<(usize, usize), AdapterError> {
    let sizes = base.n_head_kv.uniform().zip(base.head_dim.uniform());
    let (heads, head_dim) = sizes.ok_or(AdapterError::LayersDiffer)?;
    Ok((heads * head_dim, heads))
}

/// For each element of a key row of layer `il` in the base's order, its index in PEFT's: per KV head
/// new[2i+j] = old[j*d/2 + i], j in {0, 1},
/// where the converter permuted the rows of q and k.
fn key_order(base: &BaseShape, il: usize) -> Result<Vec<usize>, AdapterError> {
    let width = base.kv_width(il);
    if !base.qk_permuted {
        return Ok((0..width).collect());
    }
    let d = base.head_dim.get(il).expect("a layer of the base");
    if !d.is_multiple_of(2) {
        return Err(AdapterError::OddHeadSize { head_dim: d });
    }
    let in_head = |i: usize| i / d * d + i % 2 * (d / 2) + i % d / 2;
    Ok((0..width).map(in_head).collect())
}
