use super::*;

const V: usize = 64;

fn logits() -> Vec<f32> {
    (0..V).map(|i| ((i * 37) % 17) as f32 * 0.3).collect()
}

fn draw(params: &SamplerParams, n: usize) -> Vec<i32> {
    let mut s = Sampler::new(params, V).unwrap();
    (0..n)
        .map(|_| {
            let id = s.sample(&logits()).unwrap();
            s.accept(id);
            id
        })
        .collect()
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    let mut s = Sampler::new(&SamplerParams::greedy(), 5).unwrap();
    assert_eq!(s.sample(&[0.0, 3.0, -1.0, 3.0, 2.0]), Ok(1));
    assert_eq!(
        s.sample(&[
            f32::NEG_INFINITY,
            f32::NEG_INFINITY,
            -8.0,
            f32::NEG_INFINITY,
            -8.0
        ]),
        Ok(2)
    );
    assert!(
        s.chain.is_none() && s.candidates.capacity() == 0,
        "plain greedy allocates nothing"
    );
    // The chain's greedy follows the same rule.
    let biased = SamplerParams {
        logit_bias: vec![(1, -5.0)],
        ..SamplerParams::greedy()
    };
    assert_eq!(
        Sampler::new(&biased, 5)
            .unwrap()
            .sample(&[2.0, 3.0, -1.0, 2.0, 2.0]),
        Ok(0)
    );
}

#[test]
fn a_seed_fixes_the_sequence_and_reset_repeats_it() {
    let params = SamplerParams {
        seed: Some(7),
        repeat_penalty: 1.3,
        ..SamplerParams::default()
    };
    let first = draw(&params, 50);
    assert_eq!(first, draw(&params, 50));
    assert_ne!(
        first,
        draw(
            &SamplerParams {
                seed: Some(8),
                ..params.clone()
            },
            50
        )
    );
    let mut s = Sampler::new(&params, V).unwrap();
    for _ in 0..2 {
        let again: Vec<i32> = (0..50)
            .map(|_| {
                let id = s.sample(&logits()).unwrap();
                s.accept(id);
                id
            })
            .collect();
        assert_eq!(first, again);
        s.reset();
    }
}

/// Draws from all tokens, each with its probability.
fn unfiltered(seed: u32) -> SamplerParams {
    SamplerParams {
        seed: Some(seed),
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        temperature: 1.0,
        ..SamplerParams::default()
    }
}

#[test]
fn filters_keep_what_they_promise() {
    let base = unfiltered(1);
    let l = logits();
    let mut order: Vec<usize> = (0..V).collect();
    order.sort_by(|&a, &b| l[b].total_cmp(&l[a]));
    let third = l[order[2]];
    assert!(
        draw(
            &SamplerParams {
                top_k: 3,
                ..base.clone()
            },
            200
        )
        .iter()
        .all(|&id| l[id as usize] >= third)
    );
    let max = l[order[0]];
    let near = draw(
        &SamplerParams {
            min_p: 0.5,
            ..base.clone()
        },
        200,
    );
    assert!(near.iter().all(|&id| l[id as usize] >= max + 0.5f32.ln()));
    let top = draw(
        &SamplerParams {
            top_p: 0.0,
            ..base.clone()
        },
        50,
    );
    assert!(top.iter().all(|&id| l[id as usize] == max));
    let free = draw(&base, 2000);
    assert!(free.iter().any(|&id| l[id as usize] < third));
}

#[test]
fn temperature_one_draws_the_softmax() {
    let params = unfiltered(3);
    let l = logits();
    let sum: f32 = l.iter().map(|x| x.exp()).sum();
    let n = 40_000;
    let mut counts = vec![0usize; V];
    for id in draw(&params, n) {
        counts[id as usize] += 1;
    }
    for (i, &count) in counts.iter().enumerate() {
        let p = l[i].exp() / sum;
        let sigma = (n as f32 * p * (1.0 - p)).sqrt();
        assert!(
            (count as f32 - n as f32 * p).abs() < 5.0 * sigma,
            "token {i}: {count} draws, p = {p}"
        );
    }
}

