#!/usr/bin/env bash
# The `openai` Python package against `ggraft serve`: chat, streaming, files, a fine-tuning job from upload to chat with its model. Installs the package into a
# virtual environment under target/, unless GGRAFT_NO_OPENAI is set.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/served.sh

skip() {
	why="the openai Python package against the server: $1"
	echo "skipped: $why"
	[ -z "${GGRAFT_SKIPPED:-}" ] || echo "$why" >>"$GGRAFT_SKIPPED"
	exit 0
}

[ -z "${GGRAFT_NO_OPENAI:-}" ] || skip "GGRAFT_NO_OPENAI is set"
ggraft=${1:-target/debug/ggraft}
if [ ! -x "$ggraft" ]; then
	echo "error: $ggraft is not there: cargo build, or name another one" >&2
	exit 1
fi
venv=target/openai-venv
if ! "$venv/bin/python" -c 'import openai' 2>/dev/null; then
	# A machine without a network or without Python cannot have it, and everything else is tested there all the same.
	python3 -m venv "$venv" && timeout 180 "$venv/bin/pip" install --quiet openai || skip "it could not be installed"
fi

serve "$ggraft"
"$venv/bin/python" scripts/test_openai.py "$url"
