// One run on one page: rewards, policy, pairing, time. Charts stand for what the run records, and no more.

import { getRun } from "./api.js";
import { Chart, histogram } from "./charts.js";
import { el, empty, table } from "./dom.js";
import { plural, setting } from "./format.js";
import { Series, smooth } from "./series.js";
import { go, state } from "./state.js";
import { isLive } from "./strip.js";

const PHASES = ["text_rollout", "image_rollout", "decode", "reward", "score", "backward", "sync", "idle", "other"];
const HUES = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
export const taskColour = (task) => ({ understanding: "und", generation: "gen" })[task] ?? "c";
export const kindColour = (kind) => (kind === "aligned" ? "aligned" : "retrieved");

/** Whether it is a run of `unirl sft`. */
export const isTuning = (summary) => summary.metrics.some((metric) => metric.name.startsWith("sft/"));

let root, parts, zoomed, histogramStep, drawn;

export const overview = {
  title: "Overview",
  async show(panel, context) {
    root = panel;
    parts = null;
    zoomed = null;
    histogramStep = null;
    drawn = null;
    await this.update(context);
  },
  names: (context) => plan(context.summary).flatMap((section) => section.charts.flatMap((chart) => chart.names)),
  async update(context) {
    const sections = plan(context.summary);
    const key = JSON.stringify([context.run, sections.map((s) => s.charts.map((c) => [c.title, c.lines.length]))]);
    if (!parts || parts.key !== key) {
      build(sections, key, context);
      drawn = null;
    }
    await draw(context);
  },
  hide() {
    parts?.charts.forEach(({ chart }) => chart.destroy());
    parts = null;
  },
};

/** The sections and charts for the metrics that this run has. */
function plan(summary) {
  const has = new Set(summary.metrics.map((metric) => metric.name));
  const matching = (pattern) => [...has].filter((name) => pattern.test(name));
  const line = (name, label, hue, more) => (has.has(name) ? { name, label, colour: hue, ...more } : null);
  const chart = (title, lines, options = {}) => {
    const present = lines.filter(Boolean);
    return { title, lines: present, names: present.map((l) => l.name), options };
  };
  const perTask = (suffix, label = (task) => task) =>
    tasks.map((task) => line(`${suffix[0]}${task}${suffix[1]}`, label(task), taskColour(task)));
  const hues = (names, label) =>
    names.map((name, i) => line(name, label(name), HUES[i % HUES.length], i >= HUES.length ? { dash: [4, 3] } : {}));
  const tasks = matching(/^reward\/[^/]+$/)
    .map((name) => name.slice(7))
    .filter((task) => has.has(`reward/${task}/group_std`))
    .sort()
    .reverse();
  const phases = matching(/^phase\/.*_s$/).length
    ? PHASES.map((phase) => `phase/${phase}_s`).filter((name) => has.has(name))
    : matching(/^time\/.*_s$/).filter((name) => name !== "time/step_s");
  const rates = (what) => {
    const fleet = matching(new RegExp(`^fleet/[^/]+/${what}_per_s$`));
    return fleet.length
      ? hues(fleet, (name) => name.split("/")[1])
      : [line(`rollout/${what}_per_s`, "all workers", "a")];
  };
  const tuning = isTuning(summary);
  const perModality = (title, name, options) => {
    const made = chart(
      title,
      hues(matching(new RegExp(`^sft/${name}/`)), (metric) => metric.split("/")[2]),
      options,
    );
    return { ...made, heldOut: true };
  };
  const sections = [
    ["Reward", "wide", tasks.map((task) => rewardChart(task, line, chart))],
    [
      "Fine-tuning",
      "wide",
      [
        perModality("Cross-entropy", "nats", { unit: "nats per target", floor: true }),
        perModality("Accuracy", "accuracy", { unit: "share" }),
      ],
    ],
    [
      tuning ? "Learner" : "Policy",
      "small",
      [
        chart(
          "KL from the sampling policy",
          [line("policy/kl", "KL", "a"), line("policy/kl_reference", "from the reference", "b")],
          { unit: "nats", floor: true },
        ),
        chart("Clipped tokens", [line("policy/clip_fraction", "share", "a")], { floor: true }),
        chart("Entropy", [line("policy/entropy/text", "text", "und"), line("policy/entropy/image", "image", "gen")], {
          unit: "nats",
        }),
        chart(
          "Ratio, extremes",
          [
            line("policy/ratio_max", "largest", "a"),
            line("policy/ratio_mean", "mean", "c"),
            line("policy/ratio_min", "least", "b"),
          ],
          { digits: 7, about: "policy/ratio_mean" },
        ),
        chart("Loss", tuning ? [line("learner/loss", "loss", "a")] : [], { unit: "nats" }),
        chart("Gradient norm", [...perTask(["learner/grad_norm/", ""]), line("learner/grad_norm", "whole", "c")], {
          floor: true,
        }),
        chart(
          "Gradient cosine, und · gen",
          [
            line("learner/grad_cosine", "all pairs", "a", { width: 2 }),
            line("learner/grad_cosine/aligned", "aligned", "aligned"),
            line("learner/grad_cosine/retrieved", "retrieved", "retrieved", { dash: [5, 3] }),
          ],
          { zero: true },
        ),
        chart("Learning rate", tuning ? [line("learner/lr", "rate", "a")] : [], { floor: true }),
        perModality("Targets of a step", "num_targets", { floor: true, marks: false }),
        chart("Guided − conditional log-prob", [line("policy/guidance_gap", "mean gap", "gen")], {
          unit: "nats",
          floor: true,
        }),
        chart(
          "Learner − sampler log-prob",
          [
            line("policy/logprob_gap_max", "largest gap", "a"),
            line("policy/logprob_gap/text", "mean, text", "und"),
            line("policy/logprob_gap/image", "mean, image", "gen", { dash: [5, 3] }),
          ],
          { unit: "nats", floor: true },
        ),
      ],
    ],
    [
      "Pairing",
      "small",
      [
        has.has("pairs/similarity_mean")
          ? { title: "Similarity", lines: [], names: [], histogram: true }
          : chart("", []),
        chart("Pair weight", [line("pairs/weight_mean", "mean", "a"), line("pairs/weight_min", "least", "b")]),
        chart("Zero-variance groups", perTask(["reward/", "/zero_variance_fraction"]), { unit: "share", floor: true }),
        chart("Aligned pairs", [line("pairs/aligned_fraction", "share", "aligned")], { floor: true }),
      ],
    ],
    [
      "Time",
      "small",
      [
        chart(
          "Phases of a step",
          phases.map((name, i) =>
            line(name, name.split("/")[1].replace(/_s$/, "").replaceAll("_", " "), HUES[i % HUES.length]),
          ),
          { unit: "s", stacked: true, wide: true },
        ),
        chart("Tokens per second", tuning ? [line("sft/tokens_per_s", "learner", "a")] : rates("tokens"), { floor: true }),
        chart("Wait for data", [line("sft/data_wait_s", "slowest rank", "a")], { unit: "s", floor: true }),
        chart("Images per second", rates("images"), { floor: true }),
        chart(
          "Queue length",
          hues(matching(/^fleet\/[^/]+\/queue_length$/), (name) => name.split("/")[1]),
          { floor: true },
        ),
      ],
    ],
  ];
  return sections
    .map(([title, size, all]) => ({ title, size, charts: all.filter((c) => c.lines.length || c.histogram) }))
    .filter((section) => section.charts.length);
}

