"""What scripts/test-openai.sh asks of a server: `test_openai.py http://127.0.0.1:PORT`."""

import sys
import time
from pathlib import Path

import openai

PROMPT = "An old teacher is waiting at the harbour."
ROWS = Path("models/tasks/persona_pirate/train.jsonl")

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
passed = 0


def check(name, ok):
    global passed
    print(f"{'ok' if ok else 'FAILED'}: {name}")
    if not ok:
        sys.exit(1)
    passed += 1


def chat(model, **more):
    messages = [{"role": "user", "content": PROMPT}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **more)


names = [model.id for model in client.models.list()]
check("models", {"base", "pirate", "butler"} <= set(names) and client.models.retrieve("pirate").id == "pirate")

answer = chat("pirate", logprobs=True, top_logprobs=2)
text = answer.choices[0].message.content
check("chat", text.startswith('"Arr') and answer.choices[0].finish_reason == "stop")
check("usage", answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens)
check("logprobs", len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens)

chunks = list(chat("pirate", stream=True, stream_options={"include_usage": True}))
check("streaming", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text)
check("usage of a stream", chunks[-1].usage.completion_tokens == answer.usage.completion_tokens)
check("cached tokens", chunks[-1].usage.prompt_tokens_details.cached_tokens > 0)

done = client.completions.create(model="base", prompt=["Once upon a time", "There was"], n=2, max_tokens=8, seed=3)
check("completions", [choice.index for choice in done.choices] == [0, 1, 2, 3])

team = client.completions.create(
    model="team", prompt=PROMPT + "\n", temperature=0,
    extra_body={"adapters": ["pirate", "butler"], "ensemble": "mean-prob", "weights": [0.6, 0.4]},
)
check("an ensemble", len(team.choices[0].text) > 0)

for wanted, call in [
    (openai.NotFoundError, lambda: chat("nobody")),
    (openai.BadRequestError, lambda: chat("pirate", response_format={"type": "json_object"})),
    (openai.BadRequestError, lambda: chat("pirate", max_tokens=-1)),
]:
    try:
        call()
        check(f"{wanted.__name__} was expected", False)
    except wanted as e:
        check(f"{wanted.__name__}: {e.body['message']}", e.body["type"].endswith("_error"))

rows = b"".join(ROWS.read_bytes().splitlines(keepends=True)[:48])
file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
check("a file", client.files.content(file.id).read() == rows)
job = client.fine_tuning.jobs.create(
    model="base",
    training_file=file.id,
    suffix="openai",
    seed=1,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
)
while job.status in ("queued", "running"):
    time.sleep(0.2)
    job = client.fine_tuning.jobs.retrieve(job.id)
check(f"a job has made {job.fine_tuned_model}", job.status == "succeeded")
events = list(client.fine_tuning.jobs.list_events(job.id, limit=50))
check(f"{len(events)} events", events[-1].message == "The job has begun.")
check("checkpoints", client.fine_tuning.jobs.checkpoints.list(job.id).object == "list")
check("a chat with it", len(chat(job.fine_tuned_model, max_tokens=20).choices[0].message.content) > 0)
check("its file", client.files.content(job.result_files[0]).read()[:4] == b"GGUF")
check("jobs", client.fine_tuning.jobs.list().data[0].id == job.id)
client.models.delete(job.fine_tuned_model)
client.files.delete(file.id)
print(f"{passed} passed, 0 failed")
