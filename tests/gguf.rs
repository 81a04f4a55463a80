//! The GGUF parser against good, malformed, cut, mutated and random files; the writer against the parser and llama.cpp;
//! split files and what is not a file at all.

use ggraft::Error;
use ggraft::file::gguf::{Gguf, GgufError, Value, ValueType};
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::mmap::MappedGguf;
use ggraft::file::types::GgmlType;
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn data_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bad")
}

fn data(name: &str) -> Vec<u8> {
    let path = data_dir().join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// End of the header and start of the tensor data of `control.gguf`.
const CONTROL_HEADER: usize = 6048;

// ---------------------------------------------------------------------------------------------------------------------
// Malformed files
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn every_bad_file_gets_its_error() {
    let tensor = |name: &str| format!("blk.0.{name}.weight");
    let mut expected: BTreeMap<&str, GgufError> = BTreeMap::from([
        ("trunc_empty", GgufError::Empty),
        (
            "trunc_header",
            GgufError::Truncated {
                what: "the key count",
                at: 16,
                need: 8,
                have: 4,
            },
        ),
        (
            "trunc_kv",
            GgufError::Truncated {
                what: "an array",
                at: 877,
                need: 2304,
                have: 155,
            },
        ),
        (
            "trunc_infos",
            GgufError::Truncated {
                what: "a tensor name",
                at: 5702,
                need: 21,
                have: 18,
            },
        ),
        (
            "trunc_data",
            GgufError::DataBeyondEnd {
                tensor: tensor("ffn_down"),
                offset: 36992,
                need: 8192,
                have: 37056,
            },
        ),
        ("magic", GgufError::BadMagic { got: *b"GGML" }),
        ("version_1", GgufError::UnsupportedVersion { got: 1 }),
        ("version_99", GgufError::UnsupportedVersion { got: 99 }),
        (
            "n_tensors_huge",
            GgufError::TooManyTensors {
                got: 1 << 61,
                limit: 2428,
            },
        ),
        (
            "n_kv_huge",
            GgufError::TooManyKeys {
                got: u64::MAX,
                limit: 5724,
            },
        ),
        (
            "string_huge",
            GgufError::StringTooLong {
                what: "a metadata value",
                at: 130,
                got: 1 << 40,
                limit: 1 << 30,
            },
        ),
        (
            "array_huge",
            GgufError::ArrayTooLong {
                key: "tokenizer.ggml.tokens".into(),
                got: 1 << 58,
                limit: 1 << 30,
            },
        ),
        (
            "offset_beyond",
            GgufError::DataBeyondEnd {
                tensor: tensor("ffn_down"),
                offset: 78208,
                need: 8192,
                have: 74112,
            },
        ),
        (
            "offset_unaligned",
            GgufError::UnalignedOffset {
                tensor: tensor("ffn_up"),
                alignment: 32,
                got: 53380,
            },
        ),
        (
            "offset_overlap",
            GgufError::OffsetNotContiguous {
                tensor: tensor("ffn_up"),
                expected: 53376,
                got: 45184,
            },
        ),
        (
            "shape_overflow",
            GgufError::ShapeOverflow {
                tensor: tensor("ffn_gate"),
                ne: [1 << 32, 1 << 32, 1, 1],
            },
        ),
        (
            "shape_zero",
            GgufError::ZeroDimension {
                tensor: tensor("ffn_gate"),
                dimension: 1,
            },
        ),
        (
            "row_not_block",
            GgufError::RowNotBlock {
                tensor: tensor("ffn_gate"),
                ty: GgmlType::Q8_0,
                expected: 32,
                got: 16,
            },
        ),
        (
            "type_unknown",
            GgufError::UnknownType {
                tensor: tensor("attn_q"),
                got: 999,
            },
        ),
        (
            "tensor_duplicate",
            GgufError::DuplicateTensor {
                tensor: tensor("ffn_down"),
            },
        ),
    ]);
    // Well-formed files, bad models: the model's side of the library refuses them.
    let well_formed = [
        "blocks_too_many",
        "control",
        "heads_zero",
        "key_missing_arch",
        "key_missing_blocks",
        "key_type_string",
        "weight_inf",
        "weight_nan",
    ];
    for entry in std::fs::read_dir(data_dir()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let parsed = Gguf::parse(&std::fs::read(&path).unwrap());
        match expected.remove(stem) {
            Some(error) => assert_eq!(parsed.unwrap_err(), error, "{stem}"),
            None => {
                assert!(
                    well_formed.contains(&stem),
                    "{stem} is not expected by this test"
                );
                assert_eq!(
                    parsed
                        .unwrap_or_else(|e| panic!("{stem}: {e}"))
                        .tensors
                        .len(),
                    11,
                    "{stem}"
                );
            }
        }
    }
    assert!(
        expected.is_empty(),
        "files that were not found: {:?}",
        expected.keys()
    );
}

#[test]
fn typed_getters_refuse_the_keys_of_bad_models() {
    let parse = |name| Gguf::parse(&data(name)).unwrap();
    let missing = |key: &str| GgufError::KeyMissing { key: key.into() };
    let (arch, blocks, heads) = (
        "general.architecture",
        "llama.block_count",
        "llama.attention.head_count",
    );

    let control = parse("control.gguf");
    assert_eq!(control.require_str(arch).unwrap(), "llama");
    assert_eq!(control.require_u32(blocks).unwrap(), 1);
    assert_eq!(
        parse("key_missing_arch.gguf").require_str(arch),
        Err(missing(arch))
    );
    assert_eq!(
        parse("key_missing_blocks.gguf").require_u32(blocks),
        Err(missing(blocks))
    );
    assert_eq!(parse("key_missing_blocks.gguf").u32(blocks), Ok(None));
    assert_eq!(
        parse("key_type_string.gguf").require_u32(heads),
        Err(GgufError::KeyType {
            key: heads.into(),
            expected: "an integer",
            got: ValueType::String
        })
    );
    assert_eq!(parse("heads_zero.gguf").require_u32(heads).unwrap(), 0);
    assert_eq!(
        parse("blocks_too_many.gguf").require_u32(blocks).unwrap(),
        3
    );
}

/// A file put together by hand, so that every field can be wrong.
#[derive(Clone, Default)]
struct Raw {
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

fn string(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s].concat()
}

impl Raw {
    fn key(self, key: &[u8], ty: u32, value: &[u8]) -> Self {
        self.raw_key([&string(key), &ty.to_le_bytes()[..], value].concat())
    }
    fn raw_key(mut self, bytes: Vec<u8>) -> Self {
        self.keys.push(bytes);
        self
    }
    fn tensor(mut self, name: &[u8], ne: &[u64], ty: u32, offset: u64) -> Self {
        let ne_bytes: Vec<u8> = ne.iter().flat_map(|n| n.to_le_bytes()).collect();
        let n_dims = (ne.len() as u32).to_le_bytes();
        self.tensors.push(
            [
                &string(name),
                &n_dims[..],
                &ne_bytes,
                &ty.to_le_bytes(),
                &offset.to_le_bytes()[..],
            ]
            .concat(),
        );
        self
    }
    fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }
    fn bytes(&self, alignment: usize) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        out.extend(self.keys.concat());
        out.extend(self.tensors.concat());
        out.resize(out.len().next_multiple_of(alignment) + self.data, 0);
        out
    }
    fn error(&self) -> GgufError {
        Gguf::parse(&self.bytes(32)).unwrap_err()
    }
}

