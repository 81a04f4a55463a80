//! Random products of all types against the definition.

use super::*;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

/// What a product is made of; types, bits and sizes along the reduction are picked from those that there are.
#[derive(Clone, Debug)]
struct Sizes {
    pick: usize,
    /// Values of a row if the type has no blocks, and whether as many as a panel unpacks at a time come before them.
    values: usize,
    deep: bool,
    n: usize,
    t: usize,
    seed: u32,
    /// Blocks of X differ by so many powers of two.
    spread: u32,
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let (values, deep) = (1..320usize, proptest::bool::weighted(0.15));
    let (n, t) = (1..75usize, prop_oneof![1..6usize, 1..41usize]);
    let (pick, seed, spread) = (any::<usize>(), 1..u32::MAX, 0..30u32);
    (pick, values, deep, n, t, seed, spread).prop_map(|(pick, values, deep, n, t, seed, spread)| {
        Sizes {
            pick,
            values,
            deep,
            n,
            t,
            seed,
            spread,
        }
    })
}

impl Case {
    /// `None` where there are no kernels.
    fn random(sizes: &Sizes) -> Option<(Self, Bits)> {
        let kernels = kernels();
        let &(ty, bits) = kernels.get(sizes.pick % kernels.len().max(1))?;
        let k = match ty.block_size() as usize {
            // Pairs of BF16 are even.
            1 if ty == GgmlType::BF16 => sizes.values.next_multiple_of(2),
            1 => sizes.values,
            BLOCK => BLOCK * sizes.values.div_ceil(BLOCK),
            block => block * sizes.values.div_ceil(4 * BLOCK),
        };
        let k = k + if sizes.deep { DEPTH } else { 0 };
        let mut w = Vec::new();
        quantize_rows(ty, &values(k * sizes.n, sizes.seed), k, &mut w);
        let mut x = values(k * sizes.t, !sizes.seed);
        for (i, x) in x.chunks_mut(BLOCK).enumerate() {
            let power = (i as u32).wrapping_mul(2_654_435_769) >> 8;
            let power = (power % (sizes.spread + 1)) as i32 - sizes.spread as i32 / 2;
            // Some blocks are nothing.
            let size = match i % 23 {
                22 => 0.0,
                _ => 2.0f32.powi(power),
            };
            x.iter_mut().for_each(|x| *x *= size);
        }
        let w = Exact::new(ty, &w);
        let n = sizes.n;
        Some((Self { ty, k, n, w, x }, bits))
    }

    /// The definition in F64, and by how much a product may differ from it at most.
    fn naive(&self, bits: Bits) -> Vec<(f64, f64)> {
        let w = self.weights();
        let mut all = Vec::new();
        for x in self.x.chunks(self.k) {
            all.extend(w.chunks(self.k).map(|w| element(x, w, self.ty, bits)));
        }
        all
    }
}

/// An element of the product of rows X and W.
fn element(x: &[f32], w: &[f32], ty: GgmlType, bits: Bits) -> (f64, f64) {
    let largest = |of: &[f32]| of.iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
    let sum = |of: &[f32]| of.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    // Rounding to the nearest multiple of a step is off by half of it, and by what F32 does to quotient and product.
    let half_step = |of: &[f32], steps: f64| 0.5001 / steps * largest(of) + 1e-30;
    let (mut exact, mut bound) = (0.0, 0.0);
    // What is subtracted from the weights' integers is at most as large as the weights.
    let size = 4.0 * largest(w);
    let sums = match bits {
        Bits::Eight | Bits::Fourteen => 2 * x.len() / BLOCK + 8,
        // Chains, trees, runs.
        Bits::Bf16 | Bits::All => 2 * 32 + 4 + x.len() / 512,
    };
    let sums_in_f32 = sums as f64 * f64::from(f32::EPSILON);
    for (x, w) in x.chunks(BLOCK).zip(w.chunks(BLOCK)) {
        let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        exact += products.sum::<f64>();
        let rounded_x = match bits {
            Bits::Eight => half_step(x, 127.0),
            Bits::Fourteen => half_step(x, 8191.0),
            // Rounded each by itself, see below.
            Bits::Bf16 | Bits::All => 0.0,
        };
        if bits == Bits::Bf16 {
            let products = x.iter().zip(w).map(|(x, w)| f64::from((x * w).abs()));
            bound += products.sum::<f64>() / 255.9;
        }
        let rounded_w = match floats::reads(ty) || packed::has_format(ty) {
            true => 0.0,
            false => half_step(w, 8191.0),
        };
        bound += rounded_x * sum(w) + rounded_w * (sum(x) + 32.0 * rounded_x);
        bound += sums_in_f32 * size * sum(x);
    }
    (exact, bound)
}

