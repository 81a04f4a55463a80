//! Whether help is worth its wait. A helper that the system stops in the middle of a part, because other programs want the core, holds up the thread that waits
//! for it for some milliseconds: many times as long as the part would have taken. Then a thread is faster alone.

use std::time::{Duration, Instant};

/// Time saved that is remembered, to be lost again before help is done without: a helper is stopped now and then on any machine.
const CREDIT: Duration = Duration::from_millis(5);
/// A wait for a helper that was not stopped: small tasks must not talk large ones out of help.
const USUAL: Duration = Duration::from_micros(20);
/// For how long help is done without at first,
const FIRST: Duration = Duration::from_millis(10);
/// and at most: it is twice as long each time that help, asked again, is not worth it either.
const LONGEST: Duration = Duration::from_millis(320);

/// What help has saved and cost of late.
#[derive(Debug)]
pub(super) struct Worth {
    /// Nanoseconds saved, less those waited beyond what is [`USUAL`]: at most [`CREDIT`].
    credit: i64,
    /// Until then help is done without.
    alone: Option<Instant>,
    /// For how long the next time.
    pause: Duration,
}

impl Worth {
    /// Nothing is known.
    pub(super) fn new() -> Self {
        Self {
            credit: 0,
            alone: None,
            pause: FIRST,
        }
    }

    /// Whether to ask for help.
    pub(super) fn is_worth(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.alone.is_some_and(|until| now() >= until) {
            self.alone = None;
        }
        self.alone.is_none()
    }

    /// Takes into account a task that was over at `now`: helpers did what would have taken `saved`, and were waited for at its end.
    pub(super) fn judge(&mut self, now: Instant, saved: Duration, waited: Duration) {
        let most = CREDIT.as_nanos() as i64;
        let waited = waited.saturating_sub(USUAL);
        let change = saved.as_nanos() as i64 - waited.as_nanos() as i64;
        self.credit = most.min(self.credit + change);
        if self.credit == most {
            self.pause = FIRST;
        } else if self.credit < 0 {
            self.credit = 0;
            self.alone = Some(now + self.pause);
            self.pause = LONGEST.min(2 * self.pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const NONE: Duration = Duration::ZERO;

    #[test]
    fn help_is_done_without_for_longer_and_longer() {
        let mut now = Instant::now();
        let mut worth = Worth::new();
        for pause in [10, 20, 40, 80, 160, 320, 320] {
            assert!(worth.is_worth(|| now));
            // A little is saved, more is lost.
            worth.judge(now, MS, NONE);
            assert!(worth.is_worth(|| now));
            worth.judge(now, MS, 3 * MS);
            assert!(!worth.is_worth(|| now));
            now += (pause - 1) * MS;
            assert!(!worth.is_worth(|| now), "for {pause} ms");
            now += MS;
        }
        // What is worth it again is trusted again.
        for _ in 0..5 {
            worth.judge(now, MS, NONE);
        }
        worth.judge(now, NONE, 6 * MS);
        assert!(!worth.is_worth(|| now));
        assert!(worth.is_worth(|| now + FIRST));
    }

    #[test]
    fn small_tasks_do_not_talk_large_ones_out_of_help() {
        let now = Instant::now();
        let mut worth = Worth::new();
        for _ in 0..1000 {
            worth.judge(now, NONE, USUAL);
            assert!(worth.is_worth(|| now));
        }
    }

    #[test]
    fn a_helper_may_be_stopped_now_and_then() {
        let now = Instant::now();
        let mut worth = Worth::new();
        for _ in 0..10 {
            for _ in 0..100 {
                worth.judge(now, MS, MS / 20);
            }
            worth.judge(now, MS, 4 * MS);
            assert!(worth.is_worth(|| now));
        }
    }
}
