"use strict";
// Overview: what came out, in what state the run is, which alarms fired, the key charts small.
(function () {
  const { el } = EPO;

  // -- success before and after, with intervals

  const first = (run, split) => EPO.panel(run, split)[0];
  const last = (run, split) => EPO.panel(run, split).at(-1);

  // A share and its interval on a track from 0 to 100 %. Decoration: the numbers stand beside it.
  EPO.track = (marks) =>
    el(
      "div",
      { class: "track", "aria-hidden": "true" },
      marks
        .filter(({ value }) => EPO.isNumber(value))
        .map(({ value, low, high, kind, color }) => [
          EPO.isNumber(low)
            ? el("span", {
                class: `track-bar ${kind}`,
                style: `left: ${100 * low}%; width: ${100 * (high - low)}%; ${color ? `color: ${color}` : ""}`,
              })
            : null,
          el("span", { class: `track-dot ${kind}`, style: `left: ${100 * value}%; ${color ? `color: ${color}` : ""}` }),
        ]),
    );

  function panelCell(panel) {
    if (!panel) return el("td", { class: "muted" }, "no data");
    return el(
      "td",
      {},
      el("span", { class: "figure-number" }, EPO.format.share(panel.success)),
      el("span", { class: "interval" }, EPO.format.interval(panel.low, panel.high)),
    );
  }

  function resultRow(run, split) {
    const before = first(run, split);
    const after = last(run, split);
    const isOnly = before === after || before.step === after.step;
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, split, el("span", { class: "interval" }, `${after.episodes} episodes`)),
      before.step === 0 ? panelCell(before) : panelCell(null),
      isOnly && before.step === 0 ? el("td", { class: "muted" }, "not yet evaluated") : panelCell(after),
      el(
        "td",
        { class: "track-cell" },
        EPO.track([
          before.step === 0 ? { value: before.success, low: before.low, high: before.high, kind: "before" } : {},
          isOnly && before.step === 0 ? {} : { value: after.success, low: after.low, high: after.high, kind: "after" },
        ]),
      ),
    );
  }

  function oneRun(run) {
    const splits = EPO.splits([run]);
    if (!splits.length) {
      const train = run.metrics["success/train"]?.findLast(EPO.isNumber);
      return el(
        "p",
        { class: "lead" },
        EPO.isNumber(train)
          ? `No evaluation so far. Success in training at the last step: ${EPO.format.share(train)}.`
          : "No evaluation and no training step so far.",
      );
    }
    const step = Math.max(...splits.map((split) => last(run, split).step));
    return el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "result" },
        el("caption", { class: "unseen" }, "Success on the evaluation panels, with 95 % intervals"),
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "Success on"),
            el("th", { scope: "col" }, el("span", { class: "key before", "aria-hidden": "true" }), "before training"),
            el("th", { scope: "col" }, el("span", { class: "key after", "aria-hidden": "true" }), `after step ${step}`),
            el(
              "th",
              { scope: "col", class: "track-scale" },
              el("span", { class: "unseen" }, "drawn"),
              ["0", "50", "100 %"].map((t) => el("span", { "aria-hidden": "true" }, t)),
            ),
          ),
        ),
        el(
          "tbody",
          {},
          splits.map((split) => resultRow(run, split)),
        ),
      ),
    );
  }

  // -- several runs

  function manyRuns() {
    const splits = EPO.splits(EPO.page.runs);
    return el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "runs-table" },
        el("caption", { class: "unseen" }, "Runs: state and success"),
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["Run", "State", ...splits.flatMap((s) => [`${s} before`, `${s} after`]), "Alarms"].map((t) =>
              el("th", { scope: "col" }, t),
            ),
          ),
        ),
        el(
          "tbody",
          {},
          EPO.runs.all().map(({ run, label, index }) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, EPO.runSample(index), " ", EPO.visible(label)),
              el("td", {}, stateWords(run)),
              splits.flatMap((split) => [
                first(run, split)?.step === 0 ? panelCell(first(run, split)) : panelCell(null),
                panelCell(last(run, split)),
              ]),
              el("td", {}, alarmCount(run)),
            ),
          ),
        ),
      ),
    );
  }

  function alarmCount(run) {
    const fired = EPO.firedAlarms(run);
    if (fired === null) return "not recorded";
    return fired.length ? EPO.plural(fired.length, "alarm") : "none";
  }

  // -- state

  function stateWords(run) {
    const step = run.steps.at(-1) ?? 0;
    if (run.halted) return `halted after step ${step}`;
    if (run.finished) return `finished, ${EPO.plural(step, "step")}`;
    const going = EPO.page.mode === "live" ? "running" : "not finished";
    return `${going}, step ${step} of ${run.total_steps ?? "?"}`;
  }

  function facts(run) {
    const { config = {} } = run;
    const { algorithm = {}, entropy = {}, model = {}, environment = {}, rollout = {} } = config;
    const episodes = run.metrics.episodes?.findLast(EPO.isNumber);
    const tokens = run.metrics["tokens/sampled"]?.filter(EPO.isNumber).reduce((a, b) => a + b, 0);
    const pairs = [
      ["State", stateWords(run)],
      ["Time", EPO.isNumber(run.wall_seconds) ? EPO.format.duration(run.wall_seconds) : null],
      ["Algorithm", [algorithm.name, entropy.method === "none" ? null : entropy.method].filter(Boolean).join(" + ")],
      ["Environment", environment.suite],
      ["Model", model.path],
      ["Episodes per step", episodes ?? rollout.tasks_per_step],
      ["Tokens sampled", tokens ? EPO.format.count(tokens) : null],
      ["Seed", run.seed],
    ];
    return el(
      "dl",
      { class: "facts" },
      pairs
        .filter(([, value]) => value !== null && value !== undefined && value !== "")
        .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, EPO.visible(String(value))))),
    );
  }

  function notes(run) {
    const texts = [...(run.notes || [])];
    if (run.halted) texts.unshift(`Training was halted: ${haltWords(run.halted)}`);
    return texts.length
      ? el(
          "ul",
          { class: "notes" },
          texts.map((text) => el("li", {}, EPO.visible(text))),
        )
      : null;
  }

  function haltWords({ step, alarms = [], last_good: lastGood }) {
    const titles = alarms.map((name) => EPO.page.alarms.find((alarm) => alarm.name === name)?.title || name);
    return `after step ${step} by ${titles.join(", ")}. ${lastGood ? `Last good checkpoint: ${lastGood}` : "No good checkpoint is left."}`;
  }

  // -- alarms

  function alarms() {
    const runs = EPO.page.runs;
    const found = runs.flatMap((run, i) => (EPO.firedAlarms(run) || []).map((alarm) => ({ ...alarm, index: i })));
    const unknown = runs.every((run) => EPO.firedAlarms(run) === null);
    if (unknown) return el("p", { class: "lead" }, "No alarms were recorded.");
    if (!found.length) return el("p", { class: "quiet-good" }, "No alarm fired.");
    const byAlarm = new Map();
    for (const one of found) byAlarm.set(one.name, [...(byAlarm.get(one.name) || []), one]);
    return el(
      "ul",
      { class: "alarm-list" },
      [...byAlarm.values()].map((ones) => alarmLine(ones, runs.length)),
    );
  }

  function alarmLine(ones, runCount) {
    const [{ title, advice, steps, run }] = ones;
    const where = runCount > 1 ? `in ${ones.length} of ${runCount} runs` : `at ${EPO.stepWords(steps, run)}`;
    return el(
      "li",
      {},
      el("a", { href: "#health", class: "alarm-title" }, title),
      " ",
      el("span", { class: "muted" }, where),
      advice ? el("p", { class: "advice" }, `Try: ${advice}`) : null,
    );
  }

  // -- the tab

  function head(container) {
    const { runs, comparison } = EPO.page;
    const single = runs.length === 1;
    EPO.replace(
      container,
      single ? el("section", { class: "section" }, facts(runs[0]), notes(runs[0])) : null,
      single ? el("section", { class: "section" }, el("h2", {}, "Success"), oneRun(runs[0])) : null,
      comparison && !single
        ? el("section", { class: "section" }, el("h2", {}, "Success by arm"), EPO.comparisonTable({ brief: true }))
        : null,
      single ? null : el("section", { class: "section" }, el("h2", {}, "Runs"), manyRuns(), runs.map(notes)),
      el("section", { class: "section" }, el("h2", {}, "Alarms"), alarms()),
    );
  }

  function keyCharts() {
    const { charts } = EPO;
    const small = (spec) => EPO.card({ ...spec, id: `key-${spec.id}`, height: 220 });
    const several = EPO.page.runs.length > 1;
    const splits = EPO.splits(EPO.page.runs);
    const success = several
      ? splits.length
        ? splits.map(charts.success)
        : [charts.ofMetric("success/train")]
      : [charts.successOfRun];
    const entropy = EPO.runs.isArms()
      ? [charts.ofMetric("entropy/turn_early"), charts.ofMetric("entropy/turn_late")]
      : [charts.entropy];
    const specs = [
      ...success,
      charts.ofMetric("reward/mean"),
      ...entropy,
      ...(EPO.runs.isArms() ? [] : [charts.heatMap]),
    ];
    return el(
      "section",
      { class: "section" },
      el("h2", {}, "Key charts"),
      el(
        "p",
        { class: "lead" },
        "All of them, larger and with more, are under ",
        el("a", { href: "#charts" }, "Charts"),
        ".",
      ),
      el("div", { class: specs.length > 4 ? "grid thirds" : "grid" }, specs.map(small)),
    );
  }

  EPO.tab("overview", "Overview", (container) => {
    if (!EPO.page.runs.length) {
      container.append(EPO.message("No run yet.", "As soon as a run appears in the folder, it is shown here."));
      EPO.onUpdate(() => EPO.page.runs.length && !container.querySelector(".section") && fill(container));
      return;
    }
    fill(container);
  });

  function fill(container) {
    const top = el("div");
    const charts = el("div", { class: "section" });
    EPO.replace(container, top, charts);
    head(top);
    EPO.redrawParts(charts, keyCharts);
    EPO.onUpdate(() => head(top));
    EPO.onTheme(() => head(top));
  }
})();
