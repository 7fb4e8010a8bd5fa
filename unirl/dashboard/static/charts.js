// A chart is a figure: title, canvas, legend with values, and the same numbers as a table.

import { el, setText, svg, table } from "./dom.js";
import { num, ticks, timeTicks } from "./format.js";

const uPlot = window.uPlot;
const SYNC = uPlot.sync("steps");
const probe = el("span", { class: "probe", "aria-hidden": "true" });
let colours = new Map();

/** What a custom property of the style sheet is now, as a canvas takes it. */
function colour(name, opacity = 1) {
  const key = `${name} ${opacity}`;
  if (!colours.has(key)) {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `color-mix(in srgb, var(--${name}) ${opacity * 100}%, transparent)`;
    colours.set(key, getComputedStyle(probe).color);
  }
  return colours.get(key);
}

const charts = new Set();

/** Series that were joined have undefined where only another one has a value. */
const isKnown = (value) => value !== null && value !== undefined;

/** The theme changed: draw everything again. */
export function recolour() {
  colours = new Map();
  for (const chart of charts) chart.plot?.redraw();
}

const resize = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) target.chart?.fit(contentRect.width);
});

export class Chart {
  /**
   * @param {string} title
   * @param {object[]} lines {label, colour, dash, width, faint}: faint ones are drawn thin and left out of the legend
   * @param {object} options unit, height, zero (a line at 0), floor (y begins at 0), stacked, band ([upper, lower] of
   *   lines), x ("step" | "time" | any label), digits (of values), onRange(first, last | null), synced
   */
  constructor(title, lines, options = {}) {
    this.title = title;
    this.lines = lines;
    this.options = { height: 120, x: "step", synced: true, ...options };
    this.marks = [];
    this.xs = [];
    this.columns = [];
    this.breaks = [];
    this.values = lines.map(() => el("span", { class: "value" }));
    this.box = el("div", { class: "plot", role: "img" });
    this.box.style.height = `${this.options.height}px`;
    this.box.chart = this;
    this.note = el("p", { class: "note" });
    this.markNote = el(
      "li",
      { class: "mark", hidden: true },
      el("i", {}, "◆"),
      el("span"),
      el("span", { class: "value" }),
    );
    this.meaning = el("p", { class: "note" });
    this.details = el(
      "details",
      { on: { toggle: () => this.writeTable() } },
      el("summary", {}, "Values and meaning"),
      this.meaning,
    );
    this.figure = el(
      "figure",
      { class: "chart" },
      el("figcaption", {}, title, options.unit ? el("span", { class: "unit" }, options.unit) : null),
      this.box,
      el(
        "ul",
        { class: "legend" },
        lines.map((line, i) => (line.faint ? null : el("li", {}, swatch(line), line.label, " ", this.values[i]))),
        this.markNote,
      ),
      this.note,
      this.details,
    );
    charts.add(this);
    resize.observe(this.box);
  }

  /**
   * `columns` one array per line beside `xs`; `marks` are {x, value, low, high, of}; `meaning` explains the metric;
   * `breaks` are stretches of x in which a line is not drawn, one list of [from, to] a line.
   */
  draw(xs, columns, { marks = [], meaning = "", breaks = [] } = {}) {
    this.breaks = breaks;
    this.xs = xs;
    this.columns = columns;
    this.marks = marks;
    this.markNote.hidden = !marks.length;
    setText(this.note, meaning.split(/[.:] (?=[A-Z])|; /)[0].replace(/\.$/, ""));
    setText(this.meaning, meaning);
    const drawn = this.options.stacked ? stack(columns) : columns;
    const data = [xs, ...drawn];
    if (this.options.stacked) this.limit(drawn.at(-1) ?? []);
    if (this.plot) this.plot.setData(data);
    else this.start(data);
    this.writeLegend(this.plot?.cursor.idx ?? null);
    this.writeTable();
  }

  /** One slow step must not flatten all others: the axis ends a little above most of them, and says so. */
  limit(sums) {
    const sorted = [...sums].sort((a, b) => a - b);
    const usual = 1.4 * (sorted[Math.floor(sorted.length * 0.95)] ?? 0);
    const most = sorted.at(-1) ?? 0;
    this.ceiling = sorted.length > 5 && most > 1.5 * usual ? usual : null;
    if (this.ceiling)
      setText(this.note, `Cut off at ${num(usual, 2)}: the highest is ${num(most)}. ${this.note.textContent}`);
  }

