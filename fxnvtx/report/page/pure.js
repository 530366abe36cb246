// @ts-check
"use strict";
// Functions of their arguments alone: no document, no data of the page. tests/report/test_page_script.py runs them.

/** Every node's place between 0 and 1. Children that add up to more than their parent (work that overlaps) are scaled
 * to fit into it. Parents stand before their children.
 * @param {number[][]} children children by node
 * @param {number[]} values
 */
function placed(children, values) {
  const left = new Float64Array(values.length), right = new Float64Array(values.length);
  right[0] = 1;
  for (let i = 0; i < values.length; i++) {
    let sum = 0;
    for (const child of children[i]) sum += values[child];
    const most = Math.max(values[i], sum);
    const scale = most > 0 ? (right[i] - left[i]) / most : 0;
    let x = left[i];
    for (const child of children[i]) { left[child] = x; x += values[child] * scale; right[child] = x; }
  }
  return { left, right };
}

/** Which colour stands for a share of the roof.
 * @param {number | null | undefined} roof 1: as fast as the device can; nothing where it is not known
 */
function bandOf(roof) {
  if (roof === null || roof === undefined) return "unrated";
  if (roof > 1) return "above";
  return roof >= 0.8 ? "near" : roof >= 0.5 ? "half" : roof >= 0.2 ? "far" : "farthest";
}

/** @param {number} ns */
function time(ns) {
  const size = Math.abs(ns);
  if (size < 999.5) return `${Math.round(ns)} ns`;
  const [divisor, unit] = size < 999.95e3 ? [1e3, "µs"] : size < 999.95e6 ? [1e6, "ms"] : [1e9, "s"];
  return `${(ns / divisor).toFixed(size < 99.995 * divisor ? 2 : 1)} ${unit}`;
}
/** @param {number} x */
const percent = (x) => `${(x * 100).toFixed(1)}%`;
/** @param {number} x */
const whole = (x) => x.toLocaleString("en-US");

// What a fused range is, from its own text: `fused(norm1, attn.to_q)`.
/** @param {string} name */
function explained(name) {
  const match = /^fused\((.*)\)$/.exec(name);
  return match ? [`the compiler made one kernel of ${match[1].split(", ").join(" and ")}; its time is of all of them together (--split-fused shares it out)`] : [];
}

/** @param {number} value */
function bytes(value) {
  let size = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024) return `${unit === "B" ? size : size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} TiB`;
}
