//! The adapters that come out of a run.

use super::Trainer;
use crate::adapter::{Adapter, BaseSignature, Parts};
use crate::error::Result;
use crate::train::{Objective, Reparam};

impl Trainer {
    /// The adapter: that of the lowest validation loss, or of the last step without a validation set.
    ///
    /// # Errors
    /// [`crate::adapter::AdapterError`] if its values are not finite.
    pub fn adapter(&self) -> Result<Adapter> {
        let state = &self.state;
        match &state.best {
            Some(best) => self.folded(&best.rows, best.step),
            None if state.broken => self.folded(&state.good, state.step),
            None => self.latest(),
        }
    }

    /// The adapter of the last step, whatever its validation loss.
    ///
    /// # Errors
    /// [`crate::adapter::AdapterError`] if its values are not finite.
    pub fn latest(&self) -> Result<Adapter> {
        let rows = self.state.encoder.clone().forward();
        self.folded(&rows, self.state.step)
    }

    /// The adapter that `rows` make.
    fn folded(&self, rows: &[f32], step: u64) -> Result<Adapter> {
        let o = &self.options;
        let shape = self.model.shape();
        let payload = self.variables(rows)?.into_payload(shape)?;
        let reparam = match o.effective_reparam() {
            Reparam::None => "none",
            Reparam::Mlp => "mlp",
            Reparam::Lstm => "lstm",
        };
        let objective = match &o.loss {
            Objective::Completion => "completion",
            Objective::All => "all",
            Objective::Distill { .. } => "distill",
        };
        let valid = self.state.best.as_ref().filter(|b| b.step == step);
        let facts = [
            (
                "source",
                Some(format!("ggraft {}", env!("CARGO_PKG_VERSION"))),
            ),
            ("method", Some(o.method.name().to_owned())),
            ("reparam", Some(reparam.to_owned())),
            ("loss", Some(objective.to_owned())),
            ("steps", Some(step.to_string())),
            ("rows", Some(self.train.len().to_string())),
            ("learning_rate", Some(self.lr.to_string())),
            ("seed", Some(o.seed.to_string())),
            ("valid_loss", valid.map(|b| format!("{:.4}", b.loss))),
        ];
        Ok(Adapter::new(Parts {
            kind: o.method,
            payload,
            template: o.template.clone(),
            name: o.name.clone(),
            fingerprint: Some(self.model.fingerprint()),
            base: BaseSignature::from(shape),
            provenance: facts
                .into_iter()
                .filter_map(|(key, value)| Some((key.to_owned(), value?)))
                .collect(),
        })?)
    }
}
