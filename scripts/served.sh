# For scripts that test the server: `serve GGRAFT` starts it on the embedded model and its adapters, with a data directory in $work, which goes when the script ends, and
# says where it is in $url.

serve() {
	work=$(mktemp -d)
	"$1" serve -m models/tinylm-q8_0.gguf --adapters models/adapters --data-dir "$work/data" --port 0 \
		--chat-template examples/serve/lines.jinja >"$work/out" &
	server=$!
	trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$work"' EXIT
	for _ in $(seq 100); do
		grep -q http "$work/out" && break
		sleep 0.1
	done
	url=$(sed -n 's/^listening on \([^,]*\),.*/\1/p' "$work/out")
}