#[test]
fn penalties_and_bans_apply() {
    let params = SamplerParams {
        repeat_penalty: 1e6,
        repeat_last_n: 3,
        ..SamplerParams::greedy()
    };
    let mut s = Sampler::new(&params, 4).unwrap();
    let l = [4.0, 3.0, 2.0, 1.0];
    let ids: Vec<i32> = (0..8)
        .map(|_| {
            let id = s.sample(&l).unwrap();
            s.accept(id);
            id
        })
        .collect();
    assert_eq!(ids, [0, 1, 2, 3, 0, 1, 2, 3]);
    for penalty in [
        SamplerParams {
            frequency_penalty: 2.0,
            ..SamplerParams::greedy()
        },
        SamplerParams {
            presence_penalty: 2.0,
            ..SamplerParams::greedy()
        },
    ] {
        let mut s = Sampler::new(&penalty, 4).unwrap();
        s.accept(0);
        assert_eq!(s.sample(&l), Ok(1));
        s.reset();
        assert_eq!(s.sample(&l), Ok(0));
    }
    let banned = SamplerParams {
        logit_bias: vec![(0, f32::NEG_INFINITY)],
        seed: Some(2),
        ..SamplerParams::default()
    };
    assert!(draw(&banned, 300).iter().all(|&id| id != 0));
}

#[test]
fn logits_without_a_choice_are_an_error() {
    let all_banned = (0..4).map(|id| (id, f32::NEG_INFINITY)).collect();
    for params in [
        SamplerParams::greedy(),
        SamplerParams {
            repeat_penalty: 1.1,
            ..SamplerParams::greedy()
        },
        SamplerParams {
            seed: Some(1),
            ..SamplerParams::default()
        },
    ] {
        let mut s = Sampler::new(&params, 4).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            for at in 0..4 {
                let mut l = [1.0, 2.0, 3.0, f32::NEG_INFINITY];
                l[at] = bad;
                assert_eq!(s.sample(&l), Err(SamplerError::NonFinite));
            }
        }
        assert_eq!(
            s.sample(&[f32::NEG_INFINITY; 4]),
            Err(SamplerError::NonFinite)
        );
        assert_eq!(
            s.sample(&[0.0; 3]),
            Err(SamplerError::LogitCount {
                expected: 4,
                got: 3
            })
        );
        let banned = SamplerParams {
            logit_bias: Vec::clone(&all_banned),
            ..params
        };
        assert_eq!(
            Sampler::new(&banned, 4).unwrap().sample(&[0.0; 4]),
            Err(SamplerError::NonFinite)
        );
    }
}

#[test]
fn unusable_settings_are_refused() {
    let d = SamplerParams::default;
    for (params, name) in [
        (
            SamplerParams {
                temperature: f32::NAN,
                ..d()
            },
            "temperature",
        ),
        (
            SamplerParams {
                temperature: -1.0,
                ..d()
            },
            "temperature",
        ),
        (
            SamplerParams {
                temperature: 1e-9,
                ..d()
            },
            "temperature",
        ),
        (
            SamplerParams {
                temperature: f32::INFINITY,
                ..d()
            },
            "temperature",
        ),
        (SamplerParams { top_p: 1.5, ..d() }, "top_p"),
        (
            SamplerParams {
                top_p: f32::NAN,
                ..d()
            },
            "top_p",
        ),
        (SamplerParams { min_p: -0.1, ..d() }, "min_p"),
        (
            SamplerParams {
                repeat_penalty: 0.0,
                ..d()
            },
            "repeat_penalty",
        ),
        (
            SamplerParams {
                repeat_last_n: u32::MAX,
                ..d()
            },
            "repeat_last_n",
        ),
        (
            SamplerParams {
                frequency_penalty: f32::NAN,
                ..d()
            },
            "frequency_penalty",
        ),
        (
            SamplerParams {
                presence_penalty: f32::INFINITY,
                ..d()
            },
            "presence_penalty",
        ),
        (
            SamplerParams {
                logit_bias: vec![(0, f32::INFINITY)],
                ..d()
            },
            "logit_bias",
        ),
        (
            SamplerParams {
                logit_bias: vec![(0, f32::NAN)],
                ..d()
            },
            "logit_bias",
        ),
    ] {
        match Sampler::new(&params, V) {
            Err(SamplerError::OutOfRange { name: got, .. }) => assert_eq!(got, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    for id in [-1, V as i32] {
        let params = SamplerParams {
            logit_bias: vec![(id, 1.0)],
            ..d()
        };
        assert_eq!(
            params.validate(V),
            Err(SamplerError::BiasToken { id, n_vocab: V })
        );
    }
    assert_eq!(
        SamplerParams {
            seed: Some(u32::MAX),
            ..d()
        }
        .validate(V),
        Err(SamplerError::ReservedSeed)
    );
    assert_eq!(d().validate(0), Err(SamplerError::VocabSize { n_vocab: 0 }));
    assert_eq!(d().validate(V), Ok(()));
}
