import { $, ApiError, call, h, say } from "/static/api.js";
import { fields } from "/static/schema.js";

// Fields that are no key of the recipe.
const OWN = ["model", "training_file", "validation_file", "suffix", "seed", "n_epochs", "batch_size", "learning_rate_multiplier"];
const uploads = new Map();
let recipe;

for (const field of document.querySelectorAll("#form > .columns .field")) {
  const input = field.querySelector("input, select");
  const wrong = h("span", { class: "wrong", id: `${input.id}-wrong` });
  input.setAttribute("aria-describedby", `${input.getAttribute("aria-describedby") ?? ""} ${wrong.id}`.trim());
  field.append(wrong);
}

function clear() {
  say(null);
  $("findings").replaceChildren();
  for (const one of document.querySelectorAll(".wrong")) one.textContent = "";
  for (const one of document.querySelectorAll("[aria-invalid]")) one.removeAttribute("aria-invalid");
}

// Beside the field of a key, or of the block around it; else below the form.
function place(param) {
  if (!param) return null;
  const key = param.replace(/^recipe\./, "");
  const names = param.split(".").reverse();
  const split = { train: "training_file", validation: "validation_file" }[key.replace(/^data[./]/, "").split(/[.:/]/)[0]];
  const top = split ?? names.find((name) => OWN.includes(name));
  const input = top && !param.startsWith("recipe.") ? $(top) : null;
  if (input) return input;
  for (let path = key; path; path = path.includes(".") ? path.slice(0, path.lastIndexOf(".")) : "") {
    const found = document.querySelector(`#recipe [data-path="${CSS.escape(path)}"]`);
    if (found) return found.querySelector("input, select");
  }
  return null;
}

function mark(level, message, param) {
  const input = level === "error" ? place(param) : null;
  if (input) {
    input.setAttribute("aria-invalid", "true");
    const wrong = $(`${input.id}-wrong`);
    // The field says where already; without the names of JSON it reads as a sentence.
    const own = message.startsWith(`${param}: `) ? message.replaceAll(/(^|; )[\w.'[\]-]+: /g, "$1") : message;
    wrong.textContent = [wrong.textContent, own].filter(Boolean).join("\n");
    for (let box = input.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  }
  const title = level === "error" ? "Error" : "Warning";
  $("findings").append(h("p", { class: `finding ${level}` }, h("strong", {}, title), " ", h("span", {}, param && !message.startsWith(param) ? `${param}: ${message}` : message)));
}

function refused(error) {
  mark("error", error.message, error.param);
  (document.querySelector("[aria-invalid]") ?? $("start")).focus();
}

// Each line is a problem: where it is, perhaps a key, and what is wrong.
function failed(error) {
  for (const line of error.message.split("\n")) {
    const [first, second] = line.split(": ");
    const key = [second, first].find((part) => /^[a-z_]+(\.[a-z_]+)+$/.test(part ?? "") && !part.endsWith(".yaml"));
    const file = first.match(/^data\/(train|validation)\b/);
    mark("error", line, key ?? (file ? (file[1] === "train" ? "training_file" : "validation_file") : error.param));
  }
  (document.querySelector("[aria-invalid]") ?? $("start")).focus();
}

async function upload(id) {
  const file = $(id).files[0];
  if (!file) return undefined;
  const key = `${file.name}/${file.size}/${file.lastModified}`;
  if (!uploads.has(key)) {
    const body = new FormData();
    body.append("purpose", "fine-tune");
    body.append("file", file);
    $("busy").textContent = `Uploading ${file.name}…`;
    uploads.set(key, (await call("POST", "/v1/files", body)).id);
  }
  return uploads.get(key);
}

function asked(text) {
  const number = Number(text);
  return text.trim() !== "" && Number.isFinite(number) ? number : text.trim();
}

async function request() {
  if (!$("training_file").files.length) throw new ApiError(400, { message: "choose a file", param: "training_file" });
  const body = { model: $("model").value, training_file: await upload("training_file") };
  const validation = await upload("validation_file");
  if (validation) body.validation_file = validation;
  if ($("suffix").value.trim()) body.suffix = $("suffix").value.trim();
  if ($("seed").value.trim()) body.seed = asked($("seed").value);
  const hyperparameters = {};
  for (const name of ["n_epochs", "batch_size", "learning_rate_multiplier"]) {
    if ($(name).value.trim()) hyperparameters[name] = asked($(name).value);
  }
  if (Object.keys(hyperparameters).length) body.method = { type: "supervised", supervised: { hyperparameters } };
  const keys = recipe.value();
  if (keys) body.recipe = keys;
  return body;
}

async function doing(text, work) {
  clear();
  for (const one of ["start", "check"]) $(one).disabled = true;
  $("busy").textContent = text;
  try {
    await work();
  } catch (error) {
    if (error instanceof ApiError) refused(error);
    else say(new Error("The service can't be reached. Nothing was started."));
  } finally {
    $("busy").textContent = "";
    for (const one of ["start", "check"]) $(one).disabled = false;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  doing("Starting…", async () => {
    const body = await request();
    $("busy").textContent = "Starting…";
    let job = await call("POST", "/v1/fine_tuning/jobs", body);
    // Findings of the check belong beside their fields; where it has to wait for its turn, the job's page shows them.
    $("busy").textContent = "Checking…";
    for (let look = 0; look < 20 && job.status === "validating_files"; look++) {
      await new Promise((done) => setTimeout(done, 1000));
      job = await call("GET", `/v1/fine_tuning/jobs/${job.id}`);
    }
    if (job.status !== "failed") location.assign(`/jobs/${job.id}`);
    else failed(job.error);
  });
});

$("check").addEventListener("click", () => doing("Checking…", async () => {
  const body = await request();
  $("busy").textContent = "Checking: this loads the data and takes some seconds…";
  const found = await call("POST", "/v1/fine_tuning/preview", body);
  for (const one of found.findings) {
    const split = /^data\/(train|validation)\b/.exec(one.file ?? "")?.[1];
    const place = [one.file, one.line].filter((part) => part && part !== "recipe.yaml").join(":");
    const text = [split && place, one.message].filter(Boolean).join(": ");
    mark(one.level, text, split ? { train: "training_file", validation: "validation_file" }[split] : one.key || null);
  }
  const plan = Object.entries(found.plan ?? {});
  if (plan.length) $("findings").append(h("h3", {}, "The plan"), h("dl", {}, ...plan.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))));
  const wrong = document.querySelector("[aria-invalid]");
  (wrong ?? $("start")).focus();
}));

$("filter").addEventListener("input", () => {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const one of recipe.all()) {
    const fits = words.every((word) => one.text.includes(word));
    if (one.element.tagName === "P") one.element.hidden = !fits;
  }
  for (const group of document.querySelectorAll("#recipe details")) {
    const some = [...group.querySelectorAll("p[data-path]")].some((one) => !one.hidden && !one.dataset.path.endsWith(".kind"));
    group.hidden = words.length > 0 && !some && !words.every((word) => group.querySelector("summary").textContent.toLowerCase().includes(word));
    group.open = words.length > 0 && some;
  }
});

try {
  const [models, schema] = await Promise.all([call("GET", "/v1/models"), call("GET", "/v1/fine_tuning/recipe_schema")]);
  const bases = models.data.filter((one) => !one.id.startsWith("ft:"));
  $("model").replaceChildren(...bases.map((one) => h("option", { value: one.id }, one.id)));
  if (!bases.length) say(new Error("No base model can be used yet: its operator names them in models.yaml."));
  recipe = fields(schema, $("recipe"));
} catch (error) {
  say(error);
}
