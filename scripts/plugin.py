#!/usr/bin/env python3
"""ggraft's adapters in llama-cpp-python: two sequences of one context with an adapter each, by ctypes.

    pip install llama-cpp-python
    cargo build --release --package ggraft-host-c
    scripts/plugin.py MODEL.gguf ADAPTER_A ADAPTER_B [LIBGGRAFT_HOST.so]

The libllama is that of llama-cpp-python. What is printed is what `ggraft run -m MODEL.gguf -a ADAPTER -p PROMPT --temp 0` says. How it works: docs/PLUGIN.md.
"""

import ctypes
import sys
from ctypes import c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import llama_cpp

PROMPT = b"There is no rope left in the market.\n"
TOKENS = 24


class Host:
    """The plug-in on a context; every method that fails raises what ggraft says."""

    def __init__(self, library, ctx, model_path):
        self.lib = ctypes.CDLL(str(library))
        self.lib.ggraft_last_error.restype = c_char_p
        for name, types in {
            "ggraft_host_new": [c_void_p, c_void_p, c_void_p, c_char_p, c_int32, c_void_p],
            "ggraft_host_load": [c_void_p, c_char_p, c_void_p],
            "ggraft_host_prepare": [c_void_p, c_void_p, c_int32, c_void_p],
        }.items():
            getattr(self.lib, name).argtypes = types
        self.lib.ggraft_host_attach.argtypes = [c_void_p, c_void_p, c_int32]
        self.lib.ggraft_host_attach.restype = c_int64
        # Where the functions of llama.h are: llama-cpp-python's own library.
        find_type = ctypes.CFUNCTYPE(c_void_p, c_char_p, c_void_p)
        find = lambda name, _: ctypes.cast(getattr(llama_cpp.llama_cpp._lib, name.decode()), c_void_p).value
        self.find = find_type(find)
        self.handle = self.make("ggraft_host_new", self.find, None, ctx, str(model_path).encode(), 0)

    def check(self, result):
        if result < 0:
            raise RuntimeError(self.lib.ggraft_last_error().decode())
        return result

    def make(self, function, *args):
        out = c_void_p()
        self.check(getattr(self.lib, function)(*args, ctypes.byref(out)))
        return out

    def attach(self, path, seq):
        """Loads an adapter and puts it into a sequence; the position of the first token behind it."""
        adapter = self.make("ggraft_host_load", self.handle, str(path).encode())
        graft = self.make("ggraft_host_prepare", self.handle, adapter, seq)
        return self.check(self.lib.ggraft_host_attach(self.handle, graft, seq))


@llama_cpp.llama_log_callback
def quiet(_level, _text, _user_data):
    """libllama says much."""


def decode(ctx, tokens):
    """Decodes (token, position, sequence, wanted); logits of the wanted ones."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, seq, wanted) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = seq, wanted
    code = llama_cpp.llama_decode(ctx, batch)
    llama_cpp.llama_batch_free(batch)
    if code != 0:
        raise RuntimeError(f"llama_decode returned {code}")
    return [llama_cpp.llama_get_logits_ith(ctx, i) for i, token in enumerate(tokens) if token[3]]


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    model_path, adapters = sys.argv[1], sys.argv[2:4]
    library = sys.argv[4] if len(sys.argv) == 5 else Path(__file__).parent / "../target/release/libggraft_host.so"

    llama_cpp.llama_log_set(quiet, c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = 512, len(adapters)
    ctx = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    ids = (llama_cpp.llama_token * 64)()
    n = llama_cpp.llama_tokenize(vocab, PROMPT, len(PROMPT), ids, 64, True, False)

    host = Host(library, ctx, model_path)
    position = [host.attach(path, seq) for seq, path in enumerate(adapters)]
    batch = [(ids[i], position[seq] + i, seq, i == n - 1) for seq in range(len(adapters)) for i in range(n)]
    position = [p + n for p in position]
    text = [b""] * len(adapters)
    piece = ctypes.create_string_buffer(64)
    for _ in range(TOKENS):
        logits = decode(ctx, batch)
        batch = []
        for seq, row in enumerate(logits):
            token = max(range(n_vocab), key=row.__getitem__)
            size = llama_cpp.llama_token_to_piece(vocab, token, piece, len(piece), 0, False)
            text[seq] += piece.raw[: max(size, 0)]
            batch.append((token, position[seq], seq, True))
            position[seq] += 1
    for path, said in zip(adapters, text):
        print(f"[{path}]\n{said.decode(errors='replace')}")


if __name__ == "__main__":
    main()
