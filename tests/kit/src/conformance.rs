//! Trees of reference results by Transformers and PEFT, laid out like `tests/conformance`.

use std::path::{Path, PathBuf};

/// Folders of the cases of `tests/conformance`, or of the tree that the environment variable `GGRAFT_CONFORMANCE` names; sorted.
///
/// # Panics
/// If the tree cannot be read or has no case: a test that finds nothing to compare must not pass.
pub fn cases() -> Vec<PathBuf> {
    let root = std::env::var_os("GGRAFT_CONFORMANCE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../conformance"),
        PathBuf::from,
    );
    let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut cases: Vec<_> = entries
        .map(|e| e.unwrap_or_else(|e| panic!("{}: {e}", root.display())))
        .map(|e| e.path())
        .filter(|p| p.join("case.json").exists())
        .collect();
    assert!(!cases.is_empty(), "{} holds no case", root.display());
    cases.sort();
    cases
}

/// A case's name: that of its folder.
///
/// # Panics
/// If the path ends in `..`.
pub fn name_of(case: &Path) -> String {
    let name = case.file_name().expect("a case is a folder");
    name.to_string_lossy().into_owned()
}

/// Compares by a metric that a `case.json` names: `max|a-b|` (for scalars written `|a-b|`), `max|a-b| / max|b|` or
/// `||a-b||_2 / ||b||_2`, where b is the reference.
///
/// # Errors
/// The distance, if it is not within `limit` (a NaN never is), values of different number or none, or a metric of another name.
pub fn within<T: Copy + Into<f64>>(
    got: &[T],
    want: &[T],
    metric: &str,
    limit: f64,
) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} values instead of {}", got.len(), want.len()));
    }
    if want.is_empty() {
        return Err("nothing to compare".to_owned());
    }
    let diff = || got.iter().zip(want).map(|(&a, &b)| a.into() - b.into());
    let reference = || want.iter().map(|&b| b.into());
    let squares = |sum: f64, x: f64| sum + x * x;
    let distance = match metric {
        "|a-b|" | "max|a-b|" => diff().fold(0.0, max_abs),
        "max|a-b| / max|b|" => diff().fold(0.0, max_abs) / reference().fold(0.0, max_abs),
        "||a-b||_2 / ||b||_2" => match diff().fold(0.0, squares) {
            // A gradient may vanish in both.
            0.0 => 0.0,
            sum => (sum / reference().fold(0.0, squares)).sqrt(),
        },
        other => return Err(format!("unknown metric '{other}'")),
    };
    if distance <= limit {
        return Ok(());
    }
    // NaN is the largest of all.
    let largest = diff().map(f64::abs).enumerate();
    let at = largest.max_by(|(_, a), (_, b)| a.total_cmp(b));
    let at = at.map_or(0, |(at, _)| at);
    Err(format!(
        "{metric} = {distance:.3e} > {limit:.3e} (largest difference at {at})"
    ))
}

/// The larger absolute value. Unlike `f64::max` it keeps a NaN.
fn max_abs(m: f64, x: f64) -> f64 {
    if m.is_nan() || x.abs() <= m {
        m
    } else {
        x.abs()
    }
}

#[cfg(test)]
mod tests {
    use super::within;

    const METRICS: [&str; 4] = [
        "|a-b|",
        "max|a-b|",
        "max|a-b| / max|b|",
        "||a-b||_2 / ||b||_2",
    ];

    #[test]
    fn distances() {
        let (got, want) = ([3.0, -2.0], [3.0f64, 4.0]);
        for (metric, distance) in METRICS.into_iter().zip([6.0, 6.0, 1.5, 1.2]) {
            assert_eq!(within(&got, &want, metric, distance + 1e-9), Ok(()));
            let error = within(&got, &want, metric, distance - 1e-9).unwrap_err();
            assert!(error.starts_with(metric), "{error}");
            assert!(error.ends_with("(largest difference at 1)"), "{error}");
        }
        for metric in METRICS {
            let equal = within(&[0.0f32; 2], &[0.0; 2], metric, 0.0);
            assert_eq!(equal.is_ok(), metric != "max|a-b| / max|b|", "{metric}");
            assert!(within(&[1e-9f32, 0.0], &[0.0; 2], metric, 1e-10).is_err());
        }
    }

    #[test]
    fn what_cannot_be_compared_is_not_near() {
        for metric in METRICS {
            for (got, want) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::INFINITY, 1.0)] {
                for (got, want) in [([got, 1.0], [want, 1.0]), ([1.0, got], [1.0, want])] {
                    assert!(within(&got, &want, metric, 1e9).is_err(), "{metric}");
                }
            }
            assert!(within(&[0.0f32], &[], metric, 1e9).is_err());
            assert!(within::<f32>(&[], &[], metric, 1e9).is_err());
        }
        assert!(within(&[0.0f32], &[0.0], "|a+b|", 1e9).is_err());
    }
}
