#!/usr/bin/env bash
# The server's page in a real browser: Chromium from the distribution's packages, driven by Selenium from a virtual environment under target/. Pictures of the page, light, dark and
# narrow, are left in target/page.
set -euo pipefail
cd "$(dirname "$0")/.."

ggraft=${1:-target/debug/ggraft}
for program in "$ggraft" chromium chromedriver; do
	if ! command -v "$program" >/dev/null; then
		echo "error: $program is not there (cargo build; apt-get install chromium chromium-driver)" >&2
		exit 1
	fi
done
venv=target/page-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -c 'import selenium' 2>/dev/null || "$venv/bin/pip" install --quiet selenium

work=$(mktemp -d)
"$ggraft" serve -m models/tinylm-q8_0.gguf --adapters models/adapters --data-dir "$work/data" --port 0 \
	--chat-template examples/serve/lines.jinja >"$work/out" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 100); do
	grep -q http "$work/out" && break
	sleep 0.1
done
url=$(sed -n 's/^listening on \([^,]*\),.*/\1/p' "$work/out")
head -n 8 models/tasks/persona_pirate/train.jsonl >"$work/rows.jsonl"
mkdir -p target/page
"$venv/bin/python" scripts/test_page.py "$url" "$work/rows.jsonl" target/page
