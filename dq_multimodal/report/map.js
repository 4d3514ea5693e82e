/* The map: points on a canvas, by mouse, finger and keys; and the same as a table. */
if (points) {
  const box = byId("map-box"), canvas = byId("map-canvas"), pen = canvas.getContext("2d");
  const panel = byId("point"), live = byId("map-live");
  const count = points.row.length;
  const place = new Map(points.row.map((row, at) => [row, at]));
  const state = { chosen: -1, zoom: 1, x: 0.5, y: 0.5, bin: "", label: "", onlyKept: false };
  let shown = [], drawing = 0, width = 0, height = 0, isPinned = false;

  function choose(at, isSpoken) {
    if (isSpoken) speak(at);
    if (at === state.chosen) return;
    state.chosen = at;
    panel.replaceChildren();
    if (at < 0) {
      panel.append(make("p", "Nothing chosen yet.", "quiet"));
      redraw();
      return;
    }
    const row = points.row[at], isKept = points.kept[at], label = labelOf(at);
    const what = isKept ? "kept" : "left out";
    panel.append(make("h3", "Row " + number.format(row) + ", " + what));
    panel.append(content(row, label));
    panel.append(make("h4", isKept ? "Why it was kept" : "Why it was left out"));
    const list = make("dl");
    const say = (name, value) => {
      const holder = make("dd", value);
      holder.dir = "auto";
      list.append(make("dt", name), holder);
    };
    if (label) say("label", label);
    if (points.bin) {
      say("bin", points.bin[at] + " of 0 to " + (data.nBins - 1));
      say("rank in bin", number.format(points.rank[at]));
      if (points.gain[at] !== null) say("gain", String(points.gain[at]));
    }
    say("place", number.format(points.order[at] + 1) + " of " + number.format(data.nRows) +
      " (the first " + number.format(data.nKept) + " are kept)");
    panel.append(list, make("p", data.how, "quiet"));
    const near = points.near[at];
    if (near >= 0) {
      panel.append(make("h4", (isKept ? "Nearest other kept row: " : "Nearest kept row: ") +
        number.format(near) + ", " + similarity(at)));
      panel.append(content(near, ""));
    }
    panel.scrollTop = 0;
    redraw();
  }
  function speak(at) {
    const row = points.row[at], label = labelOf(at), near = points.near[at];
    live.textContent = "Row " + row + ", " + (points.kept[at] ? "kept" : "left out") +
      (points.bin ? ", bin " + points.bin[at] : "") + (label ? ", " + label : "") +
      ". " + plainText(row, 160) +
      (near >= 0 ? " Nearest kept row " + near + ", " + similarity(at) + "." : "");
  }

  /* The map. */
  const side = () => Math.min(width, height) * 0.94;
  const across = (at) => width / 2 + (points.x[at] / 10000 - state.x) * state.zoom * (width * 0.94);
  const down = (at) => height / 2 + (points.y[at] / 10000 - state.y) * state.zoom * (height * 0.94);
  function redraw() {
    if (!drawing) drawing = requestAnimationFrame(draw);
  }
  function circle(x, y, radius) {
    pen.beginPath();
    pen.arc(x, y, radius, 0, 7);
  }
  function draw() {
    drawing = 0;
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const plain = style.getPropertyValue("--point").trim();
    const ramp = night.matches ? data.dark : data.light;
    const scale = Math.min(3, devicePixelRatio || 1);
    const box = canvas.getBoundingClientRect();
    if (!box.width) return;
    width = box.width;
    height = box.height;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const size = Math.max(0.75, Math.min(1.5, side() / 480)) * Math.min(1.8, Math.sqrt(state.zoom));
    const colour = (at) => (points.bin && data.nBins > 1 ? ramp[points.bin[at]] : plain);
    for (const isKept of [0, 1]) {
      pen.globalAlpha = isKept ? 0.95 : 0.6;
      pen.strokeStyle = ink;
      pen.lineWidth = 1.1;
      for (const at of shown) {
        if (points.kept[at] !== isKept) continue;
        circle(across(at), down(at), (isKept ? 3.1 : 1.9) * size);
        pen.fillStyle = colour(at);
        pen.fill();
        if (isKept) pen.stroke();
      }
    }
    pen.globalAlpha = 1;
    if (state.chosen < 0) return;
    const x = across(state.chosen), y = down(state.chosen);
    const near = place.get(points.near[state.chosen]);
    pen.strokeStyle = ink;
    if (near !== undefined) {
      pen.lineWidth = 1;
      pen.setLineDash([4, 3]);
      pen.beginPath();
      pen.moveTo(x, y);
      pen.lineTo(across(near), down(near));
      pen.stroke();
      pen.setLineDash([]);
    }
    circle(x, y, 4.4 * size);
    pen.fillStyle = colour(state.chosen);
    pen.fill();
    pen.lineWidth = 2.2;
    circle(x, y, 8 * size);
    pen.stroke();
  }
  function nearestTo(x, y, reach) {
    let best = -1, least = reach * reach;
    for (const at of shown) {
      const gap = (across(at) - x) ** 2 + (down(at) - y) ** 2;
      if (gap < least) [best, least] = [at, gap];
    }
    return best;
  }
  function zoomTo(zoom, x, y) {
    const before = state.zoom;
    state.zoom = Math.max(1, Math.min(40, zoom));
    if (x !== undefined) {
      state.x += (x - width / 2) / (width * 0.94) * (1 / before - 1 / state.zoom);
      state.y += (y - height / 2) / (height * 0.94) * (1 / before - 1 / state.zoom);
    }
    settle();
  }
  function settle() {
    const room = 0.5 - 0.5 / state.zoom;
    state.x = Math.max(0.5 - room, Math.min(0.5 + room, state.x));
    state.y = Math.max(0.5 - room, Math.min(0.5 + room, state.y));
    box.classList.toggle("is-zoomed", state.zoom > 1);
    redraw();
  }
  function bringIn(at) {
    const x = across(at), y = down(at);
    if (x < 8 || y < 8 || x > width - 8 || y > height - 8) {
      state.x = points.x[at] / 10000;
      state.y = points.y[at] / 10000;
      settle();
    }
  }

  function filter() {
    const bin = state.bin === "" ? -1 : Number(state.bin);
    const label = state.label === "" ? -1 : Number(state.label);
    shown = [];
    for (let at = 0; at < count; at++) {
      if (state.onlyKept && !points.kept[at]) continue;
      if (bin >= 0 && points.bin[at] !== bin) continue;
      if (label >= 0 && points.stratum[at] !== label) continue;
      shown.push(at);
    }
    byId("map-count").textContent =
      number.format(shown.length) + " of " + number.format(count) + " points shown";
    if (state.chosen >= 0 && !shown.includes(state.chosen)) {
      isPinned = false;
      choose(-1);
    }
    page = 0;
    if (byId("points").open) fillTable();
    redraw();
  }
  function listen(id, event, act) {
    const node = byId(id);
    if (node) node.addEventListener(event, () => act(node));
  }
  listen("filter-bin", "change", (node) => { state.bin = node.value; filter(); });
  listen("filter-label", "change", (node) => { state.label = node.value; filter(); });
  listen("filter-kept", "change", (node) => { state.onlyKept = node.checked; filter(); });
  listen("zoom-in", "click", () => zoomTo(state.zoom * 1.6));
  listen("zoom-out", "click", () => zoomTo(state.zoom / 1.6));
  listen("zoom-all", "click", () => zoomTo(1));

  /* Pointing. */
  let drag = null;
  const spot = (event) => {
    const frame = canvas.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = spot(event);
    if (drag && state.zoom > 1) {
      state.x -= (x - drag[0]) / (state.zoom * width * 0.94);
      state.y -= (y - drag[1]) / (state.zoom * height * 0.94);
      drag = [x, y];
      settle();
      return;
    }
    if (event.pointerType === "touch" || isPinned) return;
    const at = nearestTo(x, y, 14);
    if (at >= 0) choose(at, false);
  });
  canvas.addEventListener("pointerdown", (event) => {
    drag = spot(event);
    if (state.zoom > 1) canvas.setPointerCapture(event.pointerId);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => { drag = null; });
  }
  canvas.addEventListener("click", (event) => {
    const at = nearestTo(...spot(event), event.pointerType === "touch" ? 28 : 14);
    isPinned = at >= 0;
    if (at >= 0) choose(at, true);
  });
  canvas.addEventListener("dblclick", (event) => zoomTo(state.zoom * 1.8, ...spot(event)));

  /* Keys. */
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  function step([x, y]) {
    if (state.chosen < 0) return nearestTo(width / 2, height / 2, 1e9);
    const x0 = across(state.chosen), y0 = down(state.chosen);
    let best = -1, least = Infinity;
    for (const at of shown) {
      if (at === state.chosen) continue;
      const ahead = (across(at) - x0) * x + (down(at) - y0) * y;
      const aside = Math.abs((across(at) - x0) * y) + Math.abs((down(at) - y0) * x);
      if (ahead <= 0.01 || aside > ahead * 1.2 + 0.5) continue;
      const cost = ahead + 1.5 * aside;
      if (cost < least) [best, least] = [at, cost];
    }
    return best;
  }
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !shown.length) return;
    let at = -2;
    if (ways[event.key]) at = step(ways[event.key]);
    else if (event.key === "Home") at = shown[0];
    else if (event.key === "End") at = shown[shown.length - 1];
    else if (event.key === "Enter" && state.chosen >= 0) {
      const near = place.get(points.near[state.chosen]);
      if (near === undefined) live.textContent = "The nearest kept row is not drawn on this map.";
      at = near === undefined ? -1 : near;
    } else if (event.key === "+" || event.key === "=") zoomTo(state.zoom * 1.6);
    else if (event.key === "-") zoomTo(state.zoom / 1.6);
    else if (event.key === "0") zoomTo(1);
    else return;
    event.preventDefault();
    if (at < 0) return;
    choose(at, true);
    bringIn(at);
  });

  /* The same as a table, fifty rows at a time. */
  const PAGE = 50;
  let page = 0;
  function fillTable() {
    const holder = byId("points-table");
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    const pager = make("div", undefined, "pager");
    for (const [text, move] of [["Previous rows", -1], ["Next rows", 1]]) {
      const button = make("button", text);
      button.type = "button";
      button.disabled = page + move < 0 || page + move >= pages;
      button.addEventListener("click", () => { page += move; fillTable(); });
      pager.append(button);
    }
    pager.append(make("span", "page " + (page + 1) + " of " + pages));
    holder.replaceChildren(pager, tableOf(shown.slice(page * PAGE, (page + 1) * PAGE)));
  }
  byId("points").addEventListener("toggle", () => { if (byId("points").open) fillTable(); });

  new ResizeObserver(redraw).observe(canvas);
  night.addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", (event) => {
    draw();
    if (event.matches) openAll(); else shutAgain();
  });
  addEventListener("beforeprint", draw);
  filter();
}
