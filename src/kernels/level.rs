//! Which instructions kernels use. It is found out once, when the program runs, whatever the program was compiled for: one binary is fast on
//! every CPU.

use std::cmp::Ordering;
use std::fmt;
use std::sync::OnceLock;

/// Vector instructions that kernels are made for. A level is above another one if it has its instructions, too; those of different architectures do
/// not compare, apart from the baseline, which is below all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuLevel {
    /// What the program was compiled for: SSE2 on x86-64, NEON on AArch64, if nobody said otherwise.
    Baseline,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 VNNI: dot products of bytes.
    Avx512Vnni,
    /// AVX-512 BF16 and VBMI: dot products of BF16.
    Avx512Bf16,
    /// AMX: tiles of BF16.
    Amx,
    /// Armv8.4's dot products of bytes, on AArch64.
    DotProd,
    /// Armv8.6's products of small matrices of bytes, on AArch64.
    I8mm,
}

/// The environment variable [`CpuLevel::VARIABLE`] asks for what is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}={wanted}: {}; this CPU has {}", CpuLevel::VARIABLE, why(*known), available())]
pub struct CpuError {
    wanted: String,
    /// Whether there is such a level.
    known: bool,
}

fn why(known: bool) -> &'static str {
    match known {
        true => "this CPU lacks these instructions",
        false => "there is no such level",
    }
}

fn available() -> String {
    let names: Vec<_> = CpuLevel::available().map(|level| level.name()).collect();
    names.join(", ")
}

impl CpuLevel {
    /// The environment variable that sets a lower level than the CPU's by its [name](Self::name): for tests and measurements.
    pub const VARIABLE: &str = "GGRAFT_CPU";

    /// Of all architectures, each one's in order.
    const ALL: [Self; 8] = [
        Self::Baseline,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::Amx,
        Self::DotProd,
        Self::I8mm,
    ];