  start(data) {
    const width = this.box.clientWidth;
    if (!width) {
      this.pending = data;
      return;
    }
    this.plot = new uPlot(this.settings(width), data, this.box);
  }

  fit(width) {
    if (!width) return;
    if (this.plot) this.plot.setSize({ width, height: this.options.height });
    else if (this.pending) {
      const data = this.pending;
      this.pending = null;
      this.plot = new uPlot(this.settings(width), data, this.box);
    }
  }

  settings(width) {
    const { height, x, stacked, band, synced, onRange } = this.options;
    const axis = {
      stroke: () => colour("soft"),
      font: "11px system-ui, sans-serif",
      ticks: { show: false },
      grid: { stroke: () => colour("edge"), width: 1 },
    };
    return {
      width,
      height,
      legend: { show: false },
      padding: [6, x === "time" ? 26 : 8, 0, 0],
      cursor: {
        points: { size: 5 },
        drag: { x: Boolean(onRange), y: false, setScale: false },
        ...(synced && { sync: { key: SYNC.key, setSeries: false, scales: ["x", null] } }),
      },
      scales: {
        x: { time: x === "time", range: (_, low, high) => this.xRange(low, high) },
        y: { range: (_, low, high) => this.yRange(low, high) },
      },
      axes: [
        {
          ...axis,
          size: 22,
          gap: 2,
          space: 60,
          values: (_, splits) => (x === "time" ? timeTicks(splits) : ticks(splits)),
          ...(this.options.xLabel && {
            label: () => this.options.xLabel(),
            labelSize: 16,
            labelFont: "11px system-ui, sans-serif",
          }),
          ...(x === "step" && {
            incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000],
          }),
        },
        {
          ...axis,
          size: (_, marks) => 14 + 6.3 * Math.max(3, ...(marks ?? []).map((mark) => mark.length)),
          gap: 4,
          space: 26,
          values: (_, splits) => ticks(splits),
        },
      ],
      series: [{}, ...this.lines.map((line, i) => this.line(line, i, stacked))],
      bands: stacked
        ? this.lines.slice(1).map((line, i) => ({ series: [i + 2, i + 1], fill: () => colour(line.colour, 0.75) }))
        : band
          ? [{ series: [band[0] + 1, band[1] + 1], fill: () => colour(this.lines[band[0]].colour, 0.18) }]
          : [],
      hooks: {
        setCursor: [(plot) => this.writeLegend(plot.cursor.idx)],
        draw: [(plot) => this.drawExtras(plot)],
        setSelect: [
          (plot) => {
            if (plot.select.width < 8) return;
            const ends = [plot.select.left, plot.select.left + plot.select.width].map((left) =>
              Math.round(plot.posToVal(left, "x")),
            );
            plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
            if (ends[1] > ends[0]) onRange?.(ends);
          },
        ],
        ready: [(plot) => plot.over.addEventListener("dblclick", () => onRange?.(null))],
      },
    };
  }

  line({ colour: name, dash, width = 1.5, faint }, i, stacked) {
    return {
      stroke: () => colour(name, stacked ? 0.9 : 1),
      width: faint || stacked ? (stacked ? 1 : 0) : width,
      dash,
      // Steps without a value are bridged; only breaks are not.
      ...(!stacked && {
        gaps: (plot) => (this.breaks[i] ?? []).map((ends) => ends.map((at) => plot.valToPos(at, "x", true))),
      }),
      ...(stacked && i === 0 && { fill: () => colour(name, 0.75) }),
      points: { show: (plot, at) => !faint && isSparse(plot.data[at]), size: 5 },
    };
  }

  /** Evaluations before the first step have their place too. */
  xRange(low, high) {
    const ends = this.marks.map((mark) => mark.x);
    const [from, to] = [Math.min(low ?? Infinity, ...ends), Math.max(high ?? -Infinity, ...ends)];
    if (from > to) return [0, 1];
    return from === to ? [from - 1, to + 1] : [from, to];
  }

  yRange(low, high) {
    if (this.ceiling) high = Math.min(high, this.ceiling);
    const { zero, floor, stacked } = this.options;
    const marks = this.marks.flatMap((mark) => [mark.low ?? mark.value, mark.high ?? mark.value]);
    let [from, to] = [Math.min(low ?? Infinity, ...marks), Math.max(high ?? -Infinity, ...marks)];
    if (from > to) return [0, 1];
    if (zero || floor || stacked) [from, to] = [Math.min(0, from), Math.max(0, to)];
    if (from === to) [from, to] = from === 0 ? [0, 1] : [from - Math.abs(from) * 0.1, to + Math.abs(to) * 0.1];
    const room = (to - from) * 0.06;
    return [(floor || stacked) && from === 0 ? 0 : from - room, to + room];
  }

  /** The zero line, and evaluations with their intervals. */
  drawExtras(plot) {
    const { ctx, bbox } = plot;
    const ratio = uPlot.pxRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    if (this.options.zero) {
      const y = plot.valToPos(0, "y", true);
      ctx.strokeStyle = colour("ink");
      ctx.lineWidth = ratio;
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.strokeStyle = ctx.fillStyle = colour("ink");
    ctx.lineWidth = 1.5 * ratio;
    ctx.setLineDash([]); // the last line drawn may have been dashed
    const inset = 5 * ratio;
    for (const { x, value, low, high } of this.marks) {
      const at = plot.valToPos(x, "x", true);
      if (at < bbox.left - inset || at > bbox.left + bbox.width + inset) continue;
      const px = Math.min(Math.max(at, bbox.left + inset), bbox.left + bbox.width - inset);
      const py = plot.valToPos(value, "y", true);
      ctx.beginPath();
      if (low !== null && high !== null) {
        ctx.moveTo(px, plot.valToPos(low, "y", true));
        ctx.lineTo(px, plot.valToPos(high, "y", true));
      }
      ctx.stroke();
      ctx.beginPath();
      for (const [dx, dy] of [
        [0, -1],
        [1, 0],
        [0, 1],
        [-1, 0],
      ])
        ctx.lineTo(px + dx * 4.5 * ratio, py + dy * 4.5 * ratio);
      ctx.fill();
    }
    ctx.restore();
  }

  /** Values under the cursor, or the last ones. */
  writeLegend(index) {
    const at = (column) => {
      if (index !== null && index !== undefined) return column[index];
      return this.options.stacked ? column.at(-1) : column.findLast(isKnown);
    };
    const { digits } = this.options;
    this.columns.forEach((column, i) => setText(this.values[i], num(at(column), digits)));
    const under = index === null || index === undefined ? Infinity : this.xs[index];
    const mark = this.marks.findLast(({ x }) => x <= under);
    if (!mark && this.marks.length) {
      setText(this.markNote.children[1], "held-out evaluation ");
      setText(this.markNote.lastChild, "none yet");
    }
    if (mark) {
      const said = this.marks.filter(({ x }) => x === mark.x).map(({ of, value }) => [of, num(value)].filter(Boolean).join(" "));
      setText(this.markNote.children[1], `held-out evaluation${isKnown(mark.low) ? ", 95 % interval" : ""} `);
      setText(this.markNote.lastChild, said.join(", "));
    }
    if (index !== null && index !== undefined) return;
    const said = this.lines
      .map((line, i) => (line.faint ? "" : `${line.label} ${num(at(this.columns[i] ?? []), digits)}`))
      .filter(Boolean);
    const where = this.xs.length
      ? ` at ${this.options.x === "time" ? "the end" : `${this.options.x} ${num(this.xs.at(-1), 6)}`}`
      : "";
    this.box.setAttribute(
      "aria-label",
      `${this.title}, chart. Last values: ${said.join(", ")}${where}. The values below it stand in a table.`,
    );
  }

  writeTable() {
    this.details.querySelectorAll(".scroll").forEach((old) => old.remove());
    if (!this.details.open) return;
    const shown = this.lines.map((line, i) => [line, i]).filter(([line]) => !line.faint);
    const stride = Math.max(1, Math.ceil(this.xs.length / 50));
    const rows = this.xs
      .map((x, i) => [x, i])
      .filter(([, i]) => (this.xs.length - 1 - i) % stride === 0)
      .reverse()
      .map(([x, i]) => [
        this.options.x === "time" ? new Date(x * 1000).toLocaleTimeString("en-GB") : num(x, 6),
        ...shown.map(([, column]) => num(this.columns[column][i], Math.max(4, this.options.digits ?? 0))),
      ]);
    if (this.marks.length) {
      this.details.append(
        table(
          `${this.title}, held-out evaluation`,
          [`${this.options.x}, held-out`, "value", "95 % interval"],
          [...this.marks]
            .reverse()
            .map(({ x, of, value, low, high }) => [
              [num(x, 7), of].filter(Boolean).join(" "),
              num(value, 4),
              isKnown(low) ? `${num(low)} to ${num(high)}` : "–",
            ]),
        ),
      );
    }
    this.details.append(table(`${this.title}, values`, [this.options.x, ...shown.map(([line]) => line.label)], rows));
  }

  destroy() {
    charts.delete(this);
    resize.unobserve(this.box);
    this.plot?.destroy();
    this.figure.remove();
  }
}

