#!/usr/bin/env python3
"""Train PEFT on the rows of `scripts/quality.py real`, on the same base, and measure it in the same way.

    scripts/peft_real.py --base models/real/smollm2-135m-instruct-q4_1.gguf --method prefix --lr 0.03 --out runs.jsonl
    scripts/quality.py real --out runs.jsonl --table

needs: pip install torch transformers peft gguf accelerate

Transformers dequantizes the GGUF file, so both train on the same weights. As ggraft does by default: 300 steps of 8 rows, 20 virtual
tokens, each row once in every pass over the data, targets are the completion and EOS, gradients clipped to a norm of 1, a warm-up
of a fifteenth of the steps and a linear decay, a validation loss after every twentieth of the run; greedy answers of 80 tokens at
most. The adapter of the last step answers, as PEFT keeps no other. What is PEFT's own: the start (normally distributed values;
--init-text starts prompts from a text), PyTorch's AdamW with its default betas and weight decay, and padding.

Appends one JSON object per run to the file of --out, in the form of quality.py. A run that is there already is not repeated.
"""
import argparse
import contextlib
import inspect
import os
import random
import sys
import time

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from quality import REAL_LENGTH, REAL_TASK, TASKS, bleu_over_all, first_line, key, load, record, recorded  # noqa: E402

