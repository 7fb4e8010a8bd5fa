// A pair: its question and prompt, its K answers and K images, and what each of them earned.

import { getRun, imageUrl } from "./api.js";
import { Chart } from "./charts.js";
import { byId, el, empty, table, untrusted } from "./dom.js";
import { num, plural, signed } from "./format.js";
import { isTuning, kindColour } from "./overview.js";
import { go, link, state } from "./state.js";

const PAGE = 50;
const FILTERS = ["kind", "zero", "task", "min", "max", "text", "at"];
const TYPED_MS = 300;

let typed = null;
let root, run, tuning, list, found, shownKey, asked, ahead, historyOpen, historyChart;

export const pairs = {
  title: "Pairs",
  names: () => [],
  async show(panel, context) {
    root = panel;
    run = context.run;
    tuning = isTuning(context.summary);
    found = null;
    shownKey = null;
    asked = null;
    ahead = null;
    list = el("ol", { class: "pair-list", "aria-label": "Pairs, newest first" });
    root.replaceChildren(
      filters(),
      el(
        "div",
        { class: "pair-view" },
        el(
          "nav",
          { class: "pair-side", "aria-label": "Pairs" },
          el(
            "div",
            { class: "pair-steps" },
            el("button", { type: "button", on: { click: () => move(-1) } }, "↑ Previous"),
            el("button", { type: "button", on: { click: () => move(1) } }, "↓ Next"),
            el(
              "button",
              { type: "button", id: "newest", on: { click: () => go({ step: null, pair: null }) } },
              "Newest",
            ),
          ),
          el("p", { class: "note", id: "pair-count", role: "status" }),
          list,
        ),
        el("div", { id: "pair-card", class: "pair-card-holder" }),
      ),
    );
    await this.update(context);
  },
  /** Look for new pairs at little cost; the list is asked for again only when there are some. */
  async update() {
    writeFilters();
    const filter = JSON.stringify([...FILTERS.map((name) => state[name]), atStep()]);
    const probe = found?.filter === filter ? await ask({ limit: 1 }) : null;
    if (!probe || probe.total !== found.total || keyOf(probe.pairs[0]) !== keyOf(found.pairs[0])) {
      const limit = Math.max(PAGE, found?.filter === filter ? Math.min(found.pairs.length, 500) : 0);
      found = { ...(await ask({ limit })), filter };
      drawList();
    }
    await drawChosen();
  },
  /** The reader chose another pair: show it and ask for nothing else. False when the list is not there yet. */
  hurry() {
    if (!found) return false;
    drawChosen().catch(() => null); // the next round says what went wrong
    return true;
  },
  hide() {
    clearTimeout(typed);
    dropChart();
  },
  keys: {
    j: () => move(1),
    ArrowDown: () => move(1),
    ArrowRight: () => move(1),
    k: () => move(-1),
    ArrowUp: () => move(-1),
    ArrowLeft: () => move(-1),
    "/": () => byId("filter-text")?.focus(),
    n: () => go({ step: null, pair: null }),
  },
};

const keyOf = (pair) => (pair ? `${pair.step} ${pair.pair_id}` : "");

/** The step whose pairs are listed: that of the filter, or of a link that names a step without a pair. */
const atStep = () => state.at || (state.step !== null && !state.pair ? state.step : "");

const ask = (params) =>
  getRun(run, "pairs", {
    kind: state.kind,
    zero_variance: state.zero,
    task: state.task,
    min_reward: state.min,
    max_reward: state.max,
    text: state.text,
    step: atStep(),
    ...params,
  });

/** Let the fields say what is filtered, however the state came about; one that is being typed in is left alone. */
function writeFilters() {
  for (const name of FILTERS) {
    const field = byId(`filter-${name}`);
    if (field.dataset.shown !== state[name]) field.value = field.dataset.shown = state[name];
  }
}

