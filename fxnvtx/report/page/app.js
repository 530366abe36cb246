// @ts-check
"use strict";
// Wiring: measure, theme, search, views, totals.
const searchBox = /** @type {HTMLInputElement} */ (by("search"));
const made = (tag, properties) => Object.assign(document.createElement(tag), properties);

function choice(holder, options, pressed, choose) {
  by(holder).replaceChildren(...options.map(([key, text]) => {
    const button = made("button", { type: "button", textContent: text });
    button.dataset.key = key;
    button.setAttribute("aria-pressed", String(key === pressed));
    button.addEventListener("click", () => {
      for (const other of by(holder).children) other.setAttribute("aria-pressed", String(other === button));
      choose(key);
    });
    return button;
  }));
}

function setTheme(theme, keep) {
  document.documentElement.dataset.theme = theme;
  by("theme").textContent = theme === "dark" ? "Light" : "Dark";
  if (keep) try { localStorage.setItem("fxnvtx-theme", theme); } catch { /* a page from a file may have no storage */ }
}

// What is worth doing, before all pictures.
function advice() {
  by("findings").replaceChildren(...data.findings.map((finding) => {
    const item = made("li", {}), more = made("ul", {});
    item.append(made("b", { textContent: time(finding.ns) }), made("span", { textContent: finding.text }));
    more.append(...finding.evidence.map(([name, ns]) => {
      const line = made("li", {});
      line.append(made("span", { textContent: time(ns) }), made("span", { textContent: name }));
      return line;
    }));
    if (finding.evidence.length) item.append(more);
    return item;
  }));
  by("findings-said").textContent = data.findings.length ? "" : "nothing stands out";
  by("unsaid").hidden = !data.unsaid.length;
  by("unsaid-list").replaceChildren(...data.unsaid.map(({ rule, why }) => made("li", { textContent: `${rule.replaceAll("_", " ")}: ${why}` })));
}

function redraw() { legend(); icicle.refresh(); timeline.draw(); steps.draw(); table.heading(); table.rebuild(); }

function legend() {
  const texts = model.colors === "headroom" ? bandText : roleText;
  const there = new Set(model.colors === "headroom" ? tree.name.map((_, i) => bandOf(tree.roof?.[i])) : data.roles);
  const used = Object.keys(texts).filter((name) => there.has(name));
  by("legend").replaceChildren(...used.map((name) => {
    const item = made("li", {}), mark = made("i", {});
    mark.style.background = fillOf(name);
    item.append(mark, model.colors === "headroom" ? texts[name] : name);
    item.title = texts[name];
    return item;
  }));
}

function totals() {
  const facts = [[time(tree.cpu[0]), "CPU time in ranges"]];
  if (data.gpu) facts.unshift([time(tree.gpu[0]), "GPU busy"], [time(tree.gap[0]), "GPU idle between launches"], [whole(tree.kernels[0]), "device operations"]);
  facts.push([whole(tree.calls.reduce((sum, value) => sum + value, 0)), "ranges"], [whole(count - 1), "distinct paths"]);
  if (data.ranks.length > 1) facts.push([whole(data.ranks.length), "processes"]);
  by("facts").replaceChildren(...facts.map(([value, text]) => {
    const holder = made("div", {});
    holder.append(made("b", { textContent: value }), made("span", { textContent: text }));
    return holder;
  }));
  by("sources").textContent = by("sources").title = data.sources.join(", ");
  by("notes").replaceChildren(...data.notes.map((note) => made("li", { textContent: note })));
}

function find() {
  const result = search(searchBox.value);
  by("found").textContent = result ? `${whole(result.found)} found, ${percent(result.share)}` : "";
  icicle.refresh(); table.rebuild();
}

/** @type {string | null} */
let stored = null;
try { stored = localStorage.getItem("fxnvtx-theme"); } catch { /* no storage */ }
setTheme(stored || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"), false);
by("theme").addEventListener("click", () => { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true); redraw(); });
let waiting = 0;
searchBox.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(find, 120); });
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && targetOf(event).tagName !== "INPUT") { event.preventDefault(); searchBox.focus(); }
  if (event.key === "Escape" && event.target === searchBox) { searchBox.value = ""; find(); by("icicle").focus(); }
});
choice("measures", data.gpu ? [["gpu", "GPU"], ["cpu", "CPU"]] : [["cpu", "CPU"]], model.measure, (measure) => {
  model.measure = measure;
  find(); redraw();
});
if (tree.roof) choice("colors", [["role", "Colours: kinds"], ["headroom", "Headroom"]], model.colors, (colors) => {
  model.colors = colors;
  legend(); icicle.refresh(); table.rebuild();
});
choice("views", [["tree", "Tree"], ...Object.keys(data.views).map((name) => [name, name[0].toUpperCase() + name.slice(1)])], "tree", (view) => table.choose(view));
model.listeners.push(() => { table.rebuild(); steps.draw(); });
totals(); advice(); legend(); icicle.crumbs(); table.heading(); icicle.refresh(); table.rebuild(); steps.draw(); timeline.draw();
// for whoever wants to drive the page, such as a test
Object.assign(window, { fxnvtx: { model, icicle, table, steps, timeline, tree, data, nameOf } });
