//! How an answer shall be drawn: the fields that chats and completions have in common.

use super::body::JsonBody;
use super::error::{ApiError, Result};
use ggraft::infer::GenerateOptions;
use ggraft::infer::sampler::SamplerParams;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Answers to one prompt at most.
const MAX_N: usize = 128;
/// Stop strings at most: each is looked for at every character.
const MAX_STOPS: usize = 16;
/// Most likely tokens at most that are told with each token.
const MAX_LOGPROBS: usize = 20;
/// A bias of less bans a token, one of more chooses it: what lies beyond is a mistake.
const MAX_BIAS: f32 = 100.0;

#[derive(Deserialize)]
pub(super) struct Sampling {
    n: Option<usize>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// Extensions, as llama.cpp's server has them.
    top_k: Option<u32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    stop: Option<Stops>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "must be a text or a list of texts")]
enum Stops {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// How the answer is sent.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Delivery {
    Whole,
    Stream { usage: bool },
}

impl Sampling {
    /// Answers to each prompt.
    pub(super) fn n(&self) -> Result<usize> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_N => Ok(n),
            n => Err(ApiError::field(
                "n",
                format_args!("{n} is not from 1 to {MAX_N}"),
            )),
        }
    }

    pub(super) fn delivery(&self) -> Delivery {
        match self.stream {
            Some(true) => Delivery::Stream {
                usage: (self.stream_options.as_ref())
                    .is_some_and(|options| options.include_usage == Some(true)),
            },
            _ => Delivery::Whole,
        }
    }

    /// What the library is asked to do; at most `most` tokens, or `usual` of them where nothing is said.
    pub(super) fn generate(
        &self,
        n_vocab: usize,
        usual: Option<usize>,
        most: Option<usize>,
    ) -> Result<GenerateOptions> {
        let mut options = GenerateOptions::default().sampler(self.sampler(n_vocab)?);
        let asked = self.max_completion_tokens.or(self.max_tokens).or(usual);
        options.max_tokens = match (asked, most) {
            (Some(asked), Some(most)) => Some(asked.min(most)),
            (asked, most) => asked.or(most),
        };
        options.stop = match &self.stop {
            None => Vec::new(),
            Some(Stops::One(stop)) => vec![stop.clone()],
            Some(Stops::Many(stops)) if stops.len() > MAX_STOPS => {
                return Err(ApiError::field(
                    "stop",
                    format_args!("{} of them, at most {MAX_STOPS} may be", stops.len()),
                ));
            }
            Some(Stops::Many(stops)) => stops.clone(),
        };
        Ok(options)
    }

    fn sampler(&self, n_vocab: usize) -> Result<SamplerParams> {
        let usual = SamplerParams::default();
        let params = SamplerParams {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_p: self.top_p.unwrap_or(usual.top_p),
            top_k: self.top_k.unwrap_or(usual.top_k),
            min_p: self.min_p.unwrap_or(usual.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(usual.repeat_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(usual.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(usual.frequency_penalty),
            logit_bias: self.logit_bias()?,
            seed: self.seed.map(seed),
            ..usual
        };
        params
            .validate(n_vocab)
            .map_err(|e| ApiError::from(ggraft::Error::from(e)))?;
        Ok(params)
    }

    fn logit_bias(&self) -> Result<Vec<(i32, f32)>> {
        let of = |(token, &bias): (&String, &f32)| {
            let wrong = |why: &str| {
                Err(ApiError::field(
                    "logit_bias",
                    format_args!("{token:?}: {why}"),
                ))
            };
            match token.parse() {
                Ok(_) if !(-MAX_BIAS..=MAX_BIAS).contains(&bias) => {
                    wrong("the bias must be from -100 to 100")
                }
                Ok(id) => Ok((id, bias)),
                Err(_) => wrong("the key must be the number of a token"),
            }
        };
        self.logit_bias.iter().flatten().map(of).collect()
    }
}

/// Ours have 32 bits, of which one value is reserved.
fn seed(seed: i64) -> u32 {
    seed.rem_euclid(u32::MAX.into()) as u32
}

/// How many of the most likely tokens are told.
pub(super) fn check_logprobs(name: &str, n: usize) -> Result<usize> {
    match n {
        0..=MAX_LOGPROBS => Ok(n),
        n => Err(ApiError::field(
            name,
            format_args!("{n} is more than {MAX_LOGPROBS}"),
        )),
    }
}

/// A field of the API that is not supported, the values of it that say what happens anyway, and why others are refused.
type Unsupported = (&'static str, fn(&Value) -> bool, &'static str);

const UNSUPPORTED: [Unsupported; 11] = [
    (
        "response_format",
        |v| v.get("type").is_some_and(|kind| kind == "text"),
        "only text: constrained decoding is not supported",
    ),
    ("tools", is_nothing, "tools are not supported"),
    ("functions", is_nothing, "functions are not supported"),
    (
        "tool_choice",
        |v| v == "none" || v == "auto",
        "tools are not supported",
    ),
    (
        "function_call",
        |v| v == "none" || v == "auto",
        "functions are not supported",
    ),
    (
        "modalities",
        |v| *v == serde_json::json!(["text"]),
        "only text is supported",
    ),
    ("audio", is_nothing, "only text is supported"),
    (
        "prediction",
        is_nothing,
        "predicted outputs are not supported",
    ),
    (
        "web_search_options",
        is_nothing,
        "searching the web is not supported",
    ),
    ("echo", is_nothing, "the prompt is not repeated"),
    (
        "suffix",
        is_nothing,
        "texts are completed at their end only",
    ),
];

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Bool(on) => !on,
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Refuses fields of the API that are not supported.
pub(super) fn refuse_unsupported(body: &JsonBody) -> Result<()> {
    for (name, is_usual, why) in UNSUPPORTED {
        if body.get(name).is_some_and(|value| !is_usual(value)) {
            return Err(ApiError::unsupported(name, why));
        }
    }
    let n = body.get("n").cloned().unwrap_or(1.into());
    match body.get("best_of") {
        Some(best) if *best != n => Err(ApiError::unsupported(
            "best_of",
            "all answers are given: it must be equal to n",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Values of every kind for the fields that are read.
    fn value() -> impl Strategy<Value = Value> {
        let plain = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        plain.prop_recursive(3, 16, 4, |inner| {
            let list = prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from);
            let object = prop::collection::btree_map(".{0,4}", inner, 0..4);
            prop_oneof![
                list,
                object.prop_map(|fields| fields.into_iter().collect::<Value>())
            ]
        })
    }

    fn field() -> impl Strategy<Value = String> {
        let names = "n max_tokens temperature top_p top_k min_p logit_bias seed stop stream \
                     stream_options presence_penalty response_format tools best_of suffix";
        let names: Vec<_> = names.split_whitespace().map(str::to_owned).collect();
        prop::sample::select(names)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = JsonBody::parse(&bytes);
        }

        #[test]
        fn what_is_read_is_within_its_limits(fields in prop::collection::btree_map(field(), value(), 0..6)) {
            let text = serde_json::to_string(&fields).unwrap();
            let body = JsonBody::parse(text.as_bytes()).unwrap();
            let _ = refuse_unsupported(&body);
            if let Ok(sampling) = body.read::<Sampling>() {
                prop_assert!(sampling.n().is_err() || (1..=MAX_N).contains(&sampling.n().unwrap()));
                if let Ok(options) = sampling.generate(32, None, Some(9)) {
                    prop_assert!(options.max_tokens.unwrap() <= 9);
                    prop_assert!(options.stop.len() <= MAX_STOPS);
                    prop_assert!(options.sampler.seed != Some(u32::MAX));
                    prop_assert!(options.sampler.validate(32).is_ok());
                }
            }
        }
    }
}
