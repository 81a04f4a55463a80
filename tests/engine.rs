//! Many users at once: each gets what it would have got alone, whatever the others do.

use ggraft::adapter::{Matrix, Parts, Payload, PrefixLayer};
use ggraft::infer::engine::{
    Engine, EngineError, EngineOptions, Event, Request, RequestId, Scheduler, WhenFull,
};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{
    Combine, Ensemble, ExistingText, GenerateOptions, Generated, KvType, SessionError, StopReason,
};
use ggraft::{Adapter, Error, Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::adapters;
use ggraft_testkit::bases::{Base, Random};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf");
    Model::open(path, &ModelOptions::default()).unwrap()
});

fn options() -> EngineOptions {
    let mut options = EngineOptions::default();
    (options.n_ctx, options.n_threads) = (Some(512), Some(1));
    options
}

/// Draws from a seed, so that every bit of the logits counts; the bits of probabilities come along.
fn drawn(n: usize, seed: u32) -> GenerateOptions {
    let mut generate = GenerateOptions::default().max_tokens(n).logprobs(2);
    generate.sampler = SamplerParams {
        seed: Some(seed),
        ..SamplerParams::default()
    };
    generate.ignore_eog = true;
    generate
}

/// Steps until nothing is left to do: what became of each request.
fn run(scheduler: &mut Scheduler) -> BTreeMap<RequestId, Result<Generated, Error>> {
    let mut ends = BTreeMap::new();
    let mut texts: BTreeMap<RequestId, String> = BTreeMap::new();
    for step in 0.. {
        assert!(step < 100_000, "it ends");
        if scheduler.is_idle() {
            break;
        }
        for (id, event) in scheduler.step() {
            match event {
                Event::Text(piece) => *texts.entry(id).or_default() += &piece,
                Event::Done(out) => {
                    assert_eq!(texts.remove(&id).unwrap_or_default(), out.text);
                    ends.insert(id, Ok(out));
                }
                Event::Failed(e) => drop(ends.insert(id, Err(e))),
                _ => unreachable!(),
            }
        }
    }
    ends
}

/// What it says, apart from how long it took.
fn said(out: &Generated) -> Generated {
    Generated {
        timings: Default::default(),
        ..out.clone()
    }
}

/// The answer of an engine that has nothing else to do.
fn alone(model: &Model, options: &EngineOptions, request: &Request) -> Generated {
    let mut options = options.clone();
    (options.kv_bytes, options.prefix_bytes, options.n_batch) = (None, 0, 512);
    let mut scheduler = Scheduler::new(model, &options).unwrap();
    let id = scheduler.submit(request.clone()).unwrap();
    said(&run(&mut scheduler).remove(&id).unwrap().unwrap())
}

/// Of every architecture a fixture, and the embedded models.
fn bases() -> Vec<Base> {
    let dir = tempfile::tempdir().unwrap();
    let mut bases = ggraft_testkit::bases::bases(dir.path(), &ModelOptions::default());
    for name in ["tinylm-f16", "tinylm-q4_k_m", "tinylm-q8_0"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("models/{name}.gguf"));
        let model = Model::open(path, &ModelOptions::default()).unwrap();
        bases.push(Base::new(name, model, false));
    }
    bases
}

/// One adapter or none, or sometimes several that speak together.
fn ensemble(r: &mut Random, base: &Base) -> Ensemble {
    if r.below(3) > 0 {
        return Ensemble::of_one(r.one(&base.adapters));
    }
    let members: Vec<_> = (0..2 + r.below(2)).map(|_| r.one(&base.adapters)).collect();
    let weights: Vec<_> = members.iter().map(|_| 1.0 + r.below(3) as f32).collect();
    let combine = r.one(&Combine::ALL);
    let ensemble = Ensemble::new(members, combine).unwrap();
    ensemble.weights(&weights).unwrap()
}