#[test]
fn header_fields_are_checked() {
    let mut big_endian = b"GGUF\0\0\0\x03".to_vec();
    big_endian.resize(24, 0);
    assert_eq!(Gguf::parse(&big_endian).unwrap_err(), GgufError::BigEndian);
    assert_eq!(
        Gguf::parse(b"GGUF\0\0\0\0").unwrap_err(),
        GgufError::UnsupportedVersion { got: 0 }
    );
    assert_eq!(
        Gguf::parse(b"GG").unwrap_err(),
        GgufError::Truncated {
            what: "the magic number",
            at: 0,
            need: 4,
            have: 2
        }
    );

    let mut v2 = data("control.gguf");
    v2[4] = 2;
    let (v2, v3) = (
        Gguf::parse(&v2).unwrap(),
        Gguf::parse(&data("control.gguf")).unwrap(),
    );
    assert_eq!((v2.version, v3.version), (2, 3));
    assert_eq!(v2.tensors, v3.tensors);
}

#[test]
fn metadata_is_checked() {
    let raw = Raw::default;
    let (u32_ty, bool_ty, string_ty, array_ty) = (4, 7, 8, 9);
    let one = 1u32.to_le_bytes();
    let key = || "k".to_owned();

    assert_eq!(
        raw().key(b"", u32_ty, &one).error(),
        GgufError::KeyEmpty { at: 24 }
    );
    assert_eq!(
        raw().key(b"\xff", u32_ty, &one).error(),
        GgufError::KeyNotUtf8 { at: 24 }
    );
    assert_eq!(
        raw().key(&[b'k'; 1 << 16], u32_ty, &one).error(),
        GgufError::StringTooLong {
            what: "a metadata key",
            at: 24,
            got: 1 << 16,
            limit: (1 << 16) - 1
        }
    );
    assert_eq!(
        raw()
            .key(b"k", u32_ty, &one)
            .key(b"k", u32_ty, &one)
            .error(),
        GgufError::DuplicateKey { key: key() }
    );
    assert_eq!(
        raw().key(b"k", 13, &one).error(),
        GgufError::UnknownValueType {
            key: key(),
            got: 13
        }
    );
    assert_eq!(
        raw().key(b"k", bool_ty, &[2]).error(),
        GgufError::BadBool {
            key: key(),
            at: 37,
            got: 2
        }
    );
    assert_eq!(
        raw().key(b"k", string_ty, &string(b"\xff")).error(),
        GgufError::ValueNotUtf8 { key: key(), at: 37 }
    );

    let array = |elem: u32, n: u64, items: &[u8]| {
        raw().key(
            b"k",
            array_ty,
            &[&elem.to_le_bytes(), &n.to_le_bytes()[..], items].concat(),
        )
    };
    assert_eq!(
        array(array_ty, 0, &[]).error(),
        GgufError::NestedArray { key: key() }
    );
    assert_eq!(
        array(99, 0, &[]).error(),
        GgufError::UnknownValueType {
            key: key(),
            got: 99
        }
    );
    assert_eq!(
        array(bool_ty, 3, &[0, 1, 7]).error(),
        GgufError::BadBool {
            key: key(),
            at: 51,
            got: 7
        }
    );
    // A length that only the element size makes too long, and an element that lies about its own.
    assert_eq!(
        array(u32_ty, 1 << 30, &[0; 16]).error(),
        GgufError::Truncated {
            what: "an array",
            at: 49,
            need: 1 << 32,
            have: 47
        }
    );
    assert_eq!(
        array(string_ty, 1, &u64::MAX.to_le_bytes()).error(),
        GgufError::StringTooLong {
            what: "an array element",
            at: 49,
            got: u64::MAX,
            limit: 1 << 30
        }
    );
    assert_eq!(
        array(string_ty, 1, &500u64.to_le_bytes()).error(),
        GgufError::Truncated {
            what: "an array element",
            at: 57,
            need: 500,
            have: 7
        }
    );

    // Tokens may be any bytes.
    let tokens = array(
        string_ty,
        3,
        &[string(b"a"), string(b"\xff\xfe"), string(b"")].concat(),
    )
    .bytes(32);
    let gguf = Gguf::parse(&tokens).unwrap();
    assert_eq!(
        gguf.str_array(&tokens, "k").unwrap().unwrap(),
        [&b"a"[..], b"\xff\xfe", b""]
    );
}

