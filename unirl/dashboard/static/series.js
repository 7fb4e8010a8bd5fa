// The metrics of one run, kept up to date by asking only for what came after the last answer.

import { getRun } from "./api.js";

const MOST_POINTS = 2000;

export class Series {
  /** `range` is [first, last] step, or null for the whole run. */
  constructor(run, range = null) {
    this.run = run;
    this.range = range;
    this.names = [];
    /** Grows with each change. */
    this.revision = 0;
    /** Of the last answer, if it held one. */
    this.strip = null;
    this.clear();
  }

  clear() {
    this.cursor = null;
    this.steps = [];
    this.times = [];
    this.samples = [];
    /** When each start of the run wrote its first step. */
    this.starts = [];
    this.values = {};
  }

  get last() {
    return this.steps.at(-1) ?? null;
  }

  column(name) {
    return this.values[name] ?? [];
  }

  /** Bring these metrics up to date; true when something changed. With a number of known `alerts`, the strip comes too. */
  async load(names, alerts = null) {
    const missing = names.some((name) => !this.names.includes(name));
    if (missing) this.names = [...new Set([...this.names, ...names])];
    const first = this.cursor === null || missing || this.steps.length > 2 * MOST_POINTS;
    const [from, to] = this.range ?? [];
    const asked = this.names;
    // The cursor stands for the names too.
    const params = first
      ? { names: asked.join(","), points: MOST_POINTS, first: from, last: to }
      : { since: this.cursor, alerts };
    const answer = await getRun(this.run, "metrics", params);
    if (asked !== this.names) return false; // Another call asked for more meanwhile; its answer holds this one.
    this.strip = answer.strip ?? null;
    if (answer.reset && !first) {
      this.clear();
      return this.load([]);
    }
    if (first) this.clear();
    this.cursor = answer.cursor;
    this.starts = answer.starts;
    answer.steps.forEach((step, i) => this.put(step, answer, i));
    const changed = first || answer.steps.length > 0;
    if (changed) this.revision++;
    return changed;
  }

  /** One row; of a step that comes again, the later one stays. */
  put(step, answer, i) {
    if (this.range && (step < this.range[0] || step > this.range[1])) return;
    let at = this.steps.length;
    while (at > 0 && this.steps[at - 1] >= step) at--;
    const again = this.steps[at] === step ? 1 : 0;
    const length = this.steps.length;
    this.steps.splice(at, again, step);
    this.times.splice(at, again, answer.times[i]);
    this.samples.splice(at, again, answer.samples?.[i] ?? null);
    for (const name of this.names) {
      const column = (this.values[name] ??= new Array(length).fill(null));
      column.splice(at, again, answer.values[name]?.[i] ?? null);
    }
  }
}

/** Exponential moving average, corrected for its start; nulls stay null and do not count. */
export function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean * weight + value * (1 - weight);
    total = total * weight + (1 - weight);
    return mean / total;
  });
}
