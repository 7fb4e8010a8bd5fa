// The workers: what each does, for how long, with which weights, and what happened to them.

import { getRun } from "./api.js";
import { Chart } from "./charts.js";
import { el, empty, svg, table } from "./dom.js";
import { clock, duration, num, setting } from "./format.js";
import { isLive } from "./strip.js";

const STATES = ["idle", "sampling", "decoding", "scoring", "updating", "publishing", "loading", "down"];
const STATE_HUE = {
  idle: "none",
  sampling: "a",
  decoding: "f",
  scoring: "c",
  updating: "b",
  publishing: "d",
  loading: "e",
  down: "bad",
  // Phases of the driver.
  start: "e",
  pairs: "f",
  evaluate: "g",
  rollout: "a",
  text_rollout: "a",
  image_rollout: "g",
  decode: "f",
  reward: "c",
  score: "e",
  update: "b",
  backward: "b",
  publish: "d",
  sync: "d",
};
const hueOf = (state) => STATE_HUE[state] ?? "h";
const HUES = ["a", "b", "c", "d", "e", "f", "g", "h"];
const MOST_EVENTS = 500;
const MOST_BEATS = 4000;
const SKEW_S = 60;

const UNITS = {
  "Tokens per second": "from one heartbeat to the next",
  "Other work per second": "completions, updates or steps, from one heartbeat to the next",
  "Weights held": "policy version",
};

let root, holders, charts, events, cursor, histories;

export const fleet = {
  title: "Fleet",
  names: () => [],
  async show(panel, context) {
    root = panel;
    events = [];
    cursor = null;
    charts = null;
    histories = new Map();
    holders = { workers: el("div"), lines: el("div"), rates: el("div", { class: "charts wide" }), events: el("div") };
    root.replaceChildren(
      el(
        "section",
        { "aria-label": "Workers" },
        el("h2", {}, "Workers"),
        holders.workers,
        holders.lines,
        holders.rates,
      ),
      el("section", { "aria-label": "Events" }, el("h2", {}, "Events"), holders.events),
    );
    await this.update(context);
  },
  async update(context) {
    const [{ actors }, news] = await Promise.all([
      getRun(context.run, "fleet", { since: since() }),
      getRun(context.run, "events", { since: cursor }),
    ]);
    cursor = news.cursor;
    if (news.events.length || !events.length) {
      events = [...events, ...news.events].slice(-MOST_EVENTS);
      drawEvents();
    }
    for (const actor of actors) {
      const known = histories.get(actor.actor) ?? [];
      const last = known.at(-1)?.[0] ?? -Infinity;
      histories.set(
        actor.actor,
        (actor.history = [...known, ...actor.history.filter(([time]) => time > last)].slice(-MOST_BEATS)),
      );
    }
    drawWorkers(actors, context.summary);
  },
  hide() {
    charts?.made.forEach((chart) => chart.destroy());
    charts = null;
  },
};

/** Since when heartbeats are asked for, null for all. The clocks of nodes differ: what comes twice is known by its time. */
function since() {
  const times = [...histories.values()].map((history) => history.at(-1)?.[0] ?? -Infinity).filter(Number.isFinite);
  return times.length ? Math.max(...times) - SKEW_S : null;
}

function drawWorkers(actors, summary) {
  if (!actors.length) {
    fleet.hide();
    holders.lines.replaceChildren();
    holders.workers.replaceChildren(
      empty(
        "No heartbeats in this run",
        "Workers write them to RUN/actors/ every monitoring.heartbeat_s seconds; 0 turns them off, and runs of older versions have none.",
      ),
    );
    return;
  }
  const running = isLive(summary.strip.status);
  const has = (name) => actors.some((actor) => actor[name] !== null && actor[name] !== undefined);
  const counted = [
    ["weights", "policy_version", 7],
    ["restarts", "restarts"],
    ["tokens/s, last minute", "tokens_per_s"],
    ["images/s, last minute", "images_per_s"],
    ["queue", "queue"],
  ].filter(([, name]) => has(name)); // fine-tuning hands on no weights
  const rows = actors.map((actor) => [
    actor.actor,
    actor.role ?? "–",
    el(
      "span",
      { class: "state" },
      el("i", { class: `swatch block c-${hueOf(actor.state)}`, "aria-hidden": "true" }),
      actor.state ?? "–",
    ),
    el("span", { class: running && actor.silent ? "bad" : null }, duration(actor.age_s)),
    ...counted.map(([, name, digits]) => num(actor[name], digits)),
  ]);
  if (!holders.workers.contains(document.activeElement))
    holders.workers.replaceChildren(
      table(
        "Workers",
        ["worker", "role", "state", "last heartbeat", ...counted.map(([title]) => title)],
        rows,
        { words: 3 },
      ),
    );
  holders.lines.replaceChildren(timeline(actors));
  drawRates(actors);
}

/** Seconds between heartbeats, most of the time. */
function period(actors) {
  const gaps = actors.flatMap(({ history }) => history.slice(1).map(([time], i) => time - history[i][0]));
  return gaps.length ? gaps.sort((a, b) => a - b)[gaps.length >> 1] : 5;
}