#[test]
fn alignment_is_checked() {
    let with = |value: u32| Raw::default().key(b"general.alignment", 4, &value.to_le_bytes());
    for got in [0, 1, 4, 24, 33, 1 << 22, u32::MAX] {
        assert_eq!(with(got).error(), GgufError::BadAlignment { got });
    }
    assert_eq!(
        Raw::default()
            .key(b"general.alignment", 8, &string(b"32"))
            .error(),
        GgufError::AlignmentType {
            got: ValueType::String
        }
    );
    // Wrong in width only: llama.cpp refuses that too.
    assert_eq!(
        Raw::default()
            .key(b"general.alignment", 10, &32u64.to_le_bytes())
            .error(),
        GgufError::AlignmentType {
            got: ValueType::U64
        }
    );
    for alignment in [8, 64, 1 << 21] {
        let bytes = with(alignment)
            .tensor(b"t", &[3], 0, 0)
            .data(12)
            .bytes(alignment as usize);
        let gguf = Gguf::parse(&bytes).unwrap();
        assert_eq!(gguf.alignment, alignment as usize);
        assert_eq!(gguf.tensors[0].range, bytes.len() - 12..bytes.len());
    }
}

#[test]
fn tensors_are_checked() {
    let one = |ne: &[u64], ty| Raw::default().tensor(b"t", ne, ty, 0).data(64).error();
    let tensor = || "t".to_owned();
    let (f32_ty, f64_ty, q8_0, q4_k) = (0, 28, 8, 12);

    assert_eq!(
        Raw::default().tensor(b"", &[1], f32_ty, 0).error(),
        GgufError::TensorNameEmpty { index: 0 }
    );
    assert_eq!(
        Raw::default().tensor(b"\xff", &[1], f32_ty, 0).error(),
        GgufError::TensorNameNotUtf8 { index: 0 }
    );
    assert_eq!(
        Raw::default().tensor(b"t\0u", &[1], f32_ty, 0).error(),
        GgufError::TensorNameNul {
            tensor: "t\0u".to_owned()
        }
    );
    assert_eq!(
        Raw::default()
            .tensor(&[b't'; 64], &[1], f32_ty, 0)
            .data(64)
            .error(),
        GgufError::StringTooLong {
            what: "a tensor name",
            at: 24,
            got: 64,
            limit: 63
        }
    );
    Gguf::parse(
        &Raw::default()
            .tensor(&[b't'; 63], &[1], f32_ty, 0)
            .data(64)
            .bytes(32),
    )
    .unwrap();

    assert_eq!(
        one(&[], f32_ty),
        GgufError::DimensionCount {
            tensor: tensor(),
            got: 0
        }
    );
    assert_eq!(
        one(&[1; 5], f32_ty),
        GgufError::DimensionCount {
            tensor: tensor(),
            got: 5
        }
    );
    assert_eq!(
        one(&[1, 1, 0], f32_ty),
        GgufError::ZeroDimension {
            tensor: tensor(),
            dimension: 2
        }
    );
    assert_eq!(
        one(&[1 << 63], f32_ty),
        GgufError::ShapeOverflow {
            tensor: tensor(),
            ne: [1 << 63, 1, 1, 1]
        }
    );
    // Wraps to a small number when it is not checked.
    assert_eq!(
        one(&[1 << 33, 1 << 33], f32_ty),
        GgufError::ShapeOverflow {
            tensor: tensor(),
            ne: [1 << 33, 1 << 33, 1, 1]
        }
    );
    // Elements fit, bytes do not: 2^62 * 8 wraps to 0, 2^61 * 8 to 2^64.
    assert_eq!(
        one(&[1 << 62], f64_ty),
        GgufError::SizeOverflow { tensor: tensor() }
    );
    assert_eq!(
        one(&[1 << 31, 1 << 30], f64_ty),
        GgufError::SizeOverflow { tensor: tensor() }
    );
    assert_eq!(
        one(&[1 << 40, (1 << 22) + 1], f32_ty),
        GgufError::SizeOverflow { tensor: tensor() }
    );
    for removed in [4, 5, 9, 15, 31, 36, 43, u32::MAX] {
        assert_eq!(
            one(&[256], removed),
            GgufError::UnknownType {
                tensor: tensor(),
                got: removed
            }
        );
    }
    assert_eq!(
        one(&[128, 2], q4_k),
        GgufError::RowNotBlock {
            tensor: tensor(),
            ty: GgmlType::Q4_K,
            expected: 256,
            got: 128
        }
    );
    Gguf::parse(
        &Raw::default()
            .tensor(b"t", &[32, 1], q8_0, 0)
            .data(34)
            .bytes(32),
    )
    .unwrap();
}

