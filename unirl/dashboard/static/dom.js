// Elements from plain values. Everything a run says goes through text nodes: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `props` are attributes, with `on` for listeners; null and false are left out. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, { on = {}, ...attributes }, children) {
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Set the text only when it differs, so that a reader's selection and a screen reader are left in peace. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Controls, soft hyphen, zero-width, direction marks and overrides, tags: what a text can hide behind.
const HIDDEN =
  /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|\udb40[\udc00-\udc7f]/g;
const MOST_MARKS = 200;

/** Text that a model or a data set wrote: isolated from the page's direction, with invisible characters shown. */
export function untrusted(text, tag = "bdi") {
  const node = el(tag, { dir: "auto", class: "untrusted" });
  const source = String(text ?? "");
  let from = 0;
  let marks = 0;
  for (const match of source.matchAll(HIDDEN)) {
    if (++marks > MOST_MARKS) break;
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(
      source.slice(from, match.index),
      el("span", { class: "hidden-char", title: "invisible character" }, `U+${code}`),
    );
    from = match.index + match[0].length;
  }
  node.append(marks > MOST_MARKS ? source.slice(from).replace(HIDDEN, "") : source.slice(from));
  return node;
}

/** A table; `head` are column titles, rows are cells of which the first is a header; after `words` columns come numbers. */
export function table(caption, head, rows, { words = 1 } = {}) {
  const side = (i) => (i < words ? null : "number");
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", { class: "sr-only" }, caption),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((title, i) => el("th", { scope: "col", class: side(i) }, title)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((cells) =>
          el(
            "tr",
            {},
            cells.map((cell, i) => (i ? el("td", { class: side(i) }, cell) : el("th", { scope: "row" }, cell))),
          ),
        ),
      ),
    ),
  );
}

export function empty(title, ...lines) {
  return el(
    "div",
    { class: "empty" },
    el("p", { class: "empty-title" }, title),
    lines.map((line) => el("p", {}, line)),
  );
}
