import { $, FINAL, badge, call, follow, h, named, number, say, span, time } from "/static/api.js";
import { chart } from "/static/chart.js";

const id = $("name").dataset.job;
const path = `/v1/fine_tuning/jobs/${id}`;
const busy = new Set();
let events = 20;
let drawn = "";

for (const what of ["pause", "resume", "cancel"]) {
  $(what).addEventListener("click", async () => {
    if (what === "cancel" && !confirm("Cancel this job? Its checkpoints stay, but it can't be resumed.")) return;
    busy.add(what);
    $(what).disabled = true;
    try {
      await call("POST", `${path}/${what}`);
      await look();
    } catch (error) {
      say(error);
    } finally {
      busy.delete(what);
    }
  });
}

function head(job) {
  $("name").textContent = named(job);
  document.title = `${named(job)} · hf_finetune`;
  badge($("state"), job.status);
  const parts = [job.id, job.model, `created ${time(job.created_at)}`];
  if (job.finished_at) parts.push(`ended ${time(job.finished_at)}`);
  $("about").textContent = parts.join(" · ");
  const moves = ["validating_files", "queued", "running"].includes(job.status);
  const buttons = { pause: moves, resume: job.status === "paused", cancel: moves || job.status === "paused" };
  for (const [name, shown] of Object.entries(buttons)) {
    // A button that had the focus must not take it away with it.
    if (!shown && document.activeElement === $(name)) $("main").focus();
    $(name).hidden = !shown;
    $(name).disabled = busy.has(name);
  }
  const progress = job.progress;
  $("progress").hidden = !progress || FINAL.includes(job.status);
  if (progress) {
    $("done").value = progress.step / progress.total_steps;
    const left = progress.estimated_finish ? ` · ${span(progress.estimated_finish - Date.now() / 1000)} left` : "";
    $("steps").textContent = `Step ${progress.step.toLocaleString()} of ${progress.total_steps.toLocaleString()}${left}`;
  }
  $("report").hidden = job.status !== "succeeded";
  $("data").hidden = job.status === "validating_files";
  $("ask").hidden = !job.fine_tuned_model;
  if (job.fine_tuned_model) $("ask").href = `/playground?model=${encodeURIComponent(job.fine_tuned_model)}`;
  $("error").hidden = !job.error;
  if (job.error) $("reason").textContent = [job.error.param && `${job.error.param}:`, job.error.message].filter(Boolean).join("\n");
  const settings = {
    Model: job.fine_tuned_model ?? job.model, Epochs: job.hyperparameters.n_epochs, "Batch size": job.hyperparameters.batch_size,
    "Learning rate multiplier": job.hyperparameters.learning_rate_multiplier, Seed: job.seed, "Trained tokens": job.trained_tokens?.toLocaleString(),
    "Training file": job.training_file, "Validation file": job.validation_file, ...job.metadata,
  };
  const rows = Object.entries(settings).filter(([, value]) => value !== null && value !== undefined);
  $("settings").replaceChildren(...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

function listed(found) {
  $("older").hidden = !found.has_more;
  $("events").replaceChildren(...found.data.map((event) =>
    h("li", { class: event.level }, h("time", { class: "soft" }, new Date(event.created_at * 1000).toLocaleTimeString()), h("span", {}, event.message))));
}

const look = follow(async () => {
  const job = await call("GET", path);
  head(job);
  const [happened, written, curves] = await Promise.all([
    call("GET", `${path}/events?limit=${events}`), call("GET", `${path}/checkpoints?limit=50`), call("GET", `${path}/metrics`),
  ]);
  listed(happened);
  $("no-checkpoints").hidden = written.data.length > 0;
  $("checkpoints").replaceChildren(...written.data.map((one) => h("tr", {},
    h("th", { scope: "row" }, job.fine_tuned_model ? h("a", { href: `/playground?model=${encodeURIComponent(one.fine_tuned_model_checkpoint)}` }, one.step_number.toLocaleString()) : one.step_number.toLocaleString()), h("td", { class: "roomy" }, time(one.created_at)),
    h("td", { class: "n" }, number(one.metrics.train_loss)), h("td", { class: "n" }, number(one.metrics.full_valid_loss)))));
  $("no-curves").hidden = curves.charts.length > 0;
  const now = JSON.stringify(curves);
  if (now !== drawn) $("curves").replaceChildren(...curves.charts.map((one) => chart(one.title, one.series)));
  drawn = now;
  return !FINAL.includes(job.status) && job.status !== "paused";
});

$("older").addEventListener("click", () => {
  events = Math.min(1000, events * 4);
  look();
});
