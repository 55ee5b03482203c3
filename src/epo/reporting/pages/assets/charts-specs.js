"use strict";
// The charts of the page, each described once: title, sentence, what it draws. Overview and Charts make cards of them.
(function () {
  const LEAVES = [
    "environment",
    "prefill",
    "decode",
    "sampling_rest",
    "workers",
    "old_logprobs",
    "values",
    "reference",
    "health",
    "update",
    "other",
  ];

  const detail = () => EPO.runs.detail();
  const ofDetail = (draw) => () => (detail() ? draw(detail().run) : []);
  const runName = () => (EPO.page.runs.length > 1 && detail() ? ` Run: ${EPO.visible(detail().label)}.` : "");
  const unitOf = (metric) => {
    const { unit } = EPO.metric(metric);
    return unit === "nats" || unit === "s" ? unit : "";
  };
  const withArms = (metric) => EPO.runs.isArms() && EPO.page.comparison.curves?.[metric];

  // How to read several lines at once, said once per chart.
  function readAs(metric) {
    if (!EPO.runs.isArms()) return "";
    const level = Math.round(100 * (EPO.page.comparison.confidence ?? 0.95));
    return withArms(metric)
      ? ` Mean over seeds, ${level} % interval as a band.`
      : " One line per run, coloured by arm.";
  }

  // A card of one metric, all runs over one another. The strip of runs is the legend.
  const ofMetric = (metric, { title, text, y = {}, id, height } = {}) => {
    const known = EPO.metric(metric);
    return {
      id: id || metric.replace(/[^a-z0-9]+/gi, "-"),
      title: title || known.title,
      unit: unitOf(metric),
      text: () => `${text || known.text}${readAs(metric)}`,
      height,
      make: () => ({
        traces: EPO.metricTraces(metric),
        layout: { showlegend: false, yaxis: { ...EPO.autoShare(metric), ...y } },
      }),
    };
  };

  const wholeShare = { tickformat: ".0%", range: [-0.02, 1.02] };

  const success = (split) => ({
    id: `success-${split}`,
    title: EPO.metric(`eval/${split}/success`).title,
    text: () => {
      const sentence = EPO.metric(`eval/${split}/success`).text;
      return withArms(`eval/${split}/success`)
        ? sentence + readAs(`eval/${split}/success`)
        : `${sentence} Bars: 95 % Wilson interval of each evaluation.`;
    },
    make: () => ({
      traces: EPO.panelTraces(split),
      layout: {
        hovermode: withArms(`eval/${split}/success`) ? "x unified" : "closest",
        showlegend: false,
        yaxis: wholeShare,
      },
    }),
  });

  const successOfRun = {
    id: "success",
    title: "Success",
    text: "Share of evaluation episodes that were fully solved, on tasks like those of training (iid) and unlike them (ood), with 95 % Wilson intervals; dotted: training episodes.",
    make: () => ({
      traces: ofDetail(EPO.successOfRun)(),
      layout: { hovermode: "closest", showlegend: true, yaxis: wholeShare },
    }),
  };

  function corridorWords() {
    const corridor = detail() && EPO.corridorOf(detail().run);
    if (!corridor) return " This run has no corridor.";
    return ` Grey: the corridor from ${corridor.low} to ${corridor.high} times the history, the mean of all steps so far.`;
  }

  const entropy = {
    id: "entropy",
    title: "Entropy of early and late turns",
    unit: "nats",
    text: () =>
      `Mean entropy per token, early and late: the first and the last third of the turns played. Late turns that climb away from early ones announce a cascade.${corridorWords()}${runName()}`,
    make: () => ({ traces: ofDetail(EPO.entropyOfRun)(), layout: { showlegend: true } }),
  };

  const heatMap = {
    id: "heat-map",
    title: "Entropy by turn and step",
    unit: "nats",
    text: () =>
      `Mean entropy per token of every turn at every step. Episodes that ended earlier do not count.${runName()}`,
    make: () => ({
      traces: ofDetail(EPO.heatMapOfRun)(),
      layout: {
        hovermode: "closest",
        margin: { r: 4 },
        yaxis: { title: { text: "turn" }, rangemode: "normal", showgrid: false, dtick: undefined },
      },
    }),
    table: () => heatMapTable(),
  };

  function heatMapTable() {
    const { steps = [], values = [] } = detail()?.run.turn_entropy || {};
    const turns = Math.max(0, ...values.map((row) => row.length));
    return {
      columns: ["step", ...Array.from({ length: turns }, (_, k) => `turn ${k + 1}`)],
      rows: steps.map((step, i) => [
        step,
        ...Array.from({ length: turns }, (_, k) => (EPO.isNumber(values[i][k]) ? EPO.format.plain(values[i][k]) : "")),
      ]),
    };
  }

  const outside = {
    id: "outside",
    title: "Tokens outside the corridor",
    text: () =>
      `Share of trained tokens below the floor and above the ceiling, in the weights of the entropy term.${runName()}`,
    make: () => ({
      traces: ofDetail((run) =>
        [
          ["entropy/above", "above", EPO.series(1)],
          ["entropy/below", "below", EPO.series(0)],
        ].flatMap(([metric, name, style]) => EPO.lines(name, run.steps, run.metrics[metric], style, metric)),
      )(),
      layout: { showlegend: true, yaxis: EPO.autoShare("entropy/above") },
    }),
  };

  const stops = {
    id: "stops",
    title: "Why episodes ended",
    text: () => `Share of the step's training episodes by the reason they stopped.${runName()}`,
    make: () => ({ traces: ofDetail(stopTraces)(), layout: { yaxis: { tickformat: ".0%", range: [0, 1] } } }),
  };

  const stopTraces = (run) =>
    EPO.stack(
      run.steps,
      Object.keys(run.metrics)
        .filter((name) => name.startsWith("stop/"))
        .map((name) => [EPO.metric(name).title, run.metrics[name], name]),
    );

  const times = {
    id: "time",
    title: "Time per stage",
    unit: "s",
    text: () => `Seconds of each step by what they were spent on.${runName()}`,
    make: () => ({ traces: ofDetail(timeTraces)(), layout: { yaxis: { ticksuffix: "" } } }),
  };

  function timeTraces(run) {
    const has = (name) => run.metrics[name]?.some(EPO.isNumber);
    const leaves = LEAVES.filter((leaf) => has(`time/${leaf}`)).map((leaf) => `time/${leaf}`);
    // Older runs know sampling and update as a whole only.
    const names = has("time/other") ? leaves : ["time/environment", "time/sampling", "time/update"].filter(has);
    return EPO.stack(
      run.steps,
      names.map((name) => [EPO.metric(name).title, run.metrics[name], name]),
    );
  }

  const budget = {
    id: "budget",
    title: "Tokens sampled so far",
    text: "The budget a run has used: sum of the tokens drawn for training.",
    make: () => ({
      traces: EPO.shownRuns().flatMap(({ run, label, style }) =>
        EPO.lines(
          label,
          run.steps,
          run.metrics["tokens/sampled"] && EPO.sumsSoFar(run.metrics["tokens/sampled"]),
          style,
          "tokens/sampled",
        ),
      ),
      layout: { showlegend: false },
    }),
  };

  const tokens = {
    id: "tokens",
    title: "Tokens per step",
    text: () => `Drawn, trained on, and run through the learner per pass (prompts included).${runName()}`,
    make: () => ({
      traces: ofDetail((run) =>
        ["tokens/processed", "tokens/trained", "tokens/sampled"].flatMap((metric, i) =>
          EPO.lines(metric.split("/")[1], run.steps, run.metrics[metric], EPO.series(i), metric),
        ),
      )(),
      layout: { showlegend: true },
    }),
  };

  // Fills `container` with make(), again whenever there are other runs, panels or arms; what only changed is drawn in place.
  EPO.redrawParts = (container, make) => {
    let known = null;
    const refresh = () => {
      const now = JSON.stringify([EPO.page.runs.length, EPO.splits(EPO.page.runs), EPO.runs.isArms()]);
      if (now === known) return;
      known = now;
      container.querySelectorAll(".plot").forEach(EPO.unplot);
      EPO.replace(container, make());
    };
    refresh();
    EPO.onUpdate(refresh);
    EPO.onRuns(refresh);
  };

  EPO.charts = { ofMetric, success, successOfRun, entropy, heatMap, outside, stops, times, budget, tokens };
})();
