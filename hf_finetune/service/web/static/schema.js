// A form made of a JSON Schema: a field for each key, blocks that unfold, and one set of fields for each kind.

import { h } from "/static/api.js";

let count = 0;

// The forms that a value may have; an anyOf within an anyOf counts as one.
const branches = (schema) => (schema.anyOf ?? schema.oneOf ?? [schema]).flatMap((one) => (one.anyOf || one.oneOf ? branches(one) : [one]));
const isBlock = (schema) => schema.type === "object" && schema.properties;
const constants = (one) => one.enum ?? ("const" in one ? [one.const] : []);

export function fields(schema, place, path = "") {
  const made = Object.entries(schema.properties ?? {}).filter(([name]) => name !== "kind").map(([name, inner]) => field(name, inner, path ? `${path}.${name}` : name));
  place.append(...made.map((one) => one.element));
  return {
    value: () => {
      const found = {};
      for (const one of made) {
        const value = one.value();
        if (value !== undefined) found[one.name] = value;
      }
      return Object.keys(found).length ? found : undefined;
    },
    all: () => made.flatMap((one) => one.all()),
  };
}

function field(name, schema, path) {
  const forms = branches(schema);
  const blocks = forms.filter(isBlock);
  if (blocks.length) return block(name, schema, path, blocks, forms.filter((one) => !isBlock(one)));
  return scalar(name, schema, path, forms);
}

function block(name, schema, path, blocks, others) {
  const inside = h("div", { class: "block" });
  const kinds = blocks.filter((one) => one.properties.kind).map((one) => one.properties.kind.const);
  const element = h("details", { class: "group" }, h("summary", {}, h("strong", {}, name), h("span", { class: "soft" }, ` ${first(schema.description)}`)), inside);
  let made = null;
  const fill = (form) => {
    const place = h("div", { class: "columns" });
    inside.lastElementChild?.classList.contains("columns") && inside.lastElementChild.remove();
    inside.append(place);
    made = form ? fields(form, place, path) : null;
  };
  if (!kinds.length) {
    const words = others.flatMap(constants).filter((one) => typeof one === "string");
    const choice = words.length ? select(path, ["", ...words], `${name} as a whole`) : null;
    if (choice) inside.append(choice.element);
    fill(blocks[0]);
    return {
      name, element,
      value: () => (choice?.value() ? choice.value() : made.value()),
      all: () => [{ path, element, text: text(name, schema, path) }, ...made.all()],
    };
  }
  const choice = select(`${path}.kind`, ["", ...kinds], "kind");
  choice.input.addEventListener("change", () => fill(blocks.find((one) => one.properties.kind?.const === choice.value())));
  inside.append(choice.element);
  return {
    name, element,
    value: () => (choice.value() ? { kind: choice.value(), ...made?.value() } : undefined),
    all: () => [{ path, element, text: `${text(name, schema, path)} ${kinds.join(" ")}` }, ...(made?.all() ?? [])],
  };
}

function select(path, options, name) {
  const id = `f${count++}`;
  const input = h("select", { id }, ...options.map((one) => h("option", { value: one }, one === "" ? "as chosen for the data" : one)));
  const message = h("span", { class: "wrong", id: `${id}-wrong` });
  return { input, value: () => input.value || undefined, element: h("p", { class: "field", "data-path": path }, h("label", { for: id }, name), input, message) };
}

function scalar(name, schema, path, forms) {
  const id = `f${count++}`;
  const words = forms.flatMap(constants);
  const types = new Set(forms.map((one) => one.type).filter(Boolean));
  const onlyWords = forms.every((one) => constants(one).length || one.type === "null" || one.type === "boolean");
  // What stands between backticks is code.
  const described = (schema.description ?? "").split("`").map((part, place) => (place % 2 ? h("code", {}, part) : part));
  const hint = h("span", { class: "soft hint", id: `${id}-hint` }, ...described);
  let input;
  let value;
  if (onlyWords) {
    const options = [...(types.has("boolean") ? [true, false] : []), ...words, ...(types.has("null") ? [null] : [])];
    input = h("select", { id }, h("option", { value: "" }, standard(schema)), ...options.map((one) => h("option", { value: JSON.stringify(one) }, one === null ? "none" : String(one))));
    value = () => (input.value === "" ? undefined : JSON.parse(input.value));
  } else {
    const isList = types.has("array") || types.has("object");
    const isNumber = types.has("integer") || types.has("number");
    input = h("input", { id, autocomplete: "off", placeholder: standard(schema), inputmode: isNumber && !types.has("string") ? "decimal" : null });
    value = () => {
      const text = input.value.trim();
      if (text === "") return undefined;
      if (words.includes(text)) return text;
      if (types.has("null") && ["null", "none"].includes(text)) return null;
      if (isNumber && text !== "" && Number.isFinite(Number(text))) return Number(text);
      if (isList && /^[[{]/.test(text)) {
        try { return JSON.parse(text); } catch { return text; }
      }
      // Names with commas between them are a list, where one is taken and no plain text is.
      return types.has("array") && (!types.has("string") || text.includes(",")) ? text.split(",").map((part) => part.trim()) : text;
    };
  }
  const message = h("span", { class: "wrong", id: `${id}-wrong` });
  input.setAttribute("aria-describedby", `${id}-hint ${id}-wrong`);
  const element = h("p", { class: "field", "data-path": path }, h("label", { for: id }, name), input, hint, message);
  return { name, element, value, all: () => [{ path, element, text: text(name, schema, path) }] };
}

function standard(schema) {
  if (!("default" in schema) || schema.default === null) return "as chosen for the data";
  return typeof schema.default === "object" ? "as chosen for the data" : `usually ${schema.default}`;
}

const first = (description = "") => description.split(/[.;:]\s/)[0].replaceAll("`", "");
const text = (name, schema, path) => `${path} ${schema.description ?? ""}`.toLowerCase();
