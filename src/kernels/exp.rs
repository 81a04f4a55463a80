//! The exponential function in straight-line code, so that loops over it are vectorized.

use super::gemm::mul_add;
use super::level::vectorized;

/// `e^x` within 2 units in the last place: 0 for very negative `x` and -inf, inf for large `x`, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    /// Added and subtracted, rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; products of the first with exponents are exact.
    const LN2: (f32, f32) = (355.0 / 512.0, -2.121_944_4e-4);
    // Beyond these the result is 0 or inf anyway. A comparison with NaN is false, which keeps it.
    let x = if x > 90.0 { 90.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    // x = n ln 2 + r with |r| <= ln 2 / 2.
    let shifted = mul_add::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FUSED>(-n, LN2.1, mul_add::<FUSED>(-n, LN2.0, x));
    // Taylor's series, the last coefficients adjusted to the interval.
    let mut tail = 1.987_569_2e-4;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        tail = mul_add::<FUSED>(tail, r, c);
    }
    let power = mul_add::<FUSED>(r * r, tail, r) + 1.0;
    // 2^n as two factors: one alone would leave the range of exponents before subnormal numbers end.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let scale = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    power * scale(half) * scale(n.wrapping_sub(half))
}

/// tanh, within 5e-7 relatively.
#[inline(always)]
pub(crate) fn tanh<const FUSED: bool>(x: f32) -> f32 {
    let by_exp = 1.0 - 2.0 / (exp::<FUSED>(2.0 * x) + 1.0);
    // Near zero that is a difference of almost equal numbers: Taylor's series instead.
    let square = x * x;
    let mut tail = 62.0 / 2835.0;
    for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        tail = mul_add::<FUSED>(tail, square, c);
    }
    let series = mul_add::<FUSED>(x * square, tail, x);
    if x.abs() < 0.3 { series } else { by_exp }
}

vectorized! {
    /// Replaces every element by `e^(element - max)` and returns the sum.
    pub(crate) fn exp_sub_sum(row: &mut [f32], max: f32) -> f32 {
        const LANES: usize = 32;
        let mut sums = [0.0f32; LANES];
        let (chunks, rest) = row.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (x, sum) in chunk.iter_mut().zip(&mut sums) {
                *x = exp::<FUSED>(*x - max);
                *sum += *x;
            }
        }
        for (x, sum) in rest.iter_mut().zip(&mut sums) {
            *x = exp::<FUSED>(*x - max);
            *sum += *x;
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
            width /= 2;
        }
        sums[0]
    }
}

vectorized! {
    /// The largest element that is a number; -inf of none.
    pub(crate) fn largest(row: &[f32]) -> f32 {
        const LANES: usize = 32;
        let mut most = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (most, &x) in most.iter_mut().zip(chunk) {
                *most = if x > *most { x } else { *most };
            }
        }
        // Scores of attention are whole halves.
        let (halves, rest) = rest.as_chunks::<{ LANES / 2 }>();
        for half in halves {
            for (most, &x) in most.iter_mut().zip(half) {
                *most = if x > *most { x } else { *most };
            }
        }
        for &x in rest {
            most[0] = if x > most[0] { x } else { most[0] };
        }
        most.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::level::FUSED;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in -110_000..95_000 {
            let x = i as f32 * 0.001 + 0.000_3;
            let (got, want) = (exp::<FUSED>(x), f64::from(x).exp());
            if want > f64::from(f32::MAX) {
                assert_eq!(got, f32::INFINITY, "{x}");
                continue;
            }
            let near = (want as f32).max(f32::from_bits(1));
            let ulp = f64::from(near) - f64::from(f32::from_bits(near.to_bits() - 1));
            worst = worst.max((f64::from(got) - want).abs() / ulp);
        }
        assert!(worst <= 2.0, "{worst} ulp");
    }

    #[test]
    fn tanh_is_near_everywhere() {
        let mut worst = 0.0f64;
        for i in 1..120_000 {
            let x = i as f32 * 1e-4 + 3e-5;
            for x in [x, -x, x * 1e-3] {
                let want = f64::from(x).tanh();
                worst = worst.max((f64::from(tanh::<FUSED>(x)) / want - 1.0).abs());
            }
        }
        assert!(worst < 5e-7, "{worst}");
        assert_eq!(
            [0.0, f32::INFINITY, -1e30].map(tanh::<FUSED>),
            [0.0, 1.0, -1.0]
        );
        assert!(tanh::<FUSED>(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_special_values() {
        assert_eq!(exp::<FUSED>(0.0), 1.0);
        assert_eq!(exp::<FUSED>(-0.0), 1.0);
        assert_eq!(exp::<FUSED>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<FUSED>(-1e30), 0.0);
        assert_eq!(exp::<FUSED>(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp::<FUSED>(1e30), f32::INFINITY);
        assert!(exp::<FUSED>(f32::NAN).is_nan());
    }

    #[test]
    fn rows_of_a_softmax() {
        for n in [1, 31, 32, 100] {
            let mut row: Vec<f32> = (0..n).map(|i| (i * 7 % 13) as f32 - 6.0).collect();
            row[0] = f32::NEG_INFINITY;
            let want: Vec<f64> = row.iter().map(|&x| f64::from(x - 6.0).exp()).collect();
            let sum = f64::from(exp_sub_sum(&mut row, 6.0));
            assert!((sum - want.iter().sum::<f64>()).abs() <= 1e-5 * sum);
            let near = |(x, w): (&f32, &f64)| (f64::from(*x) - w).abs() <= 1e-6 * w;
            assert!(row.iter().zip(&want).all(near));
        }
    }
}
