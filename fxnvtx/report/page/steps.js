// @ts-check
"use strict";
// One bar per step, in the order they ran.
const steps = (() => {
  const canvas = canvasOf("steps"), section = by("steps-section");
  const said = by("steps-said");
  const category = data.categories.indexOf("step");
  const found = [];
  const inStep = new Uint8Array(count); // a parent stands before its children
  for (let i = 1; i < count; i++) {
    const own = tree.category[i] === category;
    inStep[i] = own ? 1 : inStep[tree.parent[i]];
    if (own && !inStep[tree.parent[i]]) found.push(i);
  }
  section.hidden = found.length < 2;
  const paint = brushOf(canvas);
  let at = -1;

  function draw() {
    if (section.hidden) return;
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    const values = found.map(valueOf), most = values.reduce((a, b) => Math.max(a, b), 1);
    const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
    const median = sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--dim"), bar = style.getPropertyValue("--bar");
    const left = 70, right = 12, top = 12, bottom = 22, room = height - top - bottom, slot = (width - left - right) / found.length;
    const y = (value) => top + room - (value / most) * room;
    paint.font = "12px system-ui, sans-serif"; paint.textBaseline = "middle"; paint.textAlign = "right";
    for (const value of [most, most / 2, 0]) {
      paint.fillStyle = ink; paint.fillText(time(value), left - 8, y(value));
      paint.globalAlpha = 0.25; paint.fillRect(left, y(value), width - left - right, 1); paint.globalAlpha = 1;
    }
    found.forEach((node, index) => {
      const shown = inside(node, model.root) || inside(model.root, node) || model.root === 0;
      paint.globalAlpha = shown ? 1 : 0.35;
      paint.fillStyle = index === at ? style.getPropertyValue("--accent") : bar;
      paint.fillRect(left + index * slot, y(values[index]), Math.max(1, slot - (slot > 4 ? 2 : 0)), top + room - y(values[index]));
      paint.globalAlpha = 1;
    });
    paint.strokeStyle = style.getPropertyValue("--ink"); paint.setLineDash([5, 4]); paint.lineWidth = 1;
    paint.beginPath(); paint.moveTo(left, y(median)); paint.lineTo(width - right, y(median)); paint.stroke(); paint.setLineDash([]);
    paint.fillStyle = ink; paint.textAlign = "left"; paint.fillText(icicle.fit(label(0), (width - left - right) / 2 - 8), left, height - 10);
    paint.textAlign = "right"; paint.fillText(icicle.fit(label(found.length - 1), (width - left - right) / 2 - 8), width - right, height - 10);
    said.textContent = at >= 0 ? `${nameOf(found[at])}: ${time(values[at])}`
      : `${found.length} steps, min ${time(sorted[0])}, median ${time(median)} (dashed), max ${time(most)}`;
  }
  const label = (index) => nameOf(found[index]);

  function under(event) {
    const slot = (canvas.clientWidth - 82) / found.length;
    const index = Math.floor((event.offsetX - 70) / slot);
    return index >= 0 && index < found.length ? index : -1;
  }
  canvas.addEventListener("mousemove", (event) => { at = under(event); draw(); });
  canvas.addEventListener("mouseleave", () => { at = -1; draw(); });
  canvas.addEventListener("click", (event) => { const index = under(event); if (index >= 0) icicle.zoom(found[index]); });
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") at = Math.min(found.length - 1, at + 1);
    else if (event.key === "ArrowLeft") at = Math.max(0, at - 1);
    else if (event.key === "Enter" && at >= 0) icicle.zoom(found[at]);
    else return;
    event.preventDefault(); draw();
  });
  window.addEventListener("resize", draw);
  return { draw, found };
})();