/// Requests that come, are cancelled, preempted and helped by what others left behind, in any order; each answer has the bits of the
/// one that it would have got alone.
fn schedule(base: &Base, seed: u64) -> Result<[usize; 3], String> {
    let mut random = Random::new(seed);
    let r = &mut random;
    let trained = Session::new(&base.model, &SessionOptions::default()).unwrap();
    let n_ctx = 220.min(trained.n_ctx());
    let kv_types = [KvType::F16, KvType::F32, KvType::Q8_0];
    let mut options = options();
    options.n_ctx = Some(n_ctx);
    options.n_threads = Some(1 + r.below(4));
    options.kv_type = kv_types[r.below(3)];
    options.n_batch = 1 + r.below(100);
    let beside = 1 + r.below(20);
    options.n_batch_beside = r.one(&[None, Some(beside)]);
    options.max_running = 1 + r.below(6);
    options.prefix_bytes = r.one(&[0, 20_000, 1 << 30]);
    if Scheduler::new(&base.model, &options).is_err() {
        // Heads that are no whole blocks.
        options.kv_type = KvType::F16;
    }
    // A page or a few more than one text takes, or as much as there is.
    let probe = Scheduler::new(&base.model, &options).map_err(|e| e.to_string())?;
    let page = probe.page_bytes();
    let some = (4 + r.below(4)) * page;
    options.kv_bytes = r.one(&[None, Some(some)]);
    let mut scheduler = Scheduler::new(&base.model, &options).map_err(|e| e.to_string())?;
    // Beginnings that several share.
    let text = |r: &mut Random, n| r.tokens(&base.model, n);
    let beginnings = [text(r, 70), text(r, 130), Vec::new()];
    let mut requests = BTreeMap::new();
    let mut ends = BTreeMap::new();
    let (n, mut cancelled) = (3 + r.below(6), 0);
    let mut submitted = 0;
    for step in 0.. {
        if step > 20_000 {
            return Err("it does not end".into());
        }
        if submitted < n && (r.below(3) == 0 || scheduler.is_idle()) {
            let mut prompt = r.one(&beginnings);
            let own = 1 + r.below(40);
            prompt.extend(text(r, own));
            let generate = drawn(1 + r.below(30), r.below(1000) as u32);
            let mut request = Request::tokens(prompt).generate(generate);
            request.ensemble = ensemble(r, base);
            request.priority = r.below(3) as i32;
            if r.below(4) == 0 {
                let own = 1 + r.below(50);
                request = request.answer(text(r, own));
            }
            let answers = 1 + r.below(3) / 2;
            match scheduler.fork(request.clone(), answers) {
                Ok(ids) => {
                    for (i, id) in ids.into_iter().enumerate() {
                        let mut request = request.clone();
                        *request.generate.sampler.seed.as_mut().unwrap() += i as u32;
                        requests.insert(id, request);
                    }
                }
                Err(Error::Session(SessionError::ContextFull { .. })) => {}
                Err(Error::Engine(
                    EngineError::TooLarge { .. } | EngineError::TooManyMembers { .. },
                )) => {}
                Err(e) => return Err(e.to_string()),
            }
            submitted += 1;
        }
        if scheduler.is_idle() && submitted == n {
            break;
        }
        if r.below(40) == 0 && !requests.is_empty() {
            let ids: Vec<_> = requests.keys().copied().collect();
            let id = r.one(&ids);
            scheduler.cancel(id);
            if !ends.contains_key(&id) {
                requests.remove(&id);
                cancelled += 1;
            }
        }
        for (id, event) in scheduler.step() {
            match event {
                Event::Text(_) => {}
                Event::Done(out) => drop(ends.insert(id, said(&out))),
                Event::Failed(e) => return Err(format!("{id:?} failed: {e}")),
                _ => unreachable!(),
            }
        }
    }
    let mut prompts = 0;
    for (id, request) in &requests {
        let got = ends.get(id).ok_or(format!("nothing of {id:?}"))?;
        let want = alone(&base.model, &options, request);
        prompts += want.tokens.len();
        if *got != want {
            return Err(format!("{id:?}, {request:?}: {got:?} instead of {want:?}"));
        }
    }
    Ok([requests.len(), cancelled, prompts])
}

