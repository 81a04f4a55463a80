// From a file of rows to an adapter: uploads, jobs and their loss curves.

import { $, api, complain, showModels } from "/chat.js";

const JOBS = "/v1/fine_tuning/jobs";
/** Milliseconds between two looks at jobs that are not over. */
const AGAIN = 1000;

let file = null;

function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  $("file-name").textContent = `${chosen.name}, ${(chosen.size / 1024).toFixed(1)} KiB`;
  const stem = chosen.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]/g, "-");
  $("suffix").value ||= stem.slice(0, 64);
}

async function start(event) {
  event.preventDefault();
  $("train-error").textContent = "";
  if (!file) {
    $("train-error").textContent = "Choose a file first.";
    return;
  }
  $("start").disabled = true;
  try {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    const uploaded = await (await api("/v1/files", { method: "POST", body: form })).json();
    const tuning = {
      method: $("method").value,
      steps: Number($("steps").value),
      length: Number($("length").value),
    };
    const request = {
      model: "base",
      training_file: uploaded.id,
      suffix: $("suffix").value || undefined,
      method: { type: "supervised", ggraft: tuning },
    };
    await api(JOBS, { json: request });
    await show();
  } catch (error) {
    $("train-error").textContent = error.message;
  }
  $("start").disabled = false;
}

function element(name, text, properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text, ...properties });
}

function button(text, action) {
  const it = element("button", text, { type: "button", className: "plain" });
  it.addEventListener("click", () => action().catch(complain));
  return it;
}

/** A curve through pairs of step and loss, in a picture of 100 by 100. */
function path(points, [first, last, low, high], kind) {
  const it = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const x = (step) => (100 * (step - first)) / Math.max(last - first, 1);
  const y = (loss) => 100 - (100 * (loss - low)) / Math.max(high - low, 1e-9);
  const at = points.map(([step, loss]) => `${x(step).toFixed(2)} ${y(loss).toFixed(2)}`);
  it.setAttribute("d", at.length > 1 ? `M${at.join("L")}` : "");
  it.setAttribute("class", kind);
  return it;
}

function curve(steps) {
  const it = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const train = steps.map((data) => [data.step, data.train_loss]);
  const valid = steps.filter((data) => data.valid_loss !== null);
  const pairs = valid.map((data) => [data.step, data.valid_loss]);
  const losses = [...train, ...pairs].map(([, loss]) => loss);
  const frame = [1, steps[0].total_steps, Math.min(...losses, 0), Math.max(...losses)];
  it.setAttribute("viewBox", "0 0 100 100");
  it.setAttribute("preserveAspectRatio", "none");
  it.setAttribute("role", "img");
  const last = steps[steps.length - 1];
  const text = `Loss ${train[0][1].toFixed(3)} at step 1, ${last.train_loss.toFixed(3)} at step ${last.step}`;
  it.setAttribute("aria-label", text);
  it.append(path(train, frame, "train"), path(pairs, frame, "valid"));
  return [it, element("small", text)];
}

async function download(job) {
  const content = await (await api(`/v1/files/${job.result_files[0]}/content`)).blob();
  const url = URL.createObjectURL(content);
  const name = job.fine_tuned_model.replaceAll(":", "-");
  element("a", "", { href: url, download: `${name}.gguf` }).click();
  URL.revokeObjectURL(url);
}

async function tryIt(job) {
  await showModels(job.fine_tuned_model);
  $("text").focus();
}

async function cancel(job) {
  await api(`${JOBS}/${job.id}/cancel`, { method: "POST", headers: { "content-type": "application/json" } });
  await show();
}

/** Steps that were seen, by job: those that are over do not change. */
const seen = new Map();

async function steps(job) {
  const over = isOver(job);
  if (over && seen.get(job.id)?.over) return seen.get(job.id).steps;
  const { data } = await (await api(`${JOBS}/${job.id}/events?limit=10000`)).json();
  const found = data.filter((event) => event.type === "metrics").map((event) => event.data);
  seen.set(job.id, { over, steps: found.reverse() });
  return found;
}

const isOver = (job) => !["queued", "running"].includes(job.status);

async function card(job) {
  const it = element("article", "", { className: "job" });
  const status = element("span", job.status, { className: job.status });
  const row = element("div", "", { className: "row" });
  row.append(element("strong", job.fine_tuned_model ?? job.suffix ?? job.id), status);
  it.append(row);
  const done = await steps(job);
  if (done.length > 0) it.append(...curve(done));
  if (job.error) it.append(element("p", job.error.message, { className: "failed" }));
  const actions = element("div", "", { className: "row" });
  if (!isOver(job)) actions.append(button("Cancel", () => cancel(job)));
  if (job.fine_tuned_model) {
    actions.append(button("Try it", () => tryIt(job)), button("Download", () => download(job)));
  }
  it.append(actions);
  return it;
}

let timer = null;
/** The statuses that were shown last. */
let shown = "";

async function show() {
  clearTimeout(timer);
  const { data } = await (await api(`${JOBS}?limit=20`)).json();
  const cards = await Promise.all(data.map(card));
  const focused = document.activeElement?.closest(".job") !== null;
  const statuses = data.map((job) => job.id + job.status).join();
  // Who is about to press a button shall find it where it was.
  if (!focused || statuses !== shown) $("jobs").replaceChildren(...cards);
  if (shown && statuses !== shown) await showModels();
  shown = statuses;
  if (!data.every(isOver)) timer = setTimeout(() => show().catch(complain), AGAIN);
}

$("train").addEventListener("submit", start);
$("file").addEventListener("change", () => choose($("file").files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
show().catch((error) => {
  if (error.status !== 501) return complain(error);
  $("no-data").hidden = false;
  $("train").hidden = true;
});
