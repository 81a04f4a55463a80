//! Who answers a request: the base, an adapter, or several that speak as one.

use super::app::App;
use super::error::{ApiError, Result};
use super::keys::Caller;
use crate::args::combine;
use ggraft::infer::{Combine, Ensemble};
use serde::Deserialize;

/// What a request says about it.
#[derive(Deserialize)]
pub(super) struct Wanted {
    model: Option<String>,
    /// Extensions: several adapters that speak as one.
    adapters: Option<Vec<String>>,
    ensemble: Option<String>,
    weights: Option<Vec<f32>>,
}

pub(super) struct Speaker {
    pub(super) ensemble: Ensemble,
    /// What the answer says about who gave it.
    pub(super) name: String,
    /// What it is counted under.
    pub(super) label: String,
}

impl Wanted {
    /// Finds the adapters, of those that the caller may use.
    pub(super) fn find(&self, app: &App, caller: &Caller) -> Result<Speaker> {
        let Some(names) = &self.adapters else {
            return self.find_one(app, caller);
        };
        let members = names
            .iter()
            .map(|name| app.adapter(caller, name))
            .collect::<Result<Vec<_>>>()?;
        let ensemble = Ensemble::new(members, self.combine(names.len())?)
            .map_err(|e| ApiError::field("adapters", e))?;
        let ensemble = match &self.weights {
            Some(weights) => ensemble.weights(weights),
            None => Ok(ensemble),
        };
        Ok(Speaker {
            ensemble: ensemble.map_err(|e| ApiError::field("weights", e))?,
            name: self.model.clone().unwrap_or_else(|| names.join("+")),
            label: match names.as_slice() {
                [name] => name.clone(),
                _ => "(ensemble)".to_owned(),
            },
        })
    }

    fn find_one(&self, app: &App, caller: &Caller) -> Result<Speaker> {
        let model = self.model.as_ref().ok_or_else(|| {
            ApiError::field(
                "model",
                "is missing: the name of an adapter, or base for none",
            )
        })?;
        for (name, given) in [
            ("ensemble", self.ensemble.is_some()),
            ("weights", self.weights.is_some()),
        ] {
            if given {
                return Err(ApiError::field(name, "is for several \"adapters\""));
            }
        }
        let adapter = app.adapter(caller, model)?;
        Ok(Speaker {
            label: match adapter {
                Some(_) => model.clone(),
                None => super::catalog::BASE.to_owned(),
            },
            ensemble: Ensemble::of_one(adapter),
            name: model.clone(),
        })
    }

    fn combine(&self, n: usize) -> Result<Combine> {
        match &self.ensemble {
            Some(name) => combine(name).map_err(|why| ApiError::field("ensemble", why)),
            None if n > 1 => {
                let methods = Combine::ALL.map(Combine::name).join(", ");
                Err(ApiError::field(
                    "ensemble",
                    format_args!(
                        "says how several adapters speak together, it must be one of {methods}"
                    ),
                ))
            }
            None => Ok(Combine::default()),
        }
    }
}
