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

/// Natural logarithm of a normal, positive `x`, within 3 units in the last place or, near 1, 1e-7.
#[inline(always)]
pub(crate) fn ln<const FUSED: bool>(x: f32) -> f32 {
    // x = 2^n m with m from sqrt(1/2) to sqrt(2).
    const SQRT_HALF: u32 = std::f32::consts::FRAC_1_SQRT_2.to_bits();
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF);
    let n = (shifted as i32 >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(SQRT_HALF));
    // ln m = 2 artanh s, whose series has odd powers only.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut tail = 2.0 / 9.0;
    for c in [2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0] {
        tail = mul_add::<FUSED>(tail, square, c);
    }
    let rest = mul_add::<FUSED>(s * square, tail, 2.0 * s);
    mul_add::<FUSED>(n, std::f32::consts::LN_2, rest)
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

/// The logarithm of the sum of `e^element`: what turns logits into logarithms of probabilities. Elements are numbers.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    let max = largest(row);
    let mut room = [0.0; 1024];
    let mut sum = 0.0;
    for chunk in row.chunks(room.len()) {
        let room = &mut room[..chunk.len()];
        room.copy_from_slice(chunk);
        sum += f64::from(exp_sub_sum(room, max));
    }
    sum.ln() + f64::from(max)
}

vectorized! {
    /// Of every place the logarithm of the sum of `e^(element + offset)` of all rows, each with its offset. There is at least one row, and elements are numbers.
    pub(crate) fn log_add_exp(rows: &[&[f32]], offsets: &[f32], out: &mut [f32]) {
        const LANES: usize = 32;
        for (i, out) in out.chunks_mut(LANES).enumerate() {
            let mut most = [f32::NEG_INFINITY; LANES];
            let mut sums = [0.0; LANES];
            let first = i * LANES;
            for (row, offset) in rows.iter().zip(offsets) {
                for (most, x) in most.iter_mut().zip(&row[first..first + out.len()]) {
                    let x = x + offset;
                    *most = if x > *most { x } else { *most };
                }
            }
            for (row, offset) in rows.iter().zip(offsets) {
                let row = &row[first..first + out.len()];
                for ((sum, most), x) in sums.iter_mut().zip(&most).zip(row) {
                    *sum += exp::<FUSED>(x + offset - most);
                }
            }
            for ((out, sum), most) in out.iter_mut().zip(sums).zip(most) {
                *out = most + ln::<FUSED>(sum);
            }
        }
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
    fn ln_is_near_everywhere() {
        let mut worst = 0.0f64;
        let values = (1..200_000).map(|i| i as f32 * 3.7e-5);
        let powers = (-126..128).map(|n| 1.1 * (n as f32).exp2());
        for x in values.chain(powers.filter(|x| x.is_normal())) {
            let want = f64::from(x).ln();
            let error = (f64::from(ln::<FUSED>(x)) - want).abs();
            worst = worst.max(error / want.abs().max(0.5));
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!(ln::<FUSED>(1.0), 0.0);
    }

    #[test]
    fn sums_of_exponentials_are_near_whatever_their_range() {
        let row = |seed: u32, n: u32, scale: f32| -> Vec<f32> {
            let value = |i: u32| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(97)) % 2001;
            (0..n).map(|i| (value(i) as f32 - 1000.0) * scale).collect()
        };
        let sum = |values: &[f64]| -> f64 {
            let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            values.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max
        };
        for (n, scale) in [(1, 1.0), (33, 0.01), (5000, 0.003), (5000, 0.9)] {
            let (a, b) = (row(1, n, scale), row(2, n, scale));
            let wide: Vec<f64> = a.iter().map(|&x| x.into()).collect();
            assert!((log_sum_exp(&a) - sum(&wide)).abs() < 1e-6);
            let mut out = vec![0.0; n as usize];
            log_add_exp(&[&a, &b], &[-0.5, -250.0], &mut out);
            for ((out, &a), &b) in out.iter().zip(&a).zip(&b) {
                let want = sum(&[f64::from(a) - 0.5, f64::from(b) - 250.0]);
                assert!((f64::from(*out) - want).abs() < 1e-6 * want.abs().max(1.0));
            }
        }
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
