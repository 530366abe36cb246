// @ts-check
"use strict";
// Two captures beside each other: both icicles on one scale, coloured by how a call of the same range changed.
/** An element that the page has. @param {string} id */
const by = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
const data = JSON.parse(by("data").textContent);
const made = (tag, text) => Object.assign(document.createElement(tag), { textContent: text ?? "" });
const percent = (x) => `${x > 0 ? "+" : ""}${(x * 100).toFixed(1)}%`;
function time(ns) {
  const size = Math.abs(ns);
  if (size < 999.5) return `${Math.round(ns)} ns`;
  const [divisor, unit] = size < 999.95e3 ? [1e3, "µs"] : size < 999.95e6 ? [1e6, "ms"] : [1e9, "s"];
  return `${(ns / divisor).toFixed(size < 99.995 * divisor ? 2 : 1)} ${unit}`;
}

// faster is blue and slower is orange, because red and green look alike to many
const colours = {
  light: { faster: "#8fb8ef", slightly_faster: "#c9dcf7", same: "#e4e5e8", slightly_slower: "#fbdcb9", slower: "#f5a95c", only: "#e3bdf0", ink: "#1b1c1e", line: "#ffffff" },
  dark: { faster: "#2a5ca5", slightly_faster: "#2f4566", same: "#3b3f45", slightly_slower: "#664a2b", slower: "#9c560f", only: "#6d3583", ink: "#f2f3f4", line: "#1d2024" },
};
const meaning = { faster: "faster by more than 10%", slightly_faster: "faster", same: "within 2%", slightly_slower: "slower", slower: "slower by more than 10%", only: "on this side only" };
const paletteNow = () => colours[document.documentElement.dataset.theme === "dark" ? "dark" : "light"];

const ROW = 23;
const sides = data.sides.map((tree, index) => {
  const count = tree.parent.length;
  /** @type {number[][]} */
  const children = Array.from({ length: count }, () => []);
  const depths = new Uint16Array(count), keys = new Map(), key = [""];
  for (let i = 1; i < count; i++) {
    children[tree.parent[i]].push(i);
    depths[i] = depths[tree.parent[i]] + 1;
    key[i] = tree.parent[i] ? `${key[tree.parent[i]]}\u0000${tree.name[i]}` : String(tree.name[i]);
    keys.set(key[i], i);
  }
  keys.set("", 0);
  const left = new Float64Array(count), right = new Float64Array(count);
  right[0] = tree.value[0];
  for (let i = 0; i < count; i++) {
    const sum = children[i].reduce((total, child) => total + tree.value[child], 0), whole = Math.max(tree.value[i], sum);
    let x = left[i];
    for (const child of children[i]) { left[child] = x; x += whole > 0 ? (tree.value[child] * (right[i] - left[i])) / whole : 0; right[child] = x; }
  }
  const canvas = /** @type {HTMLCanvasElement} */ (by(index ? "b" : "a"));
  const paint = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  return { tree, children, depths, keys, key, left, right, canvas, paint, drawn: [], count };
});
let root = "", at = null;

const perCall = (side, i) => (i === undefined || !side.tree.calls[i] ? null : side.tree.value[i] / side.tree.calls[i]);
function change(key) {
  const [a, b] = sides.map((side) => perCall(side, side.keys.get(key)));
  return a === null || b === null ? null : a > 0 ? b / a - 1 : b > 0 ? Infinity : 0;
}
function kindOf(key) {
  if (key === "") return "same";
  if (sides.some((side) => side.keys.get(key) === undefined)) return "only";
  const value = change(key) ?? 0;
  return Math.abs(value) <= 0.02 ? "same" : value > 0.1 ? "slower" : value > 0 ? "slightly_slower" : value < -0.1 ? "faster" : "slightly_faster";
}

function draw() {
  const most = Math.max(...sides.map((side) => { const i = side.keys.get(root); return i === undefined ? 0 : side.right[i] - side.left[i]; })) || 1;
  const deepest = Math.max(...sides.map((side) => side.depths.reduce((a, b) => Math.max(a, b), 0)));
  for (const side of sides) {
    const { canvas, paint } = side, ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, colors = paletteNow();
    const height = (deepest + 1) * ROW + 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.font = "12.5px system-ui, sans-serif"; paint.textBaseline = "middle";
    side.drawn = [];
    const top = side.keys.get(root);
    if (top === undefined) { paint.fillStyle = colors.ink; paint.fillText("not on this side", 8, ROW / 2); continue; }
    const todo = [top], scale = width / most, reached = [];
    while (todo.length) {
      const i = todo.pop(), level = side.depths[i] - side.depths[top];
      let x0 = (side.left[i] - side.left[top]) * scale, x1 = (side.right[i] - side.left[top]) * scale;
      if (x1 <= x0) continue;
      if (x1 - x0 < 1) { if (x1 <= (reached[level] ?? 0) + 0.5) continue; x1 = x0 + 1; }
      reached[level] = x1;
      side.drawn.push([x0, x1, level, i]);
      paint.fillStyle = colors[kindOf(side.key[i])];
      paint.fillRect(x0, level * ROW, x1 - x0, ROW - 1);
      if (x1 - x0 > 3) { paint.fillStyle = colors.line; paint.fillRect(x1 - 1, level * ROW, 1, ROW - 1); }
      if (at !== null && side.key[i] === at && i) { paint.strokeStyle = colors.ink; paint.lineWidth = 2; paint.strokeRect(x0 + 1, level * ROW + 1, Math.max(1, x1 - x0 - 3), ROW - 3); }
      if (x1 - x0 > 24) { paint.fillStyle = colors.ink; paint.fillText(fit(paint, i ? shownName(side, i) : "everything", x1 - x0 - 12), x0 + 6, level * ROW + ROW / 2); }
      for (let k = side.children[i].length - 1; k >= 0; k--) todo.push(side.children[i][k]);
    }
  }
}