function filters() {
  const change = (name) => (event) => {
    clearTimeout(typed);
    const value = event.target.value.trim();
    event.target.dataset.shown = value;
    go({ [name]: value, step: null, pair: null }, { replace: true });
  };
  const search = (event) => {
    clearTimeout(typed);
    typed = setTimeout(change("text"), TYPED_MS, event);
  };
  const select = (name, label, choices) =>
    el(
      "label",
      {},
      label,
      el(
        "select",
        { id: `filter-${name}`, on: { change: change(name) } },
        choices.map(([value, text]) => el("option", { value }, text)),
      ),
    );
  const input = (name, label, props) =>
    el(
      "label",
      { class: props.class },
      label,
      el("input", {
        id: `filter-${name}`,
        on: { change: change(name), input: name === "text" ? search : () => null },
        ...props,
        class: null,
      }),
    );
  return el(
    "form",
    {
      class: "toolbar",
      role: "search",
      "aria-label": "Filter pairs",
      on: { submit: (event) => event.preventDefault() },
    },
    select("kind", "Kind", [
      ["", "all"],
      ["aligned", "aligned"],
      ["retrieved", "retrieved"],
    ]),
    select("zero", "Zero variance", [
      ["", "any"],
      ["1", "only"],
      ["0", "without"],
    ]),
    select("task", "Reward of", [
      ["", "either side"],
      ["understanding", "understanding"],
      ["generation", "generation"],
    ]),
    input("min", "from", { type: "number", step: "any", class: "short" }),
    input("max", "to", { type: "number", step: "any", class: "short" }),
    input("at", "Step", { type: "number", min: 0, class: "short" }),
    input("text", "Search", { type: "search", placeholder: "question, prompt, answer", class: "grow" }),
    el(
      "button",
      {
        type: "button",
        on: {
          click: () => {
            clearTimeout(typed);
            for (const name of FILTERS) delete byId(`filter-${name}`).dataset.shown;
            go(Object.fromEntries([...FILTERS, "pair"].map((name) => [name, ""]).concat([["step", null]])));
            writeFilters();
          },
        },
      },
      "Clear",
    ),
  );
}

function drawList() {
  const { total, pairs: shown } = found;
  byId("pair-count").textContent = plural(total, "pair");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  list.replaceChildren(
    ...shown.map((pair) =>
      el(
        "li",
        {},
        el(
          "a",
          { href: link({ step: pair.step, pair: pair.pair_id }), "data-key": keyOf(pair) },
          el("span", { class: "pair-name" }, el("span", {}, `step ${pair.step}`), untrusted(pair.pair_id)),
          el(
            "span",
            { class: "pair-facts" },
            el("i", { class: `swatch block c-${kindColour(pair.kind)}`, "aria-hidden": "true" }),
            `${pair.kind || "–"} · und ${num(pair.understanding, 2)} gen ${num(pair.generation, 2)}`,
            pair.zero_variance?.length
              ? el("span", { class: "flag", title: `all rewards equal: ${pair.zero_variance.join(", ")}` }, "zero var")
              : null,
          ),
        ),
      ),
    ),
    total > shown.length
      ? el(
          "li",
          {},
          el("button", { type: "button", on: { click: more } }, `${plural(total - shown.length, "more", "more")}`),
        )
      : "",
  );
  if (focused) [...list.querySelectorAll("a")].find((anchor) => anchor.dataset.key === focused)?.focus();
}

async function more() {
  const { pairs: next } = await ask({ offset: found.pairs.length, limit: PAGE });
  const known = new Set(found.pairs.map(keyOf));
  found.pairs.push(...next.filter((pair) => !known.has(keyOf(pair))));
  drawList();
  markChosen();
}

/** The pair that the hash names, else the newest. */
const chosen = () =>
  state.pair !== null && state.pair !== "" && state.step !== null
    ? { step: state.step, pair_id: state.pair }
    : found?.pairs[0];

async function move(by) {
  if (!found) return;
  const at = found.pairs.findIndex((pair) => keyOf(pair) === keyOf(chosen()));
  if (by > 0 && at === found.pairs.length - 1 && found.total > found.pairs.length) await more();
  const next = found.pairs[Math.max(0, at + by)];
  if (next) go({ step: next.step, pair: next.pair_id }, { replace: true });
}

/** Scroll the list, and not the page, until an entry of it is in sight. */
function reveal(anchor) {
  const [entry, box] = [anchor.getBoundingClientRect(), list.getBoundingClientRect()];
  if (entry.top < box.top) list.scrollTop -= box.top - entry.top;
  else if (entry.bottom > box.bottom) list.scrollTop += entry.bottom - box.bottom;
}

function markChosen() {
  const key = keyOf(chosen());
  for (const anchor of list.querySelectorAll("a")) {
    const current = anchor.dataset.key === key;
    if (current) {
      anchor.setAttribute("aria-current", "true");
      reveal(anchor);
    } else anchor.removeAttribute("aria-current");
  }
}

async function drawChosen() {
  const pair = chosen();
  const holder = byId("pair-card");
  if (!pair) {
    shownKey = null;
    holder.replaceChildren(noPairs());
    return;
  }
  root.classList.remove("none");
  const key = keyOf(pair);
  if (key === shownKey) return;
  markChosen();
  if (asked?.key !== key) asked = ahead?.key === key ? ahead : askFor(pair);
  const { made } = asked;
  let drawn;
  try {
    drawn = await made;
  } catch (error) {
    if (error.status !== 404) throw error;
    drawn = noSuchPair(pair);
  } finally {
    if (asked?.made === made) asked = null;
    if (ahead?.made === made) ahead = null;
  }
  if (keyOf(chosen()) !== key || shownKey === key) return; // The reader has moved on, or it stands there already.
  const at = found.pairs.findIndex((other) => keyOf(other) === shownKey);
  shownKey = key;
  dropChart();
  holder.replaceChildren(drawn);
  const past = drawn.querySelector(".history");
  if (historyOpen && past) past.open = true;
  lookAhead(at);
}

