/* The map: points on a canvas, by mouse, finger and keys; filters, colours, and the same as a table. */
if (points) {
  byId("map-tools").hidden = false;
  const box = byId("map-box"), canvas = byId("map-canvas"), pen = canvas.getContext("2d");
  const panel = byId("point"), live = byId("map-live"), hint = panel.firstElementChild;
  const count = points.row.length;
  const place = new Map(points.row.map((row, at) => [row, at]));
  const state = { chosen: -1, zoom: 1, x: 0.5, y: 0.5 };
  let shown = [], drawing = 0, width = 0, height = 0, isPinned = false;

  function choose(at, isSpoken) {
    if (isSpoken) speak(at);
    if (at === state.chosen) return;
    state.chosen = at;
    showChosen();
    redraw();
  }
  function showChosen() {
    const at = state.chosen;
    panel.replaceChildren();
    if (at < 0) {
      panel.append(hint);
      return;
    }
    const row = points.row[at], isKept = points.kept[at], label = labelOf(at);
    panel.append(make("h3", "Row " + number.format(row) + ", " + (isKept ? "kept" : "left out")));
    panel.append(content(row, label));
    panel.append(make("h4", isKept ? "Why it was kept" : "Why it was left out"));
    panel.append(make("p", whyOf(at), "why-row"));
    const list = make("dl");
    const say = (name, value) => {
      const holder = make("dd", value);
      holder.dir = "auto";
      list.append(make("dt", name), holder);
    };
    if (label) say("label", label);
    if (data.nBins > 1) say("bin", points.bin[at] + " of 0 to " + (data.nBins - 1));
    if (points.length) say("length", lengthOf(points.length[at]));
    panel.append(list);
    const near = points.near[at];
    if (near >= 0) {
      panel.append(make("h4", (isKept ? "Nearest other kept row: " : "Nearest kept row: ") +
        number.format(near) + ", " + similarity(at)));
      panel.append(content(near, ""));
    }
    panel.scrollTop = 0;
  }
  function speak(at) {
    const row = points.row[at], label = labelOf(at), near = points.near[at];
    live.textContent = "Row " + row + ", " + (points.kept[at] ? "kept" : "left out") +
      (data.nBins > 1 ? ", bin " + points.bin[at] : "") + (label ? ", " + label : "") +
      ". " + [pictureFacts(row)[1], plainText(row, 160)].filter(Boolean).join(". ") +
      (near >= 0 ? " Nearest kept row " + near + ", " + similarity(at) + "." : "");
  }

  /* Colours: each way gives the colour of a point and the entries of the legend. */
  const HUES = ["#2f7fc1", "#e07b1f", "#2e9a4f", "#c93c4a", "#8b62bd", "#8a6152", "#d667a8",
    "#7d8288", "#a8a52a", "#1fa7b8"];
  const theme = () => data.colours[night.matches ? "dark" : "light"];
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const hue = (code) => (data.labels.length <= HUES.length ? HUES[code] :
    "hsl(" + (code * 137.508) % 360 + " 60% " + (night.matches ? 65 : 45) + "%)");
  const known = points.length ? points.length.filter((length) => length >= 0) : [];
  known.sort((a, b) => a - b);
  function shadeOf(length) {
    let low = 0, high = known.length; /* how many are shorter */
    while (low < high) {
      const middle = (low + high) >> 1;
      if (known[middle] < length) low = middle + 1; else high = middle;
    }
    const shades = theme().shades;
    return shades[Math.min(shades.length - 1, Math.floor(low / known.length * shades.length))];
  }
  const some = (n) => (n <= 12 ? [...Array(n).keys()] : [0, Math.floor(n / 2), n - 1]);
  const WAYS = {
    bin: () => [(at) => theme().bins[points.bin[at]],
      some(data.nBins).map((bin) => [theme().bins[bin], "bin " + bin])],
    label: () => [(at) => hue(points.stratum[at]),
      data.labels.slice(0, 12).map((label, code) => [hue(code), label])],
    kept: () => {
      const colours = [ink("--point-out"), ink("--accent")];
      return [(at) => colours[points.kept[at]], []];
    },
    length: () => [(at) => (points.length[at] < 0 ? ink("--quiet") : shadeOf(points.length[at])),
      [0, known.length >> 1, known.length - 1].filter((at) => at in known)
        .map((at) => [shadeOf(known[at]), lengthOf(known[at])])],
  };
  let colours = [];
  function paint() {
    const [colourOf, entries] = WAYS[byId("colour").value]();
    colours = points.row.map((_, at) => colourOf(at));
    const legend = byId("legend");
    legend.replaceChildren();
    for (const [kind, text] of [["is-kept", "kept"], ["", "left out"]]) {
      const entry = make("li");
      entry.append(make("span", undefined, "dot " + kind), text);
      legend.append(entry);
    }
    for (const [colour, text] of entries) {
      const entry = make("li"), swatch = make("span", undefined, "swatch");
      swatch.style.background = colour;
      entry.append(swatch, make("bdi", text));
      legend.append(entry);
    }
    const rest = byId("colour").value === "label" ? data.labels.length - entries.length : 0;
    if (rest > 0) legend.append(make("li", "and " + number.format(rest) + " more"));
    redraw();
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
    const line = ink("--ink");
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
    if (shown.length < count) { /* the others, faint, for the shape of the whole */
      pen.globalAlpha = 0.25;
      pen.fillStyle = ink("--rule");
      for (let at = 0; at < count; at++) {
        circle(across(at), down(at), 1.9 * size);
        pen.fill();
      }
    }
    for (const isKept of [0, 1]) {
      pen.globalAlpha = isKept ? 0.95 : 0.6;
      pen.strokeStyle = line;
      pen.lineWidth = 1.1;
      for (const at of shown) {
        if (points.kept[at] !== isKept) continue;
        circle(across(at), down(at), (isKept ? 3.1 : 1.9) * size);
        pen.fillStyle = colours[at];
        pen.fill();
        if (isKept) pen.stroke();
      }
    }
    pen.globalAlpha = 1;
    if (state.chosen < 0) return;
    const x = across(state.chosen), y = down(state.chosen);
    const near = place.get(points.near[state.chosen]);
    pen.strokeStyle = line;
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
    pen.fillStyle = colours[state.chosen];
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

  /* Which points are shown. */
  const valueOf = (id) => (byId(id) ? byId(id).value : "");
  let texts = null; /* what is searched, made when it is first needed */
  function filter() {
    const tests = [];
    const only = (id, column) => {
      const value = valueOf(id);
      if (value !== "") tests.push((at) => column[at] === Number(value));
    };
    only("filter-kept", points.kept);
    only("filter-bin", points.bin);
    only("filter-label", points.stratum);
    wanted = valueOf("search").trim().toLowerCase();
    if (wanted) {
      texts = texts || points.row.map((row, at) =>
        [...fieldsOf(row), labelOf(at)].join("\n").toLowerCase());
      tests.push((at) => texts[at].includes(wanted) || String(points.row[at]) === wanted);
    }
    shown = [...points.row.keys()].filter((at) => tests.every((test) => test(at)));
    byId("map-count").textContent =
      number.format(shown.length) + " of " + number.format(count) + " points shown";
    byId("export").disabled = !shown.length;
    if (state.chosen >= 0 && !shown.includes(state.chosen)) {
      isPinned = false;
      choose(-1);
    }
    showChosen();
    page = 0;
    fillTable();
    redraw();
  }
  function listen(id, event, act) {
    const node = byId(id);
    if (node) node.addEventListener(event, act);
  }
  const FILTERS = ["search", "filter-kept", "filter-bin", "filter-label"];
  for (const id of FILTERS) listen(id, "input", filter);
  listen("show-all", "click", () => {
    for (const id of FILTERS) if (byId(id)) byId(id).value = "";
    filter();
  });
  listen("colour", "change", paint);
  listen("export", "click", () => {
    const lines = shown.map((at) =>
      [points.row[at], points.kept[at], points.bin ? points.bin[at] : ""].join(","));
    const link = make("a");
    link.href = URL.createObjectURL(
      new Blob(["row,kept,bin\n" + lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "rows.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
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

  /* The same as a table, ten rows at a time. */
  const PAGE = 10;
  let page = 0;
  function fillTable() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    byId("rows-before").disabled = page < 1;
    byId("rows-after").disabled = page + 1 >= pages;
    byId("rows-page").textContent = "page " + (page + 1) + " of " + number.format(pages);
    byId("points").replaceChildren(tableOf(shown.slice(page * PAGE, (page + 1) * PAGE), (at) => {
      isPinned = true;
      choose(at, true);
      bringIn(at);
      box.scrollIntoView({ block: "nearest" });
    }));
  }
  listen("rows-before", "click", () => { page -= 1; fillTable(); });
  listen("rows-after", "click", () => { page += 1; fillTable(); });

  new ResizeObserver(redraw).observe(canvas);
  night.addEventListener("change", paint);
  matchMedia("print").addEventListener("change", (event) => {
    paint();
    draw();
    if (event.matches) openAll(); else shutAgain();
  });
  addEventListener("beforeprint", draw);
  paint();
  filter();
}
