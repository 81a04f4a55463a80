//! How far two results are apart. A value that is not finite makes every distance infinite, so that no comparison passes by accident.

fn check(got: &[f32], reference: &[f32]) -> bool {
    assert_eq!(
        got.len(),
        reference.len(),
        "results of different length cannot be compared"
    );
    assert!(!reference.is_empty(), "nothing to compare");
    got.iter().chain(reference).all(|x| x.is_finite())
}

/// Largest |got - reference| divided by max - min of the reference.
pub fn max_abs_diff(got: &[f32], reference: &[f32]) -> f32 {
    if !check(got, reference) {
        return f32::INFINITY;
    }
    let diff = got
        .iter()
        .zip(reference)
        .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    if diff == 0.0 {
        return 0.0;
    }
    let (lo, hi) = reference
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &x| {
            (lo.min(x), hi.max(x))
        });
    diff / (hi - lo)
}

/// Normalized mean squared error: sum (got - reference)^2 / sum reference^2.
pub fn nmse(got: &[f32], reference: &[f32]) -> f64 {
    if !check(got, reference) {
        return f64::INFINITY;
    }
    let err: f64 = got
        .iter()
        .zip(reference)
        .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2))
        .sum();
    let power: f64 = reference.iter().map(|&b| f64::from(b).powi(2)).sum();
    if err == 0.0 { 0.0 } else { err / power }
}

/// Cosine of the angle between both; negative infinity if a value is not finite.
pub fn cosine(got: &[f32], reference: &[f32]) -> f64 {
    if !check(got, reference) {
        return f64::NEG_INFINITY;
    }
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(&x, &y)| f64::from(x) * f64::from(y))
            .sum::<f64>()
    };
    dot(got, reference) / (dot(got, got) * dot(reference, reference)).sqrt()
}

/// Index of the first element with |got - reference| > `tolerance`, or that is not finite in one of them.
pub fn first_difference(got: &[f32], reference: &[f32], tolerance: f32) -> Option<usize> {
    assert_eq!(
        got.len(),
        reference.len(),
        "results of different length cannot be compared"
    );
    got.iter()
        .zip(reference)
        .position(|(a, b)| (a - b).abs() > tolerance || !a.is_finite() || !b.is_finite())
}

/// Index of the largest element, the first of equals.
pub fn argmax(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let (a, b) = ([1.0, 2.0, 3.5], [1.0, 2.0, 3.0]);
        assert_eq!(max_abs_diff(&a, &b), 0.25);
        assert!((nmse(&a, &b) - 0.25 / 14.0).abs() < 1e-12);
        assert_eq!(first_difference(&a, &b, 0.1), Some(2));
        assert_eq!(first_difference(&a, &b, 0.6), None);
        assert!((cosine(&a, &a) - 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 1.0]).abs() < 1e-12);
        assert_eq!(argmax(&[0.0, 3.0, 3.0, 1.0]), 1);
    }

    #[test]
    fn not_finite_never_passes() {
        for (a, b) in [
            ([f32::NAN, 1.0], [0.0, 1.0]),
            ([0.0, 1.0], [f32::NAN, 1.0]),
            ([f32::INFINITY, 1.0], [f32::INFINITY, 1.0]),
        ] {
            assert_eq!(max_abs_diff(&a, &b), f32::INFINITY);
            assert_eq!(nmse(&a, &b), f64::INFINITY);
            assert_eq!(cosine(&a, &b), f64::NEG_INFINITY);
            assert_eq!(first_difference(&a, &b, 1.0), Some(0));
        }
    }
}