/** A pair's card, on its way; its pictures begin to load as soon as it is made. */
const askFor = (pair) => ({
  key: keyOf(pair),
  made: getRun(run, "pair", { step: pair.step, pair_id: pair.pair_id }).then(card),
});

/** Have the pair ready that comes next if the reader goes on in the same direction from the one at `before`. */
function lookAhead(before) {
  const at = found.pairs.findIndex((pair) => keyOf(pair) === shownKey);
  // Who follows the run sees what is new: after the first pair, nothing is fetched ahead of each step.
  const next = state.pair || before < 0 ? found.pairs[at + (at < before ? -1 : 1)] : null;
  if (!next || ahead?.key === keyOf(next)) return;
  ahead = askFor(next);
  ahead.made.catch(() => null); // asked again when it is wanted
}

const noSuchPair = ({ step, pair_id: name }) =>
  empty(
    "This run has not shown such a pair",
    el("span", {}, `The address asks for step ${step}, pair `, untrusted(name), ". Choose one in the list, or press Newest."),
  );

function noPairs() {
  const filtered = FILTERS.some((name) => state[name]);
  root.classList.toggle("none", !filtered);
  if (tuning)
    return empty(
      "Fine-tuning has no pairs",
      "Its losses and held-out scores stand in the overview; report.html in the run directory says more.",
    );
  if (filtered)
    return empty(
      "No pair matches the filter",
      state.min || state.max ? "Clear it, or widen the reward range." : "Clear it, or change what it asks for.",
    );
  return empty(
    "No pair has been shown yet",
    "A run shows the first pairs of a step as monitoring.pairs_every and monitoring.pairs_per_step say; 0 shows none.",
  );
}

function card(line) {
  const understanding = line.understanding;
  const generation = line.generation;
  return el(
    "article",
    {
      class: "pair-card",
      "data-pair": line.pair_id,
      "data-step": line.step,
      "aria-label": `Pair of step ${line.step}`,
    },
    el(
      "header",
      {},
      el("h2", {}, untrusted(line.pair_id)),
      el("span", { class: `badge c-${kindColour(line.kind)}` }, String(line.kind ?? "unknown kind")),
      el(
        "dl",
        { class: "facts" },
        [
          ["step", line.step],
          ["similarity s_p", num(line.similarity, 4)],
          ["weight w_p", num(line.weight, 4)],
          ["policy version", versions(line)],
        ].map(([name, fact]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(fact)))),
      ),
    ),
    el(
      "div",
      { class: "sides" },
      understanding ? understandingSide(understanding) : null,
      generation ? generationSide(generation) : null,
    ),
    history(line),
  );
}

/** Updates behind the weights that sampled: one number, or the least and the greatest. */
function versions(line) {
  const all = ["understanding", "generation"]
    .flatMap((task) => line[task]?.samples ?? [])
    .map((sample) => sample.policy_version)
    .filter(Number.isInteger);
  const [least, greatest] = all.length
    ? [Math.min(...all), Math.max(...all)]
    : [line.policy_version, line.policy_version];
  return least === greatest ? (least ?? "–") : `${least} to ${greatest}`;
}

function picture(name, alt, missing) {
  if (missing || !name) return el("div", { class: "missing" }, name ? "image deleted or missing" : "no image");
  const image = el("img", {
    src: imageUrl(run, name),
    alt,
    loading: "eager",
    decoding: "sync",
    on: {
      load: () => image.classList.toggle("pixel", image.naturalWidth < 128),
      error: () => image.replaceWith(el("div", { class: "missing" }, "image missing, or too large to show")),
    },
  });
  return image;
}

const missingOf = (side) => side.image_missing ?? side.missing ?? false;

function understandingSide(side) {
  return el(
    "section",
    { class: "side und", "aria-label": "Understanding" },
    el("h3", {}, "Understanding"),
    el(
      "div",
      { class: "asked" },
      picture(side.image, "the picture that the question is about", missingOf(side)),
      el(
        "div",
        {},
        el("p", { class: "question" }, untrusted(side.question), cut(side)),
        side.choices?.length
          ? el(
              "ol",
              { class: "choices" },
              side.choices.map((choice) => el("li", {}, untrusted(choice))),
            )
          : null,
        el("p", {}, "gold ", el("span", { class: "gold" }, untrusted(side.gold))),
      ),
    ),
    el(
      "ol",
      { class: "answers" },
      (side.samples ?? []).map((sample, i) =>
        el(
          "li",
          { class: "answer", "data-sample": i },
          el(
            "div",
            { class: "answer-text", tabindex: String(sample.text ?? "").length > 400 ? 0 : null },
            sample.text === null ? el("em", {}, "no text") : untrusted(sample.text),
            cut(sample),
          ),
          el(
            "div",
            { class: "earned" },
            sample.extracted === undefined || sample.extracted === null
              ? null
              : el("span", {}, "says ", el("b", {}, untrusted(sample.extracted))),
            verdict(sample),
          ),
          components(sample),
        ),
      ),
    ),
  );
}

