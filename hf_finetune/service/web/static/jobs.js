import { $, FINAL, badge, call, follow, h, named, span, time } from "/static/api.js";

const rows = new Map();
let limit = 20;

function row(job) {
  const made = { state: h("span"), bar: h("progress", { max: 1, "aria-label": "Steps done" }), about: h("span", { class: "soft" }) };
  const link = h("a", { href: `/jobs/${job.id}` }, named(job));
  made.element = h("li", {}, h("div", { class: "line" }, link, made.state), made.bar, made.about);
  return made;
}

function show(job) {
  if (!rows.has(job.id)) rows.set(job.id, row(job));
  const { element, state, bar, about } = rows.get(job.id);
  badge(state, job.status);
  const progress = job.progress;
  bar.hidden = !progress || FINAL.includes(job.status);
  if (progress) bar.value = progress.step / progress.total_steps;
  const parts = [job.model, `started ${time(job.created_at)}`];
  if (progress && !bar.hidden) parts.push(`step ${progress.step} of ${progress.total_steps}`);
  if (progress?.estimated_finish) parts.push(`${span(progress.estimated_finish - Date.now() / 1000)} left`);
  if (job.finished_at) parts.push(`took ${span(job.finished_at - job.created_at)}`);
  if (job.trained_tokens) parts.push(`${job.trained_tokens.toLocaleString()} tokens`);
  about.textContent = parts.join(" · ");
  return element;
}

const look = follow(async () => {
  const found = await call("GET", `/v1/fine_tuning/jobs?limit=${limit}`);
  const elements = found.data.map(show);
  const list = $("jobs");
  elements.forEach((element, place) => list.children[place] !== element && list.insertBefore(element, list.children[place] ?? null));
  while (list.children.length > elements.length) list.lastElementChild.remove();
  const active = found.data.filter((job) => !FINAL.includes(job.status) && job.status !== "paused").length;
  const summary = found.data.length ? `${active} of ${found.has_more ? "the latest " : ""}${found.data.length} at work or waiting` : "No job yet.";
  if ($("summary").textContent !== summary) $("summary").textContent = summary;
  $("more").hidden = !found.has_more;
  return active > 0;
});

$("more").addEventListener("click", () => {
  limit = Math.min(1000, limit * 2);
  look();
});
