//! Adapters: templates, the GGUF format, PEFT folders, concatenation, the library.

use ggraft::Error;
use ggraft::adapter::{
    Adapter, AdapterError, AdapterKind, BaseSignature, ImportOptions, Library, MAX_LENGTH, Matrix,
    Parts, Payload, Piece, Precision, PrefixLayer, Template, TemplateError, concat, export_peft,
    import_peft,
};
use ggraft::file::gguf::{Gguf, Value};
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::peft::{PeftError, PeftFolder, PeftType};
use ggraft::file::types::GgmlType;
use ggraft::model::{BaseShape, Fingerprint};
use half::f16;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

// ---------------------------------------------------------------- fixtures

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(path)
}

fn shape(
    architecture: &str,
    n_layer: usize,
    [n_embd, n_head, n_head_kv, head_dim]: [usize; 4],
) -> BaseShape {
    BaseShape {
        architecture: architecture.to_owned(),
        n_layer,
        n_embd,
        n_head: n_head.into(),
        n_head_kv: n_head_kv.into(),
        head_dim: head_dim.into(),
        n_vocab: 320,
        qk_permuted: architecture == "llama",
    }
}

/// The base of tests/data/peft/llama.
fn llama() -> BaseShape {
    shape("llama", 3, [64, 4, 2, 16])
}

/// A base whose layers differ in their heads.
fn uneven() -> BaseShape {
    BaseShape {
        n_head: [4, 8, 4].into_iter().collect(),
        n_head_kv: [2, 1, 4].into_iter().collect(),
        ..llama()
    }
}

/// The base of tests/data/peft_bad.
fn control() -> BaseShape {
    shape("llama", 1, [32, 2, 1, 16])
}

/// Distinct values, all exact in half precision.
fn rows(width: usize, n: usize, seed: f32) -> Matrix {
    Matrix::from_f32(
        width,
        (0..width * n).map(|i| seed + i as f32 / 8.0).collect(),
    )
    .unwrap()
}

fn prefix_parts(base: &BaseShape, p: usize) -> Parts {
    let layer = |l: usize| PrefixLayer {
        k: rows(base.kv_width(l), p, l as f32),
        v: rows(base.kv_width(l), p, -100.0 - l as f32),
    };
    Parts {
        kind: AdapterKind::Prefix,
        payload: Payload::Prefix {
            layers: (0..base.n_layer).map(layer).collect(),
        },
        template: None,
        name: Some("pirate".to_owned()),
        fingerprint: Some(Fingerprint([7; 32])),
        base: BaseSignature::from(base),
        provenance: BTreeMap::from([("method".to_owned(), "prefix".to_owned())]),
    }
}

fn rows_parts(kind: AdapterKind, base: &BaseShape, p: usize) -> Parts {
    Parts {
        kind,
        payload: Payload::VirtualTokens(rows(base.n_embd, p, 0.5)),
        ..prefix_parts(base, p)
    }
}

fn import(path: &str, base: &BaseShape) -> ggraft::Result<Adapter> {
    import_peft(&data(path), base, None, &ImportOptions::default())
}

fn adapter_error(result: ggraft::Result<Adapter>) -> AdapterError {
    match result.expect_err("must be refused") {
        Error::Adapter(e) => e,
        other => panic!("expected an adapter error, got {other:?}"),
    }
}

fn peft_error(result: ggraft::Result<Adapter>) -> PeftError {
    match result.expect_err("must be refused") {
        Error::Peft(e) => e,
        other => panic!("expected a PEFT error, got {other:?}"),
    }
}

/// Asserts that an expression matches a pattern and prints it if not.
macro_rules! assert_matches {
    ($value:expr, $pattern:pat $(if $guard:expr)?) => {
        match $value {
            $pattern $(if $guard)? => {}
            other => panic!("{} gave {other:?}", stringify!($value)),
        }
    };
}

// ---------------------------------------------------------------- templates

#[test]
fn template_drops_separators_and_keeps_text() {
    let parse = |s| Template::parse(s).unwrap();
    assert_eq!(
        parse("{v:4} {prompt} {v:3}").pieces(),
        [Piece::Virtual(4), Piece::Prompt, Piece::Virtual(3)]
    );
    assert_eq!(parse("{v:4} {prompt} {v:3}").virtual_tokens(), 7);
    assert_eq!(
        parse("  {v:1} {prompt}  ").pieces(),
        [Piece::Virtual(1), Piece::Prompt]
    );
    assert_eq!(
        parse("{v:1}\t{prompt}\n").pieces(),
        [
            Piece::Virtual(1),
            Piece::Text("\t".to_owned()),
            Piece::Prompt,
            Piece::Text("\n".to_owned())
        ]
    );
    assert_eq!(
        parse("{bos}{{Q}}: {prompt} A:{v:2}").pieces(),
        [
            Piece::Bos,
            Piece::Text("{Q}: ".to_owned()),
            Piece::Prompt,
            Piece::Text(" A:".to_owned()),
            Piece::Virtual(2)
        ]
    );
    assert!(parse("{v:1}{bos}{prompt}").places_bos());
    assert!(!parse("{v:1}{prompt}").places_bos());
    assert_eq!(
        parse("{v:1}{{{prompt}}}").pieces()[1],
        Piece::Text("{".to_owned())
    );
}

#[test]
fn template_display_is_canonical() {
    for (source, canonical) in [
        ("{v:4} {prompt} {v:3}", "{v:4} {prompt} {v:3}"),
        ("{v:04}{prompt} ", "{v:4} {prompt}"),
        ("a {{ b{prompt}}}{v:1}", "a {{ b{prompt}}}{v:1}"),
    ] {
        assert_eq!(Template::parse(source).unwrap().to_string(), canonical);
    }
}

#[test]
fn template_errors_name_the_cause() {
    let error = |s: &str| Template::parse(s).expect_err(s);
    assert_eq!(error("{v:4} {prompt"), TemplateError::Unclosed { at: 6 });
    assert_eq!(error("{ {v:4} {prompt}"), TemplateError::Unclosed { at: 0 });
    assert_eq!(error("{v:4}} {prompt}"), TemplateError::Unopened { at: 5 });
    assert_eq!(
        error("{text}"),
        TemplateError::UnknownPlaceholder {
            name: "text".to_owned()
        }
    );
    assert_eq!(
        error("{}"),
        TemplateError::UnknownPlaceholder {
            name: String::new()
        }
    );
    for count in ["", "x", "+4", "-1", " 4", "4.0"] {
        assert_eq!(
            error(&format!("{{v:{count}}}")),
            TemplateError::BadCount {
                count: count.to_owned()
            }
        );
    }
    assert_eq!(error("{prompt}{v:0}"), TemplateError::ZeroCount { at: 8 });
    assert_eq!(
        error("{v:65537}{prompt}"),
        TemplateError::TooMany { max: MAX_LENGTH }
    );
    assert_eq!(
        error("{v:99999999999999999999999}{prompt}"),
        TemplateError::TooMany { max: MAX_LENGTH }
    );
    assert_eq!(
        error("{v:65536}{v:1}{prompt}"),
        TemplateError::TooMany { max: MAX_LENGTH }
    );
    assert_eq!(error("{prompt}"), TemplateError::NoVirtual);
    assert_eq!(error("{v:1}"), TemplateError::NoPrompt);
    assert_eq!(error(""), TemplateError::NoPrompt);
    assert_eq!(error("{v:1}{prompt}{prompt}"), TemplateError::ManyPrompts);
    assert_eq!(error("{bos}{v:1}{prompt}{bos}"), TemplateError::ManyBos);
    let template = Template::parse("{v:4}{prompt}{v:3}").unwrap();
    assert_eq!(template.check_length(7), Ok(()));
    assert_eq!(
        template.check_length(8),
        Err(TemplateError::CountMismatch {
            placed: 7,
            length: 8
        })
    );
    assert_eq!(
        error("{v:4").to_string(),
        "template: `{` at byte 0 is never closed; write `{{` for a literal brace"
    );
}

/// Template sources made of valid pieces: a prompt among texts and virtual tokens, at least one of these.
fn template_source() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        (1usize..=9).prop_map(|n| format!("{{v:{n}}}")),
        "[ -z\\n]{1,6}|[{}]{1,3}".prop_map(|s| s.replace('{', "{{").replace('}', "}}")),
        Just(" ".to_owned()),
    ];
    let side = prop::collection::vec(piece, 0..5).prop_map(|v| v.concat());
    (side.clone(), side, any::<bool>()).prop_map(|(before, after, bos)| {
        format!(
            "{}{before}{{prompt}}{after}{{v:2}}",
            if bos { "{bos}" } else { "" }
        )
    })
}