fn to_bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

/// A value that is no number or infinite.
fn odd() -> impl Strategy<Value = f32> {
    prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)]
}

fn is_finite(y: &[f32]) -> bool {
    y.iter().all(|y| y.is_finite())
}

/// Elements of column `n` are no finite numbers, all others are as before.
fn only_column(n: usize, width: usize, y: &[f32], before: &[f32]) -> Result<(), TestCaseError> {
    for (i, (y, before)) in y.iter().zip(before).enumerate() {
        match i % width == n {
            true => prop_assert!(!y.is_finite(), "{y} at {i}"),
            false => prop_assert_eq!(y.to_bits(), before.to_bits()),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_what_the_definition_says(sizes in sizes()) {
        let Some((case, bits)) = Case::random(&sizes) else { return Ok(()) };
        let y = case.product(0..case.t(), bits, 1);
        for (i, (got, (want, bound))) in y.iter().zip(case.naive(bits)).enumerate() {
            let error = (f64::from(*got) - want).abs();
            prop_assert!(error <= bound, "{:?} {:?} {} at {}: {} for {}, {:e} more than {:e}", case.ty, bits, case.k, i, got, want, error, bound);
        }
    }

    #[test]
    fn rows_are_the_same_in_any_company(sizes in sizes(), nth in 1..100usize, some in any::<[prop::sample::Index; 2]>()) {
        let Some((case, bits)) = Case::random(&sizes) else { return Ok(()) };
        let all = to_bits(&case.product(0..case.t(), bits, 1));
        prop_assert_eq!(&to_bits(&case.product(0..case.t(), bits, nth)), &all);
        let [a, b] = some.map(|i| i.index(case.t() + 1));
        // None, too.
        let rows = a.min(b)..a.max(b);
        let want = &all[rows.start * case.n..rows.end * case.n];
        prop_assert_eq!(&to_bits(&case.product(rows, bits, nth)), want);
    }

    #[test]
    fn odd_values_of_x_come_out_in_their_row(sizes in sizes(), odd in odd(), at in any::<prop::sample::Index>()) {
        let Some((mut case, bits)) = Case::random(&sizes) else { return Ok(()) };
        let before = case.product(0..case.t(), bits, 1);
        prop_assert!(is_finite(&before));
        let at = at.index(case.x.len());
        case.x[at] = odd;
        let y = case.product(0..case.t(), bits, 1);
        for (t, (y, before)) in y.chunks(case.n).zip(before.chunks(case.n)).enumerate() {
            match t == at / case.k {
                true => prop_assert!(y.iter().all(|y| !y.is_finite())),
                false => prop_assert_eq!(to_bits(y), to_bits(before)),
            }
        }
    }

    #[test]
    fn odd_values_of_w_come_out_in_their_column(sizes in sizes(), odd in odd(), at in any::<prop::sample::Index>()) {
        let Some((mut case, bits)) = Case::random(&sizes) else { return Ok(()) };
        let before = case.product(0..case.t(), bits, 1);
        let row_bytes = case.row_bytes();
        // A value, or the first factor of a block.
        let size = case.ty.type_size() as usize;
        let block = at.index(case.w.len() / size);
        let value = match case.ty {
            GgmlType::F32 => odd.to_le_bytes().to_vec(),
            GgmlType::BF16 => bf16::from_f32(odd).to_le_bytes().to_vec(),
            _ => f16::from_f32(odd).to_le_bytes().to_vec(),
        };
        let offset = match case.ty.is_quantized() {
            true => factors(case.ty).first(),
            false => Some(&0),
        };
        // Of MXFP4 all bits are numbers.
        let Some(offset) = offset else { return Ok(()) };
        case.w[block * size + offset..][..value.len()].copy_from_slice(&value);
        let y = case.product(0..case.t(), bits, 1);
        only_column(block * size / row_bytes, case.n, &y, &before)?;
    }
}
