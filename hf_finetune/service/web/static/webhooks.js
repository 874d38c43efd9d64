import { $, call, h, say, time } from "/static/api.js";

const path = "/v1/webhook_endpoints";

async function listed() {
  const found = (await call("GET", `${path}?limit=100`)).data;
  $("summary").textContent = found.length ? "Called when a job or a batch ends." : "No endpoint yet.";
  $("endpoints").replaceChildren(...found.map((one) => {
    const remove = h("button", { type: "button", class: "danger", "aria-label": `Delete ${one.name}`, on: { click: () => gone(one) } }, "Delete");
    const about = `${one.url} · ${one.event_types.join(", ")} · since ${time(one.created_at)}`;
    return h("li", {}, h("div", { class: "line" }, h("strong", {}, one.name), remove), h("span", { class: "soft" }, about));
  }));
}

async function gone(one) {
  if (!confirm(`Delete ${one.name}? Events that wait for it are not delivered any more.`)) return;
  await tried(() => call("DELETE", `${path}/${one.id}`));
}

async function tried(work) {
  say(null);
  try {
    const made = await work();
    await listed();
    return made;
  } catch (error) {
    say(error);
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const event_types = [...$("types").querySelectorAll("input:checked")].map((box) => box.value);
  $("create").disabled = true;
  const made = await tried(() => call("POST", path, { name: $("name").value, url: $("url").value, event_types }));
  $("create").disabled = false;
  $("made").hidden = !made;
  $("secret").textContent = made?.signing_secret ?? "";
  if (made) $("form").reset();
});

await tried(async () => {
  const types = (await call("GET", "/v1/webhook_event_types")).data;
  $("types").append(...types.map((type) =>
    h("label", { class: "inline" }, h("input", { type: "checkbox", value: type, checked: type.startsWith("fine_tuning") }), ` ${type}`)));
});
