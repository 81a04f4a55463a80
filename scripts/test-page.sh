#!/usr/bin/env bash
# The server's page in a real browser: Chromium from the distribution's packages, driven by Selenium from a virtual environment under target/. Pictures of the page, light, dark and
# narrow, are left in target/page.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/served.sh

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

serve "$ggraft"
head -n 8 models/tasks/persona_pirate/train.jsonl >"$work/rows.jsonl"
mkdir -p target/page
"$venv/bin/python" scripts/test_page.py "$url" "$work/rows.jsonl" target/page
