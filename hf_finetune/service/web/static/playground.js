import { $, call, h, say, stream } from "/static/api.js";

let models = [];
let turns = [[], []];
let running = null;

const chosen = () => [$("first").value, $("second").value].map((name) => models.find((one) => one.id === name)).filter(Boolean);
function short(model) {
  const [, base, , suffix, id, step] = model.id.split(":");
  return `${suffix || base} · ${base} · ${id.slice(-6)}${step ? ` · step ${step.replace("ckpt-step-", "")}` : ""}`;
}

function inputs() {
  const model = chosen()[0];
  const columns = model.endpoint === "chat" ? ["Message"] : model.columns;
  const kept = new Map([...$("inputs").querySelectorAll("textarea")].map((area) => [area.name, area.value]));
  $("inputs").replaceChildren(...columns.map((name, place) =>
    h("p", { class: "field" }, h("label", { for: `input-${place}` }, name), h("textarea", { id: `input-${place}`, name, rows: 3, required: true }))));
  for (const area of $("inputs").querySelectorAll("textarea")) {
    area.value = kept.get(area.name) ?? "";
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("form").requestSubmit();
    });
  }
  // A second model must be one that answers the same question.
  const others = models.filter((one) => one.id !== model.id && one.endpoint === model.endpoint && String(one.columns) === String(model.columns));
  const before = $("second").value;
  $("second").replaceChildren(h("option", { value: "" }, "none"), ...others.map((one) => h("option", { value: one.id }, short(one))));
  $("second").value = others.some((one) => one.id === before) ? before : "";
  $("length-of").hidden = model.endpoint !== "chat";
  $("clear").hidden = !model.is_chat;
  forget();
}

function forget() {
  running?.abort();
  turns = [[], []];
  $("answers").replaceChildren(...chosen().map((model) => h("section", { "aria-label": short(model) }, h("h2", {}, short(model)), h("div", { class: "talk" }))));
}

async function chat(model, place, text, signal) {
  const before = model.is_chat ? turns[place] : [];
  const messages = [...before, { role: "user", content: text }];
  const talk = $("answers").children[place].querySelector(".talk");
  const answer = h("p", { class: "turn assistant" });
  talk.append(h("p", { class: "turn user" }, text), answer);
  const limit = Number($("length").value) || 128;
  let whole = "";
  for await (const piece of stream("/v1/chat/completions", { model: model.id, messages, max_tokens: limit, stream: true }, signal)) {
    const choice = piece.choices?.[0];
    whole += choice?.delta?.content ?? choice?.message?.content ?? "";
    answer.textContent = whole;
  }
  if (!whole) answer.append(h("span", { class: "soft" }, "(an empty answer)"));
  turns[place] = [...messages, { role: "assistant", content: whole }];
}

async function classify(model, place, row) {
  const talk = $("answers").children[place].querySelector(".talk");
  const input = model.columns.length === 1 ? [row[model.columns[0]]] : [row];
  const found = await call("POST", "/v1/classifications", { model: model.id, input });
  const results = found.results[0];
  const shown = Object.entries(results).map(([target, result]) => {
    if (!result?.scores) return h("p", {}, `${target}: ${typeof result === "object" ? JSON.stringify(result) : result}`);
    const scores = Object.entries(result.scores).sort((a, b) => b[1] - a[1]);
    return h("table", { class: "scores-of" }, h("caption", {}, target), h("tbody", {}, ...scores.map(([name, share]) =>
      h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "wide" }, h("meter", { min: 0, max: 1, value: share, "aria-label": name })), h("td", { class: "n" }, `${(100 * share).toFixed(1)} %`)))));
  });
  talk.prepend(h("div", { class: "result" }, h("p", { class: "turn user" }, Object.values(row).join(" · ")), ...shown));
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const areas = [...$("inputs").querySelectorAll("textarea")];
  const empty = areas.find((area) => !area.value.trim());
  if (empty) return empty.focus();
  const row = Object.fromEntries(areas.map((area) => [area.name, area.value]));
  const asked = chosen();
  running = new AbortController();
  $("send").disabled = true;
  $("busy").textContent = "Asking…";
  say(null);
  try {
    await Promise.all(asked.map((model, place) => (model.endpoint === "chat" ? chat(model, place, areas[0].value, running.signal) : classify(model, place, row))));
    if (asked[0].is_chat) areas[0].value = "";
  } catch (error) {
    if (error.name !== "AbortError") say(error);
  } finally {
    $("send").disabled = false;
    $("busy").textContent = "";
    areas[0].focus();
  }
});

$("first").addEventListener("change", inputs);
$("second").addEventListener("change", forget);
$("clear").addEventListener("click", forget);

try {
  models = (await call("GET", "/v1/fine_tuning/answering_models")).data.reverse();
  $("none").hidden = models.length > 0;
  $("form").hidden = models.length === 0;
  if (models.length) {
    $("first").replaceChildren(...models.map((one) => h("option", { value: one.id }, short(one))));
    const wanted = new URLSearchParams(location.search).get("model");
    if (models.some((one) => one.id === wanted)) $("first").value = wanted;
    inputs();
  }
} catch (error) {
  say(error);
}
