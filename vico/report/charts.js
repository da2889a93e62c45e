// Draws the charts one after another, so that the page can be read meanwhile.
"use strict";
{
  const { charts } = JSON.parse(document.getElementById("data").textContent);
  const plots = [...document.querySelectorAll("[data-chart]")];

  // A copy with the value of page.css for each colour that begins with --.
  function coloured(value, style, key = "") {
    if (typeof value === "string") {
      const isVariable = /color(scale)?$/.test(key) && value.startsWith("--");
      return isVariable ? style.getPropertyValue(value).trim() : value;
    }
    if (Array.isArray(value)) return value.map((part) => coloured(part, style, key));
    if (value === null || typeof value !== "object") return value;
    const parts = Object.entries(value).map(([name, part]) => [name, coloured(part, style, name)]);
    return Object.fromEntries(parts);
  }

  function axis(own) {
    const base = { gridcolor: "--grid", zerolinecolor: "--grid", linecolor: "--line" };
    return { ...base, automargin: true, fixedrange: true, ...own };
  }

  function layoutOf(own) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: "--text" },
      hoverlabel: { bgcolor: "--surface", bordercolor: "--line", font: { color: "--text" } },
      margin: { l: 44, r: 12, t: 12, b: 40 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      ...own,
      xaxis: axis(own.xaxis),
      yaxis: axis(own.yaxis),
    };
  }

  function draw(plot) {
    const chart = charts[Number(plot.dataset.chart)];
    const style = getComputedStyle(document.documentElement);
    const figure = coloured({ data: chart.data, layout: layoutOf(chart.layout) }, style);
    const options = { displayModeBar: false, responsive: true };
    return Plotly.react(plot, figure.data, figure.layout, options);
  }

  async function drawAll() {
    for (const plot of plots) {
      await new Promise((resolve) => setTimeout(resolve));
      await draw(plot);
    }
    document.documentElement.dataset.drawn = "true";
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
}
