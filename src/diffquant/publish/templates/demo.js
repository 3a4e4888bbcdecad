"use strict";
document.documentElement.classList.add("js");
for (const group of document.querySelectorAll(".compare")) {
  const range = group.querySelector("input");
  const apply = () => {
    group.style.setProperty("--split", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + "% original");
  };
  range.addEventListener("input", apply);
  apply();
  const drag = (event) => {
    if (event.type === "pointermove" && event.buttons !== 1) return;
    const box = event.currentTarget.getBoundingClientRect();
    range.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    apply();
  };
  for (const pair of group.querySelectorAll(".pair")) {
    pair.addEventListener("pointerdown", drag);
    pair.addEventListener("pointermove", drag);
  }
}
