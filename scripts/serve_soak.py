#!/usr/bin/env python3
"""Many clients of `ggraft serve` who go away, talk nonsense, cancel jobs and lose their adapters: everybody else gets what they would get alone.

    scripts/serve_soak.py target/release/ggraft [--clients 200] [--seconds 600]

Says how many answers were complete and compared, which statuses came, and what memory the server took in the middle and at the end. Fails if an answer differs from the one alone, if a
status is 500 or more, or if anything is left of requests when all clients have gone.
"""

import argparse
import asyncio
import collections
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    f"The {thing} {what}.\n"
    for thing in ["old bridge", "red lamp", "grey cat", "last train", "small boat"]
    for what in ["has not come back", "is waiting at the harbour", "fell down the stairs", "was sold this morning"]
]
MODELS = ["base", "pirate", "butler", "sentiment"]
TOKENS = 24
WRONG = [b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"model": "base", "prompt": {}}', b'{"model": "nobody", "prompt": "a"}']


class Soak:
    def __init__(self, port):
        self.port = port
        self.expected = {}
        self.statuses = collections.Counter()
        self.compared = 0
        self.left = 0
        self.failures = []

    async def send(self, method, path, body=b"", kind="application/json", leave=None):
        """Status and body; nothing if the client leaves, some of the answer being there."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            if leave is not None:
                await asyncio.wait_for(reader.read(200), 60)
                await asyncio.sleep(leave)
                self.left += 1
                return None, b""
            answer = await asyncio.wait_for(reader.read(), 120)
        finally:
            writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        self.statuses[status] += 1
        if status >= 500:
            self.failures.append(f"{method} {path}: {status} {rest[:200]}")
        return status, rest

    def question(self, model, prompt, **more):
        return json.dumps({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, **more}).encode()

    async def ask(self, model, prompt):
        status, body = await self.send("POST", "/v1/completions", self.question(model, prompt))
        if status == 200:
            return json.loads(body)["choices"][0]["text"]

    async def alone(self):
        for model in MODELS:
            for prompt in PROMPTS:
                self.expected[model, prompt] = await self.ask(model, prompt)

    async def job(self, rows):
        edge = b"edge"
        form = b"--edge\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n"
        form += b"--edge\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.jsonl\"\r\n\r\n" + rows + b"\r\n--edge--\r\n"
        kind = f"multipart/form-data; boundary={edge.decode()}"
        status, body = await self.send("POST", "/v1/files", form, kind)
        if status != 200:
            return
        file = json.loads(body)["id"]
        spec = {"model": "base", "training_file": file, "method": {"type": "supervised", "ggraft": {"steps": 500, "length": 4}}}
        status, body = await self.send("POST", "/v1/fine_tuning/jobs", json.dumps(spec).encode())
        if status == 200:
            await asyncio.sleep(random.uniform(0, 5))
            await self.send("POST", f"/v1/fine_tuning/jobs/{json.loads(body)['id']}/cancel", b"{}")
        await self.send("DELETE", f"/v1/files/{file}")

    async def client(self, end, adapters, rows):
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            what = random.random()
            model, prompt = random.choice(MODELS), random.choice(PROMPTS)
            if what < 0.6:
                said = await self.ask(model, prompt)
                if said is not None:
                    self.compared += 1
                    if said != self.expected[model, prompt]:
                        self.failures.append(f"{model} {prompt!r}: {said!r}")
            elif what < 0.85:
                body = self.question(model, prompt, stream=random.random() < 0.5, max_tokens=400)
                await self.send("POST", "/v1/completions", body, leave=random.uniform(0, 0.5))
            elif what < 0.95:
                await self.send("POST", "/v1/completions", random.choice(WRONG))
            elif what < 0.97:
                await self.job(rows)
            else:
                # Somebody's adapter goes while it is in use, and comes back.
                name = f"guest-{random.randrange(4)}"
                file = adapters / f"{name}.gguf"
                shutil.copy(ROOT / "models/adapters/butler.gguf", file.with_suffix(".new"))
                file.with_suffix(".new").rename(file)
                asking = asyncio.create_task(self.ask(name, prompt))
                await asyncio.sleep(random.uniform(0, 0.2))
                file.unlink(missing_ok=True)
                said = await asking
                if said is not None and said != self.expected["butler", prompt]:
                    self.failures.append(f"{name} {prompt!r}: {said!r}")


def megabytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ggraft")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder) / "adapters"
        shutil.copytree(ROOT / "models/adapters", adapters)
        command = [args.ggraft, "serve", "-m", ROOT / "models/tinylm-q8_0.gguf", "--port", "0"]
        command += ["--adapters", adapters, "--data-dir", Path(folder) / "data", "--queue", "1024"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().split("http://")[1].split(",")[0].split(":")[1])
            soak = Soak(port)
            await soak.alone()
            rows = b"".join((ROOT / "models/tasks/persona_pirate/train.jsonl").read_bytes().splitlines(keepends=True)[:8])
            end = asyncio.get_running_loop().time() + args.seconds
            clients = [asyncio.create_task(soak.client(end, adapters, rows)) for _ in range(args.clients)]
            await asyncio.sleep(args.seconds / 2)
            middle = megabytes(server.pid)
            for outcome in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    soak.failures.append(repr(outcome))
            await asyncio.sleep(3)
            health = json.loads((await soak.send("GET", "/health"))[1])
            print(f"{soak.compared} answers as alone, {soak.left} clients went away, statuses {dict(soak.statuses)}")
            print(f"memory: {middle:.0f} MB in the middle, {megabytes(server.pid):.0f} MB at the end; left: {health}")
            if health["running"] or health["waiting"]:
                soak.failures.append(f"left: {health}")
            for failure in soak.failures[:20]:
                print("FAILED:", failure)
            server.terminate()
            if server.wait(30) != 0:
                soak.failures.append("the server ended badly")
            sys.exit(1 if soak.failures or not soak.compared else 0)
        finally:
            server.kill()


asyncio.run(main())
