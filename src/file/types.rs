//! ggml's tensor types as they occur in GGUF files: numbers, names, block sizes. Plain data, no ggml.

/// Type of a tensor's elements in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)]
#[repr(u32)]
pub enum GgmlType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}
// H-file: complete (I8 I16 I32 I64 F64 too), with from_u32, name(), block_size() (elements), type_size() (bytes per block),
// row_bytes(ne0) -> Option<u64>; tested against ggml_type_name / ggml_blck_size / ggml_type_size in a test.
impl GgmlType {
    /// The type with ggml's number `n`.
    pub fn from_u32(_n: u32) -> Option<Self> {
        todo!()
    }
    /// ggml's name, for example `q4_K`.
    pub fn name(self) -> &'static str {
        todo!()
    }
    /// Elements per block.
    pub fn block_size(self) -> u64 {
        todo!()
    }
    /// Bytes per block.
    pub fn type_size(self) -> u64 {
        todo!()
    }
    /// Bytes of a row of `ne0` elements; `None` if `ne0` is no multiple of the block size or the product overflows.
    pub fn row_bytes(self, _ne0: u64) -> Option<u64> {
        todo!()
    }
}