#[test]
fn everybody_gets_what_they_would_have_got_alone() {
    const SCHEDULES: usize = 240;
    let bases = bases();
    assert!(bases.len() > 10);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let totals = std::sync::Mutex::new([0; 3]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if i >= SCHEDULES {
                        break;
                    }
                    let base = &bases[i % bases.len()];
                    let counts = schedule(base, i as u64)
                        .unwrap_or_else(|e| panic!("schedule {i}, {}: {e}", base.name));
                    let mut totals = totals.lock().unwrap();
                    totals.iter_mut().zip(counts).for_each(|(t, n)| *t += n);
                }
            });
        }
    });
    let [requests, cancelled, tokens] = totals.into_inner().unwrap();
    assert!(requests > 2 * SCHEDULES && cancelled > SCHEDULES / 10 && tokens > 10 * SCHEDULES);
}

/// The engine's answer is a session's, token by token.
#[test]
fn a_session_says_the_same() {
    let adapter = adapters::prefix(&MODEL, 5, 1);
    let greedy = GenerateOptions::default()
        .sampler(SamplerParams::greedy())
        .max_tokens(30);
    let model = Model::open(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinylm-q8_0.gguf"),
        &ModelOptions::default().kernels(Kernels::Own),
    )
    .unwrap();
    for adapter in [None, Some(&adapter)] {
        let options = SessionOptions::default().n_ctx(256).n_threads(1);
        let mut session = Session::new(&model, &options).unwrap();
        let mut request = Request::text("The rain has not stopped").generate(greedy.clone());
        if let Some(adapter) = adapter {
            session.attach(adapter, ExistingText::Drop).unwrap();
            request = request.adapter(adapter);
        }
        session.prompt("The rain has not stopped").unwrap();
        let want = session
            .generate(&greedy, |_| std::ops::ControlFlow::Continue(()))
            .unwrap();
        let got = alone(&model, &self::options(), &request);
        assert_eq!((&got.text, &got.tokens), (&want.text, &want.tokens));
        assert_eq!(got.reason, want.reason);
    }
}

#[test]
fn beginnings_in_common_are_computed_once_and_never_across_adapters() {
    let (a, b) = (
        adapters::prefix(&MODEL, 5, 1),
        adapters::prefix(&MODEL, 5, 2),
    );
    let mut scheduler = Scheduler::new(&MODEL, &options()).unwrap();
    let system: Vec<i32> = (0..150).map(|i| i * 7 % 200 + 20).collect();
    let computed = |scheduler: &mut Scheduler, adapter: Option<&Adapter>, own: i32| {
        let mut prompt = system.clone();
        prompt.extend([own, own + 1]);
        let mut request = Request::tokens(prompt).generate(drawn(3, 1));
        request.ensemble = Ensemble::of_one(adapter.cloned());
        let before = scheduler.positions_computed();
        let id = scheduler.submit(request.clone()).unwrap();
        let got = run(scheduler).remove(&id).unwrap().unwrap();
        assert_eq!(said(&got), alone(&MODEL, &options(), &request));
        scheduler.positions_computed() - before
    };
    let bos = usize::from(MODEL.vocab().leading_bos().is_some());
    for adapter in [None, Some(&a), Some(&b)] {
        // Its own two tokens, and all but the last one of the answer.
        assert_eq!(computed(&mut scheduler, adapter, 30), bos + 150 + 2 + 2);
        assert_eq!(computed(&mut scheduler, adapter, 50), 2 + 2);
        // All but the last token are known.
        assert_eq!(computed(&mut scheduler, adapter, 50), 1 + 2);
    }
    // Nobody needs it any more, so it may go.
    let mut forgetful = options();
    forgetful.prefix_bytes = 0;
    let mut scheduler = Scheduler::new(&MODEL, &forgetful).unwrap();
    for _ in 0..2 {
        assert_eq!(computed(&mut scheduler, None, 30), bos + 150 + 2 + 2);
        assert_eq!(scheduler.kv_bytes(), 0);
    }
}

