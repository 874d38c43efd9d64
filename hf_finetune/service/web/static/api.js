// Calls of the API, and elements made of text alone: nothing that a user wrote is ever read as HTML.

const csrf = document.querySelector('meta[name="csrf"]').content;

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.param = error.param;
  }
}

export async function call(method, path, body) {
  const headers = { "x-csrf-token": csrf };
  if (body !== undefined && !(body instanceof FormData)) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  const answer = await fetch(path, { method, headers, body });
  if (answer.status === 401) location.assign("/login");
  if (!answer.ok) throw new ApiError(answer.status, await reason(answer));
  return answer.status === 204 ? null : answer.json();
}

// Yields the objects of server-sent events as they arrive; an answer in one piece is yielded whole.
export async function* stream(path, body, signal) {
  const headers = { "x-csrf-token": csrf, "content-type": "application/json" };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) throw new ApiError(answer.status, await reason(answer));
  if (!answer.headers.get("content-type").startsWith("text/event-stream")) {
    yield await answer.json();
    return;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ApiError(500, found.error);
      yield found;
    }
  }
}

async function reason(answer) {
  try {
    return (await answer.json()).error ?? { message: `the service answered ${answer.status}` };
  } catch {
    return { message: `the service answered ${answer.status}` };
  }
}

export function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const $ = (id) => document.getElementById(id);

export function say(error) {
  const place = $("alert");
  place.textContent = error ? error.message : "";
  place.hidden = !error;
  if (error) place.scrollIntoView({ block: "nearest" });
}

// Repeats while the page is seen; waits longer where nothing moves. `look` tells whether something does.
export function follow(look) {
  let timer;
  let looking = false;
  const again = async () => {
    clearTimeout(timer);
    if (looking) return;
    looking = true;
    let moves = false;
    try {
      moves = await look();
      say(null);
    } catch (error) {
      say(error instanceof ApiError ? error : new Error("The service can't be reached. Trying again."));
    } finally {
      looking = false;
    }
    if (!document.hidden) timer = setTimeout(again, moves ? 1000 : 5000);
  };
  document.addEventListener("visibilitychange", () => document.hidden || again());
  again();
  return again;
}

export const STATES = {
  validating_files: "Checking", queued: "Waiting", running: "Training", paused: "Paused",
  succeeded: "Succeeded", failed: "Failed", cancelled: "Cancelled",
};
export const FINAL = ["succeeded", "failed", "cancelled"];
const TONES = { succeeded: "good", failed: "error", paused: "warning", cancelled: "soft" };

export function badge(place, status) {
  const text = STATES[status] ?? status;
  if (place.textContent !== text) place.textContent = text;
  place.className = `badge ${TONES[status] ?? ""}`;
}

export const time = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

export function span(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 1e-3 ? Number(value.toPrecision(3)).toExponential() : Number(value.toPrecision(4)).toString();
}

export function named(job) {
  return job.user_provided_suffix || job.id.replace(/^ftjob-/, "").slice(-12);
}

$("logout")?.addEventListener("click", async () => {
  try {
    await call("POST", "/logout");
  } finally {
    location.assign("/login");
  }
});