/** Mean with the spread inside groups as a band, and both kinds of pair as lines. */
function rewardChart(task, line, chart) {
  const mean = `reward/${task}`;
  const hue = taskColour(task);
  const made = chart(
    `${task[0].toUpperCase()}${task.slice(1)} reward`,
    [
      { name: null, label: "upper", colour: hue, faint: true },
      { name: null, label: "lower", colour: hue, faint: true },
      line(mean, "mean ± spread in a group", hue, { width: 2.25 }),
      line(`${mean}/aligned`, "aligned", "aligned"),
      line(`${mean}/retrieved`, "retrieved", "retrieved", { dash: [5, 3] }),
    ],
    { height: 210, band: [0, 1] },
  );
  made.names = [...made.names.filter(Boolean), `${mean}/group_std`];
  made.task = task;
  return made;
}

function build(sections, key, context) {
  overview.hide();
  const charts = [];
  const onRange = (ends) => go({ range: ends && `${Math.max(0, ends[0])}-${ends[1]}` });
  root.replaceChildren(
    toolbar(),
    ...sections.map((section) =>
      el(
        "section",
        { "aria-label": section.title },
        el("h2", {}, section.title),
        el(
          "div",
          { class: `charts ${section.size}` },
          section.charts.map((spec) => {
            if (spec.histogram) {
              const holder = el("div", { class: "holder" });
              charts.push({ spec, holder, chart: { destroy() {} } });
              return holder;
            }
            const chart = new Chart(spec.title, spec.lines, { ...spec.options, onRange });
            if (spec.options.wide) chart.figure.classList.add("double");
            charts.push({ spec, chart });
            return chart.figure;
          }),
        ),
      ),
    ),
    about(context),
  );
  parts = { key, charts };
}

function toolbar() {
  const output = el("output", { for: "smooth" }, String(state.smooth));
  const slider = el("input", {
    id: "smooth",
    type: "range",
    min: 0,
    max: 0.95,
    step: 0.05,
    value: state.smooth,
    on: {
      input: () => {
        output.value = slider.value;
        go({ smooth: Number(slider.value) }, { replace: true });
      },
    },
  });
  return el(
    "div",
    { class: "toolbar" },
    el("label", {}, "Smoothing ", slider, " ", output),
    state.range
      ? el(
          "button",
          { type: "button", on: { click: () => go({ range: null }) } },
          `Steps ${state.range.replace("-", " to ")}: show all`,
        )
      : el("span", { class: "note" }, "Drag over a chart to zoom in. The address keeps what you see."),
  );
}

