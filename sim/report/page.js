"use strict";
// Draws each chart with the theme that the system asks for, and again when that changes.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const themes = read("themes");
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 40rem)");

function draw() {
  const template = themes[dark.matches ? "dark" : "light"];
  for (const element of document.querySelectorAll("[data-chart]")) {
    const { data, layout } = read(element.dataset.chart);
    if (narrow.matches && layout.meta) Object.assign(layout.yaxis, layout.meta.narrow);
    // Where names stand below one another, the plot keeps its height and the names get their own.
    const names = narrow.matches && data.length > 2 ? 22 * data.length : 0;
    element.style.height = `${Number(element.dataset.height) + names}px`;
    Plotly.react(element, data, { ...layout, template }, { responsive: true, displayModeBar: false });
  }
}

dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
if (typeof Plotly !== "undefined") draw();
