// Numbers, times and names as people read them.

const NONE = "–";

/** Four significant digits at most. */
export function num(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return Number(value.toPrecision(digits)).toExponential().replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

export function signed(value) {
  if (value === null || value === undefined) return NONE;
  const text = value.toFixed(2);
  return Number(text) > 0 ? `+${text}` : text.replace("-", "−");
}

/** Seconds as 4 s, 3 min 20 s, 2 h 5 min, 3 d 4 h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 3600) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.round((s % 86400) / 3600)} h`;
}

export const hours = (value) => (value < 10 ? value.toFixed(2) : Math.round(value).toLocaleString("en"));

export const clock = (unix) =>
  new Date(unix * 1000).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });

const near = (value) => (Math.abs(value) < 1e-9 ? "0" : num(value));

/** An estimate with its interval, where it has one. */
export const interval = ({ value, low, high }) =>
  low === null || high === null ? num(value) : `${near(value)} [${near(low)}, ${near(high)}]`;

/** Marks of an axis, with as many digits as tell neighbours apart. */
export function ticks(values) {
  const most = Math.max(...values.map(Math.abs));
  if (most < 1e-3 || most >= 1e6)
    return values.map((value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toExponential().replace("e+", "e")));
  const room = Math.abs(values[1] - values[0]) / 1000 || 1e-9;
  let digits = 0;
  while (digits < 9 && values.some((value) => Math.abs(value - Number(value.toFixed(digits))) > room)) digits++;
  return values.map((value) => (most >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(digits)));
}

const time = { hour: "2-digit", minute: "2-digit", second: "2-digit" };

/** Times of day, with the date where a new one begins. */
export function timeTicks(values) {
  const fine = values.length > 1 && values[1] - values[0] < 60;
  return values.map((value, i) => {
    const at = new Date(value * 1000);
    const before = i ? new Date(values[i - 1] * 1000) : null;
    if (before && before.getDate() !== at.getDate())
      return at.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
    return at.toLocaleTimeString("en-GB", fine ? time : { hour: "2-digit", minute: "2-digit" });
  });
}

export const plural = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

/** A setting as it would stand on the command line. */
export const setting = (value) =>
  value === null || value === undefined ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value);
