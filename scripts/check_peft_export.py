#!/usr/bin/env python3
"""Adapters that ggraft trains and exports give the same logits in PEFT. Needs PyTorch, in an environment of its own:

    python3 -m venv peft-env && peft-env/bin/pip install torch transformers peft gguf
    cargo build --release
    peft-env/bin/python scripts/check_peft_export.py HF_FOLDER MODEL-f16.gguf

HF_FOLDER and MODEL-f16.gguf hold the same model (models/tinylm-f16.gguf, and its Hugging Face form). Trains one adapter per
method for a few steps on the quantized or F16 file, exports it, and compares the logits of a test row: PEFT on the F32 model
against ggraft on the GGUF file in F32. Fails if any differs by more than 1e-3 of the largest logit.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASK = os.path.join(ROOT, "models", "tasks", "persona_pirate")
TEXT = "A brown pony follows everyone to the village hall.\nThe pirate said: \"Arr, matey!\""
METHODS = {
    "prefix": ["--method", "prefix"],
    "prefix, MLP": ["--method", "prefix", "--reparam", "mlp"],
    "prompt": ["--method", "prompt"],
    "p-tuning, MLP": ["--method", "p-tuning"],
    "p-tuning, LSTM": ["--method", "p-tuning", "--reparam", "lstm", "--hidden", "64"],
}
TOLERANCE = 1e-3


def as_f32(source, target):
    """The same file with all matrices in F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for t in reader.tensors:
        writer.add_tensor(t.name, gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("hf")
    ap.add_argument("gguf")
    ap.add_argument("--ggraft", default=os.path.join(ROOT, "target", "release", "ggraft"))
    ap.add_argument("--steps", default="40")
    a = ap.parse_args()
    ids = AutoTokenizer.from_pretrained(a.hf)(TEXT)["input_ids"]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)

        def ggraft(*args):
            subprocess.run([a.ggraft, *args], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        as_f32(a.gguf, path("f32.gguf"))
        for i, (name, args) in enumerate(METHODS.items()):
            adapter, exported, out = path(f"{i}.gguf"), path(f"{i}.peft"), path(f"{i}.safetensors")
            ggraft("train", "-m", a.gguf, "--data", os.path.join(TASK, "train.jsonl"), "-o", adapter, "--steps", a.steps, *args)
            ggraft("export", adapter, "-m", a.gguf, "-o", exported, "--base-name", a.hf)
            ggraft("logits", "-m", path("f32.gguf"), "-a", adapter, "--ids", ",".join(map(str, ids)), "-o", out)
            ours = load_file(out)["logits"]
            base = AutoModelForCausalLM.from_pretrained(a.hf, dtype=torch.float32).eval()
            with torch.no_grad():
                plain = base(input_ids=torch.tensor([ids])).logits[0].numpy()
            model = PeftModel.from_pretrained(base, exported).eval()
            with torch.no_grad():
                theirs = model(input_ids=torch.tensor([ids])).logits[0, -len(ids):].numpy()
            largest = np.abs(theirs).max()
            difference = np.abs(ours - theirs).max() / largest
            effect = np.abs(plain - theirs).max() / largest
            worst = max(worst, difference)
            print(f"{name:16} differs from PEFT by {difference:.1e}; the adapter changes the logits by {effect:.2f}")
            if effect < 10 * TOLERANCE:
                sys.exit("the adapter does nothing: there is nothing to compare")
    if not worst <= TOLERANCE:
        sys.exit(f"differs by {worst:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