    /// `baseline`; `avx2`, `avx512`, `avx512-vnni`, `avx512-bf16` or `amx`; `dotprod` or `i8mm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
            Self::DotProd => "dotprod",
            Self::I8mm => "i8mm",
        }
    }

    /// The architecture that has the instructions; `None` for the baseline of all.
    fn architecture(self) -> Option<&'static str> {
        match self {
            Self::Baseline => None,
            Self::Avx2 | Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => {
                Some("x86_64")
            }
            Self::DotProd | Self::I8mm => Some("aarch64"),
        }
    }

    /// Levels that this CPU has, the lowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The level that kernels use in this process: the CPU's highest, unless the environment asks for another one.
    ///
    /// # Errors
    /// If it asks for one that the CPU does not have, or that there is not.
    pub fn current() -> Result<Self, CpuError> {
        static CHOSEN: OnceLock<Result<CpuLevel, CpuError>> = OnceLock::new();
        let choose = || match std::env::var_os(Self::VARIABLE) {
            Some(name) => Self::named(&name.to_string_lossy()),
            None => Ok(Self::highest()),
        };
        CHOSEN.get_or_init(choose).clone()
    }

    fn highest() -> Self {
        Self::available().last().unwrap_or(Self::Baseline)
    }

    fn named(name: &str) -> Result<Self, CpuError> {
        let level = Self::ALL.into_iter().find(|level| level.name() == name);
        match level {
            Some(level) if level.is_available() => Ok(level),
            known => Err(CpuError {
                wanted: name.to_owned(),
                known: known.is_some(),
            }),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        match self {
            Self::Baseline => true,
            Self::Avx2 => has!("avx2") && has!("fma") && has!("f16c"),
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512dq")
                    && has!("avx512vl")
            }
            Self::Avx512Vnni => Self::Avx512.is_available() && has!("avx512vnni"),
            Self::Avx512Bf16 => {
                Self::Avx512Vnni.is_available() && has!("avx512bf16") && has!("avx512vbmi")
            }
            Self::Amx => Self::Avx512Bf16.is_available() && super::amx::is_available(),
            Self::DotProd | Self::I8mm => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn is_available(self) -> bool {
        use std::arch::is_aarch64_feature_detected as has;
        match self {
            Self::Baseline => true,
            Self::DotProd => has!("dotprod"),
            Self::I8mm => Self::DotProd.is_available() && has!("i8mm"),
            _ => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_available(self) -> bool {
        self == Self::Baseline
    }
}

impl PartialOrd for CpuLevel {
    #[inline]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        let comparable = match (self.architecture(), other.architecture()) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        comparable.then(|| (*self as u8).cmp(&(*other as u8)))
    }
}

impl fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether kernels use the instructions of `level`. Who opens a model has been told of a wish that cannot be met; until then the CPU's highest counts.
pub(crate) fn has(level: CpuLevel) -> bool {
    level <= CpuLevel::current().unwrap_or_else(|_| CpuLevel::highest())
}

/// Whether the CPU is Intel's: at the same level it has other strengths than AMD's.
pub(crate) fn is_intel() -> bool {
    static IS_INTEL: OnceLock<bool> = OnceLock::new();
    #[cfg(target_arch = "x86_64")]
    let name_ends_with = |text: &[u8; 4]| std::arch::x86_64::__cpuid(0).ecx.to_le_bytes() == *text;
    #[cfg(not(target_arch = "x86_64"))]
    let name_ends_with = |_: &[u8; 4]| false;
    *IS_INTEL.get_or_init(|| name_ends_with(b"ntel"))
}

/// Whether a multiply-add is one instruction in code that is compiled for no level of its own.
pub(crate) const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// A function of straight-line loops that the compiler vectorizes for each level. Its body may call `#[inline(always)]` functions, which become part of it,
/// and in it `FUSED` says whether a multiply-add is one instruction.
macro_rules! vectorized {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        $vis fn $name($($arg: $ty),*) $(-> $result)? {
            #[inline(always)]
            fn body<const FUSED: bool>($($arg: $ty),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::kernels::level::{CpuLevel, has};

                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $result)? {
                    body::<true>($($arg),*)
                }

                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $result)? {
                    body::<true>($($arg),*)
                }

                if has(CpuLevel::Avx512) {
                    // SAFETY: the CPU has the instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if has(CpuLevel::Avx2) {
                    // SAFETY: the CPU has the instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body::<{ $crate::kernels::level::FUSED }>($($arg),*)
        }
    };
}
pub(crate) use vectorized;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_found_by_their_names() {
        let mut found = 0;
        for level in CpuLevel::available() {
            assert_eq!(CpuLevel::named(level.name()), Ok(level));
            found += 1;
        }
        assert!(found > 0);
        for level in CpuLevel::ALL.into_iter().filter(|l| !l.is_available()) {
            let error = CpuLevel::named(level.name()).unwrap_err();
            assert!(error.to_string().contains("lacks"), "{error}");
        }
        let error = CpuLevel::named("sse9").unwrap_err().to_string();
        assert!(
            error.starts_with("GGRAFT_CPU=sse9: there is no such level; this CPU has baseline")
        );
    }

    #[test]
    fn a_level_has_those_before_it() {
        let available: Vec<_> = CpuLevel::available().collect();
        let highest = CpuLevel::highest();
        assert_eq!(available.last(), Some(&highest));
        for level in CpuLevel::ALL {
            assert_eq!(level <= highest, available.contains(&level), "{level}");
        }
        assert!(available.is_sorted());
    }

    #[test]
    fn levels_of_other_architectures_are_neither_above_nor_below() {
        let (x86, arm) = (CpuLevel::Amx, CpuLevel::DotProd);
        assert_eq!(x86.partial_cmp(&arm), None);
        assert!(arm < CpuLevel::I8mm && CpuLevel::Avx2 < x86);
        assert!(CpuLevel::ALL.into_iter().all(|l| CpuLevel::Baseline <= l));
    }
}
