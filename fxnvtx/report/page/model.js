// @ts-check
"use strict";
// The data of the page, what is selected, how its elements are found, and how numbers read.
/** An element that the page has. @param {string} id */
const by = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
/** @param {string} id */
const canvasOf = (id) => /** @type {HTMLCanvasElement} */ (by(id));
/** @param {HTMLCanvasElement} canvas */
const brushOf = (canvas) => /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
/** What an event is about. @param {Event} event */
const targetOf = (event) => /** @type {HTMLElement} */ (event.target);

const data = JSON.parse(by("data").textContent);
const tree = data.tree;
const count = tree.parent.length;

const model = {
  measure: data.gpu ? "gpu" : "cpu",
  colors: "role",   // what boxes are coloured by: "role" or "headroom"
  root: 0,          // the node the icicle is zoomed to; 0 is the whole capture
  at: 0,            // the node under the keyboard or the mouse
  query: "",
  /** @type {Uint8Array | null} */
  hits: null,       // 1 = the name matches, 2 = something below does
  /** @type {(() => void)[]} */
  listeners: [],
  change() { for (const listener of this.listeners) listener(); },
};

/** @type {number[][]} */
const children = Array.from({ length: count }, () => []);
for (let i = 1; i < count; i++) children[tree.parent[i]].push(i);
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

// Every node's place between 0 and 1, by measure.
const places = {};
function layout(measure) {
  return (places[measure] ??= placed(children, tree[measure]));
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

// Fill and ink per role, legible in both themes. Told apart by hue: modules are cool, what computes most is warm.
const palette = {
  light: { request: "#c9ccd3", stage: "#a9d3ea", loop: "#bfe0d6", step: "#d5ecc2", block: "#cfd6f7", module: "#e2e4f3", attention: "#f6c1b5",
    mlp: "#f9dca0", norm: "#b9e6cf", fused: "#e3bdf0", op: "#ebe9f5", residency: "#ffb870", compile: "#c2c4c9", unknown: "#f3ea8c",
    kernel: "#cfe0ea", range: "#e6e1d8", "": "#eceef1",
    near: "#bfe5c4", half: "#eeea9f", far: "#fbcb8f", farthest: "#f7ab9c", above: "#d8bdf5", unrated: "#e9eaec", ink: "#1b1c1e", dim: "#5c6068", hit: "#ffe100", line: "#ffffff" },
  dark: { request: "#51555d", stage: "#1f5f84", loop: "#23594c", step: "#3e5f2c", block: "#3b4787", module: "#353a57", attention: "#8a3d31",
    mlp: "#75561a", norm: "#1d6245", fused: "#6d3583", op: "#3d3a52", residency: "#a3560c", compile: "#44474d", unknown: "#6d6410",
    kernel: "#2f4b59", range: "#4a453c", "": "#2b2f35",
    near: "#22603a", half: "#66600f", far: "#87500f", farthest: "#8e3226", above: "#5c3d8c", unrated: "#33373d", ink: "#f2f3f4", dim: "#a3a8b1", hit: "#a07c00", line: "#1d2024" },
};
const roleText = {
  request: "one request", stage: "a part of a request", loop: "all denoising steps", step: "one denoising step", block: "a block, numbered",
  module: "another module", attention: "attention", mlp: "MLP, feed-forward", norm: "normalisation", fused: "one kernel of several modules",
  op: "an operator", residency: "weights on their way", compile: "compilation", unknown: "not attributable", kernel: "device operation", range: "another range",
};
// How far from what the device can do: of a box's time, what the device needs at its best.
const bandText = {
  near: "80 % of the roof or more", half: "50 to 80 %", far: "20 to 50 %", farthest: "under 20 %",
  above: "above the roof: suspect", unrated: "work or peak not known",
};
const themeNow = () => (document.documentElement.dataset.theme === "dark" ? palette.dark : palette.light);
const fillOf = (role) => themeNow()[role] ?? themeNow().module;
const roleOf = (i) => data.roles[tree.role[i]];
const colorOf = (i) => fillOf(model.colors === "headroom" ? bandOf(tree.roof?.[i]) : roleOf(i));

function showTip(event, title, parts) {
  const tip = by("tip");
  tip.hidden = !title;
  if (!title) return;
  tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: title }),
    Object.assign(document.createElement("span"), { textContent: parts.join(" · ") }));
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(event.clientY + 16, window.innerHeight - tip.offsetHeight - 8))}px`;
}
