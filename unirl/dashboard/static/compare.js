// Several runs over one another: curves, last evaluation, settings that differ.

import { get } from "./api.js";
import { Chart } from "./charts.js";
import { el, empty, table } from "./dom.js";
import { interval, num, setting } from "./format.js";
import { Series, smooth } from "./series.js";
import { go, state } from "./state.js";

const FIRST = [
  "reward/understanding",
  "reward/generation",
  "policy/kl",
  "sft/nats/text",
  "sft/nats/image",
  "sft/accuracy/text",
  "time/step_s",
];
const HUES = ["a", "b", "c", "d", "e", "f", "g", "h"];
const MOST = 8;
const CLOCKS = [
  [7200, "hours", 3600],
  [300, "minutes", 60],
  [0, "seconds", 1],
];

let root, here, current, all, charts, tables;

export const compare = {
  title: "Compare",
  names: () => [],
  async show(panel, context) {
    root = panel;
    all = new Map();
    charts = null;
    tables = null;
    await this.update(context);
  },
  async update(context) {
    here = new Set(context.runs.map((run) => run.id));
    current = context.run;
    const key = JSON.stringify([
      compared(),
      state.shown,
      state.x,
      context.runs.map((run) => [run.id, run.status]),
      context.summary.metrics.length,
    ]);
    if (charts?.key !== key) build(key, context);
    await Promise.all([draw(context), drawTables(context)]);
  },
  hide() {
    charts?.made.forEach((chart) => chart.destroy());
    charts = null;
  },
};

/** The runs that the hash names, else the one that the other views show. */
function compared() {
  const named = state.runs.filter((run) => here.has(run)).slice(0, MOST);
  return named.length ? named : [current];
}
const hue = (i) => HUES[i % HUES.length];

function metricsOf({ summary }) {
  const names = summary.metrics.map((metric) => metric.name);
  if (state.shown.length) return { names, shown: state.shown };
  const usual = FIRST.filter((name) => names.includes(name));
  return { names, shown: usual.length ? usual : names.slice(0, 4) };
}

function build(key, context) {
  compare.hide();
  const { names, shown } = metricsOf(context);
  const units = new Map(context.summary.metrics.map((metric) => [metric.name, metric.unit]));
  const runs = compared();
  const x = { step: "step", time: "wall time", samples: "samples" }[state.x] ?? "step";
  const xLabel = x === "step" ? null : () => (x === "samples" ? x : `${clockOf().name} since the first step`);
  const made = shown.map((name) => {
    const chart = new Chart(
      name,
      runs.map((run, i) => ({ label: run, colour: hue(i), dash: i % 2 ? [6, 3] : null })),
      { height: 190, x, xLabel, unit: units.get(name) === "1" ? "" : units.get(name), synced: false },
    );
    chart.figure.querySelector("figcaption").append(
      el(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": `Remove ${name}`,
          on: { click: () => go({ shown: shown.filter((other) => other !== name) }) },
        },
        "×",
      ),
    );
    return chart;
  });
  tables = { holder: el("div", { class: "tables" }), key: null };
  root.replaceChildren(
    toolbar(names, shown),
    el(
      "div",
      { class: "compare" },
      chooser(context.runs),
      el(
        "div",
        {},
        el(
          "div",
          { class: "charts wide" },
          made.map((chart) => chart.figure),
        ),
        tables.holder,
      ),
    ),
  );
  charts = { key, made, shown };
}

function toolbar(names, shown) {
  const output = el("output", { for: "smooth" }, String(state.smooth));
  const slider = el("input", {
    id: "smooth",
    type: "range",
    min: 0,
    max: 0.99,
    step: 0.01,
    value: state.smooth,
    on: {
      input: () => {
        output.value = slider.value;
        go({ smooth: Number(slider.value) }, { replace: true });
      },
    },
  });
  const add = el(
    "select",
    { on: { change: () => add.value && go({ shown: [...shown, add.value] }) } },
    el("option", { value: "" }, "choose…"),
    names.filter((name) => !shown.includes(name)).map((name) => el("option", { value: name }, name)),
  );
  return el(
    "div",
    { class: "toolbar" },
    el("label", {}, "Smoothing ", slider, " ", output),
    el(
      "label",
      {},
      "Against ",
      el(
        "select",
        { id: "x-axis", on: { change: (event) => go({ x: event.target.value }, { replace: true }) } },
        [
          ["step", "step"],
          ["time", "wall time"],
          ["samples", "samples"],
        ].map(([value, text]) => el("option", { value, selected: state.x === value }, text)),
      ),
    ),
    el("label", {}, "Add a metric ", add),
  );
}

