//! Products in bytes in plain code, value by value: what kernels must give, to the last bit, on every CPU.

use super::BLOCK;
use crate::file::types::GgmlType;
use half::f16;

/// How a type lies in memory.
pub(super) struct Layout {
    /// Of a unit.
    pub(super) bytes: usize,
    /// Of a unit.
    pub(super) blocks: usize,
    /// Where numbers in half precision are: a step, and a minimum if there is one. A type without begins with the exponent of a step.
    pub(super) halves: &'static [usize],
}

impl Layout {
    /// `None` if a type is not integers in blocks.
    pub(super) fn of(ty: GgmlType) -> Option<Self> {
        let (bytes, blocks, halves): (_, _, &[usize]) = match ty {
            GgmlType::Q8_0 => (34, 1, &[0]),
            GgmlType::Q4_0 | GgmlType::IQ4_NL => (18, 1, &[0]),
            GgmlType::Q4_1 => (20, 1, &[0, 2]),
            GgmlType::Q5_0 => (22, 1, &[0]),
            GgmlType::Q5_1 => (24, 1, &[0, 2]),
            GgmlType::Q2_K => (84, 8, &[80, 82]),
            GgmlType::Q3_K => (110, 8, &[108]),
            GgmlType::Q4_K => (144, 8, &[0, 2]),
            GgmlType::Q5_K => (176, 8, &[0, 2]),
            GgmlType::Q6_K => (210, 8, &[208]),
            GgmlType::IQ4_XS => (136, 8, &[0]),
            GgmlType::MXFP4 => (17, 1, &[]),
            _ => return None,
        };
        Some(Self {
            bytes,
            blocks,
            halves,
        })
    }
}

/// A block of weights: integers times a step plus a minimum.
struct Block {
    integers: [i32; BLOCK],
    /// Two if halves have their own.
    steps: Vec<f32>,
    /// None, one, or two if halves have their own.
    mins: Vec<f32>,
}