proptest! {
    #[test]
    fn template_display_round_trips(source in template_source()) {
        let template = Template::parse(&source).unwrap();
        let shown = template.to_string();
        prop_assert_eq!(&shown.parse::<Template>().unwrap(), &template, "{}", shown);
    }

    #[test]
    fn template_parser_never_panics(source in "[{}v:0-9a-zé \\n]{0,24}") {
        if let Ok(template) = Template::parse(&source) {
            prop_assert_eq!(Template::parse(&template.to_string()).unwrap(), template);
        }
    }
}

// ---------------------------------------------------------------- what an adapter promises

#[test]
fn adapters_are_shared_between_threads_and_have_unique_ids() {
    fn check<T: Send + Sync + Clone>() {}
    check::<Adapter>();
    let new = || Adapter::new(prefix_parts(&llama(), 2)).unwrap();
    let (a, b) = (new(), new());
    assert_ne!(a.id(), b.id());
    assert_eq!(a.id(), a.clone().id());
    assert_eq!(
        (a.length(), a.kind(), a.name()),
        (2, AdapterKind::Prefix, Some("pirate"))
    );
}

#[test]
fn rows_keep_their_precision() {
    let half = Matrix::from_f16(2, [1.0, 2.0, 3.0, 4.0].map(f16::from_f32).to_vec()).unwrap();
    let single = Matrix::from_f32(2, vec![1.0, 2.0, 3.0, 4.0]).unwrap();
    for rows in [&half, &single] {
        let mut row = [0.0; 2];
        rows.row_f32(1, &mut row);
        assert_eq!((row, rows.n_rows(), rows.width()), ([3.0, 4.0], 2, 2));
        assert_eq!(rows.to_f32(), [1.0, 2.0, 3.0, 4.0]);
    }
    assert_eq!(
        (half.precision(), half.as_f16().is_some(), half.as_f32()),
        (Precision::F16, true, None)
    );
    assert_eq!(
        (
            single.precision(),
            single.as_f16(),
            single.as_f32().is_some()
        ),
        (Precision::F32, None, true)
    );
    for (width, values) in [(0, 4), (3, 4), (4, 0)] {
        let ragged = Matrix::from_f32(width, vec![0.0; values]);
        assert_matches!(ragged, Err(AdapterError::RaggedRows { .. }));
    }
}

#[test]
fn new_refuses_parts_that_disagree() {
    let base = llama();
    let refuse = |change: &dyn Fn(&mut Parts), kind| {
        let mut parts = match kind {
            AdapterKind::Prefix => prefix_parts(&base, 2),
            kind => rows_parts(kind, &base, 2),
        };
        change(&mut parts);
        Adapter::new(parts).expect_err("must be refused")
    };
    let prefix = |change: &dyn Fn(&mut Parts)| refuse(change, AdapterKind::Prefix);
    let layers = |parts: &mut Parts, change: &dyn Fn(&mut Vec<PrefixLayer>)| {
        let Payload::Prefix { layers } = &mut parts.payload else {
            panic!("a prefix")
        };
        change(layers);
    };

    assert_matches!(
        prefix(&|p| p.kind = AdapterKind::Prompt),
        AdapterError::PayloadKind { .. }
    );
    assert_matches!(
        prefix(&|p| layers(p, &|l| l.truncate(2))),
        AdapterError::LayerCount {
            declared: 3,
            got: 2
        }
    );
    assert_matches!(
        prefix(&|p| (p.base.n_layer, p.payload) = (Some(0), Payload::Prefix { layers: vec![] })),
        AdapterError::LayerCount {
            declared: 0,
            got: 0
        }
    );
    assert_matches!(
        prefix(&|p| layers(p, &|l| l[1].v = rows(32, 3, 0.0))),
        AdapterError::TensorShape { tensor, expected: [32, 2], got: [32, 3] } if tensor == "blk.1.prefix_v"
    );
    assert_matches!(
        prefix(&|p| p.base.head_dim = Some(8.into())),
        AdapterError::TensorShape {
            expected: [16, 2],
            got: [32, 2],
            ..
        }
    );
    assert_matches!(
        prefix(&|p| layers(p, &|l| l[2].k = Matrix::from_f32(32, {
            let mut values = vec![0.0; 64];
            values[33] = f32::NEG_INFINITY;
            values
        }).unwrap())),
        AdapterError::NonFinite { tensor, index: 33, value } if tensor == "blk.2.prefix_k" && value < 0.0
    );
    for (field, change) in [
        (
            "block_count",
            &(|p: &mut Parts| p.base.n_layer = None) as &dyn Fn(&mut Parts),
        ),
        ("head_count_kv", &|p| p.base.n_head_kv = None),
        ("head_length", &|p| p.base.head_dim = None),
    ] {
        assert_matches!(prefix(change), AdapterError::SignatureIncomplete { field: f, .. } if f == field);
    }
    assert_matches!(
        refuse(&|p| p.base.n_embd = None, AdapterKind::Prompt),
        AdapterError::SignatureIncomplete {
            field: "embedding_length",
            ..
        }
    );
    assert_matches!(
        prefix(&|p| p.base.n_vocab = Some(1 << 32)),
        AdapterError::SignatureTooLarge {
            field: "vocab_size",
            ..
        }
    );
    let template = |p: &mut Parts| p.template = Some("{v:3}{prompt}".parse().unwrap());
    assert_matches!(
        refuse(&template, AdapterKind::Prompt),
        AdapterError::TemplateKind { .. }
    );
    assert_matches!(
        refuse(&template, AdapterKind::PTuning),
        AdapterError::Template(TemplateError::CountMismatch {
            placed: 3,
            length: 2
        })
    );
    for key in ["", "Upper", "with space", &"k".repeat(65)] {
        let add = |p: &mut Parts| drop(p.provenance.insert(key.to_owned(), String::new()));
        assert_matches!(prefix(&add), AdapterError::ProvenanceKey { .. });
    }
    assert_matches!(
        prefix(&|p| p.provenance = (0..257).map(|i| (i.to_string(), String::new())).collect()),
        AdapterError::ProvenanceTooLong { got: 257, .. }
    );
    let long = |p: &mut Parts| {
        p.base.n_embd = Some(1);
        p.payload =
            Payload::VirtualTokens(Matrix::from_f16(1, vec![f16::ONE; MAX_LENGTH + 1]).unwrap());
    };
    assert_matches!(
        refuse(&long, AdapterKind::Prompt),
        AdapterError::Length { got: 65537, .. }
    );
}

#[test]
fn check_fits_refuses_other_shapes_always_and_other_weights_unless_overridden() {
    let (base, fp) = (llama(), Fingerprint([7; 32]));
    let other = Fingerprint([8; 32]);
    for parts in [
        prefix_parts(&base, 2),
        rows_parts(AdapterKind::Prompt, &base, 2),
    ] {
        let adapter = Adapter::new(parts).unwrap();
        adapter.check_fits(&base, &fp, false).unwrap();
        assert_matches!(
            adapter.check_fits(&base, &other, false),
            Err(AdapterError::FingerprintMismatch { adapter, base }) if (adapter, base) == (fp, other)
        );
        adapter.check_fits(&base, &other, true).unwrap();
        let refuse = |change: &dyn Fn(&mut BaseShape)| {
            let mut base = base.clone();
            change(&mut base);
            adapter
                .check_fits(&base, &fp, true)
                .expect_err("must be refused")
        };
        assert_matches!(
            refuse(&|b| b.architecture = "qwen2".to_owned()),
            AdapterError::ArchitectureMismatch { .. }
        );
        assert_matches!(
            refuse(&|b| b.n_layer = 4),
            AdapterError::LayerMismatch {
                adapter: 3,
                base: 4
            }
        );
        assert_matches!(
            refuse(&|b| b.n_embd = 65),
            AdapterError::EmbeddingMismatch {
                adapter: 64,
                base: 65
            }
        );
        assert_matches!(
            refuse(&|b| b.head_dim = 8.into()),
            AdapterError::KvWidthMismatch {
                adapter: 32,
                base: 16
            }
        );
        assert_matches!(
            refuse(&|b| (b.n_head_kv, b.head_dim) = (4.into(), 8.into())),
            AdapterError::KvHeadMismatch {
                adapter: 2,
                base: 4
            }
        );
    }
    let unknown = Adapter::new(Parts {
        fingerprint: None,
        ..prefix_parts(&base, 2)
    })
    .unwrap();
    unknown.check_fits(&base, &other, false).unwrap();
}

// ---------------------------------------------------------------- the GGUF format