CONFIG = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig, "p-tuning": PromptEncoderConfig}
# Rows that are evaluated or answered at once.
AT_ONCE = 32
IGNORED = -100
# What Transformers calls the cache: older versions know another name.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class Run:
    """One run: a base, a tokenizer and an adapter that learns."""

    def __init__(self, a, seed):
        torch.manual_seed(seed)
        self.a, self.seed = a, seed
        folder, name = os.path.split(os.path.abspath(a.base))
        self.tok = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        bos = self.tok.bos_token_id
        self.first = [bos] if bos is not None and self.tok("a").input_ids[0] == bos else []
        # Without a network of another width P-tuning's is as wide as the embedding, in PEFT as in ggraft.
        self.model = get_peft_model(base, CONFIG[a.method](task_type=TaskType.CAUSAL_LM, num_virtual_tokens=a.length))
        if a.init_text:
            ids = self.ids(a.init_text)
            rows = base.get_input_embeddings().weight[[ids[i % len(ids)] for i in range(a.length)]]
            self.model.prompt_encoder["default"].embedding.weight.data.copy_(rows)

    def ids(self, text):
        return self.tok(text, add_special_tokens=False).input_ids

    def precision(self):
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.a.bf16 else contextlib.nullcontext()

    def loss(self, rows):
        """Mean over the target tokens of `rows`, and their number."""
        given = [self.first + self.ids(r["prompt"]) for r in rows]
        then = [self.ids(r["completion"]) + [self.tok.eos_token_id] for r in rows]
        longest = max(len(g) + len(t) for g, t in zip(given, then))
        ids = torch.full((len(rows), longest), self.tok.eos_token_id)
        labels = torch.full_like(ids, IGNORED)
        there = torch.zeros_like(ids)
        for i, (g, t) in enumerate(zip(given, then)):
            n = len(g) + len(t)
            ids[i, :n] = torch.tensor(g + t)
            labels[i, len(g):n] = torch.tensor(t)
            there[i, :n] = 1
        with self.precision():
            loss = self.model(input_ids=ids, attention_mask=there, labels=labels).loss
        return loss, sum(map(len, then))

    @torch.no_grad()
    def valid_loss(self, rows):
        self.model.eval()
        total = n = 0
        for i in range(0, len(rows), AT_ONCE):
            loss, targets = self.loss(rows[i:i + AT_ONCE])
            total, n = total + loss.item() * targets, n + targets
        self.model.train()
        return total / n

    def train(self, rows, valid):
        """Validation losses by step, and seconds of all steps."""
        a = self.a
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=a.lr)
        warmup, every = max(1, min(a.steps // 15, 100)), -(-a.steps // 20)
        left = max(1, a.steps - warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, (a.steps - s) / left))
        shuffle, order = random.Random(self.seed), []
        curve, seconds = {}, 0.0
        self.model.train()
        for step in range(1, a.steps + 1):
            start = time.monotonic()
            while len(order) < a.batch:
                order += shuffle.sample(rows, len(rows))
            batch, order = order[:a.batch], order[a.batch:]
            loss, _ = self.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            seconds += time.monotonic() - start
            if step % every == 0 or step == a.steps:
                curve[step] = self.valid_loss(valid)
                print(f"step {step}/{a.steps}: loss {loss.item():.4f}, validation {curve[step]:.4f}", file=sys.stderr, flush=True)
        return curve, seconds

    @torch.no_grad()
    def answers(self, prompts):
        """Greedy, in F32, prompts of one length at a time: nothing is padded."""
        self.model.eval()
        by_length = {}
        for i, prompt in enumerate(prompts):
            ids = self.first + self.ids(prompt)
            by_length.setdefault(len(ids), []).append((i, ids))
        found = [""] * len(prompts)
        for same in by_length.values():
            for at in range(0, len(same), AT_ONCE):
                some = same[at:at + AT_ONCE]
                rows = self.greedy(torch.tensor([ids for _, ids in some]))
                for (i, _), row in zip(some, rows):
                    found[i] = self.tok.decode(row, skip_special_tokens=True)
        return found

    def greedy(self, ids):
        """The tokens that follow, by PEFT's rows and the base alone: `generate` of PEFT 0.21 with Transformers 5.24 leaves a prefix
        out, because it brings a cache of its own."""
        base = self.model.get_base_model()
        embed, eos = base.get_input_embeddings(), self.tok.eos_token_id
        prompt = self.model.get_prompt(batch_size=len(ids))
        x = embed(ids)
        if self.a.method == "prefix":
            cache = prompt
        else:
            cache, x = DynamicCache(), torch.cat([prompt.to(x.dtype), x], dim=1)
        rows, ended = [[] for _ in ids], [False] * len(ids)
        for _ in range(REAL_LENGTH):
            logits = base(inputs_embeds=x, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
            following = logits[:, -1].argmax(-1)
            for i, token in enumerate(following.tolist()):
                ended[i] |= token == eos
                if not ended[i]:
                    rows[i].append(token)
            if all(ended):
                break
            x = embed(following).unsqueeze(1)
        return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", required=True, help="GGUF file of the base")
    ap.add_argument("--method", required=True, choices=list(CONFIG))
    ap.add_argument("--lr", type=float, required=True, help="learning rate behind the warm-up")
    ap.add_argument("--steps", type=int, default=300)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--length", type=int, default=20, help="virtual tokens")
    ap.add_argument("--init-text", help="start from this text (prompt)")
    ap.add_argument("--seeds", default="1", help="separated by commas")
    ap.add_argument("--bf16", action="store_true", help="train with products in BF16 (autocast) instead of F32")
    ap.add_argument("--threads", type=int, default=torch.get_num_threads())
    ap.add_argument("--test", type=int, help="answer so many of the test rows only")
    ap.add_argument("--out", help="append one JSON object per run")
    a = ap.parse_args()
    if a.init_text and a.method != "prompt":
        ap.error("--init-text is for --method prompt")
    torch.set_num_threads(a.threads)
    train, valid, test = (load(os.path.join(TASKS, REAL_TASK, split + ".jsonl")) for split in ("train", "valid", "test"))
    test = test[:a.test]
    # What is not as ggraft's defaults are.
    options = ["--lr", str(a.lr)]
    for name in ("steps", "batch", "length", "init_text", "test"):
        if getattr(a, name) != ap.get_default(name):
            options += ["--" + name.replace("_", "-"), str(getattr(a, name))]
    options += ["--bf16"] if a.bf16 else []
    done = recorded(a.out)
    for seed in map(int, a.seeds.split(",")):
        r = {"engine": "peft", "base": os.path.basename(a.base), "method": a.method, "seed": seed, "options": options}
        if key(r) in done:
            print(f"seed {seed}: {a.out} has this run", file=sys.stderr)
            continue
        run = Run(a, seed)
        curve, seconds = run.train(train, valid)
        hyps = [first_line(text) for text in run.answers([row["prompt"] for row in test])]
        bleu = bleu_over_all(hyps, [row["refs"] for row in test])
        r |= {"curve": curve, "bleu": bleu, "seconds": seconds, "steps": a.steps}
        record(a.out, r)


if __name__ == "__main__":
    main()
