// A line chart as SVG in the colours of the page; a table of the same numbers for those who do not see it.

import { h, number } from "/static/api.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 480, HEIGHT = 230, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 34;

function s(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Steps of 1, 2 or 5 times a power of ten, about `count` of them.
function ticks(low, high, count, whole) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

export function chart(title, series) {
  const points = series.flatMap((one) => one.points);
  let [first, last] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  if (first === last) [first, last] = [first - 1, last + 1];
  let [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  low = low >= 0 ? Math.max(0, low - room) : low - room;
  high += room;
  const x = (step) => LEFT + ((step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  const about = series.map((one) => `${label(one)} from ${number(one.points[0][1])} to ${number(one.points.at(-1)[1])}`);
  const drawing = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title} over the steps: ${about.join(", ")}` });
  for (const value of ticks(low, high, 4)) {
    drawing.append(s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    drawing.append(s("text", { class: "tick end", x: LEFT - 7, y: y(value) + 4 }, number(value)));
  }
  for (const step of ticks(first, last, 5, true)) {
    drawing.append(s("text", { class: "tick middle", x: x(step), y: HEIGHT - BOTTOM + 17 }, step.toLocaleString()));
  }
  drawing.append(s("text", { class: "tick middle", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3 }, "step"));
  series.forEach((one, place) => {
    const path = one.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
    drawing.append(s("path", { class: `curve c${place % 6}`, d: path }));
    if (one.points.length < 26) {
      for (const p of one.points) drawing.append(s("circle", { class: `dot c${place % 6}`, cx: x(p[0]), cy: y(p[1]), r: 2.6 }));
    }
  });

  // The values at the step under the pointer.
  const cursor = s("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  drawing.append(cursor);
  const legend = h("figcaption");
  const values = series.map((one, place) => {
    const value = h("span", { class: "value" });
    legend.append(h("span", { class: `mark c${place % 6}` }, label(one), " ", value));
    return value;
  });
  const point = (step) => {
    series.forEach((one, place) => {
      const near = step === null ? one.points.at(-1) : one.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      values[place].textContent = `${number(near[1])}${step === null ? "" : ` at ${near[0].toLocaleString()}`}`;
    });
  };
  point(null);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const step = first + ((at - LEFT) / (WIDTH - LEFT - RIGHT)) * (last - first);
    const inside = Math.min(last, Math.max(first, step));
    cursor.setAttribute("x1", x(inside));
    cursor.setAttribute("x2", x(inside));
    cursor.setAttribute("visibility", "visible");
    point(inside);
  });
  drawing.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    point(null);
  });
  return h("figure", {}, h("h3", {}, title), drawing, legend);
}

function label(one) {
  const name = one.name.replaceAll("_", " ");
  return ["loss", "learning rate"].includes(name) ? (name === "loss" ? one.split : name) : `${name}, ${one.split}`;
}
