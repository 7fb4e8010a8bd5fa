// What is shown stands in the URL hash, so that a link shows a colleague the same thing.

const DEFAULTS = {
  view: "overview",
  runs: [],
  step: null,
  pair: null,
  smooth: 0,
  x: "step",
  range: null,
  shown: [],
  kind: "",
  zero: "",
  task: "",
  min: "",
  max: "",
  text: "",
  at: "",
};
const LISTS = new Set(["runs", "shown"]);
const NUMBERS = new Set(["step", "smooth"]);
const listeners = new Set();

export let state = read();

function read() {
  const found = { ...DEFAULTS };
  for (const part of location.hash.slice(1).split("&")) {
    const cut = part.indexOf("=");
    const key = part.slice(0, cut);
    if (cut < 1 || !(key in DEFAULTS)) continue;
    try {
      const text = part.slice(cut + 1);
      if (LISTS.has(key)) found[key] = text.split(",").filter(Boolean).map(decodeURIComponent);
      else if (NUMBERS.has(key)) found[key] = Number.isFinite(Number(text)) ? Number(text) : DEFAULTS[key];
      else found[key] = decodeURIComponent(text);
    } catch {
      // A link that was cut in mid-escape: the rest of it still counts.
    }
  }
  return found;
}

/** The hash that shows the present state with some changes. */
export function link(changes = {}) {
  const next = { ...state, ...changes };
  const parts = [];
  for (const [key, value] of Object.entries(next)) {
    if (value === null || value === "" || String(value) === String(DEFAULTS[key])) continue;
    const text = LISTS.has(key) ? value.map(encodeURIComponent).join(",") : encodeURIComponent(value);
    parts.push(`${key}=${text.replaceAll("%2F", "/")}`);
  }
  return `#${parts.join("&")}`;
}

/** Change what is shown. Each change is an entry in the history of the browser, unless it replaces the present one. */
export function go(changes, { replace = false } = {}) {
  const hash = link(changes);
  if (hash === (location.hash || "#")) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
  changed();
}

export const onChange = (listener) => listeners.add(listener);

function changed() {
  const before = state;
  state = read();
  for (const listener of listeners) listener(state, before);
}

window.addEventListener("popstate", changed);
window.addEventListener("hashchange", () => {
  if (link() !== (location.hash || "#")) changed();
});
