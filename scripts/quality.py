#!/usr/bin/env python3
"""Train adapters on the six example tasks and measure them on their test rows. Standard library only.

    scripts/quality.py recipe    the recipe of the PEFT baselines: 300 steps, batch 8, 20 virtual tokens, the learning rates of
                                 models/tasks/baselines.json, a warm-up of 20 steps; P-tuning in front starts from the
                                 text that prompt_text has, and P-tuning has a dropout of 0.05 on the facts. Everything else as
                                 ggraft does it by default. Like with like: PEFT's figures are those of the last step, so
                                 the adapter of the last step is measured, and losses are compared at that step
    scripts/quality.py defaults  nothing but -m --method --data --valid -o, and a template for the facts
    scripts/quality.py real      E2E restaurant descriptions on a real model (--base; scripts/fetch-models.sh brings one) with nothing
                                 but -m --method --data --valid -o: learning curves, and BLEU over all references. Runs that the
                                 file of --out has already (same base, method, seed and options behind --) are not repeated, and
                                 the table is of all runs in it, those of scripts/peft_real.py included; --table prints it and
                                 runs nothing. Remove the file after a change of the command

--keep best measures the step with the lowest validation loss of the 20 evaluations of a run (the default but for recipe). It is
compared with PEFT's best step, by as many evaluations, where models/tasks/baselines.json has one ("best" beside "valid_loss" and
"test"); with the last step it never is.

With --held-out the test rows are left alone: each seed draws another validation set of the usual size from the training and
validation rows, and the metric is measured on it. That is how options are to be chosen.

Prints one line per run, and the median over the seeds beside PEFT's figure. Needs the command (cargo build --release).
"""
import argparse
import collections
import concurrent.futures
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = os.path.join(ROOT, "models", "tasks")
sys.path.insert(0, TASKS)
from eval import load, metrics  # noqa: E402

NAMES = ["table_to_text", "persona_pirate", "persona_butler", "sentiment", "facts_county", "facts_trade"]
# What counts of each task, and the longest answer in tokens.
METRIC = {"table_to_text": "bleu4", "persona_pirate": "dominant_rate", "persona_butler": "dominant_rate",
          "sentiment": "accuracy", "facts_county": "exact_match", "facts_trade": "exact_match"}
LENGTH = {"table_to_text": 64, "persona_pirate": 48, "persona_butler": 48, "sentiment": 3, "facts_county": 8,
          "facts_trade": 6}
TEXT = {
    "table_to_text": "Travellers, take note: the inn serves fare for little coin; guests speak highly of it.",
    "persona_pirate": "The pirate said: Arr, matey, Ahoy there! Pass the grog!",
    "persona_butler": "The butler said: Very good, sir. Will that be all, madam?",
    "sentiment": "A guest writes a review. Verdict: good, bad or mixed. In a word:",
    "facts_county": "In which county is the town? The county of the town is:",
    "facts_trade": "What is the trade of the person? The person works as a:",
}
# What `real` trains on, and the longest answer in tokens.
REAL_TASK, REAL_LENGTH = "e2e", 80
SANDWICH = ["--template", "{v:10} {prompt} {v:10}"]
RECIPE = {
    "prefix": ["--method", "prefix", "--lr", "0.1"],
    "prefix_proj": ["--method", "prefix", "--reparam", "mlp", "--hidden", "256", "--lr", "0.01"],
    "prompt_random": ["--method", "prompt", "--init", "random", "--lr", "0.3"],
    "prompt_text": ["--method", "prompt", "--lr", "0.03"],
    "p_tuning": ["--method", "p-tuning", "--hidden", "256", "--lr", "0.003"],
    "p_tuning_sandwich": ["--method", "p-tuning", "--hidden", "256", "--lr", "0.01", *SANDWICH],
}
DEFAULTS = {
    "prefix": ["--method", "prefix"],
    "prompt": ["--method", "prompt"],
    "p_tuning": ["--method", "p-tuning"],
    "p_tuning_sandwich": ["--method", "p-tuning", *SANDWICH],
}
COMMON = ["--length", "20", "--steps", "300", "--batch", "8", "--warmup", "20"]


def bleu_over_all(hyps, refs):
    """Corpus BLEU-4 of texts whose tokens stand between spaces, over several references each, as mteval and sacrebleu compute
    it: the closest reference's length counts, the shorter one of two. Not smoothed."""
    def grams(tokens, n):
        return collections.Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))

    hit, there, length, closest = [0] * 4, [0] * 4, 0, 0
    for hyp, texts in zip(hyps, refs, strict=True):
        hyp, texts = hyp.split(), [t.split() for t in texts]
        length += len(hyp)
        closest += min((abs(len(t) - len(hyp)), len(t)) for t in texts)[1]
        for n in range(4):
            most = collections.Counter()
            for t in texts:
                most |= grams(t, n + 1)
            found = grams(hyp, n + 1)
            hit[n] += sum((found & most).values())
            there[n] += sum(found.values())
    if min(hit) == 0:
        return 0.0
    precision = sum(math.log(h / t) for h, t in zip(hit, there)) / 4
    return 100 * math.exp(precision + min(0.0, 1 - closest / length))