#[test]
fn places_are_checked() {
    let beyond = |offset, need, have| GgufError::DataBeyondEnd {
        tensor: "b".into(),
        offset,
        need,
        have,
    };
    // a takes 4 bytes, padded to 32.
    let two = |ne: u64, offset, data| {
        Raw::default()
            .tensor(b"a", &[1], 0, 0)
            .tensor(b"b", &[ne], 0, offset)
            .data(data)
            .bytes(32)
    };
    let error = |ne, offset, data| Gguf::parse(&two(ne, offset, data)).unwrap_err();
    let gap = |expected, got| GgufError::OffsetNotContiguous {
        tensor: "b".into(),
        expected,
        got,
    };

    let good = two(1, 32, 36);
    let tensors = Gguf::parse(&good).unwrap().tensors;
    assert_eq!(
        (tensors[0].range.len(), tensors[1].range.end),
        (4, good.len())
    );

    assert_eq!(error(1, 32, 35), beyond(32, 4, 35));
    assert_eq!(
        error(1, 32, 0),
        GgufError::DataBeyondEnd {
            tensor: "a".into(),
            offset: 0,
            need: 4,
            have: 0
        }
    );
    assert_eq!(error(1, 64, 128), gap(32, 64));
    assert_eq!(error(1, 0, 128), gap(32, 0));
    assert_eq!(
        error(1, 36, 128),
        GgufError::UnalignedOffset {
            tensor: "b".into(),
            alignment: 32,
            got: 36
        }
    );
    // Sums of offset, size and padding that wrap when they are not checked.
    let last = u64::MAX - 31;
    assert_eq!(error(16, last, 128), beyond(last, 64, 128));
    assert_eq!(error((1 << 62) - 1, 32, 128), beyond(32, u64::MAX - 3, 128));
    // The file ends within the padding in front of the data.
    let bytes = Raw::default().tensor(b"a", &[1], 0, 0).bytes(1);
    assert_eq!(
        Gguf::parse(&bytes).unwrap_err(),
        GgufError::DataBeyondEnd {
            tensor: "a".into(),
            offset: 0,
            need: 4,
            have: 0
        }
    );
}