/** Whether single values need a dot to be seen: there are few of them, with empty steps between. */
function isSparse(column) {
  const present = column.filter(isKnown).length;
  const gaps = column.filter((value) => value === null).length;
  return present < 2 || (present < 60 && gaps > present);
}

function swatch({ colour: name, dash }) {
  return el("i", { class: `swatch c-${name}${dash ? " dashed" : ""}`, "aria-hidden": "true" });
}

function stack(columns) {
  const sums = [];
  columns.forEach((column, i) => sums.push(column.map((value, j) => (value ?? 0) + (i ? sums[i - 1][j] : 0))));
  return sums;
}

/** Bars of counts by kind, stacked; `edges` one more than the counts. */
export function histogram(title, edges, counts, colourOf) {
  const kinds = Object.keys(counts).filter((kind) => counts[kind].some(Boolean));
  const totals = edges.slice(1).map((_, i) => kinds.reduce((sum, kind) => sum + counts[kind][i], 0));
  const highest = Math.max(1, ...totals);
  const [width, height, left, bottom] = [320, 120, 30, 18];
  const x = (i) => left + (i * (width - left - 4)) / totals.length;
  const y = (n) => 6 + (height - bottom - 6) * (1 - n / highest);
  const bars = totals.flatMap((_, i) => {
    let below = 0;
    return kinds.map((kind) => {
      const n = counts[kind][i];
      below += n;
      return n
        ? svg("rect", {
            class: `c-${colourOf(kind)}`,
            x: x(i) + 0.5,
            width: Math.max(1, x(i + 1) - x(i) - 1),
            y: y(below),
            height: y(below - n) - y(below),
          })
        : null;
    });
  });
  const ticks = [0, Math.floor(totals.length / 2), totals.length].map((i) =>
    svg(
      "text",
      { x: x(i), y: height - 4, "text-anchor": i === 0 ? "start" : i === totals.length ? "end" : "middle" },
      num(edges[i], 2),
    ),
  );
  const said = kinds.map((kind) => `${kind} ${counts[kind].reduce((a, b) => a + b, 0)}`).join(", ");
  return el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, title),
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}, histogram: ${said || "no pairs"}` },
      svg("line", { class: "axis", x1: left, x2: width - 4, y1: y(0), y2: y(0) }),
      svg("text", { x: left - 5, y: y(highest) + 8, "text-anchor": "end" }, num(highest)),
      svg("text", { x: left - 5, y: y(0), "text-anchor": "end" }, "0"),
      ticks,
      bars,
    ),
    el(
      "ul",
      { class: "legend" },
      kinds.map((kind) =>
        el(
          "li",
          {},
          el("i", { class: `swatch block c-${colourOf(kind)}`, "aria-hidden": "true" }),
          kind,
          " ",
          el("span", { class: "value" }, String(counts[kind].reduce((a, b) => a + b, 0))),
        ),
      ),
    ),
    el(
      "details",
      {},
      el("summary", {}, "Values"),
      table(
        `${title}, values`,
        ["from", "to", ...kinds],
        totals
          .map((_, i) => [num(edges[i]), num(edges[i + 1]), ...kinds.map((kind) => String(counts[kind][i]))])
          .filter((_, i) => totals[i]),
      ),
    ),
  );
}
