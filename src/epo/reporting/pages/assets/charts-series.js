"use strict";
// From runs to the traces that Plotly draws. Every line has a colour and a dash of its own; what a reader can compare
// comes as {traces, layout}.
(function () {
  const { isNumber } = EPO;
  const FILL_SHAPES = ["", "/", ".", "\\", "x", "-", "|", "+"];
  // The scale of the trajectory viewer: least to most, readable with any kind of colour vision.
  const SEQUENTIAL = {
    light: [
      "#fdfdf3",
      "#f3f9db",
      "#e9f5c4",
      "#d8eeb8",
      "#c1e5b7",
      "#a8dbb6",
      "#8accbb",
      "#68bec0",
      "#4aadc0",
      "#3999bd",
      "#1f86b9",
      "#2571af",
      "#265da5",
      "#214893",
      "#17337b",
      "#0c1f63",
    ],
    dark: [
      "#20242c",
      "#242d42",
      "#25355a",
      "#25416f",
      "#235080",
      "#1f5f92",
      "#267196",
      "#2a839a",
      "#3b959a",
      "#51a795",
      "#63b98f",
      "#8cc788",
      "#afd580",
      "#cce185",
      "#e5eb96",
      "#fff4a8",
    ],
  };
  const MARKERS_UP_TO = 15; // points of a line that are few enough to be marked

  // -- smoothing: the mean of the last `window` values

  let window_ = 1;
  EPO.smoothing = { get: () => window_, set: (n) => ((window_ = n), EPO.redraw()) };

  EPO.runningMean = (values, window) => {
    const smooth = [];
    for (let i = 0; i < values.length; i++) {
      const recent = values.slice(Math.max(0, i - window + 1), i + 1).filter(isNumber);
      smooth.push(isNumber(values[i]) && recent.length ? recent.reduce((a, b) => a + b, 0) / recent.length : null);
    }
    return smooth;
  };

  // -- how values are written

  const isShare = (metric) => EPO.metric(metric).unit === "share";
  const hoverValue = (metric) => (isShare(metric) ? "%{y:.1%}" : "%{y:,.4~g}");
  EPO.yAxis = (metric, more = {}) => ({
    ...(isShare(metric) ? { tickformat: ".0%", range: [-0.02, 1.02], autorangeoptions: undefined } : {}),
    ...more,
  });
  // Small shares would be a line on the ground of an axis that ends at 100 %.
  EPO.autoShare = (metric) => (isShare(metric) ? { tickformat: ".2~%", rangemode: "tozero" } : {});

  // -- lines

  function line(name, x, y, style, metric, more = {}) {
    const few = y.filter(isNumber).length <= MARKERS_UP_TO;
    return {
      type: "scatter",
      mode: few ? "lines+markers" : "lines",
      name: EPO.plotText(name),
      plainName: name,
      metric,
      x,
      y,
      line: { color: style.color, dash: style.dash, width: 1.8 },
      marker: { color: style.color, symbol: style.symbol, size: 6 },
      hovertemplate: hoverValue(metric),
      connectgaps: false,
      ...more,
    };
  }

  // A line, or with smoothing a faint line and its running mean.
  EPO.lines = (name, x, y, style, metric, more = {}) => {
    if (!y || !y.some(isNumber)) return [];
    if (window_ <= 1) return [line(name, x, y, style, metric, more)];
    const raw = {
      mode: "lines",
      opacity: 0.28,
      hoverinfo: "skip",
      hovertemplate: undefined,
      showlegend: false,
      isBand: true,
    };
    return [
      line(name, x, y, { ...style, dash: "solid" }, metric, { ...more, ...raw }),
      line(name, x, EPO.runningMean(y, window_), style, metric, { ...more, mode: "lines" }),
    ];
  };

  // The room between two lines; it belongs to `group` of the legend and is not hovered.
  EPO.band = (x, low, high, color, { group = null, name = null, alpha = 0.16 } = {}) => {
    const edge = {
      type: "scatter",
      mode: "lines",
      x,
      line: { width: 0, color },
      hoverinfo: "skip",
      legendgroup: group,
      isBand: true,
    };
    return [
      { ...edge, y: low, showlegend: false },
      {
        ...edge,
        y: high,
        fill: "tonexty",
        fillcolor: EPO.fade(color, alpha),
        showlegend: Boolean(name),
        name: name || "",
      },
    ];
  };

  const curve = (metric, arm) => EPO.page.comparison?.curves?.[metric]?.[arm];

  // Means of arms with their intervals.
  EPO.armTraces = (metric, arms) =>
    arms.flatMap((arm) => {
      const c = curve(metric, arm.name);
      if (!c) return [];
      // A single seed has no interval.
      const places = c.steps.map((_, i) => i).filter((i) => isNumber(c.low[i]) && isNumber(c.high[i]));
      const pick = (values) => places.map((i) => values[i]);
      const band = places.length
        ? EPO.band(pick(c.steps), pick(c.low), pick(c.high), arm.style.color, { group: arm.name })
        : [];
      const intervals = c.low.map((low, i) => (isNumber(low) ? [low, c.high[i]] : null));
      const mean = line(arm.name, c.steps, c.mean, arm.style, metric, {
        legendgroup: arm.name,
        intervals: isShare(metric) ? intervals : undefined,
      });
      return [...band, mean];
    });

  const column = (run, metric) => run.metrics[metric];

  // A metric of all runs shown, or of the arms where their means are known.
  EPO.metricTraces = (metric) => {
    if (EPO.runs.isArms() && EPO.page.comparison.curves?.[metric]) return EPO.armTraces(metric, EPO.runs.arms());
    return EPO.shownRuns().flatMap(({ run, label, style }) =>
      EPO.lines(label, run.steps, column(run, metric), style, metric),
    );
  };

  // With arms: the runs of the arms shown; what has no mean over an arm is drawn run by run.
  EPO.shownRuns = () => {
    if (!EPO.runs.isArms()) return EPO.runs.shown();
    const indices = new Set(EPO.runs.arms().flatMap((arm) => arm.runs));
    return EPO.runs.all().filter(({ index }) => indices.has(index));
  };

  // -- success on the evaluation panels, with the interval of every point

  function panelTrace(name, points, style, shift) {
    const rates = points.map((p) => p.success);
    return {
      type: "scatter",
      mode: "lines+markers",
      name: EPO.plotText(name),
      plainName: name,
      metric: "eval/iid/success",
      x: points.map((p) => p.step + shift),
      steps: points.map((p) => p.step),
      y: rates,
      intervals: points.map((p) => [p.low, p.high]),
      error_y: {
        type: "data",
        symmetric: false,
        array: points.map((p) => p.high - p.success),
        arrayminus: points.map((p) => p.success - p.low),
        color: style.color,
        thickness: 1.3,
        width: 3,
      },
      customdata: points.map((p) => [p.step, EPO.format.interval(p.low, p.high), p.episodes]),
      line: { color: style.color, dash: style.dash, width: 1.8 },
      marker: { color: style.color, symbol: style.symbol, size: 7 },
      hovertemplate: "step %{customdata[0]}: %{y:.1%}<br>95 %: %{customdata[1]}<br>%{customdata[2]} episodes",
    };
  }

  // Points of the same step stand beside each other, so that no bar hides another.
  function beside(series) {
    const last = Math.max(1, ...series.flatMap(({ points }) => points.map((p) => p.step)));
    return series.map(({ name, points, style }, i) =>
      panelTrace(name, points, style, 0.007 * last * (i - (series.length - 1) / 2)),
    );
  }

  EPO.panelTraces = (split) => {
    const metric = `eval/${split}/success`;
    if (EPO.runs.isArms() && EPO.page.comparison.curves?.[metric]) return EPO.armTraces(metric, EPO.runs.arms());
    const series = EPO.shownRuns().map(({ run, label, style }) => ({
      name: label,
      points: EPO.panel(run, split),
      style,
    }));
    return beside(series.filter(({ points }) => points.length));
  };

  // Both panels of one run, and the success of its training episodes behind them.
  EPO.successOfRun = (run) => {
    const series = EPO.splits([run]).map((split, i) => ({
      name: split,
      points: EPO.panel(run, split),
      style: EPO.series(i),
    }));
    const train = run.metrics["success/train"];
    const behind = train?.some(isNumber)
      ? [
          line("train", run.steps, train, { color: EPO.color("--line-strong"), dash: "dot" }, "success/train", {
            mode: "lines",
            line: { color: EPO.color("--line-strong"), width: 1.2, dash: "dot" },
            hovertemplate: "step %{x}: %{y:.1%}",
          }),
        ]
      : [];
    return [...behind, ...beside(series.filter(({ points }) => points.length))];
  };

  // -- entropy of one run: early and late turns, the history, the corridor around it

  EPO.corridorOf = (run) => {
    const { kappa_low: low, kappa_high: high } = run.config?.entropy || {};
    const reference = run.metrics["entropy/reference"];
    return isNumber(low) && isNumber(high) && reference?.some(isNumber) ? { low, high, reference } : null;
  };

  EPO.entropyOfRun = (run) => {
    const corridor = EPO.corridorOf(run);
    const traces = [];
    if (corridor) {
      const times = (k) => corridor.reference.map((h) => (isNumber(h) ? k * h : null));
      const known = corridor.reference.findIndex(isNumber);
      const cut = (values) => values.slice(known);
      traces.push(
        ...EPO.band(cut(run.steps), cut(times(corridor.low)), cut(times(corridor.high)), EPO.color("--line-strong"), {
          name: "corridor",
          group: "corridor",
          alpha: 0.21,
        }),
      );
    }
    const parts = [
      ["entropy/turn_early", "early turns", EPO.series(0)],
      ["entropy/turn_late", "late turns", EPO.series(1)],
      ["entropy/mean", "all tokens", { ...EPO.series(2), dash: "dot" }],
      ["entropy/reference", "history", { color: EPO.color("--muted"), dash: "longdash", symbol: "line-ew" }],
    ];
    for (const [metric, name, style] of parts)
      traces.push(...EPO.lines(name, run.steps, run.metrics[metric], style, metric, { hovertemplate: "%{y:.3f}" }));
    return traces.some((trace) => !trace.isBand) ? traces : [];
  };

  // -- turn x step

  const sequential = () => SEQUENTIAL[EPO.theme()].map((color, i, all) => [i / (all.length - 1), color]);

  EPO.heatMapOfRun = (run) => {
    const { steps, values, counts } = run.turn_entropy || { steps: [], values: [] };
    const turns = Math.max(0, ...values.map((row) => row.length));
    if (!turns) return [];
    const byTurn = (rows) => Array.from({ length: turns }, (_, k) => rows.map((row) => row[k] ?? null));
    return [
      {
        type: "heatmap",
        x: steps,
        y: Array.from({ length: turns }, (_, k) => k + 1),
        z: byTurn(values),
        customdata: byTurn(counts || []),
        colorscale: sequential(),
        zmin: 0,
        zmax: Math.max(...values.flat().filter(isNumber), 1e-9),
        colorbar: {
          thickness: 10,
          outlinewidth: 0,
          len: 1,
          title: { text: "nats", side: "right", font: { size: 11 } },
          tickfont: { size: 11, color: EPO.color("--muted") },
        },
        hovertemplate: "step %{x}, turn %{y}<br>%{z:.3f} nats<br>%{customdata} episodes<extra></extra>",
        hoverongaps: false,
      },
    ];
  };

  // -- parts of a whole, one above the other

  // parts: [[name, values, metric]]
  EPO.stack = (steps, parts) =>
    parts
      .filter(([, values]) => values?.some((v) => isNumber(v) && v !== 0))
      .map(([name, values, metric], i) => {
        const { color } = EPO.series(i);
        return {
          type: "scatter",
          mode: "lines",
          stackgroup: "whole",
          name: EPO.plotText(name),
          plainName: name,
          metric,
          x: steps,
          y: values.map((v) => (isNumber(v) ? v : 0)),
          line: { color, width: 1 },
          fillcolor: EPO.fade(color, 0.62),
          fillpattern: {
            shape: FILL_SHAPES[i % FILL_SHAPES.length],
            fgcolor: EPO.color("--surface"),
            fgopacity: 0.55,
            size: 7,
            solidity: 0.22,
            fillmode: "overlay",
            bgcolor: EPO.fade(color, 0.62),
          },
          hovertemplate: isShare(metric) ? "%{y:.1%}" : "%{y:.3~s} s",
        };
      });

  EPO.sumsSoFar = (values) => {
    let sum = 0;
    return values.map((v) => (isNumber(v) ? (sum += v) : null));
  };
})();