fn all_kinds() -> Vec<Adapter> {
    let base = llama();
    let template = Some("{v:2} {prompt} Answer:{v:1}".parse().unwrap());
    [
        prefix_parts(&base, 3),
        rows_parts(AdapterKind::Prompt, &base, 3),
        Parts {
            template,
            ..rows_parts(AdapterKind::PTuning, &base, 3)
        },
        Parts {
            name: None,
            fingerprint: None,
            provenance: BTreeMap::new(),
            ..rows_parts(AdapterKind::PTuning, &base, 1)
        },
    ]
    .map(|parts| Adapter::new(parts).unwrap())
    .to_vec()
}

fn values(adapter: &Adapter) -> Vec<f32> {
    match adapter.payload() {
        Payload::VirtualTokens(rows) => rows.to_f32(),
        Payload::Prefix { layers } => layers
            .iter()
            .flat_map(|l| [l.k.to_f32(), l.v.to_f32()].concat())
            .collect(),
    }
}

#[test]
fn files_round_trip_in_both_precisions() {
    let dir = tempfile::tempdir().unwrap();
    for adapter in all_kinds() {
        let again = Adapter::from_gguf(&adapter.to_gguf(Precision::F32)).unwrap();
        assert_eq!(again.parts(), adapter.parts());
        assert_ne!(again.id(), adapter.id());

        let path = dir.path().join("adapter.gguf");
        adapter.save(&path, Precision::F16).unwrap();
        assert_eq!(
            std::fs::read(&path).unwrap(),
            adapter.to_gguf(Precision::F16)
        );
        let half = Adapter::load(&path).unwrap();
        assert_eq!(values(&half), values(&adapter));
        assert_eq!(
            half.to_gguf(Precision::F16),
            adapter.to_gguf(Precision::F16)
        );
        match half.payload() {
            Payload::VirtualTokens(rows) => assert_eq!(rows.precision(), Precision::F16),
            Payload::Prefix { layers } => assert_eq!(layers[0].k.precision(), Precision::F16),
        }
    }
}

/// A size that all layers share is one number in the file, as it always was; sizes of layers that differ are arrays.
#[test]
fn sizes_are_arrays_where_layers_differ() {
    for (base, heads, kv_heads) in [
        (llama(), vec![4; 3], vec![2; 3]),
        (uneven(), vec![4, 8, 4], vec![2, 1, 4]),
    ] {
        for parts in [
            prefix_parts(&base, 2),
            rows_parts(AdapterKind::Prompt, &base, 2),
        ] {
            let adapter = Adapter::new(parts).unwrap();
            let bytes = adapter.to_gguf(Precision::F32);
            let gguf = Gguf::parse(&bytes).unwrap();
            let differ = base.n_head.uniform().is_none();
            for (field, expected) in [("head_count", &heads), ("head_count_kv", &kv_heads)] {
                let key = format!("ggraft.base.{field}");
                let found = gguf.get(&key);
                assert_eq!(matches!(found, Some(Value::Array(_))), differ, "{found:?}");
                assert_eq!(matches!(found, Some(Value::U32(_))), !differ, "{found:?}");
                let sizes = gguf.u32_or_array(&bytes, &key, 3).unwrap().unwrap();
                assert_eq!(&sizes, expected);
            }
            assert_eq!(gguf.u32("ggraft.base.head_length"), Ok(Some(16)));
            let again = Adapter::from_gguf(&bytes).unwrap();
            assert_eq!(again.parts(), adapter.parts());
        }
    }
    let prefix = Adapter::new(prefix_parts(&uneven(), 2)).unwrap();
    let Payload::Prefix { layers } = prefix.payload() else {
        panic!("a prefix")
    };
    let widths: Vec<_> = layers.iter().map(|l| (l.k.width(), l.v.width())).collect();
    assert_eq!(widths, [(32, 32), (16, 16), (64, 64)]);
    let both = concat(&prefix, &prefix).unwrap();
    assert_eq!((both.length(), both.base()), (4, prefix.base()));
}

/// Files that earlier versions have written say the same when they are written again.
#[test]
fn files_of_the_repository_are_written_as_they_are() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/adapters");
    let mut n = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "gguf") {
            let written = Adapter::load(&path).unwrap().to_gguf(Precision::F16);
            assert!(
                written == std::fs::read(&path).unwrap(),
                "{}",
                path.display()
            );
            n += 1;
        }
    }
    assert!(n > 0);
}

#[test]
fn bases_whose_layers_differ_fit_layer_by_layer() {
    let fp = Fingerprint([7; 32]);
    let adapter = Adapter::new(prefix_parts(&uneven(), 2)).unwrap();
    adapter.check_fits(&uneven(), &fp, false).unwrap();
    let refuse = |n_head_kv: [usize; 3], head_dim: usize| {
        let base = BaseShape {
            n_head_kv: n_head_kv.into_iter().collect(),
            head_dim: head_dim.into(),
            ..uneven()
        };
        let fits = adapter.check_fits(&base, &fp, true);
        fits.expect_err("must be refused")
    };
    for (kv_heads, head_dim, expected) in [
        ([2, 2, 4], 16, (16, 32)),
        ([2, 2, 2], 16, (16, 32)),
        ([2, 1, 3], 16, (64, 48)),
        ([2, 1, 4], 32, (32, 64)),
    ] {
        assert_matches!(
            refuse(kv_heads, head_dim),
            AdapterError::KvWidthMismatch { adapter, base } if (adapter, base) == expected
        );
    }
    assert_matches!(
        refuse([4, 2, 8], 8),
        AdapterError::KvHeadMismatch {
            adapter: 2,
            base: 4
        }
    );
    let uniform = Adapter::new(prefix_parts(&llama(), 2)).unwrap();
    assert_matches!(
        uniform.check_fits(&uneven(), &fp, true),
        Err(AdapterError::KvWidthMismatch {
            adapter: 32,
            base: 16
        })
    );
}

#[test]
fn sizes_of_other_layers_than_there_are() {
    let refuse = |change: &dyn Fn(&mut BaseSignature)| {
        let mut parts = prefix_parts(&uneven(), 2);
        change(&mut parts.base);
        Adapter::new(parts).expect_err("must be refused")
    };
    assert_matches!(
        refuse(&|b| b.n_head_kv = Some([2, 1].into_iter().collect())),
        AdapterError::SignatureLayers {
            field: "head_count_kv",
            declared: 3,
            got: 2
        }
    );
    assert_matches!(
        refuse(&|b| b.n_layer = None),
        AdapterError::SignatureIncomplete {
            field: "block_count",
            ..
        }
    );
    assert_matches!(
        refuse(&|b| b.n_head = Some([1, 1 << 32, 1].into_iter().collect())),
        AdapterError::SignatureTooLarge {
            field: "head_count",
            ..
        }
    );
    assert_matches!(
        refuse(&|b| b.n_head_kv = Some([2, 1, 3].into_iter().collect())),
        AdapterError::TensorShape { tensor, expected: [48, 2], got: [64, 2] } if tensor == "blk.2.prefix_k"
    );
    let read = |layers: Option<u32>, heads: &[u32]| {
        let change = |w: &mut GgufWriter| {
            if let Some(n) = layers {
                w.set("ggraft.base.block_count", MetaValue::U32(n));
            }
            w.set("ggraft.base.head_count_kv", MetaValue::U32s(heads.to_vec()));
        };
        Adapter::from_gguf(&file(change, &[GOOD]))
    };
    read(Some(2), &[3, 4]).unwrap();
    assert_matches!(read(Some(3), &[3, 4]), Err(Error::Gguf { .. }));
    assert_matches!(read(Some(u32::MAX), &[3, 4]), Err(Error::Gguf { .. }));
    assert_matches!(
        adapter_error(read(None, &[3, 4])),
        AdapterError::SignatureIncomplete {
            field: "block_count",
            ..
        }
    );
}

#[test]
fn values_beyond_half_precision_are_written_in_single() {
    let base = control();
    let mut values = vec![65504.0; 32];
    let precision = |values: &Vec<f32>| {
        let payload = Payload::VirtualTokens(Matrix::from_f32(32, values.clone()).unwrap());
        let adapter = Adapter::new(Parts {
            payload,
            ..rows_parts(AdapterKind::Prompt, &base, 1)
        })
        .unwrap();
        let again = Adapter::from_gguf(&adapter.to_gguf(Precision::F16)).unwrap();
        let Payload::VirtualTokens(rows) = again.payload() else {
            panic!("rows")
        };
        assert_eq!(&rows.to_f32(), values);
        rows.precision()
    };
    assert_eq!(precision(&values), Precision::F16);
    values[5] = -65505.0;
    assert_eq!(precision(&values), Precision::F32);
}

