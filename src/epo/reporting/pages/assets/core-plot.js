"use strict";
// Charts: themed, drawn only while they can be seen, redrawn in place so that zoom and selections stay.
(function () {
  const { el } = EPO;
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
  const UNIFIED_HOVER_UP_TO = 8; // more lines than these would fill the screen
  const FRAME_MS = 12;
  const isCoarse = matchMedia("(pointer: coarse)").matches;

  const plots = new Set(); // {div, make, isDirty, isVisible}

  // The computed value of a colour variable of the style sheet, in the theme of the moment.
  const probe = el("span", { hidden: true });
  EPO.color = (name) => {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  // rgb(1, 2, 3) -> rgba(1, 2, 3, alpha)
  EPO.fade = (color, alpha) => color.replace(/^rgba?\(([^,]+),([^,]+),([^,)]+).*$/, `rgba($1,$2,$3,${alpha})`);

  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const plot = target.epoPlot;
        plot.isVisible = isIntersecting;
        if (isIntersecting && plot.isDirty) drawSoon();
      }
    },
    { rootMargin: "160px" },
  );

  const sized = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const plot = target.epoPlot;
      const width = Math.round(contentRect.width);
      if (width === 0 || width === plot.width) continue;
      plot.width = width;
      plot.isDirty = true;
    }
    drawSoon();
  });

  // Draws make() -> {traces, layout} into `div` whenever it can be seen and something changed; null: no data.
  // onChange() runs at every change, seen or not.
  EPO.plot = (div, make, onChange) => {
    const plot = { div, make, onChange, isDirty: true, isVisible: false, width: 0 };
    div.epoPlot = plot;
    div.classList.add("plot");
    plots.add(plot);
    seen.observe(div);
    sized.observe(div);
    return div;
  };

  EPO.unplot = (div) => {
    plots.delete(div.epoPlot);
    seen.unobserve(div);
    sized.unobserve(div);
    Plotly.purge(div);
  };

  EPO.redraw = () => {
    for (const plot of plots) {
      plot.isDirty = true;
      plot.onChange?.();
    }
    drawSoon();
  };
  // As many as fit into a frame, the others in the next ones: the page stays quick to answer.
  const drawSoon = EPO.oncePerFrame(() => {
    const start = performance.now();
    for (const plot of plots) {
      if (!plot.isDirty || !plot.isVisible || plot.div.offsetWidth === 0) continue;
      if (performance.now() - start > FRAME_MS) return drawSoon();
      plot.isDirty = false;
      draw(plot);
    }
  });

  function draw(plot) {
    const made = plot.make();
    const isEmpty = !made || !made.traces.length;
    plot.div.closest(".card")?.classList.toggle("is-empty", isEmpty);
    if (isEmpty) {
      Plotly.purge(plot.div);
      EPO.replace(plot.div, el("p", { class: "no-data" }, made?.empty || "No data"));
      return;
    }
    if (plot.div.querySelector(".no-data")) plot.div.replaceChildren();
    Plotly.react(
      plot.div,
      made.traces,
      themed(
        made.layout || {},
        made.traces.filter((trace) => !trace.isBand),
        plot,
      ),
      {
        displayModeBar: false,
        doubleClick: "reset",
        showTips: false,
      },
    );
  }

  function themed(layout, traces, plot) {
    const text = EPO.color("--text");
    const muted = EPO.color("--muted");
    const line = EPO.color("--grid");
    const axis = {
      gridcolor: line,
      linecolor: EPO.color("--line-strong"),
      zeroline: false,
      tickfont: { color: muted, size: 11 },
      title: { font: { color: muted, size: 11 }, standoff: 6 },
      automargin: true,
      fixedrange: isCoarse,
    };
    // 12k, but 5 x 10^-13 rather than 500f.
    const largest = traces.reduce(
      (m, trace) => (trace.y || []).reduce((n, y) => (EPO.isNumber(y) ? Math.max(n, Math.abs(y)) : n), m),
      0,
    );
    const isTiny = largest > 0 && largest < 1e-3;
    const numbers = { exponentformat: isTiny ? "power" : "SI", minexponent: isTiny ? 2 : 4 };
    const base = {
      autosize: false,
      width: plot.div.clientWidth,
      height: plot.div.clientHeight || 260,
      margin: { l: 46, r: 10, t: 8, b: 34 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, size: 12, color: text },
      dragmode: isCoarse ? false : "zoom",
      hovermode: traces.length <= UNIFIED_HOVER_UP_TO ? "x unified" : "closest",
      hoverlabel: {
        bgcolor: EPO.color("--raised"),
        bordercolor: EPO.color("--line-strong"),
        font: { family: FONT, size: 12, color: text },
        align: "left",
        namelength: 48,
      },
      showlegend: traces.filter((trace) => trace.showlegend !== false).length > 1,
      legend: {
        orientation: "h",
        x: 0,
        xanchor: "left",
        y: 1.02,
        yanchor: "bottom",
        font: { size: 11.5, color: text },
        bgcolor: "rgba(0,0,0,0)",
        itemwidth: 30,
      },
      uirevision: "kept",
      transition: { duration: 0 },
      xaxis: { ...axis, title: { ...axis.title, text: "RL step" }, showgrid: false, hoverformat: ",d" },
      yaxis: { ...axis, ...numbers, rangemode: "tozero" },
      colorway: [0, 1, 2, 3, 4, 5, 6].map((i) => EPO.color(`--series-${i}`)),
    };
    return merged(base, layout);
  }

  function merged(base, more) {
    const result = { ...base };
    for (const [key, value] of Object.entries(more)) {
      const isTree = value && typeof value === "object" && !Array.isArray(value) && typeof result[key] === "object";
      result[key] = isTree ? merged(result[key], value) : value;
    }
    return result;
  }

  // -- a chart with its title, its sentence, and its numbers as a table

  // options: {id, title, unit, text, make, height, wide, table}; `text` may be a function. table() -> {columns, rows};
  // without it the table is made from the traces.
  EPO.card = ({ id, title, unit, text, make, height = 250, wide = false, table }) => {
    const div = el("div", { style: `height: ${height}px` });
    const words = el("p", { class: "card-text" });
    const numbers = el("div", { class: "card-table", hidden: true });
    const button = el(
      "button",
      { type: "button", class: "quiet", "aria-expanded": "false", "aria-label": `${title}: show the numbers` },
      "Numbers",
    );
    const showText = () => EPO.replace(words, typeof text === "function" ? text() : text);
    const fill = () => EPO.replace(numbers, tableOf(table ? table() : fromTraces(make()), title));
    button.addEventListener("click", () => {
      numbers.hidden = !numbers.hidden;
      button.setAttribute("aria-expanded", String(!numbers.hidden));
      if (!numbers.hidden) fill();
    });
    const save = el("button", { type: "button", class: "quiet", "aria-label": `${title}: save as PNG` }, "PNG");
    save.addEventListener("click", () => savePicture(div, title));
    EPO.plot(
      div,
      () => {
        if (!numbers.hidden) fill();
        return make();
      },
      showText,
    );
    showText();
    return el(
      "article",
      { class: wide ? "card wide" : "card", id: id ? `chart-${id}` : null },
      el(
        "header",
        { class: "card-head" },
        el("h3", {}, title, unit ? el("span", { class: "unit" }, ` ${unit}`) : null),
        el("div", { class: "card-tools" }, button, save),
      ),
      words,
      div,
      numbers,
    );
  };

  function savePicture(div, title) {
    if (!div.data) return;
    const background = EPO.color("--surface");
    const filename = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
    Plotly.downloadImage(
      {
        data: div.data,
        layout: {
          ...div.layout,
          showlegend: div.data.filter((trace) => trace.showlegend !== false && trace.name).length > 1,
          paper_bgcolor: background,
          title: { text: EPO.plotText(title), font: { size: 14 } },
          margin: { ...div.layout.margin, t: 64 },
        },
      },
      { format: "png", width: 900, height: 420, scale: 2, filename },
    );
  }

  function fromTraces(made) {
    const traces = (made?.traces || []).filter(
      (trace) => Array.isArray(trace.y) && trace.x && trace.type !== "heatmap" && !trace.isBand,
    );
    const steps = [...new Set(traces.flatMap((trace) => trace.steps || trace.x))].sort((a, b) => a - b);
    const columns = traces.map(
      (trace) => new Map((trace.steps || trace.x).map((x, i) => [x, [trace.y[i], trace.intervals?.[i]]])),
    );
    const show = (cell, trace) => {
      if (!cell || !EPO.isNumber(cell[0])) return "";
      const value = EPO.format(cell[0], trace.metric);
      return cell[1] ? `${value} (${EPO.format.interval(...cell[1])})` : value;
    };
    return {
      columns: ["step", ...traces.map((trace) => trace.plainName || trace.name || "value")],
      rows: steps.map((step) => [step, ...columns.map((column, i) => show(column.get(step), traces[i]))]),
    };
  }

  function tableOf({ columns, rows }, title) {
    if (!rows.length) return el("p", { class: "no-data" }, "No data");
    return el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title}: numbers` },
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            columns.map((column) => el("th", { scope: "col" }, EPO.visible(column))),
          ),
        ),
        el(
          "tbody",
          {},
          rows.map((row) =>
            el(
              "tr",
              {},
              row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, String(cell))),
            ),
          ),
        ),
      ),
    );
  }
})();
