// The playground: the request's form, both answers, the tabs.
import { ApiError, getJson, hasKey, streamChat } from "./api.js";
import { Answer } from "./answer.js";
import { Details } from "./details.js";
import { differences } from "./tokens.js";
import { showAdapter } from "./adapter.js";

// More pairs of tokens are compared only when both texts have ended.
const PAIRS_WHILE_STREAMING = 250_000;
const REASONS = {
  stop: "Ended by itself.",
  length: "Ended at the greatest length.",
  content_filter: "Ended by a filter.",
};

const byId = (id) => document.getElementById(id);
const details = new Details(byId("details"));
const adapted = new Answer("With the adapter", details, (prefix) => run(adapted, prefix));
const alone = new Answer("The model alone", details, (prefix) => run(alone, prefix));
const runs = new Map();
const parents = new Map();
let asked = null;
let comparing = false;

/** The request of an answer, as it is sent. */
function requestOf(answer, form, prefix) {
  const pema = { explain: true };
  if (answer === alone) pema.schedule = "none";
  else {
    if (form.schedule) pema.schedule = form.schedule;
    if (form.lambdaMax !== "") pema.lambda_max = Number(form.lambdaMax);
  }
  if (prefix.length > 0) pema.prefix = prefix.map((token) => token.id);
  return {
    model: form.model,
    messages: [{ role: "user", content: form.prompt }],
    temperature: Number(form.temperature),
    max_tokens: Number(form.maxTokens),
    stream: true,
    stream_options: { include_usage: true },
    pema,
  };
}

function readForm() {
  return {
    model: byId("model").value,
    prompt: byId("prompt").value,
    schedule: byId("schedule").value,
    lambdaMax: byId("lambda-max").value,
    temperature: byId("temperature").value || "0",
    maxTokens: byId("max-tokens").value || "128",
  };
}

/** Generate one answer. Whatever this answer was doing before is aborted. */
async function run(answer, prefix = []) {
  runs.get(answer)?.abort();
  const controller = new AbortController();
  runs.set(answer, controller);
  byId("stop").disabled = false;
  answer.begin(prefix);
  // What an aborted run still brings must not end up in its successor.
  const current = () => runs.get(answer) === controller;
  try {
    let reason = "";
    for await (const chunk of streamChat(requestOf(answer, asked, prefix), controller.signal, (n) => answer.note(n))) {
      if (!current()) return;
      const choice = chunk.choices?.[0];
      if (choice) answer.add(choice.pema?.tokens ?? [], choice.delta?.content ?? "");
      if (choice?.finish_reason) reason = REASONS[choice.finish_reason] ?? choice.finish_reason;
      if (chunk.pema?.shown) answer.shown(chunk.pema.shown);
      compareSoon();
    }
    if (current()) answer.end(reason);
  } catch (error) {
    if (!current()) return;
    if (controller.signal.aborted) answer.end("Stopped.");
    else if (prefix.length > 0 && error.param === "pema.prefix") answer.end("It ends with the token that you chose.");
    else answer.fail(error instanceof ApiError ? error.describe() : `The gateway cannot be reached, or broke off: ${error.message}`);
  } finally {
    if (current()) runs.delete(answer);
    byId("stop").disabled = runs.size === 0;
    compareSoon();
  }
}

/** Compare both texts before the next frame, once for all tokens that came since the last. */
function compareSoon() {
  if (comparing) return;
  comparing = true;
  requestAnimationFrame(() => {
    comparing = false;
    const answers = [adapted, alone];
    const ids = answers.map((answer) => answer.tokens.map((token) => token.id));
    const ended = answers.map((answer) => answer.ended);
    if (ids.some((one) => one.length === 0)) return;
    if (ended.includes(false) && ids[0].length * ids[1].length > PAIRS_WHILE_STREAMING) return;
    differences(ids, ended).forEach((differing, side) => answers[side].mark(differing));
  });
}

function stop() {
  for (const controller of runs.values()) controller.abort();
}

function start() {
  asked = readForm();
  const hasAdapter = Boolean(parents.get(asked.model));
  byId("answers").replaceChildren(...(hasAdapter ? [adapted.root, alone.root] : [alone.root]));
  stop();
  adapted.empty();
  if (hasAdapter) run(adapted);
  run(alone);
}

/** Put the request into the clipboard, and onto the page for where there is none. */
async function copyAsCurl() {
  const form = readForm();
  const answer = parents.get(form.model) ? adapted : alone;
  const body = JSON.stringify(requestOf(answer, form, []), null, 1).replaceAll("'", "'\\''");
  const address = new URL("v1/chat/completions", document.baseURI);
  const key = hasKey() ? ' \\\n  -H "Authorization: Bearer $PEMA_GATEWAY_KEY"' : "";
  const command = `curl -N ${address} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${body}'`;
  byId("curl").querySelector("pre").textContent = command;
  byId("curl").hidden = false;
  const copied = await navigator.clipboard?.writeText(command).then(() => true, () => false);
  byId("curl-note").textContent = copied ? "Copied." : "The browser keeps the clipboard closed: select and copy.";
}

function selectTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const selected = other === tab;
    other.setAttribute("aria-selected", String(selected));
    other.tabIndex = selected ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !selected;
  }
  if (tab === byId("tab-adapter")) showChosenAdapter();
}

function showChosenAdapter() {
  const name = byId("model").value;
  showAdapter(byId("view-adapter"), name, Boolean(parents.get(name)));
}

function onTabKey(event) {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const step = event.key === "ArrowRight" ? 1 : tabs.length - 1;
  const tab = tabs[(tabs.indexOf(event.target) + step) % tabs.length];
  selectTab(tab);
  tab.focus();
}

/** List the models. An adapter is the child of the model that it adapts. */
async function listModels() {
  const { data } = await getJson("v1/models");
  const select = byId("model");
  for (const model of data) parents.set(model.id, model.parent ?? null);
  const adaptersFirst = [...data].sort((a, b) => Number(!a.parent) - Number(!b.parent));
  select.replaceChildren(...adaptersFirst.map((model) =>
    new Option(model.parent ? model.id : `${model.id} (no adapter)`, model.id)));
}

byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("request").requestSubmit();
});
byId("stop").addEventListener("click", stop);
byId("copy").addEventListener("click", copyAsCurl);
byId("model").addEventListener("change", () => {
  if (!byId("view-adapter").hidden) showChosenAdapter();
});
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => selectTab(tab));
  tab.addEventListener("keydown", onTabKey);
}
try {
  await listModels();
} catch (error) {
  byId("page-error").textContent = `The models cannot be listed: ${error instanceof ApiError ? error.describe() : error.message}`;
  byId("page-error").hidden = false;
}