/// A well-formed prompt adapter file, P = 2, D = 4, changed by `change`.
fn file(change: impl FnOnce(&mut GgufWriter), tensors: &[(&str, GgmlType, &[u64])]) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    for (key, value) in [
        ("general.type", "adapter"),
        ("general.architecture", "llama"),
        ("adapter.type", "prompt"),
    ] {
        writer.set(key, MetaValue::String(value.to_owned()));
    }
    for (key, value) in [
        ("ggraft.format_version", 1),
        ("ggraft.length", 2),
        ("ggraft.base.embedding_length", 4),
    ] {
        writer.set(key, MetaValue::U32(value));
    }
    change(&mut writer);
    for (name, ty, ne) in tensors {
        writer.tensor(*name, *ty, ne);
    }
    writer.to_bytes(|i, out| {
        let (_, ty, ne) = tensors[i];
        let bytes = ty.row_bytes(ne[0]).unwrap() * ne[1..].iter().product::<u64>();
        out.resize(out.len() + usize::try_from(bytes).unwrap(), 0);
    })
}

const GOOD: (&str, GgmlType, &[u64]) = ("virtual_tokens", GgmlType::F16, &[4, 2]);

fn string(s: &str) -> MetaValue {
    MetaValue::String(s.to_owned())
}

#[test]
fn minimal_files_of_every_type_load() {
    for ty in [GgmlType::F16, GgmlType::F32, GgmlType::BF16] {
        let adapter =
            Adapter::from_gguf(&file(|_| {}, &[("virtual_tokens", ty, &[4, 2])])).unwrap();
        assert_eq!((adapter.length(), values(&adapter)), (2, vec![0.0; 8]));
    }
    // Keys of other programs and of later minor additions are ignored.
    let extra = |w: &mut GgufWriter| {
        w.set("ggraft.later_addition", MetaValue::U32(1));
    };
    Adapter::from_gguf(&file(extra, &[GOOD])).unwrap();
}

#[test]
fn bf16_values_are_widened_exactly() {
    let mut writer = GgufWriter::new();
    for (key, value) in [
        ("general.type", "adapter"),
        ("general.architecture", "llama"),
        ("adapter.type", "prompt"),
    ] {
        writer.set(key, string(value));
    }
    for (key, value) in [
        ("ggraft.format_version", 1),
        ("ggraft.length", 1),
        ("ggraft.base.embedding_length", 2),
    ] {
        writer.set(key, MetaValue::U32(value));
    }
    writer.tensor("virtual_tokens", GgmlType::BF16, &[2, 1]);
    // 1.0 and -2^100 are the upper halves of their single-precision patterns.
    let bytes = writer.to_bytes(|_, out| out.extend([0x80, 0x3f, 0x80, 0xf1]));
    assert_eq!(
        values(&Adapter::from_gguf(&bytes).unwrap()),
        [1.0, -(100f32.exp2())]
    );
}

#[test]
fn reader_refuses_other_files_and_later_versions() {
    let error = |key: &str, value: MetaValue| {
        adapter_error(Adapter::from_gguf(&file(
            |w| {
                w.set(key, value);
            },
            &[GOOD],
        )))
    };
    assert_matches!(error("general.type", string("model")), AdapterError::NotAnAdapter { found } if found == "model");
    assert_matches!(error("adapter.type", string("lora")), AdapterError::Lora);
    assert_matches!(error("adapter.type", string("ia3")), AdapterError::UnknownKind { found } if found == "ia3");
    assert_matches!(
        error("ggraft.format_version", MetaValue::U32(2)),
        AdapterError::NewerVersion {
            found: 2,
            supported: 1
        }
    );
    assert_matches!(
        error("ggraft.format_version", MetaValue::U32(0)),
        AdapterError::BadVersion { found: 0 }
    );
    for length in [0, 65537, u32::MAX] {
        assert_matches!(
            error("ggraft.length", MetaValue::U32(length)),
            AdapterError::Length { got, .. } if got == length as usize
        );
    }
    assert_matches!(
        error("ggraft.fingerprint", string("abc")),
        AdapterError::BadFingerprint { found } if found == "abc"
    );
    assert_matches!(
        error("ggraft.template", string("{v:1}{prompt}")),
        AdapterError::TemplateKind {
            kind: AdapterKind::Prompt
        }
    );
    assert_matches!(
        error("ggraft.template", string("{v")),
        AdapterError::Template(TemplateError::Unclosed { at: 0 })
    );
    assert_matches!(
        error("ggraft.provenance.steps", MetaValue::U32(1)),
        AdapterError::ProvenanceValue { key } if key == "ggraft.provenance.steps"
    );
    // A llama.cpp LoRA file has none of our keys.
    let mut lora = GgufWriter::new();
    lora.set("general.type", string("adapter"));
    lora.set("general.architecture", string("llama"));
    lora.set("adapter.type", string("lora"));
    lora.set("adapter.lora.alpha", MetaValue::F32(16.0));
    assert_matches!(
        adapter_error(Adapter::from_gguf(&lora.to_bytes(|_, _| {}))),
        AdapterError::Lora
    );
    // Old models say no type at all.
    let mut model = GgufWriter::new();
    model.set("general.architecture", string("llama"));
    assert_matches!(
        adapter_error(Adapter::from_gguf(&model.to_bytes(|_, _| {}))),
        AdapterError::NotAnAdapter { found } if found == "absent"
    );
    for key in [
        "ggraft.format_version",
        "ggraft.length",
        "ggraft.base.embedding_length",
        "general.architecture",
    ] {
        let wrong_type = Adapter::from_gguf(&file(
            |w| {
                w.set(key, MetaValue::Bool(true));
            },
            &[GOOD],
        ));
        assert_matches!(wrong_type, Err(Error::Gguf { .. }));
    }
    assert_matches!(
        Adapter::from_gguf(b"not a gguf file"),
        Err(Error::Gguf { .. })
    );
}

#[test]
fn reader_refuses_wrong_tensors() {
    let error = |tensors: &[_]| adapter_error(Adapter::from_gguf(&file(|_| {}, tensors)));
    assert_matches!(error(&[]), AdapterError::MissingTensor { tensor } if tensor == "virtual_tokens");
    assert_matches!(
        error(&[GOOD, ("blk.0.prefix_k", GgmlType::F16, &[4, 2])]),
        AdapterError::UnknownTensor { tensor } if tensor == "blk.0.prefix_k"
    );
    for ne in [&[4, 3][..], &[8, 2], &[4, 1, 2], &[4, 2, 2], &[8]] {
        assert_matches!(
            error(&[(GOOD.0, GOOD.1, ne)]),
            AdapterError::TensorShape {
                expected: [4, 2],
                ..
            }
        );
    }
    let quantized = |w: &mut GgufWriter| {
        w.set("ggraft.base.embedding_length", MetaValue::U32(32));
    };
    assert_matches!(
        adapter_error(Adapter::from_gguf(&file(
            quantized,
            &[(GOOD.0, GgmlType::Q8_0, &[32, 2])]
        ))),
        AdapterError::TensorType { found: "q8_0", .. }
    );
    // Four billion declared layers cost nothing.
    let layers = |n: u32| {
        move |w: &mut GgufWriter| {
            w.set("adapter.type", string("prefix"));
            w.set("ggraft.base.block_count", MetaValue::U32(n));
            w.set("ggraft.base.head_count_kv", MetaValue::U32(1));
            w.set("ggraft.base.head_length", MetaValue::U32(4));
        }
    };
    let layer = [
        ("blk.0.prefix_k", GgmlType::F16, &[4, 2][..]),
        ("blk.0.prefix_v", GgmlType::F32, &[4, 2]),
    ];
    Adapter::from_gguf(&file(layers(1), &layer)).unwrap();
    for n in [2, u32::MAX] {
        assert_matches!(
            adapter_error(Adapter::from_gguf(&file(layers(n), &layer))),
            AdapterError::MissingTensor { tensor } if tensor == "blk.1.prefix_k"
        );
    }
    assert_matches!(
        adapter_error(Adapter::from_gguf(&file(layers(1), &layer[..1]))),
        AdapterError::MissingTensor { tensor } if tensor == "blk.0.prefix_v"
    );
    let overflow = |w: &mut GgufWriter| {
        layers(1)(w);
        w.set("ggraft.base.head_count_kv", MetaValue::U32(u32::MAX));
        w.set("ggraft.base.head_length", MetaValue::U32(u32::MAX));
    };
    assert_matches!(
        adapter_error(Adapter::from_gguf(&file(overflow, &layer))),
        AdapterError::TensorShape { .. }
    );
}