/// Of those who come at the same time with the same beginning one computes it.
#[test]
fn a_beginning_that_is_being_computed_is_waited_for() {
    let mut scheduler = Scheduler::new(&MODEL, &options()).unwrap();
    let requests: Vec<_> = (0..10)
        .map(|i| {
            let mut prompt: Vec<i32> = (0..150).map(|i| i * 7 % 200 + 20).collect();
            prompt.push(100 + i);
            Request::tokens(prompt).generate(drawn(4, i as u32))
        })
        .collect();
    let ids: Vec<_> = (requests.iter())
        .map(|r| scheduler.submit(r.clone()).unwrap())
        .collect();
    let ends = run(&mut scheduler);
    for (id, request) in ids.iter().zip(&requests) {
        let got = said(ends[id].as_ref().unwrap());
        assert_eq!(got, alone(&MODEL, &options(), request));
    }
    let bos = usize::from(MODEL.vocab().leading_bos().is_some());
    assert_eq!(scheduler.positions_computed(), bos + 150 + 10 + 10 * 3);
}

/// Each token's logits in a session.
fn session_logits(member: Option<&Adapter>, prompt: &[i32], then: &[i32]) -> Vec<Vec<f32>> {
    let options = SessionOptions::default().n_ctx(256).n_threads(1);
    let mut session = Session::new(&MODEL, &options).unwrap();
    if let Some(adapter) = member {
        session.attach(adapter, ExistingText::Drop).unwrap();
    }
    session.prompt_tokens(prompt).unwrap();
    let mut rows = vec![session.logits().unwrap().to_vec()];
    let fed = &then[..then.len() - 1];
    session
        .feed_with_logits(fed, |_, row| rows.push(row.to_vec()))
        .unwrap();
    rows
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |&z: &f32| f64::from(z - max).exp();
    let log_sum = row.iter().map(exp).sum::<f64>().ln() + f64::from(max);
    row.iter().map(|&z| f64::from(z) - log_sum).collect()
}

/// Members of all kinds, with positions of their own; what they say together is what their sessions' logits give by the formulas.
#[test]
fn given_answers_are_as_likely_as_the_members_say_together() {
    let members = [
        None,
        Some(adapters::prefix(&MODEL, 9, 2)),
        Some(adapters::prompt(&MODEL, 4, 3)),
        Some(adapters::p_tuning(&MODEL, "{v:2}{prompt}{v:3}", 5, 4)),
    ];
    let weights = [1.0, 2.0, 0.5, 1.5];
    let prompt: Vec<i32> = (0..70).map(|i| i * 11 % 300 + 20).collect();
    let then: Vec<i32> = (0..90).map(|i| i * 13 % 300 + 20).collect();
    let rows = members
        .each_ref()
        .map(|m| session_logits(m.as_ref(), &prompt, &then));
    let mut few = options();
    // Logits of many steps, in which members come to different places.
    few.n_batch = 23;
    for combine in Combine::ALL {
        let ensemble = Ensemble::new(members.clone(), combine).unwrap();
        let ensemble = ensemble.weights(&weights.map(|w| w as f32)).unwrap();
        let request = Request::tokens(prompt.clone())
            .ensemble(&ensemble)
            .generate(GenerateOptions::default().logprobs(1))
            .answer(then.clone());
        let mut scheduler = Scheduler::new(&MODEL, &few).unwrap();
        let id = scheduler.submit(request).unwrap();
        let out = run(&mut scheduler).remove(&id).unwrap().unwrap();
        assert_eq!((&out.tokens, out.logprobs.len()), (&then, then.len()));
        for (i, (&id, got)) in then.iter().zip(&out.logprobs).enumerate() {
            let p = rows.each_ref().map(|rows| log_softmax(&rows[i]));
            let of = |v: usize| match combine {
                Combine::MeanProb => (0..4).map(|m| weights[m] * p[m][v].exp()).sum::<f64>().ln(),
                Combine::MeanLogit => (0..4).map(|m| weights[m] / 5.0 * p[m][v]).sum(),
                Combine::Product => (0..4).map(|m| weights[m] * p[m][v]).sum(),
                Combine::Vote => {
                    let first = |m: usize| {
                        (1..p[m].len()).fold(0, |b, i| if p[m][i] > p[m][b] { i } else { b })
                    };
                    let votes = (0..4).filter(|&m| first(m) == v).map(|m| weights[m]);
                    votes.sum::<f64>().ln()
                }
            };
            let all: Vec<f64> = (0..p[0].len()).map(of).collect();
            let sum = all.iter().map(|z| z.exp()).sum::<f64>().ln();
            let want = all[id as usize] - sum;
            let near = |got: f32, want: f64| {
                f64::from(got) == want || (f64::from(got) - want).abs() < 2e-3 * want.abs().max(1.0)
            };
            assert!(
                near(got.logprob, want),
                "{combine:?} {i}: {} {want}",
                got.logprob
            );
            let (best, logprob) = got.top[0];
            assert!(near(logprob, all[best as usize] - sum));
            assert!(all.iter().all(|&z| z <= all[best as usize] + 1e-3));
        }
    }
}

