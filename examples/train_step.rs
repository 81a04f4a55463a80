//! Scratch: time of a step.
use ggraft::adapter::AdapterKind;
use ggraft::train::data::Example;
use ggraft::train::*;
use ggraft::{Model, ModelOptions};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let model = Model::open(&a[1], &ModelOptions::default()).unwrap();
    let t: usize = a[2].parse().unwrap();
    let last: usize = a[3].parse().unwrap();
    let mem: Option<u64> = a.get(4).map(|m| m.parse::<u64>().unwrap() << 20);
    let mut o = TrainOptions::new(AdapterKind::Prefix);
    o.init = Some(Init::Random);
    o.memory = mem;
    o.batch = 1;
    o.steps = Some(4);
    let ids: Vec<i32> = (0..t).map(|i| ((i * 7919) % 1000) as i32 + 3).collect();
    let e = Example {
        given: vec![],
        then: ids
            .iter()
            .enumerate()
            .map(|(i, &id)| (id, i >= t - last))
            .collect(),
        weight: 1.0,
        bos: false,
    };
    let mut tr = Trainer::new(&model, o, vec![e], vec![]).unwrap();
    while let Some(r) = tr.step().unwrap() {
        println!(
            "step {} loss {:.5} gn {:.9} {:.2} s {:.1} tok/s",
            r.step,
            r.loss,
            r.grad_norm,
            r.seconds,
            t as f64 / r.seconds
        );
    }
    println!("recomputed {}", tr.summary().recomputed_layers);
    for l in std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
    {
        if l.starts_with("VmHWM") || l.starts_with("RssAnon") || l.starts_with("RssFile") {
            println!("{l}");
        }
    }
}