#[test]
fn reader_refuses_values_that_are_not_finite() {
    let mut bytes = file(|_| {}, &[GOOD]);
    // The tensor is the last thing in the file: 16 bytes, padded to 32.
    let data = bytes.len()
        - bytes.len() % 32
        - if bytes.len().is_multiple_of(32) {
            32
        } else {
            0
        };
    bytes[data + 2 * 3 + 1] = 0x7e;
    assert_matches!(
        adapter_error(Adapter::from_gguf(&bytes)),
        AdapterError::NonFinite { tensor, index: 3, .. } if tensor == "virtual_tokens"
    );
}

#[test]
fn truncated_files_are_refused() {
    let bytes = all_kinds()[0].to_gguf(Precision::F16);
    for length in (0..bytes.len() - 64).step_by(7) {
        assert!(
            Adapter::from_gguf(&bytes[..length]).is_err(),
            "{length} of {} bytes",
            bytes.len()
        );
    }
}

proptest! {
    #[test]
    fn reader_never_panics_on_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let _ = Adapter::from_gguf(&bytes);
        let _ = Adapter::from_gguf(&[b"GGUF\x03\0\0\0", bytes.as_slice()].concat());
    }

    #[test]
    fn reader_never_panics_on_damaged_files(
        which in 0usize..4,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = all_kinds()[which].to_gguf(Precision::F16);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(adapter) = Adapter::from_gguf(&bytes) {
            prop_assert_eq!(Adapter::from_gguf(&adapter.to_gguf(Precision::F32)).unwrap().length(), adapter.length());
        }
    }
}

/// The example of docs/ADAPTER_FORMAT.md is what the writer writes, byte by byte, and what the reader reads.
#[test]
fn documented_example_is_current() {
    let doc = include_str!("../docs/ADAPTER_FORMAT.md");
    let adapter = Adapter::new(Parts {
        kind: AdapterKind::PTuning,
        payload: Payload::VirtualTokens(
            Matrix::from_f32(2, vec![1.0, -2.0, 0.5, 0.25, 0.0, 4.0]).unwrap(),
        ),
        template: Some("{v:2} {prompt} {v:1}".parse().unwrap()),
        name: Some("demo".to_owned()),
        fingerprint: None,
        base: BaseSignature {
            architecture: "llama".to_owned(),
            n_layer: None,
            n_embd: Some(2),
            n_head: None,
            n_head_kv: None,
            head_dim: None,
            n_vocab: None,
        },
        provenance: BTreeMap::from([("method".to_owned(), "p_tuning".to_owned())]),
    })
    .unwrap();
    let bytes = adapter.to_gguf(Precision::F16);
    let documented: Vec<u8> = doc
        .lines()
        .filter_map(|line| {
            line.strip_prefix("    ")?
                .split_once("  ")
                .filter(|(offset, _)| offset.len() == 4)
        })
        .flat_map(|(_, rest)| {
            rest.split("  ")
                .next()
                .unwrap()
                .split(' ')
                .map(|b| u8::from_str_radix(b, 16).unwrap())
        })
        .collect();
    assert!(
        documented == bytes,
        "write this into docs/ADAPTER_FORMAT.md:\n{}",
        hex_dump(&bytes)
    );
    assert_eq!(
        Adapter::from_gguf(&documented).unwrap().template(),
        adapter.template()
    );
}

