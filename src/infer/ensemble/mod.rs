//! Several adapters that speak as one: each computes its own next-token distribution behind the same text, and the token comes from what they say together.

mod combine;
mod error;
mod fit;

pub use combine::Combine;
pub use error::EnsembleError;
pub use fit::{Fit, Losses, Sample};

use crate::adapter::Adapter;

/// Who speaks: adapters on one base, or the base without one, with weights. Clones share the adapters' values.
///
/// ```
/// use ggraft::infer::engine::{Engine, EngineOptions, Request};
/// use ggraft::infer::{Combine, Ensemble, GenerateOptions};
/// use ggraft::{Adapter, Model, ModelOptions};
///
/// let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
/// let pirate = Adapter::load("models/adapters/pirate.gguf".as_ref())?;
/// // Three parts the pirate, one part the base itself.
/// let both = Ensemble::new([Some(pirate), None], Combine::MeanProb)?.weights(&[0.75, 0.25])?;
/// let engine = Engine::new(&model, &EngineOptions::default())?;
/// let request = Request::text("The rain has not stopped.\n")
///     .ensemble(&both)
///     .generate(GenerateOptions::default().max_tokens(16));
/// println!("{}", engine.submit(request)?.wait()?.text);
/// # Ok::<(), ggraft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ensemble {
    members: Vec<Option<Adapter>>,
    combine: Combine,
    /// As they were given, one for each member.
    weights: Vec<f32>,
}

impl Ensemble {
    /// Members of equal weight; `None` is the base without an adapter.
    ///
    /// # Errors
    /// [`EnsembleError::NoMembers`].
    pub fn new(
        members: impl IntoIterator<Item = Option<Adapter>>,
        combine: Combine,
    ) -> Result<Self, EnsembleError> {
        let members: Vec<_> = members.into_iter().collect();
        if members.is_empty() {
            return Err(EnsembleError::NoMembers);
        }
        Ok(Self {
            weights: vec![1.0; members.len()],
            members,
            combine,
        })
    }

    /// One that speaks for itself.
    pub fn of_one(member: Option<Adapter>) -> Self {
        Self {
            members: vec![member],
            combine: Combine::MeanProb,
            weights: vec![1.0],
        }
    }

    /// Sets the members' weights. Only their ratios count, except with [`Combine::Product`].
    ///
    /// # Errors
    /// [`EnsembleError::WeightCount`], [`EnsembleError::Weight`], [`EnsembleError::NoWeight`].
    pub fn weights(mut self, weights: &[f32]) -> Result<Self, EnsembleError> {
        if weights.len() != self.members.len() {
            return Err(EnsembleError::WeightCount {
                expected: self.members.len(),
                got: weights.len(),
            });
        }
        let is_weight = |w: f32| w.is_finite() && w >= 0.0;
        if let Some(i) = weights.iter().position(|&w| !is_weight(w)) {
            return Err(EnsembleError::Weight {
                index: i + 1,
                got: weights[i],
            });
        }
        if weights.iter().all(|&w| w == 0.0) {
            return Err(EnsembleError::NoWeight);
        }
        self.weights = weights.to_vec();
        Ok(self)
    }

    /// Who speaks.
    pub fn members(&self) -> &[Option<Adapter>] {
        &self.members
    }

    /// What each of them counts, as it was given; 1 otherwise.
    pub fn member_weights(&self) -> &[f32] {
        &self.weights
    }

    /// How they speak together.
    pub fn combine(&self) -> Combine {
        self.combine
    }

    /// There is one member, which is taken at its word.
    pub(super) fn is_one(&self) -> bool {
        self.members.len() == 1 && (self.combine != Combine::Product || self.weights == [1.0])
    }

    /// Logits of what the members say together, from the logits of each, `ne = [V]`, all of them numbers: what a sampler takes.
    ///
    /// # Panics
    /// Unless there is a row for each member, and all are as long.
    pub fn combined(&self, rows: &[&[f32]]) -> Vec<f32> {
        assert_eq!(rows.len(), self.members.len(), "one row for each member");
        if self.is_one() {
            return rows[0].to_vec();
        }
        self.combine.logits(rows, &self.weights)
    }
}
