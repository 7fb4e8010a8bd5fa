// The server's JSON. Paths are relative to the page, so that it works below any prefix.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A run's name as one segment of a path: "~" becomes "~0", then "/" becomes "~1". */
export const segment = (run) => encodeURIComponent(run.replaceAll("~", "~0").replaceAll("/", "~1"));

/** The JSON at api/`path`. Throws ApiError: status 0 when the server did not answer. */
export async function get(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params))
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  let response;
  let body;
  try {
    response = await fetch(`api/${path}${query.size ? `?${query}` : ""}`, { signal: AbortSignal.timeout(20000) });
    body = await response.json();
  } catch (error) {
    throw new ApiError(`no answer from the server (${error.message})`, response && !response.ok ? response.status : 0);
  }
  if (!response.ok) throw new ApiError(body.error ?? `the server answered ${response.status}`, response.status);
  return body;
}

export const getRun = (run, path = "", params = {}) => get(`run/${segment(run)}${path ? `/${path}` : ""}`, params);

/** Where a picture of a run lies; `name` is relative to the run's images/ unless it names evaluations/images/. */
export function imageUrl(run, name) {
  const path = name.startsWith("evaluations/") ? name : `images/${name}`;
  return `files/${segment(run)}/${path.split("/").map(encodeURIComponent).join("/")}`;
}
