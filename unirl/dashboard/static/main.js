// Starts the page, keeps it up to date, and routes keys and the URL hash to the open view.

import { get, getRun } from "./api.js";
import { recolour } from "./charts.js";
import { compare } from "./compare.js";
import { byId, el, empty, setText } from "./dom.js";
import { duration, num } from "./format.js";
import { fleet } from "./fleet.js";
import { overview } from "./overview.js";
import { pairs } from "./pairs.js";
import { Series } from "./series.js";
import { go, link, onChange, state } from "./state.js";
import { announce, drawStrip, tick } from "./strip.js";

const VIEWS = { overview, pairs, compare, fleet };
const POLL_MS = 2000;
const HIDDEN_POLL_MS = 15000;
const STRIP_MS = 6000;
const RUNS_MS = 10000;

/** What views read: the run, its summary, its live metrics, and all runs. */
const context = { run: null, runs: [], summary: null, series: null };
let opened = null;
let stripAt = -Infinity;
let runsAt = -Infinity;
let lostAt = null;
let timer = null;
let working = false;
let again = false;

/** One round: ask for what is due, then let the open view draw. Rounds never overlap. */
async function round() {
  if (working) {
    again = true;
    return;
  }
  working = true;
  clearTimeout(timer);
  try {
    do {
      again = false;
      await refresh();
    } while (again);
    connected(state.runs.filter((run) => !isHere(run)));
    document.body.dataset.ready = "1";
  } catch (error) {
    if (error.status === undefined) console.error(error);
    if (error.status === 404) runsAt = -Infinity; // perhaps the run is gone
    lost(error);
  }
  working = false;
  timer = setTimeout(round, document.hidden ? HIDDEN_POLL_MS : POLL_MS);
}

async function refresh() {
  const now = performance.now();
  if (now - runsAt > RUNS_MS || !context.runs.length) {
    context.runs = (await get("runs")).runs;
    runsAt = now;
    drawRuns();
  }
  if (context.run && state.runs.includes(context.run) && !state.runs.some(isHere)) return gone();
  const run = state.runs.find(isHere) ?? (isHere(context.run) ? context.run : latest());
  if (!run) return nothingYet();
  if (!state.runs.length) go({ runs: [run] }, { replace: true }); // so that the address names what is shown
  if (run !== context.run) {
    Object.assign(context, { run, summary: null, series: new Series(run) });
    close();
    drawRuns();
  }
  const view = VIEWS[state.view] ?? overview;
  if (!context.summary) {
    await summarize(run);
    await context.series.load(view.names(context));
  } else {
    const { series, summary } = context;
    const fresh = await series.load(view.names(context), summary.strip.num_alerts.changes);
    if (fresh || performance.now() - stripAt > STRIP_MS) await restrip(run, fresh && series.strip);
    if (summary.strip.overview !== summary.mark) {
      await summarize(run);
      await context.series.load(view.names(context));
    }
  }
  await show(view);
}

/** All that is known of the run but its curves: asked for at first, and when something in it is another than before. */
async function summarize(run) {
  context.summary = await getRun(run);
  context.summary.mark = context.summary.strip.overview;
  stripped();
}

/** The strip alone, with alerts when there are new ones. */
async function restrip(run, given) {
  const { strip: before } = context.summary;
  const strip = given || (await getRun(run, "strip", { alerts: before.num_alerts.changes })).strip;
  context.summary.strip = { ...strip, alerts: strip.alerts ?? before.alerts };
  stripped();
}

function stripped() {
  context.summary.skipped = context.summary.strip.skipped;
  stripAt = performance.now();
  drawStrip(context.summary);
}

const isHere = (id) => context.runs.some((run) => run.id === id);

/** A run that goes on, else the one written last. */
function latest() {
  const newest = [...context.runs].sort((a, b) => (b.updated ?? 0) - (a.updated ?? 0));
  return (newest.find((run) => run.status === "running") ?? newest[0])?.id;
}

async function show(view) {
  drawNavigation(view);
  if (opened?.view === view && opened.run === context.run) await view.update(context);
  else {
    close();
    if (opened === null && document.body.dataset.ready) scrollTo({ top: 0, behavior: "instant" });
    opened = { view, run: context.run };
    const panel = byId("panel");
    panel.className = `view-${view.title.toLowerCase()}`;
    await view.show(panel, context);
  }
  document.body.dataset.view = view.title.toLowerCase();
}

function close() {
  opened?.view.hide();
  opened = null;
}

function nothingYet() {
  blank(
    overview,
    empty(
      "No run here yet",
      "Start one, for example unirl train -c configs/rl/lab.yaml, and it appears within ten seconds.",
      "Runs are folders with a run.json; unirl dashboard FOLDER shows those below FOLDER.",
    ),
  );
}

