"use strict";
/* What all of the page shares: its data, printing, and how a row is shown. */
const data = JSON.parse(document.getElementById("report-data").textContent);
const points = data.points;
const night = matchMedia("screen and (prefers-color-scheme: dark)");
const number = new Intl.NumberFormat("en");
const byId = (id) => document.getElementById(id);

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

/* Printing: everything open, and shut again afterwards. */
let opened = [];
function openAll() {
  for (const one of document.querySelectorAll("details:not([open]):not(#points)")) {
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

/* What a row says. */
function fieldsOf(row) {
  const found = data.rows[row];
  return Array.isArray(found) ? found : [];
}
function plainText(row, size) {
  if (data.kind === "image") return data.rows[row] ? "" : "no picture that can be read";
  const text = fieldsOf(row).filter(Boolean).join(" · ");
  const letters = Array.from(text.slice(0, 2 * size));
  return letters.length > size ? letters.slice(0, size).join("") + "…" : text;
}
function pictureOf(row, name) {
  const found = data.rows[row];
  if (found === undefined) return make("p", "its picture is not part of this page", "quiet");
  if (!found) return make("p", "no picture that can be read", "no-picture");
  const image = make("img");
  image.alt = "Picture of row " + row + (name ? ", " + name : "");
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 40);
  image.src = found;
  return image;
}
function content(row, name) {
  const part = document.createDocumentFragment();
  if (data.kind === "image") {
    part.append(pictureOf(row, name));
  } else if (data.kind === "text") {
    const fields = fieldsOf(row);
    fields.forEach((text, at) => {
      if (!text) return;
      const field = make("p", undefined, "field");
      if (fields.length > 1) {
        const head = make("span", data.columns[at] || "", "name");
        head.dir = "auto";
        field.append(head);
      }
      const body = make("span", text, "text");
      body.dir = "auto";
      field.append(body);
      part.append(field);
    });
    if (!part.childNodes.length) part.append(make("p", "(no text)", "field quiet"));
  }
  return part;
}

const labelOf = (at) => (data.labels.length ? data.labels[points.stratum[at]] : "");
const similarity = (at) =>
  (data.isCosine ? "cosine similarity " : "distance ") + points.similarity[at];

/* Some points as a table. */
function tableOf(places) {
  const table = make("table"), body = make("tbody"), top = make("tr");
  table.append(make("caption", "Points shown on the map"));
  const names = ["row", "kept", "bin", "place", "nearest kept row", "what it says"];
  for (const name of names) {
    const cell = make("th", name);
    cell.scope = "col";
    top.append(cell);
  }
  for (const at of places) {
    const line = make("tr"), row = points.row[at], head = make("th", number.format(row));
    head.scope = "row";
    line.append(head, make("td", points.kept[at] ? "yes" : "no"),
      make("td", points.bin ? points.bin[at] : ""), make("td", number.format(points.order[at] + 1)),
      make("td", points.near[at] < 0 ? "" : number.format(points.near[at]) +
        " (" + points.similarity[at] + ")"));
    const last = make("td");
    if (data.kind === "image") {
      last.append(pictureOf(row, labelOf(at)));
    } else {
      const body = make("span", plainText(row, 140), "text");
      body.dir = "auto";
      last.append(body);
    }
    line.append(last);
    body.append(line);
  }
  const head = make("thead");
  head.append(top);
  table.append(head, body);
  const scroll = make("div", undefined, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Points shown on the map");
  scroll.append(table);
  return scroll;
}
