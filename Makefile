# Everything a fresh Debian or Ubuntu machine with rustup's cargo needs: each target sets itself up.

CARGO ?= cargo

.PHONY: help setup build demo test fmt lint doc check-c bench fuzz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: ## install missing build tools (cmake, C++ compiler, libclang)
	@./scripts/setup.sh

build: setup ## the library and the ggraft command, optimised
	$(CARGO) build --release

demo: setup ## the embedded model, alone and with adapters, swapped in one process
	$(CARGO) run --release --example demo

test: setup fmt lint doc ## formatting, lints, documentation and all tests
	$(CARGO) test --workspace
	$(MAKE) check-c

fmt: setup
	$(CARGO) fmt --all --check

lint: setup
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items

check-c:

bench: setup ## latency beside libllama
	$(CARGO) bench --bench latency

clean:
	$(CARGO) clean