#[test]
fn messages_escape_what_the_file_says() {
    let error = Raw::default()
        .tensor(b"\x1b[31m\n", &[1], 999, 0)
        .error()
        .to_string();
    assert_eq!(
        error,
        r#"tensor "\u{1b}[31m\n" has the unknown type 999; it may need a newer ggraft"#
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// Typed getters
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn integers_of_any_type_that_fits() {
    let bytes = Raw::default()
        .key(b"u8", 0, &[200])
        .key(b"i8", 1, &[0xff])
        .key(b"u16", 2, &300u16.to_le_bytes())
        .key(b"i16", 3, &(-2i16).to_le_bytes())
        .key(b"i32", 5, &7i32.to_le_bytes())
        .key(b"u64", 10, &(1u64 << 32).to_le_bytes())
        .key(b"i64", 11, &9i64.to_le_bytes())
        .key(b"f32", 6, &1.5f32.to_le_bytes())
        .key(b"f64", 12, &2.5f64.to_le_bytes())
        .key(b"bool", 7, &[1])
        .bytes(32);
    let gguf = Gguf::parse(&bytes).unwrap();
    let range = |key: &str, got| {
        Err(GgufError::KeyRange {
            key: key.into(),
            expected: "u32",
            got,
        })
    };
    let ty = |key: &str, expected, got| GgufError::KeyType {
        key: key.into(),
        expected,
        got,
    };
    assert_eq!(gguf.u32("u8"), Ok(Some(200)));
    assert_eq!(gguf.u32("i8"), range("i8", -1));
    assert_eq!(gguf.u32("u16"), Ok(Some(300)));
    assert_eq!(gguf.u32("i16"), range("i16", -2));
    assert_eq!(gguf.u32("i32"), Ok(Some(7)));
    assert_eq!(gguf.u32("u64"), range("u64", 1 << 32));
    assert_eq!(gguf.u32("i64"), Ok(Some(9)));
    assert_eq!(
        gguf.u32("f32"),
        Err(ty("f32", "an integer", ValueType::F32))
    );
    assert_eq!(
        gguf.u32("bool"),
        Err(ty("bool", "an integer", ValueType::Bool))
    );
    assert_eq!(gguf.f32("f32"), Ok(Some(1.5)));
    assert_eq!(gguf.require_f32("f64"), Ok(2.5));
    assert_eq!(gguf.f32("u8"), Err(ty("u8", "a float", ValueType::U8)));
    assert_eq!(gguf.bool("bool"), Ok(Some(true)));
    assert_eq!(gguf.bool("u8"), Err(ty("u8", "a bool", ValueType::U8)));
    assert_eq!(gguf.str("u8"), Err(ty("u8", "a string", ValueType::U8)));
    assert_eq!(
        gguf.u32_array(&bytes, "u8"),
        Err(ty("u8", "an array", ValueType::U8))
    );
    assert_eq!(gguf.get("i8"), Some(&Value::I8(-1)));
    let keys: Vec<_> = gguf.keys().map(|(k, _)| k).collect();
    assert_eq!(
        keys,
        [
            "bool", "f32", "f64", "i16", "i32", "i64", "i8", "u16", "u64", "u8"
        ]
    );
}

#[test]
fn arrays_and_values_per_layer() {
    let array = |elem: u32, n: u64, items: &[u8]| {
        [&elem.to_le_bytes(), &n.to_le_bytes()[..], items].concat()
    };
    let i64s: Vec<u8> = [5i64, -1].iter().flat_map(|v| v.to_le_bytes()).collect();
    let floats: Vec<u8> = [1.0f32, -2.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let bytes = Raw::default()
        .key(b"scalar", 2, &8u16.to_le_bytes())
        .key(b"i64", 9, &array(11, 2, &i64s))
        .key(b"bool", 9, &array(7, 3, &[1, 0, 1]))
        .key(b"f32", 9, &array(6, 2, &floats))
        .key(b"empty", 9, &array(4, 0, &[]))
        .bytes(32);
    let gguf = Gguf::parse(&bytes).unwrap();
    let element = |key: &str, expected, got| GgufError::KeyElementType {
        key: key.into(),
        expected,
        got,
    };

    assert_eq!(gguf.i32_array(&bytes, "i64").unwrap().unwrap(), [5, -1]);
    assert_eq!(
        gguf.u32_array(&bytes, "i64"),
        Err(GgufError::KeyRange {
            key: "i64".into(),
            expected: "u32",
            got: -1
        })
    );
    assert_eq!(gguf.u32_array(&bytes, "bool").unwrap().unwrap(), [1, 0, 1]);
    assert_eq!(gguf.u32_array(&bytes, "empty").unwrap().unwrap(), [0u32; 0]);
    assert_eq!(gguf.u32_array(&bytes, "absent"), Ok(None));
    assert_eq!(gguf.f32_array(&bytes, "f32").unwrap().unwrap(), [1.0, -2.0]);
    assert_eq!(
        gguf.f32_array(&bytes, "bool"),
        Err(element("bool", "f32", ValueType::Bool))
    );
    assert_eq!(
        gguf.u32_array(&bytes, "f32"),
        Err(element("f32", "integers", ValueType::F32))
    );
    assert_eq!(
        gguf.str_array(&bytes, "f32"),
        Err(element("f32", "string", ValueType::F32))
    );

    assert_eq!(
        gguf.u32_or_array(&bytes, "scalar", 3).unwrap().unwrap(),
        [8, 8, 8]
    );
    assert_eq!(
        gguf.u32_or_array(&bytes, "bool", 3).unwrap().unwrap(),
        [1, 0, 1]
    );
    assert_eq!(
        gguf.u32_or_array(&bytes, "bool", 4),
        Err(GgufError::KeyLength {
            key: "bool".into(),
            expected: 4,
            got: 3
        })
    );
    assert_eq!(gguf.u32_or_array(&bytes, "absent", 4), Ok(None));
}

// ---------------------------------------------------------------------------------------------------------------------
// Damaged files: no panic, no allocation out of proportion, nothing that llama.cpp would not take
// ---------------------------------------------------------------------------------------------------------------------

/// Counts what the current thread has allocated, so that tests that run side by side do not disturb each other.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: forwards every call unchanged to the system's allocator; the counters do not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().wrapping_add(layout.size()));
        PEAK.set(PEAK.get().max(LIVE.get()));
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().saturating_sub(layout.size()));
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Parses, checks that the peak of allocated memory is in proportion to `bytes`, and touches everything of a file that
/// parses: places of tensors, every array.
fn exercise(bytes: &[u8]) -> Option<Gguf> {
    let before = LIVE.get();
    PEAK.set(before);
    let parsed = Gguf::parse(bytes).ok();
    let peak = PEAK.get() - before;
    assert!(
        peak <= 16 * bytes.len() + 4096,
        "{peak} bytes allocated for a file of {}",
        bytes.len()
    );

    let gguf = parsed?;
    for t in &gguf.tensors {
        assert_eq!(
            bytes[t.range.clone()].len() as u64,
            t.ty.row_bytes(t.ne[0]).unwrap() * t.ne[1..].iter().product::<u64>()
        );
        assert_eq!(gguf.tensor(&t.name), Some(t));
    }
    for (key, value) in gguf.keys() {
        if let Value::Array(array) = value {
            let len = match array.elem {
                ValueType::String => gguf.str_array(bytes, key).unwrap().unwrap().len(),
                ValueType::F32 => gguf.f32_array(bytes, key).unwrap().unwrap().len(),
                _ => gguf
                    .u32_array(bytes, key)
                    .map_or(array.len, |a| a.unwrap().len()),
            };
            assert_eq!(len, array.len);
        }
    }
    Some(gguf)
}

/// What llama.cpp's own parser says: places of all tensors from the start of the file, by name; `None` if it refuses.
fn llama_cpp(bytes: &[u8]) -> Option<BTreeMap<String, usize>> {
    let params = ggml_sys::gguf_init_params {
        no_alloc: true,
        ctx: std::ptr::null_mut(),
    };
    // SAFETY: pointer and length are those of `bytes`, which outlives the call; indices stay below the tensor count;
    // names are C strings owned by the context, which is freed once, at the end.
    unsafe {
        ggml_sys::ggml_log_set(Some(silent), std::ptr::null_mut());
        let ctx = ggml_sys::gguf_init_from_buffer(bytes.as_ptr().cast(), bytes.len(), params);
        if ctx.is_null() {
            return None;
        }
        let start = ggml_sys::gguf_get_data_offset(ctx);
        let tensors = (0..ggml_sys::gguf_get_n_tensors(ctx))
            .map(|i| {
                let name = std::ffi::CStr::from_ptr(ggml_sys::gguf_get_tensor_name(ctx, i));
                (
                    name.to_str().unwrap().to_owned(),
                    start + ggml_sys::gguf_get_tensor_offset(ctx, i),
                )
            })
            .collect();
        ggml_sys::gguf_free(ctx);
        Some(tensors)
    }
}

unsafe extern "C" fn silent(
    _: ggml_sys::ggml_log_level,
    _: *const std::ffi::c_char,
    _: *mut std::ffi::c_void,
) {
}

fn assert_llama_cpp_agrees(bytes: &[u8], gguf: &Gguf) {
    let ours: BTreeMap<_, _> = gguf
        .tensors
        .iter()
        .map(|t| (t.name.clone(), t.range.start))
        .collect();
    assert_eq!(llama_cpp(bytes).as_ref(), Some(&ours));
}

#[test]
fn truncation_at_every_percent_is_refused() {
    let good = data("control.gguf");
    assert!(exercise(&good).is_some());
    for percent in 0..100 {
        assert!(
            exercise(&good[..good.len() * percent / 100]).is_none(),
            "cut at {percent} %"
        );
    }
}

#[test]
fn single_byte_mutations_of_the_header() {
    let good = data("control.gguf");
    assert_eq!(
        Gguf::parse(&good).unwrap().tensors[0].range.start,
        CONTROL_HEADER
    );
    // SplitMix64, so that the mutations are the same everywhere and for ever.
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize
    };
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..2000 {
        let mut bytes = good.clone();
        bytes[next() % CONTROL_HEADER] ^= (1 + next() % 255) as u8;
        match exercise(&bytes) {
            Some(gguf) => {
                assert_llama_cpp_agrees(&bytes, &gguf);
                accepted += 1;
            }
            None => refused += 1,
        }
    }
    // Both happen often: letters of names and numbers of hyper-parameters may change, lengths and types may not.
    assert!(
        accepted > 200 && refused > 200,
        "{accepted} accepted, {refused} refused"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        exercise(&bytes);
        exercise(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
    }

    #[test]
    fn arbitrary_headers_never_panic(
        n_tensors in 0u64..4,
        n_keys in 0u64..4,
        words in prop::collection::vec(prop_oneof![0u64..40, any::<u64>(), Just(u64::MAX)], 0..64),
    ) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        for word in [n_tensors, n_keys].iter().chain(&words) {
            // Small words take four bytes, so that lengths, types and values meet in all ways.
            let width = if *word < 20 { 4 } else { 8 };
            bytes.extend(&word.to_le_bytes()[..width]);
        }
        exercise(&bytes);
    }

    #[test]
    fn block_mutations_never_panic(at in 0..CONTROL_HEADER, patch in prop::collection::vec(any::<u8>(), 1..16)) {
        let mut bytes = data("control.gguf");
        bytes[at..at + patch.len()].copy_from_slice(&patch);
        if let Some(gguf) = exercise(&bytes) {
            assert_llama_cpp_agrees(&bytes, &gguf);
        }
    }

    #[test]
    fn what_is_written_is_read(
        meta in prop::collection::btree_map("[a-z.\u{e4}]{1,12}", meta_value(), 0..12),
        tensors in prop::collection::btree_map("[a-z0-9._]{1,20}", (any::<prop::sample::Index>(), prop::collection::vec(1u64..5, 1..=4)), 0..8),
    ) {
        let mut writer = GgufWriter::new();
        for (key, value) in &meta {
            writer.set(key.clone(), value.clone());
        }
        let mut contents = Vec::new();
        for (i, (name, (ty, ne))) in tensors.iter().enumerate() {
            let ty = *ty.get(GgmlType::ALL);
            let mut ne = ne.clone();
            ne[0] *= ty.block_size();
            let n_bytes = ty.row_bytes(ne[0]).unwrap() * ne[1..].iter().product::<u64>();
            contents.push((0..n_bytes).map(|b| (b as usize + i) as u8).collect::<Vec<_>>());
            writer.tensor(name.clone(), ty, &ne);
        }
        let bytes = writer.to_bytes(|i, out| out.extend(&contents[i]));

        let gguf = exercise(&bytes).expect("a written file is well-formed");
        assert_llama_cpp_agrees(&bytes, &gguf);
        prop_assert_eq!(gguf.keys().count(), meta.len());
        for (key, value) in &meta {
            prop_assert_eq!(&read_back(&gguf, &bytes, key), value);
        }
        prop_assert_eq!(gguf.tensors.len(), tensors.len());
        for ((info, (name, (ty, ne))), content) in gguf.tensors.iter().zip(&tensors).zip(&contents) {
            prop_assert_eq!(&info.name, name);
            prop_assert_eq!(&info.ty, ty.get(GgmlType::ALL));
            prop_assert_eq!(info.n_dims, ne.len());
            prop_assert_eq!(info.n_elements(), ne.iter().product::<u64>() * info.ty.block_size());
            prop_assert_eq!(info.range.start % 32, 0);
            prop_assert_eq!(&bytes[info.range.clone()], content);
        }
    }
}

fn meta_value() -> impl Strategy<Value = MetaValue> {
    let float = -1e30f32..1e30;
    prop_oneof![
        any::<u32>().prop_map(MetaValue::U32),
        any::<i32>().prop_map(MetaValue::I32),
        any::<u64>().prop_map(MetaValue::U64),
        float.clone().prop_map(MetaValue::F32),
        any::<bool>().prop_map(MetaValue::Bool),
        any::<String>().prop_map(MetaValue::String),
        prop::collection::vec(any::<String>(), 0..5).prop_map(MetaValue::Strings),
        prop::collection::vec(any::<u32>(), 0..5).prop_map(MetaValue::U32s),
        prop::collection::vec(any::<i32>(), 0..5).prop_map(MetaValue::I32s),
        prop::collection::vec(float, 0..5).prop_map(MetaValue::F32s),
        prop::collection::vec(any::<bool>(), 0..5).prop_map(MetaValue::Bools),
    ]
}

/// The value of `key` as the writer would have been given it.
fn read_back(gguf: &Gguf, bytes: &[u8], key: &str) -> MetaValue {
    match gguf.get(key).unwrap() {
        Value::U32(v) => MetaValue::U32(*v),
        Value::I32(v) => MetaValue::I32(*v),
        Value::U64(v) => MetaValue::U64(*v),
        Value::F32(v) => MetaValue::F32(*v),
        Value::Bool(v) => MetaValue::Bool(*v),
        Value::String(v) => MetaValue::String(v.clone()),
        Value::Array(array) => match array.elem {
            ValueType::String => {
                let strings = gguf.str_array(bytes, key).unwrap().unwrap();
                MetaValue::Strings(
                    strings
                        .iter()
                        .map(|s| String::from_utf8(s.to_vec()).unwrap())
                        .collect(),
                )
            }
            ValueType::U32 => MetaValue::U32s(gguf.u32_array(bytes, key).unwrap().unwrap()),
            ValueType::I32 => MetaValue::I32s(gguf.i32_array(bytes, key).unwrap().unwrap()),
            ValueType::F32 => MetaValue::F32s(gguf.f32_array(bytes, key).unwrap().unwrap()),
            ValueType::Bool => MetaValue::Bools(
                gguf.u32_array(bytes, key)
                    .unwrap()
                    .unwrap()
                    .iter()
                    .map(|&b| b == 1)
                    .collect(),
            ),
            other => panic!("{key}: the writer has no arrays of {other}"),
        },
        other => panic!("{key}: the writer has no {other:?}"),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Writer
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn set_replaces_and_keeps_the_place() {
    let mut writer = GgufWriter::new();
    writer
        .set("a", MetaValue::U32(1))
        .set("b", MetaValue::Bool(true))
        .set("a", MetaValue::String("x".into()));
    let bytes = writer.to_bytes(|_, _| unreachable!("there are no tensors"));
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.keys().count(), 2);
    assert_eq!(gguf.require_str("a").unwrap(), "x");
    let place = |key: &[u8]| bytes.windows(9).position(|w| w == string(key)).unwrap();
    assert!(place(b"a") < place(b"b"));
}

#[test]
fn a_file_on_disk_equals_the_one_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut writer = GgufWriter::new();
    writer
        .set("k", MetaValue::U32s(vec![1, 2]))
        .tensor("t", GgmlType::F32, &[3])
        .tensor("u", GgmlType::I8, &[5, 2]);
    let data = |i: usize, out: &mut Vec<u8>| out.resize([12, 10][i], i as u8 + 1);
    writer.write(&path, data).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), writer.to_bytes(data));

    let mapped = MappedGguf::open(&path).unwrap();
    assert_eq!(mapped.tensor_bytes("u").unwrap(), [2; 10]);
    assert_eq!(mapped.tensor("t").unwrap().1.ne, [3, 1, 1, 1]);
    assert!(mapped.tensor("absent").is_none() && mapped.tensor_bytes("absent").is_none());
    assert_eq!(
        std::fs::read_dir(&folder).unwrap().count(),
        1,
        "temporary files are left"
    );
}