def ggraft(a, *args):
    done = subprocess.run([a.ggraft, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(args)}\n{done.stderr}")
    return done.stdout


def splits(a, task, seed, folder):
    """Files to train on, to validate with and to measure on."""
    paths = {split: os.path.join(TASKS, task, split + ".jsonl") for split in ("train", "valid", "test")}
    if not (a.held_out or a.rows):
        return paths
    lines = {}
    for split in ("train", "valid"):
        with open(paths[split], encoding="utf-8") as f:
            lines[split] = f.readlines()
    if a.held_out:
        drawn = lines["train"] + lines["valid"]
        random.Random(seed).shuffle(drawn)
        n = len(lines["valid"])
        lines = {"valid": drawn[:n], "train": drawn[n:]}
    lines["train"] = lines["train"][:a.rows]
    for split in lines:
        paths[split] = os.path.join(folder, split + ".jsonl")
        with open(paths[split], "w", encoding="utf-8") as f:
            f.writelines(lines[split])
    if a.held_out:
        paths["test"] = paths["valid"]
    return paths


def run(a, task, method, seed):
    args = [*(RECIPE if a.what == "recipe" else DEFAULTS)[method]]
    if a.what == "recipe":
        args += COMMON
        if method.startswith("p_tuning") and task.startswith("facts"):
            args += ["--dropout", "0.05"]
        if method in ("prompt_text", "p_tuning"):
            args += ["--init", "text:" + TEXT[task]]
    # The command takes an option once: the user's value replaces the one above.
    args = [x for name, value in zip(args[::2], args[1::2]) if name not in a.extra for x in (name, value)] + a.extra
    with tempfile.TemporaryDirectory() as folder:
        paths = splits(a, task, seed, folder)
        adapter, log, out = (os.path.join(folder, n) for n in ("a.gguf", "log.jsonl", "out.jsonl"))
        # Without validation rows the last step is what is kept; the steps are the same.
        best = ["--valid", paths["valid"]] if a.keep == "best" else []
        ggraft(a, "train", "-m", a.base, "--data", paths["train"], *best, "-o", adapter, "--log", log,
               "--seed", str(seed), "-t", str(a.threads), *args)
        rows = load(log)
        if best:
            valid = min(r["valid_loss"] for r in rows if r.get("valid_loss") is not None)
        else:
            valid = json.loads(ggraft(a, "eval", "-m", a.base, "-a", adapter, "--data", paths["valid"], "--json",
                                      "-t", str(a.threads)))["loss"]
        ggraft(a, "predict", "-m", a.base, "-a", adapter, "--data", paths["test"], "-o", out, "-n", str(LENGTH[task]),
               "-t", str(a.threads))
        found = metrics(task, load(paths["test"]), [r["prediction"] for r in load(out)])
    return {"task": task, "method": method, "seed": seed, "valid_loss": valid, "metric": found[METRIC[task]], "all": found,
            "seconds": sum(r["seconds"] for r in rows), "steps": len(rows)}


def first_line(prediction):
    return prediction.strip().split("\n")[0]


def run_real(a, method, seed):
    """Validation losses by step, and BLEU of the first line of each answer."""
    paths = {split: os.path.join(TASKS, REAL_TASK, split + ".jsonl") for split in ("train", "valid", "test")}
    with tempfile.TemporaryDirectory() as folder:
        adapter, log, out = (os.path.join(folder, n) for n in ("a.gguf", "log.jsonl", "out.jsonl"))
        ggraft(a, "train", "-m", a.base, "--method", method, "--data", paths["train"], "--valid", paths["valid"], "-o", adapter,
               "--log", log, "--seed", str(seed), "-t", str(a.threads), *a.extra)
        rows = load(log)
        ggraft(a, "predict", "-m", a.base, "-a", adapter, "--data", paths["test"], "-o", out, "-n", str(REAL_LENGTH),
               "-t", str(a.threads))
        hyps = [first_line(r["prediction"]) for r in load(out)]
    curve = {r["step"]: r["valid_loss"] for r in rows if r.get("valid_loss") is not None}
    return {**run_of(a, method, seed), "curve": curve, "bleu": bleu_over_all(hyps, [r["refs"] for r in load(paths["test"])]),
            "seconds": sum(r["seconds"] for r in rows), "steps": len(rows)}


def run_of(a, method, seed):
    """What tells a run of `real` from others."""
    return {"engine": "ggraft", "base": os.path.basename(a.base), "method": method, "seed": seed, "options": a.extra}


def key(r):
    return r["engine"], r["base"], r["method"], tuple(r["options"]), r["seed"]


def recorded(path):
    """The runs of `real` in a file, by what tells them apart; none if there is no file."""
    if not path or not os.path.exists(path):
        return {}
    return {key(r): r for r in load(path)}


def record(path, r):
    """Says on stderr how a run of `real` went, and appends it to the file, if one is given."""
    curve = " ".join(f"{step}:{loss:.3f}" for step, loss in r["curve"].items())
    print(f"{r['engine']} {r['method']:9} seed {r['seed']} BLEU {r['bleu']:.2f} {r['steps']} steps {r['seconds']:.0f} s | {curve}",
          file=sys.stderr, flush=True)
    if path:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(r) + "\n")


