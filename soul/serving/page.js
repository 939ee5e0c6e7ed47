"use strict";
// The page: one question to every model of a run, side by side. All text goes in as text, never as markup.
const ROLES = {
  target: ["Original", "before unlearning"],
  unlearned: ["Unlearned", "after unlearning"],
  retrained: ["Retrained", "never saw the forgotten rows"],
};
const GROUPS = { forget: "To be forgotten", retain: "To be kept", world: "About the world" };
const SHOWN = ["forget.rougeL_recall", "forget.exact_memorization", "forget.probability", "retain.rougeL_recall", "retain.probability", "model_utility"];
const $ = (id) => document.getElementById(id);
const state = { key: "", runs: new Map(), questions: [], abort: null };

function make(tag, options = {}, ...children) {
  const { class: name, data, ...rest } = options;
  const node = Object.assign(document.createElement(tag), rest);
  if (name) node.className = name;
  Object.assign(node.dataset, data ?? {});
  node.append(...children.filter((child) => child !== null));
  return node;
}

async function call(path, body, signal) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw Object.assign(new Error(told?.error?.message ?? `the server answered ${reply.status}`), { status: reply.status });
}

function complain(error) {
  if (error?.name === "AbortError") return;
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

async function start() {
  complain(null);
  try {
    const listed = await (await call("/v1/models")).json();
    $("key-form").hidden = true;
    const models = [...listed.data.filter((model) => !model.alias_of), ...listed.refused.map((model) => ({ ...model, refused: true }))];
    state.runs = Map.groupBy ? Map.groupBy(models, (model) => model.run) : group(models);
    $("run").replaceChildren(...[...state.runs.keys()].map((run) => make("option", { value: run, textContent: run })));
    $("run-field").hidden = state.runs.size < 2;
    await show();
  } catch (error) {
    if (error.status === 401) {
      $("key-form").hidden = false;
      if (!state.key) error = null;
      $("key").focus();
    }
    complain(error);
  }
}

function group(models) {
  const runs = new Map();
  for (const model of models) runs.set(model.run, [...(runs.get(model.run) ?? []), model]);
  return runs;
}

function models() {
  const order = Object.keys(ROLES);
  return [...(state.runs.get($("run").value) ?? [])].sort((a, b) => order.indexOf(a.role) - order.indexOf(b.role));
}

async function show() {
  $("answers").replaceChildren(...models().map(card));
  $("scale").hidden = true;
  $("status").textContent = "";
  $("go").disabled = models().every((model) => model.refused);
  const run = $("run").value;
  const report = await (await call(`/v1/models/${run}/report`)).json();
  if (run !== $("run").value) return;
  fillQuestions(report.questions);
  fillReport(report);
}

function card(model) {
  const [name, meaning] = ROLES[model.role];
  const kind = model.refused ? "refused" : model.role !== "unlearned" ? "reference" : model.evaluated ? "approved" : "unevaluated";
  const words = { refused: "not hosted", reference: "for comparison", approved: "passed the gate", unevaluated: "not approved" };
  const answer = make("div", { class: "answer" });
  if (model.refused) answer.append(make("span", { class: "empty", textContent: capital(model.reason) + "." }));
  return make(
    "article",
    { class: model.role, data: { model: model.id } },
    make("h3", {}, name, make("span", { class: `badge ${kind}`, textContent: words[kind] })),
    make("small", { textContent: meaning }),
    answer,
    make("div", { class: "heat", hidden: true }),
  );
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function fillQuestions(questions) {
  state.questions = questions;
  $("pick-field").hidden = !questions.length;
  const groups = Object.entries(GROUPS).map(([group, label]) =>
    make("optgroup", { label }, ...questions.flatMap((item, place) => (item.group === group ? [make("option", { value: place, textContent: item.question })] : []))),
  );
  $("pick").replaceChildren(make("option", { value: "", textContent: "your own question" }), ...groups.filter((node) => node.children.length));
  const same = questions.findIndex((item) => item.question === $("question").value);
  if (same >= 0) $("pick").value = String(same);
  if (questions.length && !$("question").value) {
    $("pick").value = "0";
    pick();
  }
}

function pick() {
  const item = state.questions[$("pick").value];
  $("question").value = item?.question ?? "";
  $("truth").value = item?.answer ?? "";
  if (!item) $("question").focus();
}

async function ask(event) {
  event.preventDefault();
  complain(null);
  state.abort?.abort();
  const abort = (state.abort = new AbortController());
  const question = $("question").value.trim();
  const truth = $("truth").value.trim();
  const asked = models().filter((model) => !model.refused);
  $("stop").hidden = false;
  $("status").textContent = "Answering.";
  $("scale").hidden = !truth;
  const jobs = asked.flatMap((model) => {
    const node = document.querySelector(`article[data-model="${CSS.escape(model.id)}"]`);
    return [answer(model.id, node, question, abort.signal), heat(model.id, node, question, truth, abort.signal)];
  });
  const failed = (await Promise.allSettled(jobs)).find((job) => job.status === "rejected");
  if (state.abort !== abort) return;
  $("stop").hidden = true;
  $("status").textContent = abort.signal.aborted ? "Stopped." : failed ? "" : `${asked.length} models have answered.`;
  if (failed) complain(failed.reason);
}

async function answer(model, node, question, signal) {
  const place = node.querySelector(".answer");
  place.replaceChildren();
  place.classList.add("waiting");
  try {
    const body = { model, messages: [{ role: "user", content: question }], temperature: 0, stream: true };
    for await (const event of events(await call("/v1/chat/completions", body, signal))) {
      if (event.error) throw new Error(event.error.message);
      place.append(event.choices[0]?.delta?.content ?? "");
    }
    if (!place.textContent) place.append(make("span", { class: "empty", textContent: "It says nothing." }));
  } finally {
    place.classList.remove("waiting");
  }
}

async function* events(reply) {
  let text = "";
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function heat(model, node, question, truth, signal) {
  const place = node.querySelector(".heat");
  place.hidden = !truth;
  if (!truth) return;
  const told = await (await call("/v1/score", { model, messages: [{ role: "user", content: question }], answer: truth }, signal)).json();
  const mean = Math.exp(told.tokens.reduce((sum, token) => sum + token.logprob, 0) / told.tokens.length);
  const strip = told.tokens.map(({ token, logprob, best }) => {
    const chance = Math.exp(logprob);
    const instead = best === token ? "its first choice" : `it would say “${best.trim() || best}”`;
    const cell = make("span", { class: "token", textContent: token, tabIndex: 0, role: "listitem", data: { tip: `${percent(chance)}, ${instead}` } });
    cell.setAttribute("aria-label", `${token.trim() || "space"}: ${percent(chance)}, ${instead}`);
    cell.style.setProperty("--p", chance.toFixed(3));
    return cell;
  });
  const list = make("div", { class: "tokens", role: "list" }, ...strip);
  list.setAttribute("aria-label", "The true answer, token by token");
  place.replaceChildren(make("p", {}, "The true answer, to this model: ", make("strong", { textContent: percent(mean) }), " per token"), list);
}

function percent(share) {
  return share > 0.9995 ? "100 %" : share >= 0.001 ? `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %` : "under 0.1 %";
}

function fillReport(report) {
  const verdict = report.hosted ? (report.evaluated ? ["passed the gate", ""] : ["not approved", "unevaluated"]) : ["not hosted", "refused"];
  const parts = [make("p", {}, make("strong", { textContent: report.run + " " }), make("span", { class: `badge ${verdict[1]}`, textContent: verdict[0] }))];
  if (report.benchmark) parts.push(make("p", { class: "hint", textContent: `${report.method} with ${report.optimizer} on ${report.benchmark}` }));
  if (report.reason && !report.checks.length) parts.push(make("p", { textContent: `${capital(report.reason)}.` }));
  parts.push(make("ul", { class: "checks" }, ...report.checks.map((check) => make("li", { class: check.passed ? "" : "failed" }, `${check.passed ? "" : "Failed: "}${check.text}`))));
  if (report.models) {
    const reading = "On the forget rows the unlearned model should be like the retrained one; elsewhere, like the original.";
    parts.push(make("p", { class: "hint", textContent: reading }), table(report));
  }
  if (report.has_page) parts.push(fullReport(report.id));
  $("report").replaceChildren(...parts);
}

function table(report) {
  const names = Object.keys(ROLES).filter((name) => report.models[name]);
  const value = (name, path) => path.split(".").reduce((at, key) => at?.[key], report.models[name]);
  const rows = SHOWN.filter((path) => names.some((name) => typeof value(name, path) === "number")).map((path) => {
    const [split, metric] = path.includes(".") ? path.split(".") : ["", path];
    const word = report.words[metric];
    const head = make("th", { scope: "row", title: word.meaning }, word.title, make("small", { textContent: split ? ` · ${split} rows` : "" }));
    return make("tr", {}, head, ...names.map((name) => cell(value(name, path), name)));
  });
  const head = make("tr", {}, make("td"), ...names.map((name) => make("th", { scope: "col", textContent: ROLES[name][0] })));
  const box = make("div", { class: "scroll", tabIndex: 0, role: "region" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  box.setAttribute("aria-label", "Numbers of the report");
  return box;
}

function cell(number, model) {
  if (typeof number !== "number") return make("td", { textContent: "–" });
  const fill = make("i");
  fill.style.width = `${Math.min(Math.max(number, 0), 1) * 100}%`;
  return make("td", { class: model }, number.toFixed(3), make("span", { class: "bar", ariaHidden: "true" }, fill));
}

function fullReport(model) {
  const isWide = matchMedia("(min-width: 40rem)").matches;
  const details = make("details", { open: isWide }, make("summary", { textContent: "The whole report, with its plots" }));
  details.addEventListener("toggle", async () => {
    if (!details.open || details.querySelector("iframe")) return;
    try {
      const page = await (await call(`/v1/models/${model}/report.html`)).text();
      details.append(make("iframe", { title: "Evaluation report", sandbox: "", srcdoc: page }));
    } catch (error) {
      complain(error);
    }
  });
  return details;
}

$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => state.abort?.abort());
$("pick").addEventListener("change", pick);
$("run").addEventListener("change", () => show().catch(complain));
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  start();
});
start();
