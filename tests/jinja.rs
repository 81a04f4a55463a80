//! Expressions and small templates are rendered as real Jinja renders them, set up as Transformers does.

use ggraft::model::chat::{ChatMessage, ChatTemplate};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

/// Templates whose rendering is not Jinja's: why, and which. A template that is refused, where Jinja renders it, costs a message; none of
/// these stands in a template of a model that we have seen.
const KNOWN: &[(&str, &[&str])] = &[
    (
        "Filters for web pages and for people, which no chat template has: they are refused.",
        &[
            "{{ nl | wordwrap(5) }}",
            "{{ 'The quick brown fox jumps over the lazy dog' | wordwrap(10) }}",
            "{{ 'The quick brown fox' | wordwrap(4) }}",
            "{{ 'The quick brown fox' | wordwrap(4, false) }}",
            "{{ 'The quick brown fox' | wordwrap(width=9, wrapstring='|') }}",
            "{{ nl | striptags }}",
            "{{ '<b>x &amp; y</b>' | striptags }}",
            "{{ 'a b/ü&?' | urlencode }}",
            "{{ d | urlencode }}",
            "{{ {'a': 1, 'b': 'x y'} | xmlattr }}",
            "{{ 'see http://x.org now' | urlize }}",
            "{{ 1000 | filesizeformat }}",
            "{{ 1234567 | filesizeformat }}",
            "{{ 1234567 | filesizeformat(true) }}",
            "{{ 1 | filesizeformat }}",
            "{{ s | pprint }}",
            "{{ d | pprint }}",
            "{{ {'a': [1, 'x', none]} | pprint }}",
            "{{ lm | random is defined }}",
        ],
    ),
    (
        "Functions that no chat template has.",
        &[
            "{{ lipsum is defined }}",
            "{{ cycler is defined }}",
            "{{ joiner is defined }}",
            "{{ cycler('a', 'b').next() }}",
        ],
    ),
    (
        "Methods of bytes, tables of characters and numbers.",
        &[
            "{{ s.encode() }}",
            "{{ s.encode('utf-8') }}",
            "{{ 'abc'.translate({97: 'x'}) }}",
            "{{ 'abc'.maketrans('a', 'b') }}",
            "{{ n.bit_length() }}",
            "{{ n.real }}",
            "{{ f.is_integer() }}",
            "{{ (2.0).is_integer() }}",
        ],
    ),
    (
        "Statements that minijinja does not know: they are refused.",
        &[
            "{% print n %}",
            "{% print n, s %}",
            "{% autoescape true %}{{ '<' }}{% endautoescape %}",
            "{% autoescape false %}{{ '<' }}{% endautoescape %}",
        ],
    ),
    (
        "minijinja's macros have no `varargs` and `kwargs`.",
        &[
            "{% macro f(a) %}{{ a }}{{ varargs }}{% endmacro %}{{ f(1, 2, 3) }}",
            "{% macro f(a) %}{{ a }}{{ kwargs }}{% endmacro %}{{ f(1, x=3) }}",
            "{% macro f(a) %}{{ a }}{% endmacro %}{{ f.name }}{{ f.arguments }}{{ f }}",
        ],
    ),
    (
        "What minijinja's statements do otherwise: two names for a text of two letters, blocks in loops.",
        &[
            "{% for a, b in ['xy'] %}{{ a }}{{ b }}{% endfor %}",
            "{% for i in l %}{% block x %}{{ i }}{% endblock %}{% endfor %}",
        ],
    ),
    (
        "minijinja's namespaces hold if there is something in them, and `self` has no text.",
        &["{% if namespace() %}a{% endif %}", "{{ self }}"],
    ),
    (
        "What Jinja lets pass by chance.",
        &["{{ l[] }}", "{% raw %}"],
    ),
    (
        "Names of characters.",
        &["{{ '\\u00e9\\x41\\101\\N{BULLET}\\q' }}"],
    ),
];

/// What `scripts/jinja-cases.py` wrote.
#[test]
fn renderings_are_those_of_jinja() {
    let text = fs::read_to_string("tests/data/chat/jinja.json").unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let mut values = all["context"].as_object().unwrap().clone();
    let messages = values.remove("messages").unwrap();
    let messages = messages.as_array().unwrap().iter();
    let messages: Vec<_> = messages
        .map(|m| ChatMessage::from_json(m.clone()).unwrap())
        .collect();
    let known: BTreeSet<&str> = KNOWN.iter().flat_map(|(_, all)| *all).copied().collect();
    let mut different = BTreeSet::new();
    let mut report = Vec::new();
    let cases = all["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 1890);
    for case in cases {
        let (source, expected) = (case[0].as_str().unwrap(), case[1].as_str());
        let got = ChatTemplate::new(source).and_then(|t| t.render(&messages, true, &values));
        if got.as_deref().ok() == expected {
            continue;
        }
        different.insert(source);
        if !known.contains(source) {
            report.push(format!(
                "{source:?}\n  got      {got:?}\n  expected {expected:?}"
            ));
        }
    }
    assert!(
        report.is_empty(),
        "{} differ:\n{}",
        report.len(),
        report.join("\n")
    );
    let right: Vec<_> = known.difference(&different).collect();
    assert!(
        right.is_empty(),
        "these are right and no longer known differences: {right:#?}"
    );
}