function shownName(side, i) {
  const text = data.names[side.tree.name[i]], above = side.tree.parent[i] ? data.names[side.tree.name[side.tree.parent[i]]] : "";
  return above && text.startsWith(`${above}.`) ? text.slice(above.length + 1) : text;
}
function fit(paint, text, room) {
  if (paint.measureText(text).width <= room) return text;
  let low = 0, high = text.length;
  while (low < high) { const half = (low + high + 1) >> 1; if (paint.measureText(`${text.slice(0, half)}…`).width <= room) low = half; else high = half - 1; }
  return low ? `${text.slice(0, low)}…` : "";
}

function facts(key) {
  const parts = sides.map((side, index) => {
    const i = side.keys.get(key), letter = index ? "B" : "A";
    return i === undefined ? `${letter}: not there` : `${letter}: ${time(side.tree.value[i])} in ${side.tree.calls[i]} calls`;
  });
  const value = change(key);
  if (value !== null) parts.push(Number.isFinite(value) ? `${percent(value)} a call` : "new work");
  return parts;
}
function nameOf(key) { return key === "" ? "everything" : data.names[Number(key.slice(key.lastIndexOf("\u0000") + 1))]; }

function zoom(key) {
  root = key; at = key;
  const line = [""], parts = key === "" ? [] : key.split("\u0000");
  for (let n = 1; n <= parts.length; n++) line.push(parts.slice(0, n).join("\u0000"));
  by("crumbs").replaceChildren(...line.flatMap((item, index) => {
    const button = made("button", nameOf(item));
    button.type = "button";
    button.addEventListener("click", () => zoom(item));
    return index ? ["›", button] : [button];
  }));
  draw();
}
const above = (key) => (key.includes("\u0000") ? key.slice(0, key.lastIndexOf("\u0000")) : "");

for (const side of sides) {
  const under = (event) => {
    const level = Math.floor(event.offsetY / ROW);
    const box = side.drawn.find(([x0, x1, where]) => where === level && event.offsetX >= x0 && event.offsetX < x1);
    return box ? side.key[box[3]] : null;
  };
  side.canvas.addEventListener("mousemove", (event) => {
    const key = under(event), tip = by("tip");
    if (key !== at) { at = key; draw(); }
    tip.hidden = !key;
    by("pointed").textContent = key ? `${nameOf(key)}: ${facts(key).join(", ")}` : "";
    if (!key) return;
    tip.replaceChildren(made("b", nameOf(key)), made("span", facts(key).join(" · ")));
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, Math.min(event.clientY + 16, window.innerHeight - tip.offsetHeight - 8))}px`;
  });
  side.canvas.addEventListener("mouseleave", () => { by("tip").hidden = true; at = null; draw(); });
  side.canvas.addEventListener("click", (event) => { const key = under(event); if (key !== null) zoom(key === root ? above(key) : key); });
  side.canvas.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.preventDefault(); zoom(above(root)); } });
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  by("theme").textContent = theme === "dark" ? "Light" : "Dark";
  by("legend").replaceChildren(...Object.entries(meaning).map(([kind, text]) => {
    const item = made("li"), mark = made("i");
    mark.style.background = paletteNow()[kind];
    item.append(mark, text);
    return item;
  }));
  draw();
}
by("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
window.addEventListener("resize", draw);

by("sources").textContent = `A: ${data.titles[0]}, B: ${data.titles[1]}`;
by("headline").textContent = data.headline;
by("notes").replaceChildren(...data.notes.map((note) => made("li", note)));
document.querySelectorAll("figcaption").forEach((caption, index) => {
  caption.textContent = `${index ? "B" : "A"}: ${data.titles[index].split("/").pop()}, ${time(sides[index].tree.value[0])} ${data.measure.toUpperCase()}`;
});
by("table-said").textContent = `medians per step (per request or capture outside of steps)${data.left ? `; ${data.left.toLocaleString("en-US")} smaller ones are left out` : ""}`;
const heads = made("tr");
heads.append(...["range", `A ${data.measure}`, `B ${data.measure}`, "change", "relative", "verdict"].map((text) => made("th", text)));
by("changes-head").append(heads);
by("changes-body").append(...data.rows.map(([name, a, b, relative, verdict]) => {
  const row = made("tr");
  const delta = (b ?? 0) - (a ?? 0);
  row.className = verdict.startsWith("change") ? (delta > 0 ? "slower" : "faster") : "";
  row.append(made("td", name), ...[a === null ? "-" : time(a), b === null ? "-" : time(b), `${delta > 0 ? "+" : ""}${time(delta)}`,
    relative === null ? "" : percent(relative), verdict].map((text) => made("td", text)));
  row.firstChild.title = name;
  return row;
}));
zoom("");
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
// for whoever wants to drive the page, such as a test
Object.assign(window, { fxnvtx: { sides, zoom, kindOf, change, data, get root() { return root; }, get at() { return at; } } });