async function draw(context) {
  const { summary } = context;
  const series = await zoom(context);
  if (!parts) return;
  if (!series.steps.length) {
    overview.hide();
    root.replaceChildren(noSteps(context), about(context));
    return;
  }
  const stamp = JSON.stringify([series.revision, state.range, state.smooth, summary.evaluations.length]);
  if (stamp === drawn) return;
  drawn = stamp;
  const meanings = new Map(summary.metrics.map((metric) => [metric.name, metric.meaning]));
  for (const { spec, chart, holder } of parts.charts) {
    if (holder) continue;
    const columns = spec.lines.map((line) => (line.name ? smooth(series.column(line.name), state.smooth) : null));
    const marks = spec.task
      ? evaluationMarks(summary.evaluations, spec.task, series)
      : spec.heldOut && spec.options.marks !== false
        ? spec.lines.flatMap((one) => heldOutMarks(summary.evaluations, one, series))
        : [];
    if (spec.task) {
      const spread = smooth(series.column(`reward/${spec.task}/group_std`), state.smooth);
      const edge = (sign) =>
        columns[2].map((mean, i) => (mean === null || spread[i] === null ? null : mean + sign * spread[i]));
      [columns[0], columns[1]] = [edge(1), edge(-1)];
    }
    chart.draw(series.steps, columns, {
      marks,
      meaning: meanings.get(spec.options.about ?? spec.lines.find((line) => line.name).name) ?? "",
    });
  }
  const last = series.last;
  const histograms = parts.charts.filter(({ holder }) => holder);
  if (histograms.length && last !== histogramStep) {
    histogramStep = last;
    const { edges, counts } = await getRun(context.run, "similarities", { step: last });
    for (const { holder } of histograms) {
      const open = holder.querySelector("details")?.open;
      holder.replaceChildren(histogram(`Similarity, step ${last}`, edges, counts, kindColour));
      holder.querySelector("details").open = open ?? false;
    }
  }
}

/** The live series, or one of the zoomed range at full resolution. */
async function zoom(context) {
  const range = state.range?.split("-").map(Number);
  if (!range || range.length !== 2 || !range.every(Number.isFinite)) return context.series;
  if (zoomed?.run !== context.run || zoomed.range.join() !== range.join()) zoomed = new Series(context.run, range);
  if (zoomed.cursor === null || range[1] >= (context.series.last ?? 0)) await zoomed.load(overview.names(context));
  return zoomed;
}

/** Evaluations of the steps in sight. */
function inSight(evaluations, series) {
  const [first, last] = state.range ? series.range : [0, Infinity];
  return evaluations.filter(({ step }) => step >= first && step <= last);
}

/** What held-out sequences gave for the metric of a line. */
function heldOutMarks(evaluations, { name, label }, series) {
  return inSight(evaluations, series)
    .filter(({ tasks }) => Number.isFinite(tasks[name]?.value))
    .map(({ step, tasks }) => ({ x: step, of: label, ...tasks[name] }));
}

function evaluationMarks(evaluations, task, series) {
  return inSight(evaluations, series)
    .flatMap(({ step, tasks }) => {
      const name = [
        `${task}/sampled/reward`,
        `${task}/reward`,
        task,
        ...Object.keys(tasks).filter((n) => n.startsWith(`${task}/`)),
      ].find((n) => tasks[n]);
      return name && tasks[name].value !== null ? [{ x: step, ...tasks[name] }] : [];
    });
}

function noSteps({ summary }) {
  const { status } = summary.strip;
  return empty(
    "No step has finished yet",
    isLive(status)
      ? "The first step also loads the models and may take a while; this page shows it as soon as it is written."
      : `The run is ${status}${summary.run.reason ? `: ${summary.run.reason}` : ""}. Its logs/driver.log says why.`,
  );
}

/** What the run is: facts and the settings that differ from the defaults. */
function about({ summary }) {
  const { run } = summary;
  const facts = [
    ["id", run.id],
    ["created", run.created],
    ["starts", String((run.attempt ?? 0) + 1)],
    ["host", run.host],
    ["commit", String(run.git_commit ?? "unknown").slice(0, 12)],
    ...Object.entries(run.versions ?? {}),
  ];
  const changed = Object.entries(run.changed ?? {});
  return el(
    "section",
    { "aria-label": "Run" },
    el("h2", {}, "Run"),
    el(
      "dl",
      { class: "facts" },
      facts
        .filter(([, fact]) => fact)
        .map(([name, fact]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(fact)))),
    ),
    el(
      "details",
      { class: "card" },
      el("summary", {}, `${plural(changed.length, "setting differs", "settings differ")} from the defaults`),
      changed.length
        ? table(
            "Changed settings",
            ["setting", "default", "this run"],
            changed.map(([key, [before, now]]) => [key, setting(before), setting(now)]),
            { words: 3 },
          )
        : null,
    ),
  );
}
