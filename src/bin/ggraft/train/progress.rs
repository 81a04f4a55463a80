//! What is seen of a training run while it runs.

use crate::io;
use ggraft::train::Report;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Steps that the training loss shown is about the mean of.
const SMOOTH: f64 = 20.0;
/// Lines that a run without validation prints where there is no terminal.
const LINES: u64 = 10;

/// What is seen while it runs: a bar on a terminal, otherwise a line per evaluation.
pub(super) struct Progress {
    /// `None` where stderr is no terminal.
    bar: Option<ProgressBar>,
    /// Steps done before this run.
    pub(super) start: u64,
    begin: Instant,
    tokens: u64,
    seconds: f64,
    /// Sums of losses and of their weights, older ones fading.
    loss: f64,
    weight: f64,
    /// Whether there will be evaluations.
    evaluated: bool,
    valid: Option<f64>,
}

impl Progress {
    pub(super) fn new(start: u64, evaluated: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:16} {pos}/{len} {wide_msg}")
                .expect("a constant template");
            io::shown(ProgressBar::new(0).with_style(style).with_position(start))
        });
        Self {
            bar,
            start,
            begin: Instant::now(),
            tokens: 0,
            seconds: 0.0,
            loss: 0.0,
            weight: 0.0,
            evaluated,
            valid: None,
        }
    }

    /// Before the first step: the base has read `done` of `rows` behind the context that is distilled.
    pub(super) fn show_teaching(&mut self, done: usize, rows: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(rows as u64);
            bar.set_position(done as u64);
            bar.set_message("rows read behind the context");
        } else if done == 0 {
            io::note(&format!(
                "the model reads the context in front of {rows} rows"
            ));
        }
        self.begin = Instant::now();
    }

    /// A line that stays.
    pub(super) fn line(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => io::note(text),
        }
        self.begin = Instant::now();
    }

    pub(super) fn show(&mut self, report: &Report, best: Option<(u64, f64)>) {
        let keep = 1.0 - 1.0 / SMOOTH;
        self.loss = keep * self.loss + report.loss;
        self.weight = keep * self.weight + 1.0;
        self.tokens += report.tokens;
        self.seconds += report.seconds;
        self.valid = report.valid_loss.or(self.valid);

        let mut text = format!("loss {:.4}", self.loss / self.weight);
        if let Some(valid) = self.valid {
            text += &format!(", validation {valid:.4}");
            match best {
                // A bar has one line.
                _ if self.bar.is_some() => {}
                Some((step, _)) if step == report.step => text += " (best)",
                Some((step, loss)) => text += &format!(" (best {loss:.4} at step {step})"),
                None => {}
            }
        }
        let rate = self.tokens as f64 / self.seconds.max(f64::MIN_POSITIVE);
        let per_step = self.begin.elapsed().as_secs_f64() / (report.step - self.start) as f64;
        let left = report.steps.saturating_sub(report.step) as f64 * per_step;
        let left = duration(Duration::from_secs(left.ceil() as u64));
        text += &format!(", {rate:.0} tok/s, {left} left");

        if let Some(bar) = &self.bar {
            bar.set_length(report.steps);
            bar.set_position(report.step);
            bar.set_message(text);
            return;
        }
        let due = match self.evaluated {
            true => report.valid_loss.is_some(),
            false => report
                .step
                .is_multiple_of(report.steps.div_ceil(LINES).max(1)),
        };
        if due {
            io::note(&format!("step {}/{}: {text}", report.step, report.steps));
        }
    }

    /// Nothing may end up behind the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Two parts at most: people compare, they do not calculate.
pub(super) fn duration(time: Duration) -> String {
    match time.as_secs() {
        0..10 if time.subsec_millis() > 0 => format!("{:.1} s", time.as_secs_f64()),
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        s => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let text = |s| duration(Duration::from_secs(s));
        assert_eq!(
            [text(7), text(61), text(3725)],
            ["7 s", "1 min 01 s", "1 h 02 min"]
        );
    }
}
