"use strict";
document.documentElement.classList.add("js");

/** Shows one panel of several, as its select says. */
function choices(group) {
  const select = group.querySelector("select");
  const panels = group.querySelectorAll(":scope > .panel");
  const apply = () => panels.forEach((one, at) => one.classList.toggle("other", at !== select.selectedIndex));
  select.addEventListener("change", apply);
  apply();
}

/** Sorts a table's bodies by a column; a second time the other way. Cells without a key stay last. */
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const told = table.closest("section").querySelector("[data-sorted]");
  heads.forEach((head, at) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (body) => {
        const text = body.rows[0].cells[at].dataset.key || "";
        return text === "" ? null : at === 0 ? text : Number(text);
      };
      const order = (one, other) => {
        const a = key(one), b = key(other);
        if (a === null || b === null) return (a === null) - (b === null);
        return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
      };
      table.append(...[...table.tBodies].filter((body) => !body.classList.contains("reference")).sort(order));
      told.textContent = "Sorted by " + head.textContent.trim() + (down ? ", descending." : ", ascending.");
    });
  });
}

/** The picture slider: reference on the left of the line, a file (or its difference) on the right. */
function viewer(root) {
  const section = root.closest("section");
  const part = (name) => root.querySelector(name);
  const row = part("[data-row]"), pair = part("[data-pair]"), zoom = part("[data-zoom]");
  const heat = part("[data-heat]"), range = part("input[type=range]");
  const box = part(".stage-box"), stage = part(".stage"), left = part(".left"), right = part(".right");
  const figure = (at) => section.querySelector("figure" + (at === null ? ":not([data-row])" : '[data-row="' + at + '"]') + '[data-pair="' + pair.value + '"]');
  const split = () => {
    stage.style.setProperty("--split", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + "% reference, " + (100 - range.value) + "% " + row.selectedOptions[0].textContent);
  };
  const show = () => {
    const exact = figure(null).querySelector(".shot"), other = figure(row.value);
    const shot = other.querySelector(heat.checked ? ".heat" : ".shot");
    const name = row.selectedOptions[0].textContent;
    left.src = exact.src;
    left.alt = exact.alt;
    right.hidden = !shot;
    if (shot) {
      right.src = shot.src;
      right.alt = shot.alt;
    }
    root.classList.toggle("heated", heat.checked);
    part("[data-name]").textContent = heat.checked ? "difference" : name;
    const facts = other.dataset.facts;
    part("[data-facts]").textContent = [name + (shot ? "" : " (not embedded)"), ...facts.split("; ")].join("\n");
    for (const one of section.querySelectorAll("figure.shown")) one.classList.remove("shown");
    other.classList.add("shown");
    split();
  };
  const size = () => {
    root.classList.toggle("zoomed", zoom.value !== "");
    root.style.setProperty("--zoom", zoom.value || 1);
    box.tabIndex = zoom.value === "" ? -1 : 0;
  };
  for (const one of [row, pair, heat]) one.addEventListener("change", show);
  zoom.addEventListener("change", size);
  range.addEventListener("input", split);
  const drag = (event) => {
    if (event.type === "pointermove" && !stage.hasPointerCapture(event.pointerId)) return;
    if (event.type === "pointerdown") {
      if (event.button !== 0 || (event.pointerType === "touch" && zoom.value !== "")) return;
      stage.setPointerCapture(event.pointerId);
    }
    const area = stage.getBoundingClientRect();
    range.value = Math.round((100 * (event.clientX - area.left)) / area.width);
    split();
  };
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  for (const link of section.querySelectorAll("figure a")) {
    link.addEventListener("click", () => {
      const one = link.closest("figure");
      pair.value = one.dataset.pair;
      if (one.dataset.row !== undefined) row.value = one.dataset.row;
      show();
    });
  }
  show();
  size();
}

/** Names the weight under the pointer, or that the slider under the chart stands at. */
function layers(panel) {
  const chart = panel.querySelector(".chart svg"), ring = chart.querySelector(".ring");
  const dots = [...chart.querySelectorAll("use")];
  const range = panel.querySelector("input[type=range]"), told = panel.querySelector(".walk p");
  const show = () => {
    const dot = dots[range.value];
    told.textContent = dot.querySelector("title").textContent;
    range.setAttribute("aria-valuetext", told.textContent);
    ring.setAttribute("cx", dot.getAttribute("x"));
    ring.setAttribute("cy", dot.getAttribute("y"));
  };
  const near = (event) => {
    const area = chart.getBoundingClientRect();
    const away = (dot) => Math.hypot(area.left + (parseFloat(dot.getAttribute("x")) / 100) * area.width - event.clientX, area.top + Number(dot.getAttribute("y")) - event.clientY);
    let best = 0, least = Infinity;
    dots.forEach((dot, at) => {
      const distance = away(dot);
      if (distance < least) [best, least] = [at, distance];
    });
    range.value = best;
    show();
  };
  range.addEventListener("input", show);
  chart.addEventListener("pointermove", near);
  chart.addEventListener("pointerdown", near);
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-choices]").forEach(choices);
  document.querySelectorAll("[data-sortable]").forEach(sortable);
  document.querySelectorAll("[data-viewer]").forEach(viewer);
  document.querySelectorAll("[data-layers]").forEach(layers);
});
