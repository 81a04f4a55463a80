//! Products of BF16 in tiles of AMX (Intel's Advanced Matrix Extensions): 16 x 16 sums and 16 times as many multiply-adds as a register of
//! AVX-512 has, in one instruction.
//!
//! Stable Rust has no functions for these instructions, so they are written out.

use std::arch::asm;
use std::sync::OnceLock;

/// Rows of a tile, and 4-byte words of a row.
const SIDE: usize = 16;
/// Sums of a block: two by two tiles. Two of each operand are loaded for four products.
pub(super) const BLOCK: usize = 2 * SIDE;

/// What `ldtilecfg` reads: for each of the eight tiles its rows, and bytes of a row. Tiles 0 to 3 are sums, 4 and 5 of A, 6 and 7 of B.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// For a block of `m` rows and `n` columns, at most [`BLOCK`] of each, and `words` words of each row of A at a time. What a dimension does not fill is left
    /// out of the tiles; of those that are not there at all one row or column is multiplied for nothing ([`run`] says where that goes).
    fn new(m: usize, n: usize, words: usize) -> Self {
        let halves = |x: usize| [x.min(SIDE), x.saturating_sub(SIDE).max(1)];
        let (m, n) = (halves(m), halves(n));
        let mut config = Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for i in 0..2 {
            config.set(2 * i, m[i], n[0]);
            config.set(2 * i + 1, m[i], n[1]);
            config.set(4 + i, m[i], words);
            config.set(6 + i, words, n[i]);
        }
        config
    }

    fn set(&mut self, tile: usize, rows: usize, words: usize) {
        self.rows[tile] = rows as u8;
        self.row_bytes[tile] = 4 * words as u16;
    }
}

/// Whether this CPU has tiles of BF16, and the operating system lets this process use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cpu_has_tiles() && system_allows_tiles())
}

fn cpu_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    /// Of CPUID leaf 7.
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    /// Of register XCR0: the system saves configuration and data of tiles.
    const TILE_STATE: u64 = 0b11 << 17;
    #[target_feature(enable = "xsave")]
    fn saved_state() -> u64 {
        // SAFETY: register 0 is there wherever there is the instruction.
        unsafe { _xgetbv(0) }
    }
    __cpuid(0).eax >= 7
        && __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES
        && is_x86_feature_detected!("xsave")
        // SAFETY: the CPU has XSAVE, and the system uses it (as the macro says).
        && unsafe { saved_state() } & TILE_STATE == TILE_STATE
}

/// Linux wants to be asked before a process uses tiles: threads that do need more room to be saved.
#[cfg(target_os = "linux")]
fn system_allows_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: sets a permission of this process, and reads no memory.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn system_allows_tiles() -> bool {
    false
}

/// The matrices of a product: A is rows of pairs of BF16, B pairs of rows of it side by side, [`BLOCK`] words of them, C F32. Rows of A and C begin so many bytes
/// apart.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) a: *const u32,
    pub(super) a_bytes: usize,
    pub(super) b: *const u32,
    pub(super) c: *mut f32,
    pub(super) c_bytes: usize,
}

/// `C = A B`, or `C += A B` to `accumulate`, of `m` rows and `n` columns, at most [`BLOCK`] of each, over `pairs` pairs. Each element is one chain of additions, in
/// the order of pairs.
///
/// # Safety
/// The matrices must be valid, B with all of its columns, the dimensions above 0, and tiles [available](is_available).
pub(super) unsafe fn block(accumulate: bool, [m, n, pairs]: [usize; 3], x: Operands) {
    let (steps, rest) = (pairs / SIDE, pairs % SIDE);
    // SAFETY: the caller's promise; the rest of the pairs comes after the steps.
    unsafe {
        if steps > 0 {
            run(accumulate, &Config::new(m, n, SIDE), [m, n], steps, x);
        }
        if rest > 0 {
            let x = Operands {
                a: x.a.add(steps * SIDE),
                b: x.b.add(steps * SIDE * BLOCK),
                ..x
            };
            let config = Config::new(m, n, rest);
            run(accumulate || steps > 0, &config, [m, n], 1, x);
        }
    }
}

/// Some steps of [`SIDE`] pairs each, or of as many as the configuration has.
///
/// # Safety
/// As for [`block`].
unsafe fn run(accumulate: bool, config: &Config, [m, n]: [usize; 2], steps: usize, x: Operands) {
    // Tiles that are not there are stored in the place of those that are, which are stored over them.
    let below = if m > SIDE { SIDE } else { 0 };
    let beside = if n > SIDE { SIDE } else { 0 };
    let c = [(0, 0), (0, beside), (below, 0), (below, beside)];
    let c = c.map(|(i, j)| x.c.wrapping_byte_add(i * x.c_bytes + 4 * j));
    // SAFETY: tiles are loaded from, and stored to, elements of the matrices only.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "test {accumulate:e}, {accumulate:e}",
            "jz 2f",
            "tileloadd tmm0, [{t} + {c_stride}]",
            "mov {t}, [{c} + 8]",
            "tileloadd tmm1, [{t} + {c_stride}]",
            "mov {t}, [{c} + 16]",
            "tileloadd tmm2, [{t} + {c_stride}]",
            "mov {t}, [{c} + 24]",
            "tileloadd tmm3, [{t} + {c_stride}]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a} + {a_stride}]",
            "tileloadd tmm6, [{b} + {b_stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {b_stride} + {side}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {a_stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, {side}",
            "add {a1}, {side}",
            "add {b}, {b_step}",
            "dec {steps}",
            "jnz 3b",
            "mov {t}, [{c} + 24]",
            "tilestored [{t} + {c_stride}], tmm3",
            "mov {t}, [{c} + 16]",
            "tilestored [{t} + {c_stride}], tmm2",
            "mov {t}, [{c} + 8]",
            "tilestored [{t} + {c_stride}], tmm1",
            "mov {t}, [{c}]",
            "tilestored [{t} + {c_stride}], tmm0",
            // Nobody has to save what is left in them.
            "tilerelease",
            config = in(reg) config,
            accumulate = in(reg) u32::from(accumulate),
            a = inout(reg) x.a => _,
            a1 = inout(reg) x.a.wrapping_byte_add(below * x.a_bytes) => _,
            a_stride = in(reg) x.a_bytes,
            b = inout(reg) x.b => _,
            b_stride = in(reg) 4 * BLOCK,
            b_step = const 4 * BLOCK * SIDE,
            c = in(reg) c.as_ptr(),
            c_stride = in(reg) x.c_bytes,
            t = inout(reg) x.c => _,
            side = const 4 * SIDE,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}