function chooser(runs) {
  const chosen = compared();
  const toggle = (id) => (event) =>
    go({ runs: event.target.checked ? [...chosen, id] : chosen.filter((run) => run !== id) });
  return el(
    "fieldset",
    { class: "chooser" },
    el("legend", {}, "Runs"),
    runs.map((run) => {
      const at = chosen.indexOf(run.id);
      return el(
        "label",
        {},
        el("input", {
          type: "checkbox",
          checked: at >= 0,
          disabled: at < 0 && chosen.length >= MOST,
          on: { change: toggle(run.id) },
        }),
        el("i", { class: `swatch c-${at >= 0 ? hue(at) : "none"}${at % 2 ? " dashed" : ""}`, "aria-hidden": "true" }),
        el(
          "span",
          {},
          run.id,
          el(
            "small",
            {},
            `${run.status}, ${num(run.step, 7)} / ${num(run.num_steps, 7)}`,
          ),
        ),
      );
    }),
    chosen.length >= MOST ? el("p", { class: "note" }, `${MOST} at most.`) : null,
  );
}

async function draw({ summary }) {
  const { made, shown } = charts;
  const runs = compared();
  for (const run of runs) if (!all.has(run)) all.set(run, new Series(run));
  const loaded = await Promise.allSettled(runs.map((run) => all.get(run).load(shown)));
  if (charts?.made !== made) return;
  const stamp = JSON.stringify([state.smooth, runs.map((run) => all.get(run).revision)]);
  if (stamp === charts.drawn) return;
  charts.drawn = stamp;
  const meanings = new Map(summary.metrics.map((metric) => [metric.name, metric.meaning]));
  made.forEach((chart, c) => {
    const each = runs.map((run) => [axis(all.get(run)), smooth(all.get(run).column(shown[c]), state.smooth)]);
    const [xs, ...columns] = join(each);
    const breaks = state.x === "time" ? runs.map((run) => pauses(all.get(run))) : [];
    chart.draw(xs, columns, { meaning: meanings.get(shown[c]) ?? "", breaks });
  });
  const failed = loaded.find((result) => result.status === "rejected");
  if (failed) throw failed.reason;
}

function axis(series) {
  if (state.x === "samples") return series.samples.map((value) => value ?? 0);
  if (state.x === "time") return series.times.map(since(series));
  return series.steps;
}

const since = (series) => {
  const { unit } = clockOf();
  return (time) => (time - series.times[0]) / unit;
};

/** The unit of wall time that suits the longest of the runs. */
function clockOf() {
  const longest = Math.max(0, ...compared().map((run) => (all.get(run)?.times.at(-1) ?? 0) - (all.get(run)?.times[0] ?? 0)));
  const [, name, unit] = CLOCKS.find(([least]) => longest >= least);
  return { name, unit };
}

/** From the last step before each resume to the first one after it: nothing ran there. */
function pauses(series) {
  const { times, starts } = series;
  const at = since(series);
  return starts
    .map((start) => [times.findLast((time) => time < start), times.find((time) => time >= start)])
    .filter(([before, after]) => before !== undefined && after !== undefined)
    .map((ends) => ends.map(at));
}

/** One ascending x for all runs; a run has null where only another has a value. */
function join(each) {
  const filled = each.map(([xs, values]) => {
    const kept = [];
    xs.forEach((x, i) => (!kept.length || x > kept.at(-1)[0]) && kept.push([x, values[i] ?? null]));
    return [kept.map(([x]) => x), kept.map(([, value]) => value)];
  });
  return filled.length ? window.uPlot.join(filled) : [[]];
}

async function drawTables(context) {
  const runs = compared();
  const steps = new Map(context.runs.map((run) => [run.id, run.step]));
  const key = JSON.stringify(runs.map((run) => [run, steps.get(run)])); // a live run may have been evaluated again
  const mine = tables;
  if (mine.key === key) return;
  mine.key = key;
  const { config, evaluations } = await get("compare", { runs: runs.join(",") });
  const tasks = [...new Set(runs.flatMap((run) => Object.keys(evaluations[run]?.tasks ?? {})))].sort();
  const heads = runs.map((run) => {
    const { step } = evaluations[run] ?? {};
    return step === undefined ? `${run}, not evaluated` : `${run}, step ${step}`;
  });
  const differing = Object.entries(config);
  mine.holder.replaceChildren(
    el(
      "section",
      { "aria-label": "Last evaluation" },
      el("h2", {}, "Last evaluation"),
      tasks.length
        ? table(
            "Last evaluation with 95 % intervals",
            ["held-out", ...heads],
            tasks.map((task) => [
              task,
              ...runs.map((run) => (evaluations[run]?.tasks?.[task] ? interval(evaluations[run].tasks[task]) : "–")),
            ]),
          )
        : empty("No evaluation yet", "evaluation.enabled=true measures before the first step and after the last."),
    ),
    el(
      "section",
      { "aria-label": "Settings that differ" },
      el("h2", {}, "Settings that differ"),
      differing.length
        ? table(
            "Settings that differ",
            ["setting", ...runs],
            differing.map(([name, values]) => [
              name,
              ...runs.map((run) => (run in values ? setting(values[run]) : "–")),
            ]),
            { words: 99 },
          )
        : el(
            "p",
            { class: "note" },
            runs.length > 1 ? "None: the runs have the same settings." : "Choose a second run to see what differs.",
          ),
    ),
  );
}
