//! Learning rate over time.

use std::f64::consts::PI;

/// Decaying schedules end at this fraction of the learning rate instead of 0, where the last steps would do nothing.
const FLOOR: f64 = 0.02;

/// How the learning rate changes over a run, besides the warm-up. Step `s` counts from 0, `n` is the number of steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls as `1 - s/n`, to 2 % at least.
    #[default]
    Linear,
    /// Falls as `(1 + cos(pi s/n)) / 2` (Loshchilov and Hutter 2017, without restarts), to 2 % at least.
    Cosine,
}

impl Schedule {
    /// What the learning rate is multiplied by in step `step` (from 0) of `steps`: `min(1, (step + 1) / warmup)` times the
    /// decay. The decay starts with the run, not after the warm-up as in Transformers: the schedule after the warm-up does not
    /// depend on how long that was. 0 for no warm-up. Steps after the last one stay where that ends.
    pub(crate) fn factor(self, step: usize, steps: usize, warmup: usize) -> f64 {
        let warm = ((step + 1) as f64 / warmup.max(1) as f64).min(1.0);
        let progress = (step as f64 / steps.max(1) as f64).min(1.0);
        let decay = match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(FLOOR),
            Self::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(FLOOR),
        };
        warm * decay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors() {
        use Schedule::{Constant, Cosine, Linear};
        for (schedule, step, warmup, expected) in [
            (Constant, 0, 20, 1.0 / 20.0),
            (Constant, 18, 20, 19.0 / 20.0),
            (Constant, 19, 20, 1.0),
            (Constant, 99, 20, 1.0),
            (Constant, 0, 0, 1.0),
            (Constant, 0, 1, 1.0),
            (Linear, 0, 20, 1.0 / 20.0),
            (Linear, 9, 20, 0.5 * 0.91),
            (Linear, 50, 20, 0.5),
            (Linear, 97, 20, 0.03),
            (Linear, 99, 20, 0.02),
            (Linear, 500, 20, 0.02),
            (Cosine, 0, 0, 1.0),
            (Cosine, 25, 0, 0.5 + 0.5f64.sqrt() / 2.0),
            (Cosine, 50, 0, 0.5),
            (Cosine, 99, 0, 0.02),
            (Cosine, 150, 0, 0.02),
        ] {
            let got = schedule.factor(step, 100, warmup);
            assert!((got - expected).abs() < 1e-12, "{schedule:?} {step}: {got}");
        }
    }

    #[test]
    fn a_run_without_steps() {
        assert_eq!(Schedule::Linear.factor(0, 0, 0), 1.0);
    }
}
