// @ts-check
"use strict";
// One step as it ran: a lane per thread and per stream, on one clock. Wheel or + and - zoom, dragging or arrows move.
const timeline = (() => {
  const canvas = canvasOf("timeline"), section = by("timeline-section");
  const said = by("timeline-said"), tip = by("tip");
  const found = data.timeline;
  section.hidden = !found;
  if (!found) return { draw() {}, boxAt: () => null, get drawn() { return 0; } };
  const ROW = 18, TITLE = 17, GAP = 8, AXIS = 22;
  const rows = found.lanes.map((_, lane) => found.boxes.reduce((most, box) => (box[0] === lane ? Math.max(most, box[1] + 1) : most), 1));
  const tops = [];
  let height = AXIS;
  rows.forEach((count) => { tops.push(height + TITLE); height += TITLE + count * ROW + GAP; });
  // device work may go on after the step's calls ended
  const end = found.boxes.reduce((most, box) => Math.max(most, box[3]), found.length);
  const paint = brushOf(canvas);
  let view = [0, end], width = 0, drawn = [];
  /** @type {number | null} */
  let held = null;   // where the pointer was while it drags

  function draw() {
    const ratio = window.devicePixelRatio || 1, colors = themeNow();
    width = canvas.clientWidth;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.textBaseline = "middle";
    const scale = width / (view[1] - view[0]);
    axis(scale, colors);
    found.lanes.forEach((title, lane) => {
      paint.font = "600 12px system-ui, sans-serif"; paint.fillStyle = colors.dim;
      paint.fillText(title, 6, tops[lane] - TITLE / 2);
    });
    paint.font = "12px system-ui, sans-serif";
    drawn = [];
    const reached = new Map();    // what no pixel is left for is not drawn
    for (const box of found.boxes) {
      let x0 = (box[2] - view[0]) * scale, x1 = (box[3] - view[0]) * scale;
      if (x1 < 0 || x0 > width) continue;
      const row = box[0] * 1000 + box[1];
      if (x1 - x0 < 1) { if (x1 <= (reached.get(row) ?? -1) + 0.5) continue; x1 = x0 + 1; }
      reached.set(row, x1);
      x0 = Math.max(0, x0); x1 = Math.min(width, x1);
      const y = tops[box[0]] + box[1] * ROW;
      drawn.push([x0, x1, y, box]);
      paint.fillStyle = fillOf(box[5]); paint.fillRect(x0, y, x1 - x0, ROW - 1);
      if (x1 - x0 > 3) { paint.fillStyle = colors.line; paint.fillRect(x1 - 1, y, 1, ROW - 1); }
      if (x1 - x0 > 26) { paint.fillStyle = colors.ink; paint.fillText(icicle.fit(found.names[box[4]], x1 - x0 - 10), x0 + 5, y + ROW / 2); }
    }
    said.textContent = `${found.title}: ${time(found.length)} on the CPU${found.cut ? ", cut: it has more ranges than are kept" : ""}`;
  }

  function axis(scale, colors) {
    const rough = ((view[1] - view[0]) / width) * 110, power = 10 ** Math.floor(Math.log10(rough));
    const unit = ([1, 2, 5].find((n) => n * power >= rough) ?? 10) * power;
    paint.font = "12px system-ui, sans-serif";
    for (let at = Math.ceil(view[0] / unit) * unit; at <= view[1]; at += unit) {
      const x = (at - view[0]) * scale;
      paint.fillStyle = colors.dim; paint.globalAlpha = 0.18; paint.fillRect(x, AXIS, 1, height - AXIS); paint.globalAlpha = 1;
      if (x < width - 60) paint.fillText(at === 0 ? "0" : time(at), x + 3, AXIS / 2);
    }
  }

  function boxAt(x, y) {
    for (const [x0, x1, top, box] of drawn) if (x >= x0 && x < x1 && y >= top && y < top + ROW) return box;
    return null;
  }

  function zoom(factor, at) {
    const here = view[0] + (view[1] - view[0]) * at, span = Math.min(end, Math.max(100, (view[1] - view[0]) * factor));
    const start = Math.max(0, Math.min(end - span, here - span * at));
    view = [start, start + span]; draw();
  }
  function move(part) {
    const span = view[1] - view[0], start = Math.max(0, Math.min(end - span, view[0] + span * part));
    view = [start, start + span]; draw();
  }
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey && document.activeElement !== canvas) return;   // the page scrolls
    event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, event.offsetX / width);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { held = event.clientX; canvas.focus(); });
  window.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (held !== null) { move((held - event.clientX) / width); held = event.clientX; return; }
    const box = boxAt(event.offsetX, event.offsetY);
    showTip(event, box && found.names[box[4]], box && [box[5], `${time(box[3] - box[2])} from ${time(box[2])}`, ...explained(found.names[box[4]])]);
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", (event) => {
    const box = boxAt(event.offsetX, event.offsetY);
    view = box ? [box[2], Math.max(box[3], box[2] + 100)] : [0, end];
    draw();
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") zoom(0.6, 0.5);
    else if (event.key === "-") zoom(1.6, 0.5);
    else if (event.key === "ArrowLeft") move(-0.2);
    else if (event.key === "ArrowRight") move(0.2);
    else if (event.key === "Escape" || event.key === "0") { view = [0, end]; draw(); }
    else return;
    event.preventDefault();
  });
  window.addEventListener("resize", draw);
  return { draw, boxAt, zoom, get view() { return view; }, get drawn() { return drawn.length; } };
})();
