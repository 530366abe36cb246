// @ts-check
"use strict";
// The icicle: every range as wide as its time. What no pixel is left for is not visited, so the cost of a picture
// depends on the window and not on the capture.
const icicle = (() => {
  const canvas = canvasOf("icicle");
  const box = by("icicle-box");
  const paint = brushOf(canvas);
  const ROW = 23;
  let width = 0, height = 0;
  let view = [0, 1], from = [0, 1], since = 0, moving = false;   // the shown part of [0, 1], and where a zoom comes from
  let drawn = [];                                // boxes of the last picture: [x0, x1, level, node]

  function levels() {
    let deepest = 0;
    const todo = [model.root];
    while (todo.length) { const i = /** @type {number} */ (todo.pop()); deepest = Math.max(deepest, depths[i]); todo.push(...children[i]); }
    return deepest - depths[model.root] + 1;
  }

  function resize() {
    const ratio = window.devicePixelRatio || 1;
    width = box.clientWidth;
    height = Math.max(3, levels()) * ROW + 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  function frame(now) {
    const moved = Math.min(1, (now - since) / 170);
    const eased = 1 - (1 - moved) ** 3;
    const { left, right } = layout(model.measure);
    const goal = right[model.root] > left[model.root] ? [left[model.root], right[model.root]] : [0, 1];
    view = [from[0] + (goal[0] - from[0]) * eased, from[1] + (goal[1] - from[1]) * eased];
    draw(left, right);
    moving = moved < 1;
    if (moving) requestAnimationFrame(frame);
  }

  function draw(left, right) {
    const colors = themeNow();
    paint.clearRect(0, 0, width, height);
    paint.font = "12.5px system-ui, sans-serif";
    paint.textBaseline = "middle";
    drawn = [];
    const scale = width / (view[1] - view[0]);
    const todo = [model.root], reached = [];   // reached: per level, up to where boxes are drawn
    while (todo.length) {
      const i = /** @type {number} */ (todo.pop());
      const level = depths[i] - depths[model.root];
      let x0 = Math.max(0, (left[i] - view[0]) * scale), x1 = Math.min(width, (right[i] - view[0]) * scale);
      if (x1 <= x0) continue;
      if (x1 - x0 < 1) {   // of what shares a pixel, the first stands for all
        if (x1 <= (reached[level] ?? 0) + 0.5) continue;
        x0 = Math.max(x0, reached[level] ?? 0); x1 = Math.min(width, x0 + 1);
      }
      reached[level] = Math.max(reached[level] ?? 0, x1);
      boxed(i, x0, x1, level, colors);
      for (let k = children[i].length - 1; k >= 0; k--) todo.push(children[i][k]);
    }
  }

  function boxed(i, x0, x1, level, colors) {
    const y = level * ROW, wide = x1 - x0;
    const hits = model.hits;
    drawn.push([x0, x1, level, i]);
    paint.globalAlpha = hits && !hits[i] ? 0.28 : 1;
    paint.fillStyle = hits && hits[i] & 1 ? colors.hit : colorOf(i);
    paint.fillRect(x0, y, wide, ROW - 1);
    if (wide > 3) { paint.fillStyle = colors.line; paint.fillRect(x1 - 1, y, 1, ROW - 1); }
    if (i === model.at && i > 0) {
      paint.strokeStyle = colors.ink; paint.lineWidth = 2;
      paint.strokeRect(x0 + 1, y + 1, Math.max(1, wide - 3), ROW - 3);
    }
    if (wide > 24) {
      paint.fillStyle = colors.ink;
      paint.fillText(fit(i === 0 ? "everything" : i === model.root ? nameOf(i) : relative(i), wide - 12), x0 + 6, y + ROW / 2);
    }
    paint.globalAlpha = 1;
  }

  const measured = new Map();
  function wideOf(text) {
    let wide = measured.get(text);
    if (wide === undefined) {
      paint.font = "12.5px system-ui, sans-serif";
      wide = paint.measureText(text).width;
      if (measured.size > 50000) measured.clear();
      measured.set(text, wide);
    }
    return wide;
  }
  // Inside "transformer.blocks.0" the box of "transformer.blocks.0.attn" need only say "attn".
  function relative(node) {
    const text = nameOf(node), above = nameOf(tree.parent[node]);
    return text.startsWith(above + ".") ? text.slice(above.length + 1) : text;
  }

  function fit(text, room) {
    if (wideOf(text) <= room) return text;
    const last = text.slice(text.lastIndexOf(".") + 1);
    if (last !== text && !last.includes(" ") && wideOf("…" + last) <= room) return "…" + last;
    let low = 0, high = text.length;
    while (low < high) { const half = (low + high + 1) >> 1; wideOf(text.slice(0, half) + "…") <= room ? (low = half) : (high = half - 1); }
    return low ? text.slice(0, low) + "…" : "";
  }

  function nodeAt(x, y) {
    const level = Math.floor(y / ROW);
    for (const [x0, x1, at, node] of drawn) if (at === level && x >= x0 && x < x1) return node;
    return -1;
  }

  function rectOf(node) {
    for (const [x0, x1, level, at] of drawn) if (at === node) return { x: x0, y: level * ROW, width: x1 - x0, height: ROW };
    return null;
  }

  function zoom(node) {
    from = view; since = performance.now(); moving = true;
    model.root = node; model.at = node;
    resize(); crumbs(); point(node); requestAnimationFrame(frame);
    model.change();
  }

  function crumbs() {
    const line = [0, ...pathTo(model.root)];
    by("crumbs").replaceChildren(...line.flatMap((node, index) => {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = node ? nameOf(node) : "everything"; button.title = button.textContent;
      button.addEventListener("click", () => zoom(node));
      return index ? ["›", button] : [button];
    }));
  }

  function facts(node) {
    const parts = [`${whole(tree.calls[node])} calls`, `${time(valueOf(node))} ${model.measure === "gpu" ? "GPU" : "CPU"}`,
      `self ${time(selfOf(node))}`, percent(valueOf(0) ? valueOf(node) / valueOf(0) : 0)];
    if (data.gpu) {
      parts.push(model.measure === "gpu" ? `CPU ${time(tree.cpu[node])}` : `GPU ${time(tree.gpu[node])}`);
      parts.push(`${whole(tree.kernels[node])} operations`, `idle ${time(tree.gap[node])}`);
    }
    const flags = tree.flags[node];
    if (data.classes[nameOf(node)]) parts.push(`class ${data.classes[nameOf(node)]}`);
    if (tree.resident?.[node]) parts.push(`hidden ${percent(tree.overlap?.[node] / tree.resident[node] || 0)}`);
    if (tree.communication?.[node]) parts.push(`exposed communication ${time(tree.communication[node] - (tree.communication_hidden?.[node] ?? 0))}`);
    if (tree.waited?.[node]) parts.push(`waits ${time(tree.waited[node])}`);
    if (tree.headroom?.[node] != null) parts.push(`headroom ${time(tree.headroom[node])}`);
    if (tree.roof?.[node] != null) parts.push(`${percent(tree.roof[node])} of the roof, ${tree.bound[node]}-bound`);
    if (tree.peak?.[node]) parts.push(`memory ${bytes(tree.peak[node])}`);
    parts.push(...explained(nameOf(node)));
    if (flags & 1) parts.push("replayed by a CUDA graph");
    if (flags & 2) parts.push("an estimate");
    if (flags & 4) parts.push("some were still open at the end");
    return parts;
  }

  function point(node) {
    model.at = node;
    by("pointed").textContent = node > 0 ? `${nameOf(node)}: ${facts(node).join(", ")}` : "";
    table.follow(node);
  }

  const tip = by("tip");
  canvas.addEventListener("mousemove", (event) => {
    const node = nodeAt(event.offsetX, event.offsetY);
    showTip(event, node > 0 && nameOf(node), node > 0 && [categoryOf(node), ...facts(node)]);
  });
  canvas.addEventListener("mouseleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => {
    const node = nodeAt(event.offsetX, event.offsetY);
    if (node < 0) return;
    zoom(node === model.root && node > 0 ? tree.parent[node] : node);
  });
  canvas.addEventListener("keydown", (event) => {
    const at = model.at, siblings = at ? children[tree.parent[at]] : [0], place = siblings.indexOf(at);
    let to = at;
    if (event.key === "ArrowDown") to = biggest(children[at]) ?? at;
    else if (event.key === "ArrowUp") to = at > model.root ? tree.parent[at] : at;
    else if (event.key === "ArrowRight") to = at > model.root ? siblings[Math.min(place + 1, siblings.length - 1)] : at;
    else if (event.key === "ArrowLeft") to = at > model.root ? siblings[Math.max(place - 1, 0)] : at;
    else if (event.key === "Enter") { event.preventDefault(); zoom(at); return; }
    else if (event.key === "Escape" || event.key === "Backspace") { event.preventDefault(); zoom(tree.parent[model.root] ?? 0); return; }
    else return;
    event.preventDefault();
    point(to); requestAnimationFrame(frame);
  });
  const biggest = (nodes) => nodes.reduce((best, i) => (best === undefined || valueOf(i) > valueOf(best) ? i : best), undefined);

  function refresh() { from = view; since = performance.now() - 1000; moving = true; resize(); requestAnimationFrame(frame); }
  window.addEventListener("resize", refresh);
  return { zoom, refresh, fit, relative, nodeAt, rectOf, point, crumbs, get drawn() { return drawn.length; }, get moving() { return moving; } };
})();