#[test]
fn answers_to_one_prompt_compute_it_once() {
    let mut scheduler = Scheduler::new(&MODEL, &options()).unwrap();
    let prompt: Vec<i32> = (0..30).map(|i| i * 7 % 200 + 20).collect();
    let request = Request::tokens(prompt).generate(drawn(5, 7));
    let ids = scheduler.fork(request.clone(), 4).unwrap();
    let ends = run(&mut scheduler);
    let mut texts = std::collections::BTreeSet::new();
    for (i, id) in ids.iter().enumerate() {
        let mut request = request.clone();
        request.generate.sampler.seed = Some(7 + i as u32);
        let got = said(ends[id].as_ref().unwrap());
        assert_eq!(got, alone(&MODEL, &options(), &request));
        texts.insert(got.text);
    }
    assert!(texts.len() > 1, "{texts:?}");
    let bos = usize::from(MODEL.vocab().leading_bos().is_some());
    // The last token of the prompt once for each, whose logits are its own.
    assert_eq!(scheduler.positions_computed(), bos + 30 + 3 + 4 * 4);
    // All or none, and nothing is none.
    let mut few = options();
    few.max_waiting = 3;
    let mut scheduler = Scheduler::new(&MODEL, &few).unwrap();
    let busy = scheduler.fork(request.clone(), 4).unwrap_err();
    assert!(matches!(
        busy,
        Error::Engine(EngineError::Busy { waiting: 0 })
    ));
    assert!(scheduler.is_idle() && scheduler.fork(request, 0).unwrap().is_empty());
}

/// Wakes a thread that waits for it.
struct Unpark(std::thread::Thread);

impl std::task::Wake for Unpark {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.unpark();
    }
}