fn hex_dump(bytes: &[u8]) -> String {
    let line = |(i, chunk): (usize, &[u8])| {
        let hex: Vec<_> = chunk.iter().map(|b| format!("{b:02x}")).collect();
        let text: String = chunk
            .iter()
            .map(|&b| if b.is_ascii_graphic() { b as char } else { '.' })
            .collect();
        format!("    {:04x}  {:<47}  {text}\n", i * 16, hex.join(" "))
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

// ---------------------------------------------------------------- PEFT

/// `prompt_embeddings` of a folder as saved, row-major.
fn raw(path: &str) -> Vec<f32> {
    PeftFolder::read(&data(path))
        .unwrap()
        .prompt_embeddings
        .data
}

#[test]
fn prefixes_are_laid_out_and_permuted() {
    for (path, base, p) in [
        ("peft/llama/prefix", llama(), 5),
        ("peft/llama/prefix_mlp", llama(), 5),
        ("peft/llama/cartridge", llama(), 6),
        ("peft/qwen3/prefix", shape("qwen3", 2, [64, 4, 2, 32]), 5),
    ] {
        let (adapter, w) = (import(path, &base).unwrap(), raw(path));
        assert_eq!(
            (adapter.kind(), adapter.length()),
            (AdapterKind::Prefix, p),
            "{path}"
        );
        let Payload::Prefix { layers } = adapter.payload() else {
            panic!("{path}: a prefix")
        };
        let sizes = (base.n_head_kv.uniform(), base.head_dim.uniform());
        let (Some(hk), Some(d)) = sizes else {
            panic!("{path}: layers differ")
        };
        let mut row = vec![0.0; hk * d];
        let mut compared = 0;
        for (l, layer) in layers.iter().enumerate() {
            // K[l][h][t][i] = W[t, ((2l+0)*Hk + h)*d + i], V likewise with 2l+1.
            let at = |t: usize, kv: usize, h: usize, i: usize| {
                w[t * 2 * base.n_layer * hk * d + ((2 * l + kv) * hk + h) * d + i]
            };
            for t in 0..p {
                layer.v.row_f32(t, &mut row);
                for (n, &x) in row.iter().enumerate() {
                    assert_eq!(x, at(t, 1, n / d, n % d));
                }
                layer.k.row_f32(t, &mut row);
                for (h, i, j) in
                    (0..hk).flat_map(|h| (0..d / 2).flat_map(move |i| [(h, i, 0), (h, i, 1)]))
                {
                    let place = if base.qk_permuted {
                        2 * i + j
                    } else {
                        j * d / 2 + i
                    };
                    assert_eq!(
                        row[h * d + place],
                        at(t, 0, h, j * d / 2 + i),
                        "{path} {l} {t} {h} {i} {j}"
                    );
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, base.n_layer * p * hk * d);
    }
}

#[test]
fn embedding_rows_are_taken_as_they_are() {
    for (path, base, kind, p) in [
        ("peft/llama/prompt", llama(), AdapterKind::Prompt, 4),
        ("peft/llama/cpt", llama(), AdapterKind::Prompt, 10),
        ("peft/llama/ptuning_mlp", llama(), AdapterKind::PTuning, 4),
        ("peft/llama/ptuning_lstm", llama(), AdapterKind::PTuning, 4),
        (
            "peft/gemma/prompt",
            shape("gemma", 2, [64, 4, 1, 16]),
            AdapterKind::Prompt,
            4,
        ),
    ] {
        let adapter = import(path, &base).unwrap();
        assert_eq!(
            (adapter.kind(), adapter.length(), adapter.template()),
            (kind, p, None),
            "{path}"
        );
        assert_eq!(values(&adapter), raw(path), "{path}");
        assert_eq!(adapter.base(), &BaseSignature::from(&base));
    }
    let cartridge = import("peft/llama/cartridge", &llama()).unwrap();
    let expected = [
        ("base_name", "llama"),
        ("frozen_tokens", "2"),
        ("method", "cartridge"),
        ("source", "peft 0.21.2"),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    assert_eq!(cartridge.provenance(), &expected);
}

#[test]
fn options_are_applied_or_refused() {
    let base = llama();
    let fingerprint = Some(Fingerprint([3; 32]));
    let import = |path: &str, task, row_factor| {
        let options = ImportOptions {
            task,
            row_factor,
            name: Some("n".to_owned()),
        };
        import_peft(&data(path), &base, fingerprint, &options)
    };
    let scaled = import("peft/llama/prompt", None, Some(8.0)).unwrap();
    assert_eq!(
        values(&scaled),
        raw("peft/llama/prompt")
            .iter()
            .map(|x| x * 8.0)
            .collect::<Vec<_>>()
    );
    assert_eq!(
        (scaled.name(), scaled.fingerprint()),
        (Some("n"), fingerprint)
    );
    for factor in [0.0, f32::NAN, f32::INFINITY] {
        assert_matches!(
            adapter_error(import("peft/llama/prompt", None, Some(factor))),
            AdapterError::BadRowFactor { .. }
        );
    }
    assert_matches!(
        adapter_error(import("peft/llama/prompt", None, Some(f32::MAX))),
        AdapterError::NonFinite { .. }
    );
    assert_matches!(
        adapter_error(import("peft/llama/prefix", None, Some(2.0))),
        AdapterError::RowFactorNotApplicable {
            peft_type: "PREFIX_TUNING"
        }
    );
    assert_matches!(
        adapter_error(import("peft/llama/prompt", Some(0), None)),
        AdapterError::TaskNotApplicable {
            peft_type: "PROMPT_TUNING"
        }
    );
    assert_matches!(
        adapter_error(import("peft/llama/multitask_prompt", None, None)),
        AdapterError::TaskRequired { tasks: 3 }
    );
    assert_matches!(
        adapter_error(import("peft/llama/multitask_prompt", Some(3), None)),
        AdapterError::TaskOutOfRange { task: 3, tasks: 3 }
    );
}

#[test]
fn multitask_rows_are_composed_for_the_chosen_task() {
    let folder = PeftFolder::read(&data("peft/llama/multitask_prompt")).unwrap();
    let factors = folder.tasks.as_ref().unwrap();
    let (p, r, d) = (4, 2, 64);
    for task in 0..3 {
        let options = ImportOptions {
            task: Some(task),
            ..Default::default()
        };
        let adapter = Adapter::from_peft(folder.clone(), &llama(), None, &options).unwrap();
        let got = values(&adapter);
        for (t, i) in (0..p).flat_map(|t| (0..d).map(move |i| (t, i))) {
            let product: f32 = (0..r)
                .map(|k| {
                    factors.cols.data[(task * p + t) * r + k]
                        * factors.rows.data[(task * r + k) * d + i]
                })
                .sum();
            let expected = folder.prompt_embeddings.data[t * d + i] * product;
            assert!(
                (got[t * d + i] - expected).abs() <= 1e-6 * expected.abs(),
                "task {task} row {t} value {i}"
            );
        }
        assert_eq!(adapter.provenance()["task"], task.to_string());
    }
}

#[test]
fn controls_of_the_malformed_folders_are_accepted() {
    for (name, kind, task) in [
        ("prefix", AdapterKind::Prefix, None),
        ("prompt", AdapterKind::Prompt, None),
        ("multitask_prompt", AdapterKind::Prompt, Some(1)),
    ] {
        let options = ImportOptions {
            task,
            ..Default::default()
        };
        let dir = data(&format!("peft_bad/control/adapters/{name}"));
        assert_eq!(
            import_peft(&dir, &control(), None, &options)
                .unwrap()
                .kind(),
            kind
        );
    }
}

#[test]
fn malformed_folders_are_refused_with_their_cause() {
    let bad = |name: &str| import(&format!("peft_bad/peft_{name}"), &control());
    assert_matches!(
        peft_error(bad("no_config")),
        PeftError::ConfigMissing { .. }
    );
    assert_matches!(peft_error(bad("bad_json")), PeftError::ConfigSyntax { .. });
    assert_matches!(
        peft_error(bad("no_model")),
        PeftError::TensorsMissing { .. }
    );
    assert_matches!(
        peft_error(bad("header_lies")),
        PeftError::TensorsMalformed { .. }
    );
    assert_matches!(peft_error(bad("header_huge")), PeftError::HeaderTooLarge { size, .. } if size == 1 << 60);
    assert_matches!(
        adapter_error(bad("shape_base")),
        AdapterError::KvWidthMismatch {
            adapter: 32,
            base: 16
        }
    );
    assert_matches!(peft_error(bad("int8")), PeftError::TensorDtype { dtype, .. } if dtype == "I8");
    assert_matches!(
        peft_error(bad("no_embeddings")),
        PeftError::TensorMissing {
            tensor: "prompt_embeddings"
        }
    );
    assert_matches!(
        peft_error(bad("virtual_mismatch")),
        PeftError::TensorShape { expected, got, .. } if expected == [5, 32] && got == [3, 32]
    );
    assert_matches!(
        peft_error(bad("nan")),
        PeftError::NonFinite {
            tensor: "prompt_embeddings",
            ..
        }
    );
    assert_matches!(
        peft_error(bad("prompt_width")),
        PeftError::TensorShape { expected, got, .. } if expected == [3, 32] && got == [3, 48]
    );
    let lora = peft_error(bad("lora"));
    assert_matches!(&lora, PeftError::UnsupportedType { peft_type } if peft_type == "LORA");
    assert_eq!(
        lora.to_string(),
        "PEFT type LORA is not supported; supported are PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, \
         MULTITASK_PROMPT_TUNING, CPT"
    );
    let listed = std::fs::read_dir(data("peft_bad")).unwrap().count();
    assert_eq!(
        listed,
        12 + 1,
        "12 malformed folders and the controls, each has a line here"
    );
}

/// A PREFIX_TUNING folder for `control()` as bytes: configuration changed by `config`, tensor file as given.
fn parse(config: &[(&str, serde_json::Value)], tensors: &[u8]) -> Result<PeftFolder, PeftError> {
    let mut map: BTreeMap<&str, serde_json::Value> = BTreeMap::from([
        ("peft_type", "PREFIX_TUNING".into()),
        ("num_virtual_tokens", 3.into()),
        ("num_layers", 1.into()),
        ("num_attention_heads", 1.into()),
        ("token_dim", 16.into()),
    ]);
    map.extend(config.iter().cloned());
    PeftFolder::parse(&serde_json::to_vec(&map).unwrap(), tensors)
}

fn tensor_file(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

fn prefix_tensor(dtype: &str, bytes_per_value: usize) -> Vec<u8> {
    let n = 3 * 32 * bytes_per_value;
    let header = format!(
        r#"{{"prompt_embeddings":{{"dtype":"{dtype}","shape":[3,32],"data_offsets":[0,{n}]}}}}"#
    );
    tensor_file(&header, &vec![0; n])
}

#[test]
fn folder_parser_accepts_three_float_types() {
    for (dtype, size) in [("F32", 4), ("F16", 2), ("BF16", 2)] {
        assert_eq!(
            parse(&[], &prefix_tensor(dtype, size))
                .unwrap()
                .prompt_embeddings
                .data,
            vec![0.0; 96]
        );
    }
    for (dtype, size) in [
        ("F64", 8),
        ("I32", 4),
        ("U8", 1),
        ("BOOL", 1),
        ("F8_E4M3", 1),
    ] {
        assert_matches!(
            parse(&[], &prefix_tensor(dtype, size)),
            Err(PeftError::TensorDtype { dtype: d, .. }) if d == dtype
        );
    }
    // What the three types decode to.
    for (dtype, bytes) in [
        ("F32", &[0, 0, 0x20, 0xc0][..]),
        ("F16", &[0, 0xc1]),
        ("BF16", &[0x20, 0xc0]),
    ] {
        let n = bytes.len();
        let mut file = prefix_tensor(dtype, n);
        let end = file.len();
        file[end - n..].copy_from_slice(bytes);
        assert_eq!(
            parse(&[], &file).unwrap().prompt_embeddings.data[95],
            -2.5,
            "{dtype}"
        );
    }
}

#[test]
fn folder_parser_checks_the_configuration() {
    let good = prefix_tensor("F32", 4);
    let error =
        |key: &'static str, value: serde_json::Value| parse(&[(key, value)], &good).expect_err(key);
    parse(
        &[
            ("num_transformer_submodules", 1.into()),
            ("unknown", true.into()),
        ],
        &good,
    )
    .unwrap();
    for key in [
        "peft_type",
        "num_virtual_tokens",
        "num_layers",
        "num_attention_heads",
        "token_dim",
    ] {
        assert_matches!(error(key, serde_json::Value::Null), PeftError::ConfigKeyMissing { key: k } if k == key);
        assert_matches!(error(key, true.into()), PeftError::ConfigKeyType { key: k, .. } if k == key);
    }
    for value in [
        serde_json::json!(-3),
        serde_json::json!(3.5),
        serde_json::json!("3"),
    ] {
        assert_matches!(
            error("num_virtual_tokens", value),
            PeftError::ConfigKeyType { .. }
        );
    }
    assert_matches!(
        error("num_layers", 0.into()),
        PeftError::ConfigValue {
            key: "num_layers",
            got: 0,
            ..
        }
    );
    assert_matches!(
        error("num_attention_heads", 3.into()),
        PeftError::ConfigValue {
            key: "token_dim",
            ..
        }
    );
    assert_matches!(
        error("num_frozen_tokens", 4.into()),
        PeftError::ConfigValue {
            key: "num_frozen_tokens",
            ..
        }
    );
    assert_matches!(
        error("num_transformer_submodules", 2.into()),
        PeftError::ConfigValue { got: 2, .. }
    );
    assert_matches!(
        error("num_layers", u64::MAX.into()),
        PeftError::TensorShape { .. }
    );
    for kind in ["IA3", "ADAPTION_PROMPT", "prefix_tuning"] {
        assert_matches!(error("peft_type", kind.into()), PeftError::UnsupportedType { peft_type } if peft_type == kind);
    }
    for text in ["", "[]", "null", "{", "\u{feff}{}"] {
        assert_matches!(
            PeftFolder::parse(text.as_bytes(), &good),
            Err(PeftError::ConfigSyntax { .. })
        );
    }
}

#[test]
fn folder_parser_checks_the_tensor_file() {
    assert_matches!(
        parse(&[], b"1234567"),
        Err(PeftError::TensorsMalformed { .. })
    );
    let beyond = [&100u64.to_le_bytes()[..], b"{}"].concat();
    assert_matches!(
        parse(&[], &beyond),
        Err(PeftError::HeaderTooLarge { size: 100, max: 2 })
    );
    let large = tensor_file(&" ".repeat((1 << 20) + 1), &[]);
    assert_matches!(
        parse(&[], &large),
        Err(PeftError::HeaderTooLarge { max: 1_048_576, .. })
    );
    assert_matches!(
        parse(&[], &tensor_file("{}", &[])),
        Err(PeftError::TensorMissing { .. })
    );
    let embeddings = r#""prompt_embeddings":{"dtype":"F32","shape":[3,32],"data_offsets":[0,384]}"#;
    let extra = format!(
        r#"{{{embeddings},"score.weight":{{"dtype":"U8","shape":[1],"data_offsets":[384,385]}}}}"#
    );
    assert_matches!(
        parse(&[], &tensor_file(&extra, &[0; 385])),
        Err(PeftError::TensorUnexpected { tensor }) if tensor == "score.weight"
    );
    let mut infinite = prefix_tensor("F16", 2);
    let end = infinite.len();
    infinite[end - 1] = 0x7c;
    assert_matches!(
        parse(&[], &infinite),
        Err(PeftError::NonFinite {
            index: 95,
            value: f32::INFINITY,
            ..
        })
    );

    let multitask = |cols: &str, rows: &str| {
        let header = format!(
            r#"{{"prompt_embeddings":{{"dtype":"F32","shape":[3,16],"data_offsets":[0,192]}},
                "prefix_task_cols":{{"dtype":"F32","shape":{cols},"data_offsets":[192,216]}},
                "prefix_task_rows":{{"dtype":"F32","shape":{rows},"data_offsets":[216,344]}}}}"#
        );
        parse(
            &[("peft_type", "MULTITASK_PROMPT_TUNING".into())],
            &tensor_file(&header, &[0; 344]),
        )
    };
    assert_eq!(
        multitask("[2,3,1]", "[2,1,16]").unwrap().config.peft_type,
        PeftType::MultitaskPromptTuning
    );
    for (cols, rows) in [
        ("[6]", "[2,1,16]"),
        ("[2,1,3]", "[2,1,16]"),
        ("[2,3,1]", "[1,2,16]"),
        ("[2,3,1]", "[32]"),
    ] {
        assert_matches!(multitask(cols, rows), Err(PeftError::TensorShape { .. }));
    }
}

#[test]
fn pickles_and_oversized_configurations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = data("peft_bad/control/adapters/prefix/adapter_config.json");
    std::fs::copy(source, dir.path().join("adapter_config.json")).unwrap();
    std::fs::write(dir.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
    let import = || import_peft(dir.path(), &control(), None, &ImportOptions::default());
    let error = peft_error(import());
    assert_matches!(&error, PeftError::PickleOnly { .. });
    let text = error.to_string();
    assert!(
        text.contains("weights_only=True") && !text.contains('\n'),
        "{text}"
    );
    assert!(
        text.ends_with(&format!("'{}'", dir.path().display())),
        "{text}"
    );
    // A folder that holds such folders names them.
    let parent = tempfile::tempdir().unwrap();
    for name in ["zeta", "alpha", "empty"] {
        std::fs::create_dir(parent.path().join(name)).unwrap();
        if name != "empty" {
            std::fs::copy(
                dir.path().join("adapter_config.json"),
                parent.path().join(name).join("adapter_config.json"),
            )
            .unwrap();
        }
    }
    let error = peft_error(import_peft(
        parent.path(),
        &control(),
        None,
        &ImportOptions::default(),
    ));
    assert!(
        error.to_string().ends_with("use one of alpha, zeta"),
        "{error}"
    );
    std::fs::write(
        dir.path().join("adapter_config.json"),
        " ".repeat((1 << 20) + 1),
    )
    .unwrap();
    assert_matches!(
        peft_error(import()),
        PeftError::ConfigTooLarge {
            size: 1_048_577,
            max: 1_048_576
        }
    );
    let missing = import_peft(
        &dir.path().join("absent"),
        &control(),
        None,
        &ImportOptions::default(),
    );
    assert_matches!(peft_error(missing), PeftError::ConfigMissing { .. });
}

#[test]
fn folders_for_other_bases_are_refused() {
    let import = |path: &str, change: &dyn Fn(&mut BaseShape)| {
        let mut base = llama();
        change(&mut base);
        adapter_error(import(path, &base))
    };
    assert_matches!(
        import("peft/llama/prefix", &|b| b.n_layer = 4),
        AdapterError::LayerMismatch {
            adapter: 3,
            base: 4
        }
    );
    assert_matches!(
        import("peft/llama/prefix", &|b| (b.n_head_kv, b.head_dim) =
            (4.into(), 8.into())),
        AdapterError::KvHeadMismatch {
            adapter: 2,
            base: 4
        }
    );
    assert_matches!(
        import("peft/llama/prompt", &|b| b.n_embd = 32),
        AdapterError::EmbeddingMismatch {
            adapter: 64,
            base: 32
        }
    );
    assert_matches!(
        import("peft/llama/prompt", &|b| b.n_head = 8.into()),
        AdapterError::HeadMismatch {
            adapter: 4,
            base: 8
        }
    );
}

#[test]
fn export_writes_the_keys_and_values_peft_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let json = |path: &Path| -> BTreeMap<String, serde_json::Value> {
        serde_json::from_slice(&std::fs::read(path.join("adapter_config.json")).unwrap()).unwrap()
    };
    for name in ["prefix", "prompt", "ptuning_mlp"] {
        let source = data(&format!("peft/llama/{name}"));
        let out = dir.path().join(name);
        let adapter = import(&format!("peft/llama/{name}"), &llama()).unwrap();
        export_peft(&adapter, &llama(), &out, "llama").unwrap();
        // Twice: an existing folder is overwritten.
        export_peft(&adapter, &llama(), &out, "llama").unwrap();
        let (mut expected, got) = (json(&source), json(&out));
        // The width of the discarded encoder is not in the adapter.
        if let Some(width) = expected.get_mut("encoder_hidden_size") {
            *width = got["encoder_hidden_size"].clone();
        }
        assert_eq!(got, expected, "{name}");
        let tensors = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(tensors(&out), tensors(&source), "{name}: byte for byte");
        assert_eq!(
            std::fs::read_dir(&out).unwrap().count(),
            2,
            "no temporary files stay"
        );
    }
}

#[test]
fn export_refuses_templates_and_other_bases() {
    let dir = tempfile::tempdir().unwrap();
    let templated = &all_kinds()[2];
    let error = export_peft(templated, &llama(), dir.path(), "llama").expect_err("templates");
    assert_matches!(error, Error::Adapter(AdapterError::ExportTemplate { .. }));
    let error =
        export_peft(&all_kinds()[0], &control(), dir.path(), "llama").expect_err("another base");
    assert_matches!(error, Error::Adapter(AdapterError::LayerMismatch { .. }));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// PEFT's prefixes are equally wide in all layers; rows at the input do not depend on that.
#[test]
fn prefixes_of_uneven_layers_stay_out_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let base = uneven();
    let prefix = Adapter::new(prefix_parts(&base, 2)).unwrap();
    let error = export_peft(&prefix, &base, dir.path(), "base").expect_err("uneven layers");
    assert_matches!(error, Error::Adapter(AdapterError::LayersDiffer));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_matches!(
        adapter_error(import("peft/llama/prefix", &base)),
        AdapterError::LayersDiffer
    );
    let prompt = import("peft/llama/prompt", &base).unwrap();
    export_peft(&prompt, &base, dir.path(), "llama").unwrap();
    let again = import_peft(dir.path(), &base, None, &ImportOptions::default()).unwrap();
    assert_eq!(values(&again), values(&prompt));
}

/// An adapter of any kind on a small base of any shape, permuted or not, with any finite values.
fn any_adapter() -> impl Strategy<Value = (Adapter, BaseShape)> {
    let finite = any::<f32>().prop_filter("finite", |x| x.is_finite());
    let kind = prop_oneof![
        Just(AdapterKind::Prefix),
        Just(AdapterKind::Prompt),
        Just(AdapterKind::PTuning)
    ];
    let dims = (
        1usize..4,
        1usize..4,
        1usize..4,
        1usize..4,
        1usize..5,
        any::<bool>(),
    );
    (kind, dims, prop::collection::vec(finite, 64..=64)).prop_map(|(kind, dims, pool)| {
        let (n_layer, heads_per_kv, n_head_kv, half_dim, p, permuted) = dims;
        let (n_head, head_dim) = (n_head_kv * heads_per_kv, 2 * half_dim);
        let mut base = shape(
            "llama",
            n_layer,
            [n_head * head_dim, n_head, n_head_kv, head_dim],
        );
        base.qk_permuted = permuted;
        let mut next = pool
            .iter()
            .cycle()
            .enumerate()
            .map(|(i, x)| if i < 64 { *x } else { i as f32 });
        let mut rows = |width: usize| {
            Matrix::from_f32(width, next.by_ref().take(width * p).collect()).unwrap()
        };
        let payload = match kind {
            AdapterKind::Prefix => Payload::Prefix {
                layers: (0..n_layer)
                    .map(|il| PrefixLayer {
                        k: rows(base.kv_width(il)),
                        v: rows(base.kv_width(il)),
                    })
                    .collect(),
            },
            _ => Payload::VirtualTokens(rows(base.n_embd)),
        };
        let method = match kind {
            AdapterKind::Prefix => "prefix_tuning",
            AdapterKind::Prompt => "prompt_tuning",
            AdapterKind::PTuning => "p_tuning",
        };
        let provenance = [
            ("method", method),
            ("source", "peft 0.21.2"),
            ("base_name", "base"),
        ];
        let provenance = provenance.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let parts = Parts {
            kind,
            payload,
            provenance,
            ..prefix_parts(&base, p)
        };
        (Adapter::new(parts).unwrap(), base)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn import_of_export_is_the_same_adapter((adapter, base) in any_adapter()) {
        let dir = tempfile::tempdir().unwrap();
        export_peft(&adapter, &base, dir.path(), "base").unwrap();
        let options = ImportOptions { name: adapter.name().map(str::to_owned), ..Default::default() };
        let again = import_peft(dir.path(), &base, adapter.fingerprint(), &options).unwrap();
        prop_assert_eq!(again.parts(), adapter.parts());
    }

    #[test]
    fn single_precision_files_are_exact((adapter, _) in any_adapter()) {
        let again = Adapter::from_gguf(&adapter.to_gguf(Precision::F32)).unwrap();
        prop_assert_eq!(again.parts(), adapter.parts());
    }

    #[test]
    fn folder_parser_never_panics(
        tensors in prop::collection::vec(any::<u8>(), 0..64),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        in_config in any::<bool>(),
    ) {
        let dir = data("peft_bad/control/adapters/multitask_prompt");
        let mut config = std::fs::read(dir.join("adapter_config.json")).unwrap();
        let mut good = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let _ = PeftFolder::parse(&config, &tensors);
        let damaged = if in_config { &mut config } else { &mut good };
        let at = at.index(damaged.len());
        damaged[at] = value;
        if let Ok(folder) = PeftFolder::parse(&config, &good) {
            let options = ImportOptions { task: folder.tasks.as_ref().map(|_| 0), ..Default::default() };
            let _ = Adapter::from_peft(folder, &control(), None, &options);
        }
    }
}

// ---------------------------------------------------------------- concatenation, library

#[test]
fn concat_puts_the_rows_of_the_first_adapter_first() {
    let base = llama();
    let (a, b) = (
        Adapter::new(prefix_parts(&base, 2)).unwrap(),
        Adapter::new(prefix_parts(&base, 3)).unwrap(),
    );
    let both = concat(&a, &b).unwrap();
    assert_eq!(
        (both.kind(), both.length(), both.fingerprint()),
        (AdapterKind::Prefix, 5, a.fingerprint())
    );
    let layers = |x: &Adapter| match x.payload() {
        Payload::Prefix { layers } => layers.clone(),
        Payload::VirtualTokens(_) => panic!("a prefix"),
    };
    for ((joined, first), second) in layers(&both).iter().zip(layers(&a)).zip(layers(&b)) {
        assert_eq!(
            joined.k.to_f32(),
            [first.k.to_f32(), second.k.to_f32()].concat()
        );
        assert_eq!(
            joined.v.to_f32(),
            [first.v.to_f32(), second.v.to_f32()].concat()
        );
    }
    let prompt = |p| Adapter::new(rows_parts(AdapterKind::Prompt, &base, p)).unwrap();
    let both = concat(&prompt(1), &prompt(2)).unwrap();
    assert_eq!(
        values(&both),
        [values(&prompt(1)), values(&prompt(2))].concat()
    );
    assert_eq!(both.provenance()["method"], "concat");
    assert_eq!(both.provenance()["first"], "pirate");

    // Half precision stays only if both sides are.
    let half = Adapter::from_gguf(&prompt(1).to_gguf(Precision::F16)).unwrap();
    for (x, y, precision) in [
        (&half, &half, Precision::F16),
        (&half, &prompt(1), Precision::F32),
    ] {
        let both = concat(x, y).unwrap();
        let Payload::VirtualTokens(rows) = both.payload() else {
            panic!("rows")
        };
        assert_eq!(
            (rows.precision(), values(&both)),
            (precision, [values(x), values(y)].concat())
        );
    }
}

#[test]
fn concat_refuses_what_does_not_belong_together() {
    let base = llama();
    let new = |parts| Adapter::new(parts).unwrap();
    let error = |a: Parts, b: Parts| concat(&new(a), &new(b)).expect_err("must be refused");
    let prompt = |p| rows_parts(AdapterKind::Prompt, &base, p);
    assert_matches!(
        error(prefix_parts(&base, 2), prompt(2)),
        AdapterError::ConcatKinds {
            first: AdapterKind::Prefix,
            second: AdapterKind::Prompt
        }
    );
    assert_matches!(
        error(prompt(2), rows_parts(AdapterKind::PTuning, &base, 2)),
        AdapterError::ConcatKinds { .. }
    );
    let template = Some("{v:2}{prompt}".parse().unwrap());
    let templated = Parts {
        template,
        ..rows_parts(AdapterKind::PTuning, &base, 2)
    };
    assert_matches!(
        error(templated.clone(), templated),
        AdapterError::ConcatTemplate
    );
    assert_matches!(
        error(
            prompt(2),
            Parts {
                fingerprint: Some(Fingerprint([8; 32])),
                ..prompt(2)
            }
        ),
        AdapterError::ConcatFingerprints { .. }
    );
    assert_matches!(
        error(prompt(2), rows_parts(AdapterKind::Prompt, &control(), 2)),
        AdapterError::ConcatBases { source } if matches!(*source, AdapterError::LayerMismatch { adapter: 1, base: 3 })
    );
    let narrow = shape("llama", 1, [1, 1, 1, 1]);
    let long = || rows_parts(AdapterKind::Prompt, &narrow, MAX_LENGTH);
    assert_matches!(
        error(long(), rows_parts(AdapterKind::Prompt, &narrow, 1)),
        AdapterError::Length { got: 65537, .. }
    );
}

#[test]
fn library_loads_and_unloads_while_others_hold_adapters() {
    let library = Library::new();
    let new = || Adapter::new(prefix_parts(&llama(), 2)).unwrap();
    let (a, b) = (new(), new());
    assert!(library.insert("a", a.clone()).is_none());
    assert!(library.insert("b", b.clone()).is_none());
    assert_eq!(library.names(), ["a", "b"]);
    let held = library.get("a").unwrap();
    assert_eq!(library.insert("a", b.clone()).unwrap().id(), a.id());
    assert_eq!(
        (held.id(), library.get("a").unwrap().id()),
        (a.id(), b.id())
    );
    assert_eq!(library.remove("a").unwrap().id(), b.id());
    assert!(library.remove("a").is_none() && library.get("a").is_none());

    std::thread::scope(|scope| {
        for t in 0..4 {
            let (library, adapter) = (&library, a.clone());
            scope.spawn(move || {
                for i in 0..200 {
                    let name = format!("{t}.{}", i % 5);
                    library.insert(name.clone(), adapter.clone());
                    assert_eq!(library.get(&name).unwrap().length(), 2);
                    assert_eq!(library.remove(&name).unwrap().id(), adapter.id());
                }
            });
        }
    });
    assert_eq!(library.names(), ["b"]);
}
