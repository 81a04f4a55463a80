#!/usr/bin/env python3
"""Kills `ggraft serve` in the middle of uploads and of a fine-tuning job, again and again, and looks what is left.

    scripts/serve_kills.py target/release/ggraft [--kills 20]

Each acknowledged upload must be there after the next start, with its bytes, and the job's adapter must end up as that of a job that nobody disturbed, byte for byte.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS = "/v1/fine_tuning/jobs"
SPEC = {"model": "base", "suffix": "killed", "method": {"type": "supervised", "ggraft": {"steps": 120, "length": 8}}}


class Server:
    def __init__(self, ggraft, folder):
        command = [ggraft, "serve", "-m", ROOT / "models/tinylm-q8_0.gguf", "--port", "0"]
        command += ["--data-dir", folder, "--checkpoint-every", "2"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split(" ")[2].rstrip(",")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def send(self, path, body=None, kind="application/json"):
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def json(self, path, body=None):
        return json.loads(self.send(path, None if body is None else json.dumps(body).encode()))

    def upload(self, rows):
        form = b"--edge\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n"
        form += b"--edge\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.jsonl\"\r\n\r\n" + rows + b"\r\n--edge--\r\n"
        return json.loads(self.send("/v1/files", form, "multipart/form-data; boundary=edge"))["id"]

    def job(self, file):
        return self.json(JOBS, {**SPEC, "training_file": file})["id"]

    def result(self, job):
        while (state := self.json(f"{JOBS}/{job}"))["status"] in ("queued", "running"):
            time.sleep(0.1)
        if state["status"] != "succeeded":
            sys.exit(f"FAILED: {state}")
        return self.send(f"/v1/files/{state['result_files'][0]}/content")


def upload_until_killed(server, rows, acknowledged):
    """Uploads files of several lengths; those that were acknowledged are noted."""
    while True:
        text = rows * random.randrange(1, 200)
        try:
            acknowledged[server.upload(text)] = text
        except (OSError, urllib.error.URLError, ValueError):
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ggraft")
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    rows = b"".join((ROOT / "models/tasks/persona_pirate/train.jsonl").read_bytes().splitlines(keepends=True)[:16])
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.ggraft, Path(folder) / "undisturbed")
        expected = server.result(server.job(server.upload(rows)))
        server.kill()
        data = Path(folder) / "killed"
        server = Server(args.ggraft, data)
        job = server.job(server.upload(rows))
        acknowledged, kills, went_on = {}, 0, 0
        while kills < args.kills:
            uploads = threading.Thread(target=upload_until_killed, args=(server, rows, acknowledged))
            uploads.start()
            time.sleep(random.uniform(0.05, 1.5))
            server.kill()
            kills += 1
            uploads.join()
            server = Server(args.ggraft, data)
            for file, text in acknowledged.items():
                if server.send(f"/v1/files/{file}/content") != text:
                    sys.exit(f"FAILED: {file} is not what was uploaded")
            went_on += server.json(f"{JOBS}/{job}")["status"] == "running"
        same = server.result(job) == expected
        server.kill()
        print(f"{kills} kills, {went_on} of them in the middle of the job, {len(acknowledged)} acknowledged uploads are there; the adapter is "
              f"{'the same' if same else 'ANOTHER'}, byte for byte")
        sys.exit(0 if same else 1)


main()