/** What each worker did when: one lane a worker. */
function timeline(actors) {
  const times = actors.flatMap((actor) => actor.history.map(([time]) => time));
  if (!times.length) return "";
  const from = times.reduce((a, b) => Math.min(a, b));
  const to = Math.max(
    times.reduce((a, b) => Math.max(a, b)),
    from + 1,
  );
  const lane = 18;
  const every = period(actors);
  const seen = new Set();
  const lanes = actors.map(({ actor, history }, row) => {
    const x = (time) => ((time - from) / (to - from)) * 1000;
    const bars = history.map(([time, state], i) => {
      const end = history[i + 1]?.[0] ?? Math.min(to, time + every);
      seen.add(state);
      return svg("rect", {
        class: `c-${hueOf(state)}`,
        x: x(time),
        width: Math.max(1, x(end) - x(time)),
        y: row * lane + 2,
        height: lane - 4,
      });
    });
    return [actor, bars];
  });
  const drawing = svg(
    "svg",
    {
      class: "lanes",
      viewBox: `0 0 1000 ${actors.length * lane}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `State of ${actors.length} workers from ${clock(from)} to ${clock(to)}; the table above says the present state`,
    },
    lanes.map(([, bars]) => bars),
  );
  drawing.style.height = `${actors.length * lane}px`;
  const names = el(
    "div",
    { class: "lane-names" },
    actors.map(({ actor }) => el("span", {}, actor)),
  );
  return el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, "State over time"),
    el("div", { class: "lane-box" }, names, drawing),
    el("div", { class: "lane-ends" }, el("span", {}, clock(from)), el("span", {}, clock(to))),
    el(
      "ul",
      { class: "legend" },
      [...STATES, ...[...seen].filter((state) => !STATES.includes(state))]
        .filter((state) => seen.has(state))
        .map((state) =>
          el("li", {}, el("i", { class: `swatch block c-${hueOf(state)}`, "aria-hidden": "true" }), String(state)),
        ),
    ),
  );
}

function drawRates(actors) {
  const samples = ({ tokens_per_s: rate }) => rate !== null && rate !== undefined;
  // What the driver counts is what its workers do.
  const working = actors.filter(({ role, history }) => role !== "driver" && history.some((point) => point[3]));
  const shown = [
    ["Tokens per second", working.filter(samples), 3],
    ["Other work per second", working.filter((actor) => !samples(actor)), 3],
    ["Weights held", actors.filter(({ history }) => history.some((point) => Number.isInteger(point[2]))), 2],
  ].filter(([, some]) => some.length);
  const key = JSON.stringify(shown.map(([title, some]) => [title, some.map(({ actor }) => actor)]));
  if (charts?.key !== key) {
    fleet.hide();
    const lines = (some) =>
      some.map(({ actor }, i) => ({ label: actor, colour: HUES[i % HUES.length], dash: i % 2 ? [5, 3] : null }));
    charts = {
      key,
      made: shown.map(
        ([title, some, column]) =>
          new Chart(title, lines(some), {
            unit: UNITS[title],
            height: 150,
            x: "time",
            floor: column === 3,
            synced: false,
          }),
      ),
    };
    holders.rates.replaceChildren(...charts.made.map((chart) => chart.figure));
  }
  shown.forEach(([, some, column], i) => {
    const [xs, ...columns] = window.uPlot.join(
      some.map(({ history }) => {
        const ascending = history.filter(([time], j) => j === 0 || time > history[j - 1][0]);
        return [ascending.map(([time]) => time), ascending.map((point) => point[column] ?? null)];
      }),
    );
    charts.made[i].draw(xs, columns);
  });
}

/** What an event says; of changed settings, which. */
function told(event) {
  const said = String(event.message ?? [event.actor, event.state].filter(Boolean).join(" "));
  const { changed } = event;
  if (typeof changed !== "object" || changed === null) return said;
  const each = Object.entries(changed).map(([key, values]) => {
    const [before, now] = Array.isArray(values) ? values : [null, values];
    return `${key} ${setting(before)} → ${setting(now)}`;
  });
  return each.length ? `${said}: ${each.join(", ")}` : said;
}

function drawEvents() {
  const over = new Map(events.map(({ kind, sentinel }, i) => [kind === "alert over" ? sentinel : null, i]));
  const isOpen = (event) => event.kind === "alert" && !(over.get(event.sentinel) > events.indexOf(event));
  holders.events.replaceChildren(
    events.length
      ? table(
          "Events, newest first",
          ["when", "kind", "step", "what"],
          [...events]
            .reverse()
            .map((event) => [
              clock(event.time),
              el(
                "span",
                { class: event.kind === "stall" || isOpen(event) ? "bad" : null },
                String(event.kind ?? "–"),
              ),
              event.step ?? "–",
              told(event),
            ]),
          { words: 4 },
        )
      : empty("No event yet"),
  );
}