/** The run that stands here was removed: nothing of it is shown on, and no other one in its place. */
function gone() {
  blank(
    VIEWS[state.view] ?? overview,
    empty(
      "This run's folder is gone",
      `${context.run} was removed or moved while it was shown. Choose another run above; if it comes back, it is shown again.`,
    ),
  );
}

function blank(view, said) {
  close();
  drawRuns();
  drawNavigation(view);
  byId("strip").replaceChildren();
  byId("alerts").hidden = byId("skipped").hidden = true;
  byId("panel").replaceChildren(said);
}

function drawRuns() {
  const select = byId("run");
  const key = JSON.stringify([context.run, context.runs.map((run) => [run.id, run.status])]);
  if (select.dataset.key === key || document.activeElement === select) return;
  select.dataset.key = key;
  const absent = context.run && !isHere(context.run);
  select.replaceChildren(
    ...(absent ? [el("option", { value: context.run, selected: true, disabled: true }, `${context.run} · gone`)] : []),
    ...context.runs.map((run) =>
      el(
        "option",
        { value: run.id, selected: run.id === context.run },
        `${run.id} · ${run.status}`,
      ),
    ),
  );
}

function drawNavigation(current) {
  const nav = byId("views");
  Object.entries(VIEWS).forEach(([name, view], i) => {
    const anchor = nav.children[i] ?? nav.appendChild(el("a", {}, view.title));
    anchor.href = link({ view: name });
    if (view === current) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  });
  const step = context.series?.last;
  setText(byId("title"), `${current.title} of ${context.run ?? "runs"}`);
  document.title = `${step ? `step ${num(step, 7)} · ` : ""}${context.run ?? "unirl"} · ${current.title}`;
}

function lost(error) {
  const banner = byId("connection");
  const was = lostAt;
  lostAt ??= performance.now();
  const gone = error.status === 0;
  setText(
    banner,
    gone
      ? `Connection lost ${duration((performance.now() - lostAt) / 1000)} ago; trying again every 2 s. What you see is what was there before. Is unirl dashboard still running?`
      : error.message,
  );
  banner.hidden = false;
  document.body.classList.toggle("disconnected", gone);
  if (was === null) announce(banner.textContent);
}

function connected(absent) {
  if (lostAt !== null) announce("Connected again.");
  lostAt = null;
  byId("connection").hidden = !absent.length;
  setText(
    byId("connection"),
    absent.length ? `Not among these runs: ${absent.join(", ")}. Choose another one above.` : "",
  );
  document.body.classList.remove("disconnected");
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  recolour();
}

function onKey(event) {
  if (event.key === "Escape" && event.target.matches("input, select") && !byId("help").open) {
    event.preventDefault(); // browsers would empty a search
    event.target.blur();
  }
  if (
    event.defaultPrevented ||
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    byId("help").open ||
    !byId("keys-on").checked
  )
    return;
  const typing = event.target.matches("input:not([type=checkbox], [type=range]), textarea, select");
  const arrow = event.key.startsWith("Arrow");
  if (typing || (arrow && event.target.closest("input, summary, .scroll, [tabindex='0']"))) return;
  const keys = {
    ...VIEWS[state.view]?.keys,
    "?": () => byId("help").showModal(),
    ...Object.fromEntries(Object.keys(VIEWS).map((view, i) => [String(i + 1), () => go({ view })])),
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
}

function start() {
  byId("run").addEventListener("change", (event) =>
    go({
      runs: [event.target.value, ...state.runs.slice(1).filter((run) => run !== event.target.value)],
      step: null,
      pair: null,
      range: null,
    }),
  );
  const theme = byId("theme");
  theme.value = document.documentElement.dataset.theme ?? "";
  theme.addEventListener("change", () => {
    localStorage.setItem("unirl-theme", theme.value);
    setTheme(theme.value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  const keysOn = byId("keys-on");
  keysOn.checked = localStorage.getItem("unirl-keys") !== "off";
  keysOn.addEventListener("change", () => localStorage.setItem("unirl-keys", keysOn.checked ? "on" : "off"));
  byId("help-open").addEventListener("click", () => byId("help").showModal());
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("panel").focus();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", () => document.hidden || round());
  onChange((now, before) => {
    if (now.view === "overview" && now.range !== before.range) close();
    const onlyPair = link({ ...before, step: now.step, pair: now.pair }) === link();
    if (onlyPair && now.pair && before.pair !== now.pair && opened?.view.hurry?.()) drawNavigation(opened.view);
    else round();
  });
  setInterval(tick, 1000);
  round();
}

start();