/// All that a stream gives, on this thread.
fn collect<T>(mut stream: impl futures_core::Stream<Item = T> + Unpin) -> Vec<T> {
    use std::task::{Context, Poll, Waker};
    let waker = Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut items = Vec::new();
    loop {
        match std::pin::Pin::new(&mut stream).poll_next(&mut context) {
            Poll::Ready(Some(item)) => items.push(item),
            Poll::Ready(None) => return items,
            // Nobody else wakes it: it stops here for ever if the engine forgets to.
            Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn replies_are_streams() {
    let engine = Engine::new(&MODEL, &options()).unwrap();
    let request = Request::tokens(vec![30; 20]).generate(drawn(12, 5));
    let want = alone(&MODEL, &options(), &request);
    let mut replies = engine.fork(request.clone(), 2).unwrap();
    let second = replies.pop().unwrap();
    let mut first = replies.pop().unwrap();
    let pieces: Vec<String> = collect(&mut first)
        .into_iter()
        .map(|p| p.unwrap())
        .collect();
    assert_eq!(pieces.concat(), want.text);
    assert_eq!(said(&first.take_end().unwrap()), want);
    let pieces = collect(second);
    assert!(!pieces.is_empty() && pieces.into_iter().all(|piece| piece.is_ok()));
    // Those who wait for an engine that goes are woken.
    let long = request.generate(drawn(400, 5));
    let reply = engine.submit(long).unwrap();
    let waits = std::thread::spawn(move || collect(reply));
    std::thread::sleep(Duration::from_millis(20));
    drop(engine);
    let last = waits.join().unwrap().pop().unwrap();
    assert!(
        matches!(last, Err(Error::Engine(EngineError::Ended))),
        "{last:?}"
    );
}

#[test]
fn a_full_context_ends_an_answer() {
    let mut small = options();
    small.n_ctx = Some(40);
    let mut scheduler = Scheduler::new(&MODEL, &small).unwrap();
    let bos = usize::from(MODEL.vocab().leading_bos().is_some());
    let request = |n| Request::tokens(vec![30; n]);
    for (request, needed) in [
        (request(30).generate(drawn(50, 1)).until_full(true), None),
        (
            request(41).generate(drawn(50, 1)).until_full(true),
            Some(bos + 41),
        ),
        (request(30).generate(drawn(50, 1)), Some(bos + 79)),
        (request(30).answer(vec![31; 12]), Some(bos + 41)),
        (
            request(30).answer(vec![31; 12]).until_full(true),
            Some(bos + 41),
        ),
    ] {
        match (scheduler.submit(request), needed) {
            (Ok(id), None) => {
                let out = run(&mut scheduler).remove(&id).unwrap().unwrap();
                // The last token has no place any more, and needs none.
                let room = 40 - bos - 30 + 1;
                assert_eq!(
                    (out.tokens.len(), out.reason),
                    (room, StopReason::ContextFull)
                );
            }
            (Err(Error::Session(SessionError::ContextFull { needed, .. })), Some(want)) => {
                assert_eq!(needed, want);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A token that is raised stops a step; nothing of it counts.
#[test]
fn a_cancelled_step_has_not_been() {
    let mut scheduler = Scheduler::new(&MODEL, &options()).unwrap();
    let request = Request::tokens(vec![30; 100]).generate(drawn(9, 3));
    let id = scheduler.submit(request.clone()).unwrap();
    let token = scheduler.cancel_token();
    let mut ends = BTreeMap::new();
    for i in 0.. {
        assert!(i < 100);
        if i % 2 == 0 {
            token.cancel();
            assert!(scheduler.step().is_empty());
            token.reset();
        }
        for (id, event) in scheduler.step() {
            if let Event::Done(out) = event {
                ends.insert(id, said(&out));
            }
        }
        if scheduler.is_idle() {
            break;
        }
    }
    assert_eq!(ends[&id], alone(&MODEL, &options(), &request));
    // What there is of an answer that is broken off.
    let id = scheduler.submit(request.clone()).unwrap();
    (0..4).for_each(|_| drop(scheduler.step()));
    let some = scheduler.cancel(id).unwrap();
    assert!(
        ends.into_values()
            .next()
            .unwrap()
            .tokens
            .starts_with(&some.tokens)
    );
    assert_eq!((some.tokens.len(), some.reason), (4, StopReason::Callback));
    assert!(scheduler.cancel(id).is_none() && scheduler.is_idle());
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let mut few = options();
    few.max_waiting = 2;
    let mut scheduler = Scheduler::new(&MODEL, &few).unwrap();
    let refused = |r: Request, scheduler: &mut Scheduler| scheduler.submit(r).unwrap_err();
    let request = |n: usize, m| Request::tokens(vec![30; n]).generate(drawn(m, 1));
    let bos = usize::from(MODEL.vocab().leading_bos().is_some());
    let full = refused(request(500, 100), &mut scheduler);
    let needed = bos + 599;
    assert!(
        matches!(full, Error::Session(SessionError::ContextFull { needed: n, n_ctx: 512 }) if n == needed)
    );
    let outside = refused(Request::tokens(vec![1 << 30]), &mut scheduler);
    assert!(matches!(
        outside,
        Error::Session(SessionError::TokenOutOfRange { .. })
    ));
    let stop = GenerateOptions::default().stop("");
    let stop = refused(request(3, 1).generate(stop), &mut scheduler);
    assert!(matches!(stop, Error::Stop(_)));
    if bos == 0 {
        let empty = refused(Request::tokens(vec![]), &mut scheduler);
        assert!(matches!(empty, Error::Session(SessionError::EmptyPrompt)));
    }
    let crowd = Ensemble::new(vec![None; 65], Combine::Vote).unwrap();
    let crowd = refused(request(3, 1).ensemble(&crowd), &mut scheduler);
    assert!(matches!(
        crowd,
        Error::Engine(EngineError::TooManyMembers {
            members: 65,
            most: 64
        })
    ));
    scheduler.submit(request(3, 2)).unwrap();
    let second = scheduler.submit(request(3, 2)).unwrap();
    let busy = refused(request(3, 2), &mut scheduler);
    assert!(matches!(
        busy,
        Error::Engine(EngineError::Busy { waiting: 2 })
    ));
    // Refusals leave no trace.
    assert!(run(&mut scheduler)[&second].is_ok());

    let mut small = options();
    small.kv_bytes = Some(2 * scheduler.page_bytes());
    let mut scheduler = Scheduler::new(&MODEL, &small).unwrap();
    let large = refused(request(200, 1), &mut scheduler);
    assert!(
        matches!(large, Error::Engine(EngineError::TooLarge { needed, limit }) if needed == 2 * limit)
    );
    scheduler.submit(request(100, 20)).unwrap();
    assert!(run(&mut scheduler).values().all(Result::is_ok));

    let late = request(3, 100).deadline(Instant::now());
    let id = scheduler.submit(late).unwrap();
    let ends = run(&mut scheduler);
    assert!(matches!(ends[&id], Err(Error::Engine(EngineError::Late))));
}

#[test]
fn who_is_refused_for_memory_is_the_youngest_and_the_others_notice_nothing() {
    let page = Scheduler::new(&MODEL, &options()).unwrap().page_bytes();
    let mut refusing = options();
    refusing.kv_bytes = Some(3 * page);
    refusing.when_full = WhenFull::Refuse;
    let mut scheduler = Scheduler::new(&MODEL, &refusing).unwrap();
    // Each begins with a page and needs two in the end.
    let request = |i| Request::tokens(vec![30 + i; 40]).generate(drawn(60, i as u32));
    let ids: Vec<_> = (0..2)
        .map(|i| scheduler.submit(request(i)).unwrap())
        .collect();
    let third = scheduler.submit(request(2)).unwrap();
    let ends = run(&mut scheduler);
    let got = said(ends[&ids[0]].as_ref().unwrap());
    assert_eq!(got, alone(&MODEL, &options(), &request(0)));
    let failed = |id| matches!(ends[id], Err(Error::Engine(EngineError::OutOfPages)));
    assert!(failed(&third) && (failed(&ids[1]) || ends[&ids[1]].is_ok()));
    assert!(scheduler.kv_bytes() <= 3 * page);
}

/// Rows that the cache's type cannot hold make one answer fail, and no other.
#[test]
fn numbers_that_are_none_stay_with_their_user() {
    let shape = MODEL.shape();
    let rows = |il| Matrix::from_f32(shape.kv_width(il), vec![1e30; shape.kv_width(il)]).unwrap();
    let layers = (0..shape.n_layer).map(|il| PrefixLayer {
        k: rows(il),
        v: rows(il),
    });
    let bad = Adapter::new(Parts {
        payload: Payload::Prefix {
            layers: layers.collect(),
        },
        ..adapters::prefix(&MODEL, 1, 1).parts().clone()
    });
    let mut scheduler = Scheduler::new(&MODEL, &options()).unwrap();
    let good = Request::tokens(vec![30; 10]).generate(drawn(20, 1));
    let ids = [
        good.clone(),
        good.clone().adapter(&bad.unwrap()),
        good.clone(),
    ]
    .map(|request| scheduler.submit(request).unwrap());
    let ends = run(&mut scheduler);
    let failed = Error::Session(SessionError::NonFiniteLogits).to_string();
    assert_eq!(ends[&ids[1]].as_ref().unwrap_err().to_string(), failed);
    for id in [ids[0], ids[2]] {
        let got = said(ends[&id].as_ref().unwrap());
        assert_eq!(got, alone(&MODEL, &options(), &good));
    }
}

#[test]
fn an_engine_serves_threads_and_forgets_who_has_gone() {
    let engine = Engine::new(&MODEL, &options()).unwrap();
    let adapter = adapters::prefix(&MODEL, 5, 1);
    let request = |i: usize| {
        let mut request =
            Request::text(format!("Once there were {i}")).generate(drawn(20, i as u32));
        request.ensemble = Ensemble::of_one(i.is_multiple_of(2).then(|| adapter.clone()));
        request
    };
    std::thread::scope(|scope| {
        for i in 0..6 {
            let (engine, request) = (&engine, &request);
            scope.spawn(move || {
                let got = said(&engine.submit(request(i)).unwrap().wait().unwrap());
                assert_eq!(got, alone(&MODEL, &options(), &request(i)));
            });
        }
        // Others come and go.
        for i in 0..200 {
            drop(engine.submit(request(i % 7)));
        }
    });
    let mut reply = engine.submit(request(1)).unwrap();
    let mut text = String::new();
    let out = loop {
        match reply.poll() {
            Some(Event::Text(piece)) => text += &piece,
            Some(Event::Done(out)) => break out,
            Some(other) => panic!("{other:?}"),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    assert_eq!((out.text, out.reason), (text, StopReason::MaxTokens));
    assert!(reply.poll().is_none());
    // An engine that ends leaves nobody waiting.
    let long: Vec<_> = (0..3)
        .map(|i| {
            engine
                .submit(Request::text("So").generate(drawn(400, i)))
                .unwrap()
        })
        .collect();
    drop(engine);
    for reply in long {
        let end = reply.wait();
        assert!(matches!(
            end,
            Err(Error::Engine(EngineError::Ended)) | Ok(_)
        ));
    }
}

/// Users who come and go for `GGRAFT_SOAK_SECONDS` (2; `scripts/soak.sh`: ten minutes), 64 at a time: no error, no wrong answer, no memory that grows.
#[test]
fn many_users_for_a_while() {
    let seconds = std::env::var("GGRAFT_SOAK_SECONDS").map_or(2, |s| s.parse().expect("seconds"));
    let kinds = if seconds > 60 { 64 } else { 16 };
    let mut options = options();
    options.n_threads = Some(2);
    options.kv_bytes = Some(40 * Scheduler::new(&MODEL, &options).unwrap().page_bytes());
    let base = Base::new("tinylm-q8_0", MODEL.clone(), false);
    let mut random = Random::new(7);
    let kinds: Vec<_> = (0..kinds)
        .map(|i| {
            let r = &mut random;
            let n_vocab = MODEL.shape().n_vocab;
            // Some begin with the same.
            let mut prompt: Vec<i32> = (0..[0, 40, 150][i % 3]).map(|i| i * 7 % 200 + 20).collect();
            prompt.extend((0..1 + r.below(40)).map(|_| r.below(n_vocab) as i32));
            let mut request = Request::tokens(prompt).generate(drawn(1 + r.below(40), i as u32));
            request.ensemble = ensemble(r, &base);
            let want = alone(&MODEL, &self::options(), &request);
            (request, want)
        })
        .collect();
    let engine = Engine::new(&MODEL, &options).unwrap();
    let (start, length) = (Instant::now(), Duration::from_secs(seconds));
    let resident = || ggraft_testkit::process_size("RssAnon").unwrap_or(0);
    let (served, warm) = (
        std::sync::atomic::AtomicUsize::new(0),
        std::sync::atomic::AtomicU64::new(0),
    );
    std::thread::scope(|scope| {
        for user in 0..64 {
            let (engine, kinds, served, warm) = (&engine, &kinds, &served, &warm);
            scope.spawn(move || {
                let mut random = Random::new(user as u64);
                let mut own = 0;
                // Also on a machine that is busy everybody gets an answer.
                while start.elapsed() < length || own == 0 {
                    let (request, want) = &kinds[random.below(kinds.len())];
                    let mut reply = engine.submit(request.clone()).unwrap();
                    if random.below(5) == 0 {
                        // Who does not wait for the end.
                        let _ = reply.next();
                        continue;
                    }
                    assert_eq!(said(&reply.wait().unwrap()), *want);
                    own += 1;
                    served.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if start.elapsed() > length / 3 {
                        warm.fetch_max(
                            if start.elapsed() < length / 2 {
                                resident()
                            } else {
                                0
                            },
                            std::sync::atomic::Ordering::Relaxed,
                        );
                    }
                }
            });
        }
    });
    let (served, warm, end) = (served.into_inner(), warm.into_inner(), resident());
    eprintln!("{served} answers, {warm} bytes resident after a third, {end} in the end");
    assert!(served >= 64);
    // Of a short run other tests take a part, and of a system that does not say there is nothing to compare.
    if seconds > 60 && warm > 0 {
        assert!(end < warm + warm / 10, "{warm} bytes, then {end}");
    }
}