/// Twice what MXFP4 means by four bits.
const E2M1: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What IQ4_NL and IQ4_XS mean by four bits.
const LEVELS: [i32; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

impl Block {
    /// Block `i` of a unit.
    fn decode(ty: GgmlType, unit: &[u8], i: usize) -> Self {
        let half = |at: usize| f16::from_le_bytes([unit[at], unit[at + 1]]).to_f32();
        // `n` bits of a byte, from bit `from` on.
        let bits = |at: usize, from: usize, n: usize| i32::from(unit[at]) >> from & ((1 << n) - 1);
        let nibble = |at: usize, j: usize| bits(at + j % 16, j / 16 * 4, 4);
        let fifth = |at: usize, j: usize| bits(at + j / 8, j % 8, 1) << 4;
        // Four bits of the K-quants that keep two blocks in 32 bytes.
        let low = |at: usize, j: usize| bits(at + 32 * (i / 2) + j, 4 * (i % 2), 4);
        let integer = |j: usize| match ty {
            GgmlType::Q8_0 => i32::from(unit[2 + j].cast_signed()),
            GgmlType::Q4_0 => nibble(2, j) - 8,
            GgmlType::Q4_1 => nibble(4, j),
            GgmlType::Q5_0 => (nibble(6, j) | fifth(2, j)) - 16,
            GgmlType::Q5_1 => nibble(8, j) | fifth(4, j),
            GgmlType::Q2_K => bits(16 + 32 * (i / 4) + j, 2 * (i % 4), 2),
            GgmlType::Q3_K => {
                (bits(32 + 32 * (i / 4) + j, 2 * (i % 4), 2) | bits(j, i, 1) << 2) - 4
            }
            GgmlType::Q4_K => low(16, j),
            GgmlType::Q5_K => low(48, j) | bits(16 + j, i, 1) << 4,
            GgmlType::Q6_K => {
                let (upper, quarter) = (i / 4, i % 4);
                let low = bits(64 * upper + 32 * (quarter % 2) + j, 4 * (quarter / 2), 4);
                (low | bits(128 + 32 * upper + j, 2 * quarter, 2) << 4) - 32
            }
            GgmlType::IQ4_NL => LEVELS[nibble(2, j) as usize],
            GgmlType::IQ4_XS => LEVELS[nibble(8 + 16 * i, j) as usize],
            GgmlType::MXFP4 => E2M1[nibble(1, j) as usize],
            ty => unreachable!("{ty:?} is no integers"),
        };
        // Six bits of a step's and of a minimum's factor.
        let factors = || match i {
            0..4 => [bits(4 + i, 0, 6), bits(8 + i, 0, 6)],
            _ => [
                bits(8 + i, 0, 4) | bits(i, 6, 2) << 4,
                bits(8 + i, 4, 4) | bits(4 + i, 6, 2) << 4,
            ],
        };
        let (steps, mins) = match ty {
            GgmlType::Q4_1 | GgmlType::Q5_1 => (vec![half(0)], vec![half(2)]),
            GgmlType::Q4_K | GgmlType::Q5_K => {
                let [step, min] = factors().map(|f| f as f32);
                (vec![half(0) * step], vec![-half(2) * min])
            }
            GgmlType::Q2_K => {
                let of_half = |at: usize, from: usize| {
                    let factor = |half| bits(2 * i + half, from, 4) as f32;
                    [factor(0) * half(at), factor(1) * half(at)]
                };
                let [steps, mins] = [of_half(80, 0), of_half(82, 4)];
                (steps.to_vec(), mins.map(|min| -min).to_vec())
            }
            GgmlType::Q3_K => {
                let factor = |s: usize| {
                    let low = bits(96 + s % 8, s / 8 * 4, 4);
                    (low | bits(104 + s % 4, s / 4 * 2, 2) << 4) - 32
                };
                let step = |s| half(108) * factor(s) as f32;
                (vec![step(2 * i), step(2 * i + 1)], vec![])
            }
            GgmlType::Q6_K => {
                let step = |s: usize| half(208) * f32::from(unit[192 + s].cast_signed());
                (vec![step(2 * i), step(2 * i + 1)], vec![])
            }
            GgmlType::IQ4_XS => {
                let factor = bits(4 + i / 2, i % 2 * 4, 4) | bits(2 + i / 4, i % 4 * 2, 2) << 4;
                (vec![half(0) * (factor - 32) as f32], vec![])
            }
            GgmlType::MXFP4 => (vec![2f64.powi(i32::from(unit[0]) - 128) as f32], vec![]),
            _ => (vec![half(0)], vec![]),
        };
        Self {
            integers: std::array::from_fn(integer),
            steps,
            mins,
        }
    }
}

/// A block of X, rounded to 8 bits.
struct Rounded {
    integers: [i32; BLOCK],
    step: f32,
}

impl Rounded {
    fn new(x: &[f32]) -> Self {
        let most = x.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        let (step, inverse) = match most > super::TINY {
            true => (most / 127.0, 127.0 / most),
            false => (0.0, 0.0),
        };
        let integer = |i: usize| (x[i] * inverse).round_ties_even() as i32;
        Self {
            integers: std::array::from_fn(integer),
            step,
        }
    }
}

/// A row of weights of type `ty` times one of finite values.
pub(super) fn dot(ty: GgmlType, w: &[u8], x: &[f32]) -> f32 {
    let layout = Layout::of(ty).expect("integers in blocks");
    let mut sum = 0.0f32;
    for (b, x) in x.chunks(BLOCK).enumerate() {
        let unit = &w[b / layout.blocks * layout.bytes..];
        let (w, x) = (Block::decode(ty, unit, b % layout.blocks), Rounded::new(x));
        let products: Vec<_> = (0..BLOCK).map(|i| w.integers[i] * x.integers[i]).collect();
        let parts = products.chunks(BLOCK / w.steps.len());
        for (products, step) in parts.zip(&w.steps) {
            let products: i32 = products.iter().sum();
            sum = (products as f32).mul_add(step * x.step, sum);
        }
        let x_sum = |integers: &[i32]| integers.iter().sum::<i32>() as f32 * x.step;
        let all = x_sum(&x.integers);
        match w.mins[..] {
            [] => {}
            [min] => sum = min.mul_add(all, sum),
            _ => {
                let first = x_sum(&x.integers[..BLOCK / 2]);
                sum = w.mins[0].mul_add(first, sum);
                sum = w.mins[1].mul_add(all - first, sum);
            }
        }
    }
    sum
}