#[test]
fn a_callback_that_lies_panics_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut writer = GgufWriter::new();
    writer.tensor("t", GgmlType::F32, &[3]);
    let panic = std::panic::catch_unwind(|| writer.write(&path, |_, out| out.push(0))).unwrap_err();
    let message = panic.downcast::<String>().unwrap();
    assert!(
        message.contains(r#"tensor 0 "t": the data callback appended 1 bytes"#),
        "{message}"
    );
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn declarations_no_reader_would_accept_panic() {
    type Declare = fn(&mut GgufWriter) -> &mut GgufWriter;
    let wrong: [(Declare, &str); 9] = [
        (|w| w.set("", MetaValue::Bool(true)), "must not be empty"),
        (
            |w| w.set("general.alignment", MetaValue::U32(64)),
            "always aligned to 32",
        ),
        (|w| w.tensor("", GgmlType::F32, &[1]), "1 to 63 bytes"),
        (
            |w| w.tensor("t".repeat(64), GgmlType::F32, &[1]),
            "1 to 63 bytes",
        ),
        (
            |w| {
                w.tensor("t", GgmlType::F32, &[1])
                    .tensor("t", GgmlType::F32, &[1])
            },
            "declared twice",
        ),
        (|w| w.tensor("t", GgmlType::F32, &[]), "1 to 4 dimensions"),
        (|w| w.tensor("t", GgmlType::F32, &[1, 0]), "zero dimension"),
        (|w| w.tensor("t", GgmlType::Q8_0, &[16]), "rows of 16"),
        (|w| w.tensor("t", GgmlType::I8, &[1 << 62, 2]), "overflows"),
    ];
    for (declare, expected) in wrong {
        let panic = std::panic::catch_unwind(|| {
            declare(&mut GgufWriter::new());
        })
        .unwrap_err();
        let message = panic
            .downcast::<String>()
            .map_or_else(|p| (*p.downcast::<&str>().unwrap()).to_owned(), |s| *s);
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Maps and split files
// ---------------------------------------------------------------------------------------------------------------------

fn open_error(path: &Path) -> String {
    MappedGguf::open(path).unwrap_err().to_string()
}

#[test]
fn what_is_not_a_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let message = |path: &Path, what: &str| format!("{}: {what}", path.display());

    assert_eq!(
        open_error(folder.path()),
        message(folder.path(), "is a directory, expected a gguf file")
    );
    assert!(
        matches!(MappedGguf::open(&at("absent")), Err(Error::Io { path, source })
        if path == at("absent") && source.kind() == std::io::ErrorKind::NotFound)
    );
    std::fs::write(at("empty"), []).unwrap();
    assert_eq!(
        open_error(&at("empty")),
        message(&at("empty"), "the file is empty")
    );
    std::fs::write(at("text"), "hello").unwrap();
    assert!(
        matches!(MappedGguf::open(&at("text")), Err(Error::Gguf { path: Some(path), source: GgufError::BadMagic { .. } })
        if path == at("text"))
    );

    #[cfg(unix)]
    {
        let special = "is not a regular file and cannot be mapped";
        assert_eq!(
            open_error(Path::new("/dev/zero")),
            message(Path::new("/dev/zero"), special)
        );
        // Nobody writes to the pipe: opening it for reading would wait for ever.
        assert!(
            std::process::Command::new("mkfifo")
                .arg(at("pipe"))
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(open_error(&at("pipe")), message(&at("pipe"), special));
    }
}

/// Writes part `no` of `count` with the tensors `names` (each one F32 of the value `no`) and returns its path.
fn write_part(
    folder: &Path,
    (no, count): (u32, u32),
    total: Option<i32>,
    names: &[&str],
) -> PathBuf {
    let path = folder.join(format!("m-{:05}-of-{count:05}.gguf", no + 1));
    let mut writer = GgufWriter::new();
    writer
        .set("split.no", MetaValue::U32(no))
        .set("split.count", MetaValue::U32(count));
    if let Some(total) = total {
        writer.set("split.tensors.count", MetaValue::I32(total));
    }
    if no == 0 {
        writer.set("general.architecture", MetaValue::String("llama".into()));
    }
    for name in names {
        writer.tensor(*name, GgmlType::F32, &[1]);
    }
    writer
        .write(&path, |_, out| out.extend((no as f32).to_le_bytes()))
        .unwrap();
    path
}

#[test]
fn any_part_of_a_split_model_opens_all() {
    let folder = tempfile::tempdir().unwrap();
    let parts = [
        write_part(folder.path(), (0, 3), Some(3), &[]),
        write_part(folder.path(), (1, 3), None, &["b", "a"]),
        write_part(folder.path(), (2, 3), None, &["c"]),
    ];
    for part in &parts {
        let mapped = MappedGguf::open(part).unwrap();
        assert!(mapped.parts().iter().map(|p| &p.path).eq(&parts));
        assert_eq!(
            mapped
                .main()
                .gguf
                .require_str("general.architecture")
                .unwrap(),
            "llama"
        );
        let tensors: Vec<_> = mapped
            .tensors()
            .map(|(i, t)| (i, t.name.as_str()))
            .collect();
        assert_eq!(tensors, [(1, "b"), (1, "a"), (2, "c")]);
        assert_eq!(mapped.tensor_bytes("a").unwrap(), 1f32.to_le_bytes());
        let (part, info) = mapped.tensor("c").unwrap();
        assert_eq!(part.path, parts[2]);
        assert_eq!(part.bytes()[info.range.clone()], 2f32.to_le_bytes());
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, main) = (
        folder.path(),
        write_part(folder.path(), (0, 2), Some(2), &["a"]),
    );
    let second = dir.join("m-00002-of-00002.gguf");
    let error = |named: &Path| match MappedGguf::open(named).unwrap_err() {
        Error::Gguf { path, source } => (path.unwrap(), source),
        other => panic!("{other}"),
    };

    assert_eq!(
        error(&main),
        (
            second.clone(),
            GgufError::SplitPartMissing { part: 2, count: 2 }
        )
    );

    write_part(dir, (1, 2), None, &["a"]);
    assert_eq!(
        error(&main),
        (
            second.clone(),
            GgufError::DuplicateTensor { tensor: "a".into() }
        )
    );

    write_part(dir, (1, 2), None, &["b", "c"]);
    assert_eq!(
        error(&second),
        (
            main.clone(),
            GgufError::SplitTensorCount {
                expected: 2,
                got: 3
            }
        )
    );

    write_part(dir, (0, 2), None, &["a"]);
    let missing = GgufError::KeyMissing {
        key: "split.tensors.count".into(),
    };
    assert_eq!(error(&main), (main.clone(), missing));

    write_part(dir, (0, 2), Some(2), &["a"]);
    let other = write_part(dir, (1, 3), None, &["b"]);
    std::fs::rename(&other, &second).unwrap();
    let mismatch = GgufError::SplitMismatch {
        key: "split.count",
        expected: 2,
        got: 3,
    };
    assert_eq!(error(&main), (second.clone(), mismatch));
    assert_eq!(
        error(&second),
        (
            second.clone(),
            GgufError::SplitName {
                expected: "-00002-of-00003.gguf".into()
            }
        )
    );

    std::fs::copy(&main, &second).unwrap();
    let mismatch = GgufError::SplitMismatch {
        key: "split.no",
        expected: 1,
        got: 0,
    };
    assert_eq!(error(&main), (second.clone(), mismatch));

    let beyond = write_part(dir, (7, 2), None, &["b"]);
    assert_eq!(
        error(&beyond),
        (
            beyond.clone(),
            GgufError::SplitNumber {
                number: 7,
                count: 2
            }
        )
    );
    let last = dir.join("last.gguf");
    let mut writer = GgufWriter::new();
    writer
        .set("split.no", MetaValue::U32(u32::MAX))
        .set("split.count", MetaValue::U32(u32::MAX));
    writer.write(&last, |_, _| {}).unwrap();
    assert_eq!(
        error(&last).1,
        GgufError::SplitNumber {
            number: u32::MAX,
            count: u32::MAX
        }
    );
}

#[test]
fn a_split_of_one_is_a_plain_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_part(folder.path(), (0, 1), Some(1), &["a"]);
    assert_eq!(MappedGguf::open(&path).unwrap().parts().len(), 1);
}
