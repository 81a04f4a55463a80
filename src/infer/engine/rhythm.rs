//! How much of a long prompt is computed beside texts that are being written.

use std::time::Duration;

/// How many tokens of prompts a step can take without the readers of the texts that are written minding: as many as about double its time. Results do not depend on it.
#[derive(Default)]
pub(super) struct Rhythm {
    /// By the number of texts that are written; `None` before the first step of so many.
    paces: Vec<Option<Pace>>,
}

#[derive(Clone, Copy)]
struct Pace {
    /// Seconds of a step without prompts, smoothed.
    alone: f64,
    beside: usize,
}

/// Beside one text, before anything was measured.
const FIRST: usize = 8;

impl Rhythm {
    /// Tokens of prompts beside so many texts. 0 at first, so that it becomes known how long a step takes without.
    pub(super) fn beside(&self, written: usize) -> usize {
        let pace = self.paces.get(written).copied().flatten();
        pace.map_or(0, |pace| pace.beside)
    }

    /// A step of so many texts that are written, with so many tokens of prompts, took so long. There are at most `most` of these.
    pub(super) fn heard(&mut self, written: usize, of_prompts: usize, time: Duration, most: usize) {
        let seconds = time.as_secs_f64();
        if self.paces.len() <= written {
            self.paces.resize(written + 1, None);
        }
        let guess = self.guess(written).min(most);
        match &mut self.paces[written] {
            None if of_prompts == 0 => {
                self.paces[written] = Some(Pace {
                    alone: seconds,
                    beside: guess,
                });
            }
            Some(pace) if of_prompts == 0 => pace.alone = 0.8 * pace.alone + 0.2 * seconds,
            Some(pace) if seconds > 1.9 * pace.alone => {
                pace.beside = (of_prompts.min(pace.beside) * 7 / 8).max(1);
            }
            Some(pace) if of_prompts >= pace.beside && seconds < 1.7 * pace.alone => {
                pace.beside = (pace.beside + 1).min(most);
            }
            _ => {}
        }
    }

    /// What others suggest. A step takes a time of its own and one for each token: as many tokens as double it are a constant more than texts.
    fn guess(&self, written: usize) -> usize {
        let known = self.paces.iter().enumerate();
        let known = known.filter_map(|(n, pace)| Some((n, (*pace)?.beside)));
        let nearest = known.min_by_key(|(n, _)| n.abs_diff(written));
        let (n, beside) = nearest.unwrap_or((1, FIRST));
        (beside + written).saturating_sub(n).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settles where a step takes about twice as long, for any number of texts, however they come and go.
    #[test]
    fn a_step_takes_about_twice_as_long_at_most() {
        let time = |tokens: usize| 0.03 + 0.004 * tokens as f64;
        let mut rhythm = Rhythm::default();
        for round in 0..400 {
            let written = [1, 12, 3, 16][round % 4];
            let n = rhythm.beside(written);
            assert!(round >= 4 || n == 0, "measured without prompts first");
            let took = Duration::from_secs_f64(time(written + n));
            rhythm.heard(written, n, took, 512);
        }
        for written in [1, 3, 12, 16] {
            let ratio = time(written + rhythm.beside(written)) / time(written);
            assert!((1.5..1.95).contains(&ratio), "{written}: {ratio}");
        }
        // What was not seen is guessed from what was.
        rhythm.heard(8, 0, Duration::from_secs_f64(time(8)), 512);
        let ratio = time(8 + rhythm.beside(8)) / time(8);
        assert!((1.5..2.1).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_slow_machine_gets_a_token_at_least() {
        let mut rhythm = Rhythm::default();
        rhythm.heard(1, 0, Duration::from_millis(1), 512);
        for _ in 0..100 {
            let n = rhythm.beside(1);
            assert!(n > 0);
            rhythm.heard(1, n, Duration::from_secs(1), 512);
        }
        assert_eq!(rhythm.beside(1), 1);
    }
}
