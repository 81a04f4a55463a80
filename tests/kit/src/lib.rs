//! Random models of every architecture, and libllama as the oracle. Serves this repository's tests, benches and examples only.

pub mod adapters;
pub mod bases;
pub mod bench;
pub mod command;
pub mod conformance;
pub mod fixture;
pub mod metrics;
pub mod oracle;
pub mod quantize;
pub mod recurrent;
pub mod synth;
pub mod tensors;
mod vocab;

use std::io::Write as _;

/// Says that a test, or a part of one, does not run here: `why` names what is not checked and what it would need. The line goes
/// past the test harness, which hides what passing tests print, and to the end of the file that `GGRAFT_SKIPPED` names, from
/// which `make test` repeats all of them.
///
/// # Panics
/// If it cannot be written.
pub fn skipped(why: &str) {
    let line = format!("skipped: {why}\n");
    std::io::stderr()
        .write_all(line.as_bytes())
        .expect("stderr takes a line");
    if let Some(file) = std::env::var_os("GGRAFT_SKIPPED") {
        let mut options = std::fs::OpenOptions::new();
        let file = options.create(true).append(true).open(file);
        file.and_then(|mut f| f.write_all(line.as_bytes()))
            .expect("the file of skipped tests takes a line");
    }
}

/// A size in this process's status, in bytes (`VmHWM`, `RssAnon`, ...); `None` where the system does not say.
pub fn process_size(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(name, _)| *name == field)?;
    Some(value.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// Inverse-frequency divisors of Llama 3's rope scaling, `ne = [n_rot / 2]`, as its converter stores them in `rope_freqs.weight`:
/// 1 for wavelengths below `n_ctx_orig / high`, `factor` above `n_ctx_orig / low`, a linear blend between.
pub(crate) fn llama3_rope_factors(
    n_rot: usize,
    base: f32,
    factor: f32,
    low: f32,
    high: f32,
    n_ctx_orig: f32,
) -> Vec<f32> {
    (0..n_rot / 2)
        .map(|i| {
            let freq = base.powf(-2.0 * i as f32 / n_rot as f32);
            let wavelength = std::f32::consts::TAU / freq;
            if wavelength < n_ctx_orig / high {
                1.0
            } else if wavelength > n_ctx_orig / low {
                factor
            } else {
                let smooth = (n_ctx_orig / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
        .collect()
}
