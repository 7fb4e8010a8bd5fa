// The line that answers "is it alive and well": always in sight, whatever view is open.

import { byId, el, setText } from "./dom.js";
import { duration, hours, num, plural } from "./format.js";

const AGED = { last: null, at: 0, running: false };

/** The newest line of the run was written `age` seconds ago. */
export function setAge(age, running) {
  Object.assign(AGED, { last: age, at: performance.now(), running });
  tick();
}

/** Count the age on between two answers of the server. */
export function tick() {
  const node = byId("age");
  if (!node) return;
  setText(
    node,
    AGED.last === null ? "–" : `${duration(AGED.last + (AGED.running ? (performance.now() - AGED.at) / 1000 : 0))} ago`,
  );
}

/** Whether a run may still go on; a stalled one may. */
export const isLive = (status) => ["running", "starting", "stalled"].includes(status);

export function drawStrip(summary) {
  const { run, strip } = summary;
  const { status } = strip;
  const running = isLive(status);
  const workers = Object.entries(strip.workers ?? {});
  const down = workers.some(([, [up, total]]) => up < total);
  const lag = strip.lag?.max ?? 0;
  const cost = strip.cost ?? {};
  const age = el("span", { id: "age" });
  const tiles = [
    ["Status", el("span", { class: `badge ${status}` }, status), strip.resume ? null : run.reason || null],
    [
      "Step",
      `${num(strip.step, 7)} / ${num(strip.num_steps, 7)}`,
      el("progress", { max: strip.num_steps || 1, value: strip.step ?? 0, "aria-label": "Steps done" }),
    ],
    strip.resume && ["Go on with", el("code", {}, strip.resume), null, "broad"],
    ["Time left", running ? duration(strip.eta_s) : "–"],
    [running ? "Last write" : "Written", age, null, strip.stalled && "bad"],
    ["Workers", ...crew(workers, running), down && running && "warn"],
    strip.version !== null && [
      "Weights",
      `version ${num(strip.version, 7)}`,
      typeof strip.lag?.max !== "number" ? null : lag ? `lag ${plural(lag, "update")}` : "no lag",
      lag > 1 && "warn",
    ],
    [
      "Alerts",
      strip.num_alerts.all ? `${strip.num_alerts.open} open` : "0",
      strip.num_alerts.all ? `${strip.num_alerts.all} in all` : null,
      strip.num_alerts.open > 0 && "bad",
    ],
    [
      "Cost",
      cost.gpu_hours ? `${hours(cost.gpu_hours)} GPU-h` : `${hours(cost.cpu_hours ?? 0)} CPU-h`,
      cost.gpu_hours && cost.cpu_hours ? `${hours(cost.cpu_hours)} CPU-h` : null,
    ],
  ];
  byId("strip").replaceChildren(
    ...tiles.filter(Boolean).map(([name, value, note, tone]) =>
      el(
        "div",
        { class: [tone, name === "Workers" && "broad"].filter(Boolean).join(" ") || null },
        el("dt", {}, name),
        el(
          "dd",
          {},
          value,
          note && typeof note !== "string" ? note : null,
          note && typeof note === "string" ? el("small", {}, note) : null,
        ),
      ),
    ),
  );
  setAge(strip.age_s, running);
  drawAlerts(strip.alerts ?? [], strip.num_alerts);
  drawSkipped(summary.skipped ?? {});
}

/** How many workers are up, and of which roles; of a run that has ended, which there were. */
function crew(workers, running) {
  if (!workers.length) return ["–", null];
  const sum = (at) => workers.reduce((all, [, counts]) => all + counts[at], 0);
  const parts = workers.map(([role, [up, total]]) =>
    el(
      "span",
      { class: up < total && running ? "part bad" : "part" },
      running ? `${role} ${up}/${total}` : `${role} ${total}`,
    ),
  );
  return [running ? `${sum(0)} / ${sum(1)} up` : "ended", el("small", {}, parts)];
}

let announced = null;

/** What is open stands in red, the gravest in sight; what is over is grey and folded away. */
function drawAlerts(alerts, { open: numOpen, all, changes }) {
  const box = byId("alerts");
  box.hidden = !alerts.length;
  box.classList.toggle("over", !numOpen);
  if (!alerts.length) return;
  const key = JSON.stringify([numOpen, all, changes, alerts]);
  if (announced === key) return;
  const known = announced === null ? alerts : JSON.parse(announced)[3];
  const told = ({ sentinel, step, message }) => JSON.stringify([sentinel, step, message]);
  const before = new Set(known.map(told));
  const news = alerts.filter((alert) => alert.over === null && !before.has(told(alert)));
  if (news.length) announce(`New alert: ${news[0].message}`);
  announced = key;
  const items = alerts.map(alertItem);
  const lead = numOpen ? items.shift() : null;
  const rest = [numOpen > 1 && plural(numOpen - 1, "more open", "more open"), all > numOpen && `${all - numOpen} over`];
  const said = rest.filter(Boolean).join(", ");
  const cut = all > alerts.length ? `; ${alerts.length} of ${all} here` : "";
  const isOpen = box.querySelector("details")?.open;
  box.replaceChildren(
    lead ? el("ul", {}, lead) : "",
    items.length
      ? el("details", { open: isOpen }, el("summary", {}, `Alerts: ${said}${cut}`), el("ul", {}, items))
      : "",
  );
}

function alertItem(alert) {
  const name = alert.sentinel ?? alert.kind ?? "alert";
  const times = alert.told > 1 ? `, told ${alert.told} times` : "";
  return el(
    "li",
    { class: alert.over === null ? (alert.severity === "stop" ? "stop" : null) : "over" },
    el("b", {}, alert.step === undefined || alert.step === null ? name : `step ${alert.step} · ${name}`),
    " ",
    String(alert.message ?? ""),
    alert.over === null ? null : el("span", {}, ` (over at step ${alert.over}${times})`),
    alert.remedy ? el("span", { class: "remedy" }, ` ${alert.remedy}`) : null,
  );
}

const SKIPPED = {
  bad_lines: ["unreadable line"],
  bad_files: ["unreadable evaluation"],
  refused_files: ["file that leads out of the run", "files that lead out of the run"],
  refused_images: ["image name that is none", "image names that are none"],
  values_beyond_limit: ["value beyond the limits", "values beyond the limits"],
  missing_images: ["missing image"],
  repeated_steps: ["repeated step"],
  clock_jumps: ["jump of the clock", "jumps of the clock"],
};

function drawSkipped(skipped) {
  const said = Object.entries(skipped)
    .filter(([, n]) => n > 0)
    .map(([name, n]) => plural(n, ...(SKIPPED[name] ?? [name.replaceAll("_", " "), name.replaceAll("_", " ")])));
  const box = byId("skipped");
  box.hidden = !said.length;
  setText(box, said.length ? `Skipped in this run directory: ${said.join(", ")}.` : "");
}

/** Say it to a screen reader, once. */
export function announce(text) {
  setText(byId("announcer"), text);
}
