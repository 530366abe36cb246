// @ts-check
"use strict";
// The table: only the rows in sight exist in the document.
const table = (() => {
  const box = by("table"), head = by("head"), rows = by("rows");
  const HEIGHT = 26;
  const RARE = ["resident", "overlap", "payload", "communication", "communication_hidden", "waited", "queued", "launches", "peak"];
  /** @type {string | null} */
  let sort = null;
  let view = "tree", down = true;
  let shown = [];                        // rows of the current view, in order: tree nodes, or rows of data.views
  let cursor = -1;
  const open = new Uint8Array(count);    // tree nodes whose children are listed
  for (let i = 0, listed = 0; i < count && listed < 400; i++) if (children[i].length && depths[i] < 4) { open[i] = 1; listed += children[i].length; }
  open[0] = 1;

  const cell = {
    // the names are the text report's
    calls: ["calls", (r) => r.calls, whole], cpu: ["total", (r) => r.cpu, time], cpu_self: ["self", (r) => r.cpu_self, time],
    gpu: ["gpu", (r) => r.gpu, time], gpu_self: ["gpu self", (r) => r.gpu_self, time], kernels: ["kernels", (r) => r.kernels, whole],
    most: ["p99", (r) => r.most, time], hidden: ["hidden", (r) => (r.resident ? (r.overlap ?? 0) / r.resident : null), percent],
    payload: ["bytes", (r) => r.payload || null, bytes], exposed: ["exposed", (r) => (r.communication ? r.communication - (r.communication_hidden ?? 0) : null), time],
    waited: ["wait", (r) => r.waited || null, time], queue: ["queue", (r) => (r.launches ? (r.queued ?? 0) / r.launches : null), time],
    peak: ["memory", (r) => r.peak ?? null, bytes], cls: ["class", (r) => data.classes[r.name] ?? null, String],
    gap: ["gap", (r) => r.gap, time], low: ["min", (r) => r.low, time], middle: ["median", (r) => r.middle, time], high: ["max", (r) => r.high, time],
    flops: ["flops", (r) => r.flops ?? null, (n) => Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(n)],
    roof: ["roof", (r) => r.roof ?? null, percent], bound: ["bound", (r) => r.bound ?? null, String], headroom: ["headroom", (r) => r.headroom ?? null, time],
    skew: ["skew", (r) => r.skew, percent], share: ["share", (r) => r.share, percent],
  };

  function columns() {
    const list = ["calls", "cpu", "cpu_self"];
    if (data.gpu) list.push("gpu", "gpu_self", "kernels", "gap");
    if (view !== "tree") {
      const some = data.views[view].rows;
      for (const name of ["low", "skew"]) if (some.some((row) => row[name] !== null)) list.push(...(name === "low" ? ["low", "middle", "most", "high"] : ["skew"]));
    }
    const rare = view === "tree" ? tree : Object.fromEntries(RARE.map((name) => [name, data.views[view].rows.some((row) => row[name])]));
    if (rare.resident) list.push("hidden");
    if (rare.payload) list.push("payload");
    if (rare.communication) list.push("exposed");
    if (rare.waited) list.push("waited");
    if (rare.launches && rare.queued) list.push("queue");
    if (rare.peak) list.push("peak");
    if (view === "tree" && Object.keys(data.classes).length) list.push("cls");
    if (data.work && view !== "kernel") list.push("flops", "roof", "bound", "headroom");
    list.push("share");
    return view === "kernel" ? list.filter((name) => !name.startsWith("cpu") && name !== "gap") : list;
  }

  // the name gives way where the window is narrow; it stays in sight while the rest scrolls
  const template = (list) => `minmax(${box.clientWidth < 700 ? 190 : 280}px, 1fr) repeat(${list.length}, ${box.clientWidth < 700 ? 84 : 100}px)`;

  function record(i) {
    return { ...Object.fromEntries(RARE.map((name) => [name, tree[name]?.[i]])), name: nameOf(i), role: roleOf(i), category: categoryOf(i), kind: tree.category[i] === data.categories.indexOf("unknown") ? "unknown" : "range",
      calls: tree.calls[i], cpu: tree.cpu[i], cpu_self: tree.cpu_self[i], gpu: tree.gpu[i], gpu_self: tree.gpu_self[i],
      kernels: tree.kernels[i], gap: tree.gap[i], flops: tree.flops?.[i], roof: tree.roof?.[i], bound: tree.bound?.[i],
      headroom: tree.headroom?.[i], share: valueOf(0) ? valueOf(i) / valueOf(0) : 0 };
  }

  function order(list, get) {
    if (sort === null) return list;
    const key = sort === "name" ? (r) => get(r).name : (r) => cell[sort][1](get(r)) ?? -1;
    const keys = new Map(list.map((item) => [item, key(item)]));
    return [...list].sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      const less = typeof x === "string" ? (x < y ? -1 : x > y ? 1 : 0) : x - y;
      return down ? -less : less;
    });
  }

  function rebuild() {
    shown = [];
    if (view === "tree") {
      const hits = model.hits;
      const todo = order(children[model.root].filter((i) => !hits || hits[i]), record).reverse();
      if (model.root) shown.push(model.root);
      while (todo.length) {
        const i = todo.pop();
        shown.push(i);
        if (hits ? hits[i] & 2 : open[i]) todo.push(...order(children[i].filter((k) => !hits || hits[k]), record).reverse());
      }
    } else {
      const wanted = model.query.trim().toLowerCase();
      shown = order(data.views[view].rows.filter((row) => !wanted || row.name.toLowerCase().includes(wanted)), (row) => row);
    }
    cursor = Math.min(cursor, shown.length - 1);
    rows.style.height = `${shown.length * HEIGHT}px`;
    box.setAttribute("aria-rowcount", String(shown.length + 1));
    draw();
  }

  function heading() {
    const list = columns();
    head.style.gridTemplateColumns = template(list);
    head.replaceChildren(...["name", ...list].map((name) => {
      const holder = document.createElement("div"), button = document.createElement("button");
      holder.setAttribute("role", "columnheader");
      holder.setAttribute("aria-sort", sort === name ? (down ? "descending" : "ascending") : "none");
      button.type = "button"; button.dataset.sort = name;
      button.textContent = (name === "name" ? (view === "tree" ? "range" : view) : cell[name][0]) + (sort === name ? (down ? " ↓" : " ↑") : "");
      button.addEventListener("click", () => {
        if (sort !== name) { sort = name; down = name !== "name"; } else if (down === (name !== "name")) down = !down; else sort = null;
        heading(); rebuild();
        /** @type {HTMLElement} */ (head.querySelector(`[data-sort="${name}"]`)).focus();
      });
      holder.append(button);
      return holder;
    }));
  }

  function draw() {
    const list = columns();
    const first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 8);
    const last = Math.min(shown.length, first + Math.ceil(box.clientHeight / HEIGHT) + 16);
    const made = [];
    for (let index = first; index < last; index++) made.push(line(index, list));
    rows.replaceChildren(...made);
  }

  function line(index, list) {
    const item = shown[index], isNode = view === "tree", r = isNode ? record(item) : item;
    const row = document.createElement("div"), name = document.createElement("span");
    row.className = `row ${r.kind}${index === cursor ? " at" : ""}${isNode && model.hits && model.hits[item] & 1 ? " hit" : ""}`;
    row.setAttribute("role", "row"); row.setAttribute("aria-rowindex", String(index + 2));
    row.style.top = `${index * HEIGHT}px`;
    row.style.gridTemplateColumns = template(list);
    row.dataset.index = String(index);
    if (isNode) {
      const fold = document.createElement("span");
      fold.className = "fold"; fold.style.marginLeft = `${Math.min(depths[item] - Math.max(1, depths[model.root]), 24) * 14}px`;
      fold.textContent = children[item].length ? (open[item] || model.hits ? "▾" : "▸") : "";
      name.append(fold);
      row.setAttribute("aria-level", String(depths[item]));
    }
    const dot = document.createElement("i");
    dot.className = "dot"; dot.style.background = fillOf(model.colors === "headroom" ? bandOf(r.roof) : r.role);
    name.append(dot, isNode && box.clientWidth < 700 ? icicle.relative(item) : r.name); name.title = r.name; name.setAttribute("role", "gridcell");
    row.append(name);
    for (const column of list) {
      const span = document.createElement("span"), value = cell[column][1](r);
      span.setAttribute("role", "gridcell");
      span.textContent = value === null || value === undefined ? "" : cell[column][2](value);
      if (column === "share") { span.className = "share"; span.style.setProperty("--share", `${Math.max(0, Math.min(1, value)) * 100}%`); }
      row.append(span);
    }
    return row;
  }

  function toggle(item) { if (children[item].length) { open[item] ^= 1; rebuild(); } }
  rows.addEventListener("click", (event) => {
    const row = /** @type {HTMLElement | null} */ (targetOf(event).closest(".row"));
    if (!row) return;
    cursor = Number(row.dataset.index);
    const item = shown[cursor];
    if (view === "tree" && targetOf(event).classList.contains("fold")) toggle(item); else draw();
    if (view === "tree") { model.at = item; icicle.refresh(); }
  });
  rows.addEventListener("dblclick", (event) => {
    const row = /** @type {HTMLElement | null} */ (targetOf(event).closest(".row"));
    if (row && view === "tree") icicle.zoom(shown[Number(row.dataset.index)]);
  });
  box.addEventListener("keydown", (event) => {
    if (event.target !== box) return;
    const page = Math.max(1, Math.floor(box.clientHeight / HEIGHT) - 2);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length };
    const item = shown[cursor];
    if (event.key in moves) cursor = Math.max(0, Math.min(shown.length - 1, cursor + moves[event.key]));
    else if (view === "tree" && cursor >= 0 && event.key === "ArrowRight" && !open[item]) toggle(item);
    else if (view === "tree" && cursor >= 0 && event.key === "ArrowLeft" && open[item]) toggle(item);
    else if (view === "tree" && cursor >= 0 && event.key === "Enter") icicle.zoom(item);
    else return;
    event.preventDefault();
    reveal(cursor); draw();
    if (view === "tree" && cursor >= 0) { model.at = shown[cursor]; icicle.refresh(); }
  });
  box.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  window.addEventListener("resize", () => { heading(); draw(); });

  function reveal(index) {
    const top = index * HEIGHT, room = box.clientHeight - head.offsetHeight;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + HEIGHT > box.scrollTop + room) box.scrollTop = top + HEIGHT - room;
  }

  function follow(node) {
    if (view !== "tree") return;
    const index = shown.indexOf(node);
    if (index >= 0) { cursor = index; reveal(index); draw(); }
  }

  function choose(name) { view = name; cursor = -1; box.scrollTop = 0; if (sort && !columns().includes(sort) && sort !== "name") sort = null; heading(); rebuild(); }
  return { rebuild, choose, follow, heading, get view() { return view; }, get size() { return shown.length; } };
})();