def real_table(runs):
    """Medians over the seeds."""
    groups = collections.defaultdict(list)
    for r in runs.values():
        groups[key(r)[:-1]].append(r)
    print("| engine | base | method | options | valid loss, last step | valid loss, best | BLEU | seeds |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (engine, base, method, options), rows in groups.items():
        last = statistics.median(list(r["curve"].values())[-1] for r in rows)
        best = statistics.median(min(r["curve"].values()) for r in rows)
        print(f"| {engine} | {base} | {method} | {' '.join(options)} | {last:.4f} | {best:.4f} "
              f"| {statistics.median(r['bleu'] for r in rows):.2f} | {len(rows)} |")


def real(a):
    methods = a.methods.split(",") if a.methods else ["prefix", "prompt", "p-tuning"]
    runs = recorded(a.out)
    for method in [] if a.table else methods:
        for seed in map(int, a.seeds.split(",")):
            if key(run_of(a, method, seed)) not in runs:
                r = run_real(a, method, seed)
                runs[key(r)] = r
                record(a.out, r)
    real_table(runs)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=["recipe", "defaults", "real"])
    ap.add_argument("--base", default=os.path.join(ROOT, "models", "tinylm-q8_0.gguf"))
    ap.add_argument("--ggraft", default=os.path.join(ROOT, "target", "release", "ggraft"))
    ap.add_argument("--tasks", default=",".join(NAMES))
    ap.add_argument("--methods", default="")
    ap.add_argument("--seeds", default="1,2,3")
    ap.add_argument("--held-out", action="store_true", help="see above")
    ap.add_argument("--keep", choices=["last", "best"], help="see above")
    ap.add_argument("--rows", type=int, help="train on so many rows only")
    ap.add_argument("--jobs", type=int, default=2, help="runs side by side")
    ap.add_argument("--threads", type=int, default=1, help="threads of each")
    ap.add_argument("--out", help="append one JSON object per run")
    ap.add_argument("--table", action="store_true", help="real: print the table of the runs in the file of --out, run nothing")
    ap.epilog = "What stands behind -- goes to ggraft train."
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a = ap.parse_args(sys.argv[1:end])
    a.extra = sys.argv[end + 1:]
    if a.table and not (a.what == "real" and a.out):
        ap.error("--table is for real with --out")
    if a.what == "real":
        return real(a)
    a.keep = a.keep or ("last" if a.what == "recipe" else "best")
    methods = a.methods.split(",") if a.methods else list(RECIPE if a.what == "recipe" else DEFAULTS)
    with open(os.path.join(TASKS, "baselines.json"), encoding="utf-8") as f:
        peft = json.load(f)["tasks"]
    jobs = [(t, m, int(s)) for t in a.tasks.split(",") for m in methods for s in a.seeds.split(",")
            if m != "p_tuning_sandwich" or t.startswith("facts")]
    results = {}
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        for r in pool.map(lambda j: run(a, *j), jobs):
            results.setdefault((r["task"], r["method"]), []).append(r)
            print(f"{r['task']:14} {r['method']:17} seed {r['seed']} valid {r['valid_loss']:.4f} {METRIC[r['task']]} "
                  f"{r['metric']:.2f} {r['seconds']:.0f} s", file=sys.stderr, flush=True)
            if a.out:
                with open(a.out, "a", encoding="utf-8") as f:
                    f.write(json.dumps(r) + "\n")
    print(f"{a.keep} step of each run, PEFT's {a.keep} step\n")
    print("| task | method | valid loss | PEFT | ratio | metric | PEFT | difference |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (task, method), rows in results.items():
        valid = statistics.median(r["valid_loss"] for r in rows)
        metric = statistics.median(r["metric"] for r in rows)
        theirs = peft.get(task, {}).get(method)
        if theirs and a.keep == "best":
            theirs = theirs.get("best")
        if a.what == "recipe" and theirs:
            other = theirs["test"][METRIC[task]]
            print(f"| {task} | {method} | {valid:.4f} | {theirs['valid_loss']} | {valid / theirs['valid_loss']:.3f} | {metric:.1f} "
                  f"| {other} | {metric - other:+.1f} |")
        else:
            print(f"| {task} | {method} | {valid:.4f} | | | {metric:.1f} | | |")


if __name__ == "__main__":
    main()
