"use strict";
// The data of the page, what is selected, and how numbers read. Nothing here touches the document.
const data = JSON.parse(document.getElementById("data").textContent);
const tree = data.tree;
const count = tree.parent.length;

const model = {
  measure: data.gpu ? "gpu" : "cpu",
  root: 0,          // the node the icicle is zoomed to; 0 is the whole capture
  at: 0,            // the node under the keyboard or the mouse
  query: "",
  hits: null,       // Uint8Array: 1 = the name matches, 2 = something below does
  listeners: [],
  change() { for (const listener of this.listeners) listener(); },
};

const kids = Array.from({ length: count }, () => []);
for (let i = 1; i < count; i++) kids[tree.parent[i]].push(i);
const depths = new Uint16Array(count);
for (let i = 1; i < count; i++) depths[i] = depths[tree.parent[i]] + 1;

const nameOf = (i) => data.names[tree.name[i]];
const categoryOf = (i) => data.categories[tree.category[i]];
const valueOf = (i) => tree[model.measure][i];
const selfOf = (i) => tree[model.measure + "_self"][i];

function pathTo(i) {
  const path = [];
  for (; i > 0; i = tree.parent[i]) path.push(i);
  return path.reverse();
}

function inside(i, ancestor) {
  for (; i > ancestor; i = tree.parent[i]);
  return i === ancestor;
}

// Every node's place between 0 and 1, for one measure. Children that add up to more than their parent (work that
// overlaps) are scaled to fit into it.
const places = {};
function layout(measure) {
  if (places[measure]) return places[measure];
  const values = tree[measure];
  const left = new Float64Array(count), right = new Float64Array(count);
  right[0] = 1;
  for (let i = 0; i < count; i++) {
    let sum = 0;
    for (const kid of kids[i]) sum += values[kid];
    const whole = Math.max(values[i], sum);
    const scale = whole > 0 ? (right[i] - left[i]) / whole : 0;
    let x = left[i];
    for (const kid of kids[i]) { left[kid] = x; x += values[kid] * scale; right[kid] = x; }
  }
  return (places[measure] = { left, right });
}

function search(query) {
  model.query = query;
  const wanted = query.trim().toLowerCase();
  if (!wanted) { model.hits = null; return null; }
  const matching = data.names.map((name) => name.toLowerCase().includes(wanted));
  const hits = new Uint8Array(count);
  let found = 0, share = 0;
  for (let i = count - 1; i > 0; i--) {
    if (matching[tree.name[i]]) { hits[i] |= 1; found++; }
    if (hits[i]) hits[tree.parent[i]] |= 2;
  }
  for (let i = 1; i < count; i++) {
    if (!(hits[i] & 1)) continue;
    let above = tree.parent[i];
    while (above > 0 && !(hits[above] & 1)) above = tree.parent[above];
    if (above === 0) share += valueOf(i);
  }
  model.hits = hits;
  return { found, share: valueOf(0) > 0 ? share / valueOf(0) : 0 };
}

function time(ns) {
  const size = Math.abs(ns);
  if (size < 999.5) return `${Math.round(ns)} ns`;
  const [divisor, unit] = size < 999.95e3 ? [1e3, "µs"] : size < 999.95e6 ? [1e6, "ms"] : [1e9, "s"];
  return `${(ns / divisor).toFixed(size < 99.995 * divisor ? 2 : 1)} ${unit}`;
}
const percent = (x) => `${(x * 100).toFixed(1)}%`;
const whole = (x) => x.toLocaleString("en-US");

// Fill and ink per category, legible in both themes.
const palette = {
  light: { request: "#bcd4f2", stage: "#b5e0e8", loop: "#bfe5c2", step: "#d9f0c8", module: "#d8cdf0", op: "#ece6f8", residency: "#ffd9b0",
    compile: "#d5d6d9", unknown: "#f8e3a0", kernel: "#cfe0ea", range: "#e3e0da", "": "#eceef1", ink: "#1b1c1e", hit: "#ffd84d", line: "#ffffff" },
  dark: { request: "#2b4f7e", stage: "#1f5d69", loop: "#2c5f38", step: "#45652f", module: "#51407e", op: "#3d3559", residency: "#7d4a17",
    compile: "#4b4e54", unknown: "#6b561a", kernel: "#2f4b59", range: "#48443d", "": "#2b2f35", ink: "#f2f3f4", hit: "#a07c00", line: "#1d2024" },
};
const themeNow = () => (document.documentElement.dataset.theme === "dark" ? palette.dark : palette.light);
const fillOf = (category) => themeNow()[category] ?? themeNow().module;