function generationSide(side) {
  return el(
    "section",
    { class: "side gen", "aria-label": "Generation" },
    el("h3", {}, "Generation"),
    el(
      "div",
      { class: "asked" },
      side.image
        ? el(
            "figure",
            {},
            picture(side.image, "the reference picture of the prompt", missingOf(side)),
            el("figcaption", {}, "reference"),
          )
        : null,
      el("p", { class: "question" }, untrusted(side.prompt), cut(side)),
    ),
    el(
      "ol",
      { class: "drawings" },
      (side.samples ?? []).map((sample, i) =>
        el(
          "li",
          { class: "drawing", "data-sample": i },
          picture(
            sample.image,
            `drawing ${i + 1} of ${side.samples.length}, reward ${num(sample.reward)}`,
            missingOf(sample),
          ),
          sample.text ? el("div", { class: "answer-text" }, untrusted(sample.text), cut(sample)) : null,
          el("div", { class: "earned" }, verdict(sample)),
          components(sample),
        ),
      ),
    ),
  );
}

const cut = (side) => (side.cut ? el("span", { class: "flag" }, "cut at 20,000 characters") : null);

function verdict({ reward, advantage }) {
  const tone = advantage > 0 ? "up" : advantage < 0 ? "down" : "";
  return [
    el(
      "span",
      {},
      "r ",
      el("b", { "data-reward": reward ?? "" }, reward === null || reward === undefined ? "not judged" : num(reward)),
    ),
    el("span", {}, "A ", el("b", { class: tone, "data-advantage": advantage ?? "" }, signed(advantage))),
  ];
}

function components({ parts }) {
  const entries = Object.entries(parts ?? {});
  if (!entries.length) return null;
  const short = (name) => {
    const cutAt = name.indexOf("/");
    return cutAt > 0 && name.slice(0, cutAt) in parts ? `· ${name.slice(cutAt + 1)}` : name;
  };
  return el(
    "dl",
    { class: "components" },
    entries.map(([name, value]) =>
      el("div", { "data-part": name }, el("dt", {}, untrusted(short(name))), el("dd", {}, num(value))),
    ),
  );
}

/** The same pair over epochs, asked for when it is opened. */
function history(line) {
  const box = el(
    "details",
    {
      class: "history card",
      on: {
        toggle: () => {
          historyOpen = box.open;
          if (box.open && box.childElementCount === 1) fillHistory(box, line);
        },
      },
    },
    el("summary", {}, "History of this pair over epochs"),
  );
  return box;
}

async function fillHistory(box, line) {
  const body = el("div", {}, "…");
  box.append(body);
  try {
    const { uses } = await getRun(run, "pair_history", { pair_id: line.pair_id });
    const rows = uses.map((use) => [
      use.shown
        ? el("a", { href: link({ step: use.step, pair: line.pair_id }) }, `step ${use.step}`)
        : `step ${use.step}`,
      num(use.understanding),
      change(uses, use, "understanding"),
      num(use.generation),
      change(uses, use, "generation"),
      num(use.similarity, 4),
      num(use.weight, 4),
    ]);
    if (!body.isConnected) return;
    body.replaceChildren(
      uses.length > 2 ? drawHistory(uses) : "",
      uses.length
        ? table(
            "History of the pair",
            ["used at", "understanding", "since first", "generation", "since first", "similarity", "weight"],
            rows,
          )
        : empty("This pair was used once", "Its history grows with each epoch."),
    );
  } catch (error) {
    body.replaceChildren(el("p", { class: "bad" }, error.message));
  }
}

function drawHistory(uses) {
  dropChart();
  historyChart = new Chart(
    "Mean reward of each use",
    [
      { label: "understanding", colour: "und" },
      { label: "generation", colour: "gen", dash: [5, 3] },
    ],
    { height: 140, floor: true, synced: false },
  );
  historyChart.draw(
    uses.map((use) => use.step),
    ["understanding", "generation"].map((task) => uses.map((use) => use[task] ?? null)),
  );
  return historyChart.figure;
}

function dropChart() {
  historyChart?.destroy();
  historyChart = null;
}

function change(uses, use, task) {
  const first = uses[0][task];
  const by = use[task] === null || first === null || first === undefined ? null : use[task] - first;
  return by === null || use === uses[0] ? "" : el("span", { class: by > 0 ? "up" : by < 0 ? "down" : "" }, signed(by));
}
