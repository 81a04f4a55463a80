use super::super::naive::{Layout, dot};
use super::super::{BLOCK, Dots, has_bytes, has_format, most_dots, pack_row};
use super::super::{Bits, packed_words};
use super::*;
use crate::kernels::{TYPES, values};

/// Rows of any bits, but for numbers in half precision, which are sensible ones.
fn weights(layout: &Layout, bytes: usize) -> Vec<u8> {
    let random = values(bytes + bytes / 2, 3).into_iter();
    let random: Vec<_> = random.map(|x| (x * 2f32.powi(23)) as i32).collect();
    let mut w: Vec<_> = random[..bytes].iter().map(|x| *x as u8).collect();
    for (unit, random) in w.chunks_mut(layout.bytes).zip(&random[bytes..]) {
        if layout.halves.is_empty() {
            // Also those that have no exponent of their own.
            unit[0] = match random % 16 {
                0 => (random >> 4 & 1) as u8,
                _ => 112 + (unit[0] & 15),
            };
        }
        for (i, at) in layout.halves.iter().enumerate() {
            // Of 2^-8 to 2^-4, of any sign.
            let bits = (random >> i & 0x0fff | 0x1c00 | random << 3 & 0x8000) as u16;
            unit[*at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
    }
    w
}

/// A kernel for [`Dots`]: false if there is none for the type.
type Kernel = unsafe fn(Dots, GgmlType) -> bool;

/// The kernels for weights as they lie in memory, of type `ty`, and for how many rows of X each is: the one that is chosen, and those that it is chosen from.
fn kernels(ty: GgmlType) -> Vec<(&'static str, usize, Kernel)> {
    // SAFETY: the caller's promise.
    let chosen = |dots: Dots, ty| unsafe { dots.compute(ty) };
    let mut all: Vec<(_, _, Kernel)> = vec![("chosen", most_dots(ty, Bits::Eight), chosen)];
    all.extend(choice());
    all
}

/// Those that one is chosen from.
#[cfg(target_arch = "x86_64")]
fn choice() -> Vec<(&'static str, usize, Kernel)> {
    use super::super::avx2::{formats::visit, turned as eight};
    use super::super::avx512::{dot::ByteDots, turned::MOST_TURNED, turned::TurnedDots};
    use super::super::has_avx512;
    if !has_avx512() {
        // SAFETY: the same.
        let turned: Kernel = |dots, ty| unsafe { visit(ty, eight::TurnedDots(dots)) }.is_some();
        return vec![("turned", eight::MOST_TURNED, turned)];
    }
    // SAFETY: the caller's promise; the tests check that the CPU has the instructions.
    let across: Kernel = |dots, ty| unsafe { visit(ty, ByteDots(dots)) }.is_some();
    // SAFETY: the same.
    let turned: Kernel = |dots, ty| unsafe { visit(ty, TurnedDots(dots)) }.is_some();
    vec![("across", 4, across), ("turned", MOST_TURNED, turned)]
}

/// There is only one.
#[cfg(not(target_arch = "x86_64"))]
fn choice() -> Vec<(&'static str, usize, Kernel)> {
    Vec::new()
}

/// Rows of W times rows of X, by a kernel for W as it lies in memory, or by tiles in the depths that a panel has.
fn product(
    ty: GgmlType,
    w: &[u8],
    x: &[f32],
    [k, rows, t]: [usize; 3],
    kernel: Option<Kernel>,
) -> Vec<f32> {
    let (row_bytes, stride) = (w.len() / rows, packed_words(k, t, Bits::Eight));
    let mut packed = vec![0.0; stride * t];
    for (x, to) in x.chunks(k).zip(packed.chunks_mut(stride)) {
        pack_row(x, t, Bits::Eight, to);
    }
    let mut y = vec![f32::NAN; rows * t];
    if let Some(kernel) = kernel {
        let dots = Dots {
            first: w.as_ptr(),
            row_bytes,
            rows,
            x: packed.as_ptr(),
            bits: Bits::Eight,
            t,
            k,
            y: y.as_mut_ptr(),
            y_stride: rows,
        };
        // SAFETY: the matrices have these sizes, and the CPU the instructions (checked by the caller).
        assert!(unsafe { kernel(dots, ty) });
        return y;
    }
    let mut panel = BytePanel::new();
    let depth = 256;
    panel.resize(depth / BLOCK);
    for first in (0..rows).step_by(BYTE_WIDTH) {
        for k0 in (0..k).step_by(depth) {
            let blocks = depth.min(k - k0) / BLOCK;
            let layout = Layout::of(ty).unwrap();
            let at = first * row_bytes + k0 / BLOCK / layout.blocks * layout.bytes;
            let x = Rows {
                words: packed.as_ptr(),
                t,
                k,
                first: k0 / BLOCK,
                stride,
            };
            let y = Output {
                values: y[first..].as_mut_ptr(),
                stride: rows,
                width: BYTE_WIDTH.min(rows - first),
                accumulate: k0 > 0,
            };
            // SAFETY: as above.
            unsafe {
                panel.unpack(ty, (w[at..].as_ptr(), row_bytes), y.width, 0..blocks);
                panel.multiply(blocks, x, y);
            }
        }
    }
    y
}

#[test]
fn products_are_those_of_plain_code() {
    if !has_bytes() {
        ggraft_testkit::skipped("products in bytes beside plain code (needs AVX2 or NEON)");
        return;
    }
    let mut types = 0;
    for ty in TYPES.into_iter().filter(|&ty| has_format(ty)) {
        let layout = Layout::of(ty).unwrap();
        for (k, rows) in [(512, 37), (256, 3), (288, 9), (32, 65)] {
            let Some(row_bytes) = ty.row_bytes(k as u64) else {
                continue;
            };
            let w = weights(&layout, rows * row_bytes as usize);
            for t in 1..14 {
                let mut x = values(k * t, 2);
                for (i, x) in x.iter_mut().enumerate() {
                    *x *= (1 + i % 7) as f32 * if i % 61 == 0 { 20.0 } else { 1.0 };
                }
                x[..BLOCK].fill(if t % 2 == 0 { 0.0 } else { 1e-38 });
                let w_rows = || w.chunks(row_bytes as usize);
                let want = x
                    .chunks(k)
                    .flat_map(|x| w_rows().map(move |w| dot(ty, w, x).to_bits()));
                let want: Vec<_> = want.collect();
                let check = |name: &str, kernel| {
                    let got = product(ty, &w, &x, [k, rows, t], kernel);
                    let got: Vec<_> = got.into_iter().map(f32::to_bits).collect();
                    assert!(got == want, "{ty:?}, {k} x {rows} x {t}, {name}");
                };
                if arch::has_tiles() {
                    check("tiles", None);
                }
                for (name, most, kernel) in kernels(ty) {
                    if t <= most {
                        check(name, Some(kernel));
                    }
                }
            }
        }
        types += 1;
    }
    assert_eq!(types, if cfg!(target_arch = "x86_64") { 13 } else { 12 });
}
