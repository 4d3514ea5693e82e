"use strict";
/* What all of the page shares: its data, printing, and how a row is shown. */
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("report-data").textContent);
const points = data.points;
const night = matchMedia("screen and (prefers-color-scheme: dark)");
const number = new Intl.NumberFormat("en");
let wanted = ""; /* what is searched for, in small letters */

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
function makeButton(text, act) {
  const button = make("button", text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

/* Printing: everything open, and shut again afterwards. */
let opened = [];
function openAll() {
  for (const one of document.querySelectorAll("details:not([open])")) {
    one.open = true;
    opened.push(one);
  }
}
function shutAgain() {
  for (const one of opened) one.open = false;
  opened = [];
}
addEventListener("beforeprint", openAll);
addEventListener("afterprint", shutAgain);

/* What a row says: its texts, and the address of its picture with what is said of that. */
const fieldsOf = (row) => (data.texts && data.texts[row]) || [];
const pictureFacts = (row) => (data.pictures ?
  data.pictures[row] || ["", "its picture is not part of this page"] : ["", ""]);
function plainText(row, size) {
  const text = fieldsOf(row).filter(Boolean).join(" · ");
  const found = wanted ? text.toLowerCase().indexOf(wanted) : -1;
  const start = found > size / 2 ? found - Math.floor(size / 4) : 0;
  const letters = Array.from(text.slice(start, start + 2 * size));
  return (start ? "…" : "") +
    (letters.length > size ? letters.slice(0, size).join("") + "…" : letters.join(""));
}
/* Text with what is searched for marked. */
function marked(text) {
  const node = make("span", undefined, "text"), small = text.toLowerCase();
  node.dir = "auto";
  let from = 0;
  if (wanted && small.length === text.length) {
    for (let at; (at = small.indexOf(wanted, from)) >= 0; from = at + wanted.length) {
      node.append(text.slice(from, at), make("mark", text.slice(at, at + wanted.length)));
    }
  }
  node.append(text.slice(from));
  return node;
}
function pictureOf(row, name) {
  const [address, note] = pictureFacts(row), part = make("div", undefined, "picture");
  if (address) {
    const image = make("img");
    image.alt = "Picture of row " + row + (name ? ", " + name : "");
    image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 40);
    image.src = address;
    part.append(image);
  }
  if (note) part.append(make("small", note));
  return part;
}
function wordsOf(row) {
  const part = make("div", undefined, "words"), fields = fieldsOf(row);
  fields.forEach((text, at) => {
    if (!text) return;
    const field = make("p", undefined, "field");
    if (fields.length > 1) {
      const head = make("span", data.columns[at] || "", "name");
      head.dir = "auto";
      field.append(head);
    }
    field.append(marked(text));
    part.append(field);
  });
  if (!part.childNodes.length) part.append(make("p", "(no text)", "field quiet"));
  return part;
}
function content(row, name) {
  const part = make("div", undefined, "shown");
  if (data.pictures) part.append(pictureOf(row, name));
  if (data.texts) part.append(wordsOf(row));
  return part;
}

/* What is known of a point, in words. */
const labelOf = (at) => (data.labels.length ? data.labels[points.stratum[at]] : "");
const similarity = (at) =>
  (data.isCosine ? "cosine similarity " : "distance ") + points.similarity[at];
const lengthOf = (length) =>
  length < 0 ? "unknown" : number.format(length) + " " +
    (length === 1 ? data.lengthName.replace(/s$/, "") : data.lengthName);
function whyOf(at) {
  const [nRows, nKept] = data.groups[points.group[at]];
  const values = { place: points.place[at], n_rows: nRows, n_kept: nKept };
  return data.sentences[points.why[at]].replace(/\{(place|n_rows|n_kept)\}/g,
    (_, name) => number.format(values[name]));
}

/* Some points as a table; a row number chooses its point. */
function tableOf(places, choose) {
  const table = make("table"), body = make("tbody"), top = make("tr"), head = make("thead");
  table.append(make("caption", "Rows shown on the map"));
  const columns = [["row", (at) => {
    const button = makeButton(number.format(points.row[at]), () => choose(at));
    button.className = "link";
    button.setAttribute("aria-label", "Show row " + points.row[at] + " on the map");
    return button;
  }], ["kept", (at) => (points.kept[at] ? "yes" : "no")]];
  if (data.nBins > 1) columns.push(["bin", (at) => points.bin[at]]);
  if (data.labels.length > 1) {
    columns.push(["label", (at) => {
      const label = make("bdi", labelOf(at));
      label.dir = "auto";
      return label;
    }]);
  }
  columns.push(["nearest kept row", (at) => (points.near[at] < 0 ? "" :
    number.format(points.near[at]) + " (" + points.similarity[at] + ")"), "near"]);
  if (data.pictures) columns.push(["picture", (at) => pictureOf(points.row[at], labelOf(at))]);
  if (data.texts) columns.push(["what it says", (at) => marked(plainText(points.row[at], 140))]);
  for (const [name, , kind] of columns) {
    const cell = make("th", name, kind);
    cell.scope = "col";
    top.append(cell);
  }
  for (const at of places) {
    const line = make("tr");
    columns.forEach(([, show, kind], number) => {
      const cell = make(number ? "td" : "th", undefined, kind);
      if (!number) cell.scope = "row";
      cell.append(show(at));
      line.append(cell);
    });
    body.append(line);
  }
  head.append(top);
  table.append(head, body);
  const scroll = make("div", undefined, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Rows shown on the map");
  scroll.append(table);
  return scroll;
}
