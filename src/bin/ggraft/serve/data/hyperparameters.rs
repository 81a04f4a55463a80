//! What a job is asked to do, and what that is to the trainer.

use crate::serve::error::{ApiError, Result};
use ggraft::Adapter;
use ggraft::adapter::{AdapterKind, Template};
use ggraft::train::{Init, Objective, Reparam, TrainOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Longest suffix of a name, as the API has it.
const MAX_SUFFIX: usize = 64;

/// A request for a job, as it is kept.
#[derive(Clone, Serialize, Deserialize)]
pub(in crate::serve) struct Spec {
    pub(super) model: String,
    pub(super) training_file: String,
    pub(super) validation_file: Option<String>,
    pub(super) suffix: Option<String>,
    #[serde(default = "usual_seed")]
    pub(super) seed: u32,
    #[serde(default)]
    hyperparameters: Hyperparameters,
    method: Option<Method>,
    metadata: Option<Value>,
    /// Results may depend on it in the last bits: a job that goes on elsewhere computes as it began.
    #[serde(default)]
    pub(super) threads: usize,
}

fn usual_seed() -> u32 {
    1
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Hyperparameters {
    #[serde(default)]
    n_epochs: Choice<f64>,
    #[serde(default)]
    batch_size: Choice<usize>,
    #[serde(default)]
    learning_rate_multiplier: Choice<f64>,
}

/// A value, or `"auto"`.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(untagged, expecting = "must be a number or \"auto\"")]
enum Choice<T> {
    Value(T),
    Auto(Auto),
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum Auto {
    #[serde(rename = "auto")]
    Auto,
}

impl<T> Default for Choice<T> {
    fn default() -> Self {
        Self::Auto(Auto::Auto)
    }
}

impl<T: Copy> Choice<T> {
    fn value(self) -> Option<T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Auto(_) => None,
        }
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Method {
    #[serde(rename = "type")]
    kind: String,
    supervised: Option<Supervised>,
    /// The extension: what is trained, and how.
    ggraft: Option<Tuning>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Supervised {
    #[serde(default)]
    hyperparameters: Hyperparameters,
}

/// As the options of `ggraft train`.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tuning {
    method: Option<Kind>,
    length: Option<usize>,
    template: Option<String>,
    reparam: Option<Reparam>,
    loss: Option<Loss>,
    steps: Option<u64>,
    learning_rate: Option<f64>,
    weight_decay: Option<f64>,
    dropout: Option<f32>,
    max_len: Option<usize>,
    patience: Option<usize>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Prefix,
    Prompt,
    PTuning,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Loss {
    Completion,
    All,
}

impl Spec {
    /// Refuses what is wrong whatever the model and the data.
    pub(super) fn check(&self) -> Result<()> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if let Some(suffix) = &self.suffix
            && (suffix.len() > MAX_SUFFIX || !suffix.chars().all(is_plain))
        {
            return Err(ApiError::field(
                "suffix",
                format_args!(
                    "must be at most {MAX_SUFFIX} of the characters a-z, A-Z, 0-9, -, _ and ."
                ),
            ));
        }
        if let Some(method) = &self.method
            && method.kind != "supervised"
        {
            return Err(ApiError::unsupported(
                "method.type",
                "only supervised is supported",
            ));
        }
        if self.seed == u32::MAX {
            return Err(ApiError::field("seed", "is too large"));
        }
        Ok(())
    }

    fn hyperparameters(&self) -> &Hyperparameters {
        let method = self.method.as_ref().and_then(|m| m.supervised.as_ref());
        method.map_or(&self.hyperparameters, |s| &s.hyperparameters)
    }

    fn tuning(&self) -> Tuning {
        let tuning = self.method.as_ref().and_then(|m| m.ggraft.clone());
        tuning.unwrap_or_default()
    }

    /// What the trainer is asked to do; `from` is the adapter that is trained further.
    pub(super) fn options(&self, from: Option<&Adapter>) -> Result<TrainOptions> {
        let (common, tuning) = (self.hyperparameters(), self.tuning());
        let kind = match (tuning.method, from) {
            (Some(Kind::Prefix), _) => AdapterKind::Prefix,
            (Some(Kind::Prompt), _) => AdapterKind::Prompt,
            (Some(Kind::PTuning), _) => AdapterKind::PTuning,
            (None, Some(adapter)) => adapter.kind(),
            (None, None) => AdapterKind::Prefix,
        };
        let mut options = TrainOptions::new(kind);
        options.init = from.cloned().map(Init::Adapter);
        options.length = tuning.length;
        let template = tuning.template.as_deref().map(Template::parse);
        options.template = template
            .transpose()
            .map_err(|e| ApiError::field("method.ggraft.template", e))?;
        options.reparam = tuning.reparam;
        if let Some(Loss::All) = tuning.loss {
            options.loss = Objective::All;
        }
        options.steps = tuning.steps;
        options.epochs = common.n_epochs.value();
        options.batch = common.batch_size.value().unwrap_or(options.batch);
        let factor = common.learning_rate_multiplier.value();
        let scaled = factor.map(|factor| factor * options.default_lr());
        options.lr = tuning.learning_rate.or(scaled);
        options.weight_decay = tuning.weight_decay;
        options.dropout = tuning.dropout.unwrap_or(options.dropout);
        options.max_len = tuning.max_len;
        options.patience = tuning.patience;
        options.seed = self.seed.into();
        options.threads = Some(self.threads);
        // Who chats does not wait for a step.
        options.background = true;
        Ok(options)
    }

    /// As the API shows it.
    pub(super) fn json(&self) -> Value {
        let method = json!({
            "type": "supervised",
            "supervised": {"hyperparameters": self.hyperparameters()},
            "ggraft": self.tuning(),
        });
        json!({
            "hyperparameters": self.hyperparameters(),
            "method": method,
            "metadata": self.metadata,
        })
    }
}
