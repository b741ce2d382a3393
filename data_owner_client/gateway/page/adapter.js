// The second tab: how an adapter was trained, and what each side has learned of the other.
import { ApiError, getJson } from "./api.js";
import { curves, describe, element, short, table } from "./elements.js";

const WORDS = {
  context_mode: "contexts of the memory",
  interpolation_why: "reason for this mixture",
  lambda_max: "λ max",
  length_ratio: "target length / source length",
  mean_length: "mean target length, in tokens",
  mixture_nll: "loss with the adapter, nats per token",
  nearest: "retrieved examples in a prompt",
  nll: "loss, nats per token",
  plm_nll: "loss of the model alone, nats per token",
};
let shownName = null;

/** Show the facts about an adapter. Parts that the gateway does not have are left out. */
export async function showAdapter(view, name, hasAdapter) {
  shownName = name;
  view.replaceChildren(element("p", { className: "status", role: "status" }, "Loading …"));
  if (!hasAdapter) {
    view.replaceChildren(element("p", {}, "This is the owner's model. Choose an adapter above."));
    return;
  }
  try {
    const facts = await getJson(`pema/adapters/${encodeURIComponent(name)}`);
    if (shownName === name) view.replaceChildren(...parts(facts));
  } catch (error) {
    const message = error instanceof ApiError ? error.describe() : error.message;
    if (shownName === name) view.replaceChildren(element("p", { className: "error", role: "alert" }, message));
  }
}

function parts(facts) {
  return [
    element("h2", {}, facts.name ?? "Adapter"),
    section("Adapter", overview(facts)),
    ...history(facts.history ?? []),
    ...trials(facts),
    ...policies(facts.policies ?? []),
    section("Memory", pairsOf(facts.memory)),
    section("What each side has learned of the other", pairsOf(facts.exchange)),
    section("Validation", pairsOf(facts.validation)),
    section("Training settings", pairsOf(facts.settings)),
  ].filter((part) => part !== null);
}

function overview(facts) {
  const { name, history, trials, trial_weights: weights, policies, memory, exchange, validation, settings, ...rest } = facts;
  const interpolation = rest.interpolation ?? {};
  return pairsOf({
    ...rest,
    created: rest.created ? new Date(rest.created * 1000).toLocaleString() : null,
    interpolation: interpolation.gate ? "a learned gate" : interpolation.schedule,
    lambda_max: interpolation.lambda_max,
  });
}

/** Curves of everything that changes over the epochs; losses apart from the other numbers. */
function history(rows) {
  if (rows.length === 0) return [];
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))]
    .filter((name) => name !== "epoch" && rows.some((row) => Number.isFinite(row[name])));
  const series = (name) => ({ name: words(name), points: rows.map((row, i) => [i + 1, row[name]]) });
  const isLoss = (name) => /loss|nll|cross|perplexity/u.test(name);
  const isTime = (name) => /seconds|rate|step/u.test(name);
  const losses = names.filter(isLoss);
  const others = names.filter((name) => !isLoss(name) && !isTime(name));
  return [
    ...(losses.length > 0 ? [curves("Training: losses", "epoch", losses.map(series))] : []),
    ...others.map((name) => curves(`Training: ${words(name)}`, "epoch", [series(name)])),
  ];
}

function trials({ trials: tried = [], trial_weights: weights = [] }) {
  if (tried.length === 0) return [];
  const flat = tried.map((trial) => flatten(trial));
  // A column says something where the trials differ. The settings of a single trial have a section of their own.
  const names = [...new Set(flat.flatMap((row) => Object.keys(row)))].filter((name) =>
    (flat.length === 1 ? !name.startsWith("settings ") : new Set(flat.map((row) => text(row[name]))).size > 1));
  const used = (weight = 0) => (weight === 1 ? "✓ chosen" : weight > 0 ? `✓ ${Math.round(100 * weight)} %` : "");
  const rows = flat.map((row, i) => [used(weights[i]), ...names.map((name) => text(row[name]))]);
  return [table("What train tried", ["", ...names.map((name) => words(name.replace(/^settings /u, "")))], rows)];
}

function policies(tried) {
  if (tried.length === 0) return [];
  const flat = tried.map((policy) => flatten(policy));
  const names = [...new Set(flat.flatMap((row) => Object.keys(row)))]
    .filter((name) => flat.some((row) => text(row[name]) !== "–"));
  const rows = flat.map((row, i) => [i === 0 ? "✓ chosen" : "", ...names.map((name) => text(row[name]))]);
  return [table("Decoding policies that train compared", ["", ...names.map(words)], rows)];
}

function section(title, pairs) {
  if (pairs.length === 0) return null;
  const list = element("dl", {});
  describe(list, pairs);
  return element("section", {}, element("h3", {}, title), list);
}

function pairsOf(record) {
  return Object.entries(flatten(record ?? {}))
    .filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => [words(name), text(value)]);
}

/** A record without records in it: their names are joined. Long lists are counted. */
function flatten(record, before = "") {
  return Object.fromEntries(Object.entries(record).flatMap(([name, value]) => {
    if (Array.isArray(value)) return [[before + name, value.length > 8 ? `${value.length} values` : value.map(text).join(", ")]];
    if (value !== null && typeof value === "object") return Object.entries(flatten(value, `${before}${name} `));
    return [[before + name, value]];
  }));
}

/** The name of a number in words. The parts of a joined name are apart by spaces. */
function words(name) {
  return name.split(" ").map((part) => WORDS[part] ?? part.replaceAll("_", " ")).join(" ");
}

function text(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : short(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
