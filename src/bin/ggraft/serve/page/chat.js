// The conversation: one adapter, or two beside each other, and another one for any of its turns.

export const $ = (id) => document.getElementById(id);

/** A request with the key, if there is one. Fails with what the server says. */
export async function api(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  if (options.json) {
    headers["content-type"] = "application/json";
    options = { ...options, method: "POST", body: JSON.stringify(options.json) };
  }
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  const said = await response.json().catch(() => null);
  const error = new Error(said?.error?.message ?? `the server answers ${response.status}`);
  error.status = response.status;
  throw error;
}

const columns = [0, 1].map((i) => ({
  model: $(`model-${i}`),
  log: $(`messages-${i}`),
  messages: [],
}));

/** Fills the lists of adapters, and keeps what was chosen. */
export async function showModels(choose) {
  const { data } = await (await api("/v1/models")).json();
  const base = data.find((model) => model.id === "base");
  $("base").textContent = base.file;
  for (const [i, column] of columns.entries()) {
    const chosen = (i === 0 && choose) || column.model.value;
    const options = data.map(({ id }) => new Option(id === "base" ? "base (no adapter)" : id, id));
    column.model.replaceChildren(...options);
    const first = data[Math.min(i + 1, data.length - 1)].id;
    column.model.value = data.some(({ id }) => id === chosen) ? chosen : first;
  }
}

function say(column, role, who, text) {
  const message = document.createElement("div");
  message.className = `message ${role}`;
  const name = document.createElement("span");
  name.className = "who";
  name.textContent = who;
  const body = document.createElement("span");
  body.textContent = text;
  message.append(name, body);
  column.log.append(message);
  column.log.scrollTop = column.log.scrollHeight;
  return { message, body };
}

/** The objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data: ") ? part.slice(6) : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

let running = null;

async function answer(column, signal) {
  const model = column.model.value;
  const { message, body } = say(column, "assistant", model, "");
  const seed = $("seed").value;
  const request = {
    model,
    messages: column.messages,
    stream: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    ...(seed && { seed: Number(seed) }),
  };
  try {
    const response = await api("/v1/chat/completions", { json: request, signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      body.textContent += event.choices[0]?.delta.content ?? "";
      column.log.scrollTop = column.log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      message.classList.add("bad");
      body.textContent += error.message;
      // It is no part of what was said.
      column.messages.pop();
      return;
    }
  }
  column.messages.push({ role: "assistant", content: body.textContent });
}

async function ask(event) {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  running = new AbortController();
  $("send").textContent = "Stop";
  const shown = columns.slice(0, $("compare").checked ? 2 : 1);
  for (const column of shown) {
    column.messages.push({ role: "user", content: text });
    say(column, "user", "You", text);
  }
  await Promise.all(shown.map((column) => answer(column, running.signal)));
  running = null;
  $("send").textContent = "Send";
  $("text").focus();
}

function clear() {
  running?.abort();
  for (const column of columns) {
    column.messages = [];
    column.log.replaceChildren();
  }
  $("text").focus();
}

/** Shows what went wrong where there is no better place for it. */
export function complain(error) {
  $("base").textContent = error.message;
}

$("ask").addEventListener("submit", ask);
$("clear").addEventListener("click", clear);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("compare").addEventListener("change", () => {
  $("second").hidden = !$("compare").checked;
  // Both go on from the same.
  columns[1].messages = columns[0].messages.slice();
  columns[1].log.replaceChildren(...[...columns[0].log.children].map((it) => it.cloneNode(true)));
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  location.reload();
});
showModels().catch(complain);
