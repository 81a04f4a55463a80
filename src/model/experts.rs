//! What the metadata says of feed-forward networks: dense ones, and mixtures of experts (Shazeer et al. 2017).

use super::ModelError;
use super::arch::{ArchSpec, ExpertSpec, SharedSpec, Weighting};
use super::keys::{Keys, MAX_SIZE};

/// llama.cpp's own limit of experts.
const MAX_EXPERTS: usize = 1024;
/// `expert_gating_func` of probabilities by softmax.
const SOFTMAX: usize = 1;
/// The same of probabilities among those that were chosen.
const SOFTMAX_OF_CHOSEN: usize = 3;

/// Sizes of a layer's feed-forward network. Letters as in the design: F.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FfnShape {
    Dense {
        /// F.
        n_ff: usize,
    },
    Experts(ExpertShape),
}

/// Sizes of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpertShape {
    /// E, 1 to 1024.
    pub(crate) n_expert: usize,
    /// Experts that each token goes through, 1 to E.
    pub(crate) n_used: usize,
    /// F of an expert.
    pub(crate) n_ff: usize,
    /// F of the expert that all tokens go through, if there is one.
    pub(crate) n_ff_shared: Option<usize>,
}

/// The feed-forward network of each layer.
pub(super) fn read_ffn(
    keys: Keys<'_>,
    arch: &ArchSpec,
    n_layer: usize,
) -> Result<Vec<FfnShape>, ModelError> {
    let n_expert = keys.integer("expert_count")?.unwrap_or(0);
    match arch.experts {
        None if n_expert > 0 => Err(ModelError::MixtureOfExperts),
        Some(spec) if n_expert > 0 || !spec.may_be_dense => {
            let layers = read_experts(keys, spec, n_layer)?;
            Ok(layers.into_iter().map(FfnShape::Experts).collect())
        }
        _ => {
            let n_ff = widths(keys, n_layer)?;
            Ok(n_ff
                .into_iter()
                .map(|n_ff| FfnShape::Dense { n_ff })
                .collect())
        }
    }
}

/// `feed_forward_length` of each layer.
fn widths(keys: Keys<'_>, n_layer: usize) -> Result<Vec<usize>, ModelError> {
    let key = "feed_forward_length";
    keys.required(key, keys.size_per_layer(key, n_layer, 1)?)
}

fn read_experts(
    keys: Keys<'_>,
    spec: ExpertSpec,
    n_layer: usize,
) -> Result<Vec<ExpertShape>, ModelError> {
    check_gating(keys, spec)?;
    let n_expert = keys.size("expert_count", MAX_EXPERTS)?;
    let used_key = "expert_used_count";
    let used = keys.required(used_key, keys.size_per_layer(used_key, n_layer, 1)?)?;
    for (il, &n) in used.iter().enumerate() {
        if n > n_expert {
            let why = format!("the model has {n_expert} experts");
            return Err(keys.bad_in_layer(used_key, n, il, why));
        }
    }

    let own_width = match spec.own_width {
        // 0 is as good as absent.
        true => keys
            .size_per_layer("expert_feed_forward_length", n_layer, 0)?
            .filter(|sizes| sizes.iter().all(|&n| n > 0)),
        false => None,
    };
    let shared_width = match spec.shared {
        SharedSpec::Absent => None,
        SharedSpec::Optional | SharedSpec::Gated => {
            let key = "expert_shared_feed_forward_length";
            let named = keys.integer(key)?.filter(|&n| n > 0);
            named.map(|n| keys.in_range(key, n, MAX_SIZE)).transpose()?
        }
    };
    let needs_width =
        own_width.is_none() || spec.shared == SharedSpec::Gated && shared_width.is_none();
    let dense = match needs_width {
        true => widths(keys, n_layer)?,
        false => Vec::new(),
    };
    let layer = |il: usize| {
        let n_ff = match &own_width {
            Some(own) => own[il],
            None if spec.own_width => dense[il] / used[il],
            None => dense[il],
        };
        if n_ff == 0 {
            let why = format!("is less than the {} experts of a token", used[il]);
            return Err(keys.bad_in_layer("feed_forward_length", dense[il], il, why));
        }
        let n_ff_shared = match spec.shared {
            SharedSpec::Gated => Some(shared_width.unwrap_or_else(|| dense[il])),
            SharedSpec::Absent | SharedSpec::Optional => shared_width,
        };
        Ok(ExpertShape {
            n_expert,
            n_used: used[il],
            n_ff,
            n_ff_shared,
        })
    };
    (0..n_layer).map(layer).collect()
}

/// Refuses what libllama leaves unread in files of these architectures and what would make another model of them.
fn check_gating(keys: Keys<'_>, spec: ExpertSpec) -> Result<(), ModelError> {
    let unsupported = |key: &str, value: String, why: &str| ModelError::UnsupportedExperts {
        key: keys.name(key),
        value,
        why: why.to_owned(),
    };
    let key = "expert_gating_func";
    let (gating, why) = match spec.weighting {
        Weighting::AmongChosen => (
            SOFTMAX_OF_CHOSEN,
            "experts of this architecture are weighted by softmax among those that are chosen (3)",
        ),
        Weighting::Probability | Weighting::Normalized => (
            SOFTMAX,
            "experts of this architecture are chosen by softmax (1)",
        ),
    };
    // 0 is as good as absent.
    if let Some(kind) = keys.integer(key)?.filter(|&n| n > 0 && n != gating) {
        return Err(unsupported(key, kind.to_string(), why));
    }
    let key = "expert_group_count";
    if let Some(groups) = keys.integer(key)?.filter(|&n| n > 1) {
        let why = "experts are chosen among all, not by groups";
        return Err(unsupported(key, groups.to_string(), why));
    }
    let is_normalized = spec.weighting != Weighting::Probability;
    let key = "expert_weights_norm";
    if let Some(norm) = keys.bool(key)?.filter(|&norm| norm != is_normalized) {
        let why = "this architecture has the other way to weight experts";
        return Err(unsupported(key, norm.to_string(), why));
    }
    let key = "expert_weights_scale";
    match keys.number(key)? {
        None | Some(0.0 | 1.0) => Ok(()),
        Some(scale) => {
            let why = "weights of experts are not scaled in this architecture";
            Err(unsupported(key, scale.to_string(), why))
        }
    }
}
