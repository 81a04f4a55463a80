//! ggml's tensor types as they occur in GGUF files: numbers, names, block sizes. Plain data, no ggml.

/// One row per type keeps number, name and sizes of a type in one place: `Variant = number, name, elements and bytes per block`.
macro_rules! ggml_types {
    ($($variant:ident = $number:literal, $name:literal, $block:literal, $bytes:literal;)*) => {
        /// Type of a tensor's elements in a file.
        ///
        /// ggml's Q8_1 and Q8_K are missing on purpose: they are scratch formats of its kernels and hold no weights.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types, missing_docs)]
        #[repr(u32)]
        pub enum GgmlType {
            $($variant = $number,)*
        }

        impl GgmlType {
            /// Every type, in the order of ggml's numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The type with ggml's number `n`.
            pub fn from_u32(n: u32) -> Option<Self> {
                match n {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// ggml's name, for example `q4_K`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Elements per block.
            pub fn block_size(self) -> u64 {
                match self {
                    $(Self::$variant => $block,)*
                }
            }

            /// Bytes per block.
            pub fn type_size(self) -> u64 {
                match self {
                    $(Self::$variant => $bytes,)*
                }
            }
        }
    };
}

ggml_types! {
    F32 = 0, "f32", 1, 4;
    F16 = 1, "f16", 1, 2;
    Q4_0 = 2, "q4_0", 32, 18;
    Q4_1 = 3, "q4_1", 32, 20;
    Q5_0 = 6, "q5_0", 32, 22;
    Q5_1 = 7, "q5_1", 32, 24;
    Q8_0 = 8, "q8_0", 32, 34;
    Q2_K = 10, "q2_K", 256, 84;
    Q3_K = 11, "q3_K", 256, 110;
    Q4_K = 12, "q4_K", 256, 144;
    Q5_K = 13, "q5_K", 256, 176;
    Q6_K = 14, "q6_K", 256, 210;
    IQ2_XXS = 16, "iq2_xxs", 256, 66;
    IQ2_XS = 17, "iq2_xs", 256, 74;
    IQ3_XXS = 18, "iq3_xxs", 256, 98;
    IQ1_S = 19, "iq1_s", 256, 50;
    IQ4_NL = 20, "iq4_nl", 32, 18;
    IQ3_S = 21, "iq3_s", 256, 110;
    IQ2_S = 22, "iq2_s", 256, 82;
    IQ4_XS = 23, "iq4_xs", 256, 136;
    I8 = 24, "i8", 1, 1;
    I16 = 25, "i16", 1, 2;
    I32 = 26, "i32", 1, 4;
    I64 = 27, "i64", 1, 8;
    F64 = 28, "f64", 1, 8;
    IQ1_M = 29, "iq1_m", 256, 56;
    BF16 = 30, "bf16", 1, 2;
    TQ1_0 = 34, "tq1_0", 256, 54;
    TQ2_0 = 35, "tq2_0", 256, 66;
    MXFP4 = 39, "mxfp4", 32, 17;
    NVFP4 = 40, "nvfp4", 64, 36;
    Q1_0 = 41, "q1_0", 128, 18;
    Q2_0 = 42, "q2_0", 64, 18;
}

impl GgmlType {
    /// Elements share a block with a common scale, so that a row can only be cut at block boundaries.
    pub fn is_quantized(self) -> bool {
        self.block_size() > 1
    }

    /// Bytes of a row of `ne0` elements; `None` if `ne0` is no multiple of the block size or the product overflows.
    pub fn row_bytes(self, ne0: u64) -> Option<u64> {
        if !ne0.is_multiple_of(self.block_size()) {
            return None;
        }
        (ne0 / self.block_size()).checked_mul(self.type_size())
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn every_number_agrees_with_ggml() {
        const SCRATCH_ONLY: [u32; 2] = [ggml_sys::GGML_TYPE_Q8_1, ggml_sys::GGML_TYPE_Q8_K];
        for n in 0..ggml_sys::GGML_TYPE_COUNT {
            // SAFETY: `n` is below GGML_TYPE_COUNT, as these table lookups demand; the name is a static C string.
            let (name, block, bytes, quantized) = unsafe {
                (
                    CStr::from_ptr(ggml_sys::ggml_type_name(n))
                        .to_str()
                        .unwrap(),
                    ggml_sys::ggml_blck_size(n) as u64,
                    ggml_sys::ggml_type_size(n) as u64,
                    ggml_sys::ggml_is_quantized(n),
                )
            };
            let Some(ty) = GgmlType::from_u32(n) else {
                assert!(
                    block == 0 || SCRATCH_ONLY.contains(&n),
                    "{name} ({n}) is missing"
                );
                continue;
            };
            assert_eq!(ty as u32, n);
            assert_eq!(ty.name(), name);
            assert_eq!((ty.block_size(), ty.type_size()), (block, bytes), "{name}");
            assert_eq!(ty.is_quantized(), quantized, "{name}");
        }
        assert_eq!(GgmlType::from_u32(ggml_sys::GGML_TYPE_COUNT), None);
        assert_eq!(GgmlType::from_u32(u32::MAX), None);
    }

    #[test]
    fn row_bytes_refuses_part_blocks_and_overflow() {
        assert_eq!(GgmlType::Q8_0.row_bytes(64), Some(68));
        assert_eq!(GgmlType::Q8_0.row_bytes(16), None);
        assert_eq!(GgmlType::F32.row_bytes(u64::MAX / 2), None);
        assert_eq!(GgmlType::F32.row_bytes(0), Some(0));
    }
}
