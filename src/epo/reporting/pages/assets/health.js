"use strict";
// Health: which alarm fired when, what each looks for, and what to try.
(function () {
  const { el, svg } = EPO;
  const RANGES_SHOWN = 12; // stretches of steps named in words

  const alarmsOf = () => EPO.page.alarms || [];
  const columnOf = (run, name) => run.metrics[`health/${name}`];

  const firedSteps = (run, name) => run.steps.filter((_, i) => columnOf(run, name)?.[i] > 0);

  // Alarms that fired in a run: [{..alarm, steps, run}]; null where none were recorded.
  EPO.firedAlarms = (run) => {
    if (!alarmsOf().some(({ name }) => columnOf(run, name)?.some(EPO.isNumber))) return null;
    return alarmsOf()
      .map((alarm) => ({ ...alarm, steps: firedSteps(run, alarm.name), run }))
      .filter(({ steps }) => steps.length);
  };

  EPO.stepWords = (steps, run) => {
    const ranges = EPO.ranges(steps, run.steps);
    const shown = ranges.slice(0, RANGES_SHOWN).map(EPO.rangeText).join(", ");
    const rest = ranges.length > RANGES_SHOWN ? " and later" : "";
    return `${steps.length === 1 ? "step" : "steps"} ${shown}${rest}`;
  };

  // -- timeline: a track of steps, filled where the alarm fired

  function track(run, name) {
    const { steps } = run;
    const span = Math.max(1, steps.length);
    const at = new Map(steps.map((step, i) => [step, i]));
    const shapes = EPO.ranges(firedSteps(run, name), steps).map(([from, to]) =>
      svg(
        "rect",
        {
          x: at.get(from),
          y: 0,
          width: Math.max(at.get(to) - at.get(from) + 1, span / 300),
          height: 1,
          class: "fired",
        },
        svg("title", {}, `steps ${EPO.rangeText([from, to])}`),
      ),
    );
    return svg(
      "svg",
      { class: "timeline-track", viewBox: `0 0 ${span} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
      shapes,
    );
  }

  // -- several runs: how many steps of each run an alarm fired at

  function matrix() {
    const runs = EPO.runs.shown();
    const rows = alarmsOf().map((alarm) => ({
      alarm,
      counts: runs.map(({ run }) => firedSteps(run, alarm.name).length),
    }));
    const loud = rows.filter(({ counts }) => counts.some((n) => n > 0));
    if (!loud.length) return el("p", { class: "quiet-good" }, "No alarm fired in any of the runs shown.");
    return el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "matrix" },
        el("caption", { class: "unseen" }, "Steps at which an alarm fired, by run"),
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "Run"),
            loud.map(({ alarm }) => el("th", { scope: "col", class: "number" }, alarm.title)),
          ),
        ),
        el(
          "tbody",
          {},
          runs.map(({ label, index }, i) =>
            el(
              "tr",
              {},
              el(
                "th",
                { scope: "row" },
                el(
                  "button",
                  { type: "button", class: "link", on: { click: () => EPO.runs.setDetail(index) } },
                  EPO.visible(label),
                ),
              ),
              loud.map(({ counts }) =>
                el("td", { class: counts[i] ? "number loud" : "number muted" }, counts[i] || "–"),
              ),
            ),
          ),
        ),
      ),
    );
  }

  // -- catalogue

  const open = new Set(); // names of alarms that stand open

  function catalogueEntry(alarm, run) {
    const steps = firedSteps(run, alarm.name);
    const pairs = [
      ["Looks for", alarm.definition],
      ["Threshold", alarm.threshold],
      ["Source", alarm.source],
      ["What to try", alarm.advice],
    ];
    const metrics = (alarm.needs || []).filter((name) => run.metrics[name]?.some(EPO.isNumber));
    const isRecorded = columnOf(run, alarm.name)?.some(EPO.isNumber);
    const state = !isRecorded ? "not recorded" : steps.length ? EPO.plural(steps.length, "step") : "quiet";
    const entry = el(
      "details",
      { class: "alarm", id: `alarm-${alarm.name}`, open: open.has(alarm.name) },
      el(
        "summary",
        {},
        el("span", { class: "alarm-title" }, alarm.title),
        el("span", { class: "alarm-track" }, track(run, alarm.name)),
        el(
          "span",
          { class: steps.length ? "alarm-state loud" : "alarm-state" },
          steps.length ? el("span", { class: "unseen" }, "fired at ") : null,
          state,
        ),
      ),
      el(
        "dl",
        { class: "alarm-text" },
        pairs.filter(([, text]) => text).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
        steps.length ? el("div", {}, el("dt", {}, "Fired"), el("dd", {}, stepLinks(steps, run))) : null,
      ),
      metrics.length
        ? el(
            "div",
            { class: "grid" },
            metrics.slice(0, 4).map((name) => evidence(alarm, name)),
          )
        : null,
    );
    entry.addEventListener("toggle", () => (entry.open ? open.add(alarm.name) : open.delete(alarm.name)));
    return entry;
  }

  function stepLinks(steps, run) {
    const ranges = EPO.ranges(steps, run.steps);
    const index = EPO.page.runs.indexOf(run);
    const links = ranges
      .slice(0, RANGES_SHOWN)
      .flatMap((range, i) => [
        i ? ", " : null,
        el(
          "a",
          { href: `#trajectories?run=${index}&step=${range[0]}`, title: `Read the trajectories of step ${range[0]}` },
          EPO.rangeText(range),
        ),
      ]);
    return [steps.length === 1 ? "step " : "steps ", ...links, ranges.length > RANGES_SHOWN ? " and later" : null];
  }

  // A number the alarm rests on, with the steps marked at which it fired.
  function evidence(alarm, name) {
    const spec = EPO.charts.ofMetric(name);
    const make = () => {
      const { run, label } = EPO.runs.detail();
      const steps = new Set(firedSteps(run, alarm.name));
      const y = run.metrics[name] || [];
      const at = run.steps.map((step, i) => (steps.has(step) ? y[i] : null));
      const marks = {
        type: "scatter",
        mode: "markers",
        name: "alarm",
        plainName: "alarm",
        metric: name,
        x: run.steps,
        y: at,
        marker: { color: EPO.color("--bad"), symbol: "diamond-open", size: 9, line: { width: 2 } },
        hoverinfo: "skip",
      };
      return {
        traces: [...EPO.lines(label, run.steps, y, EPO.series(0), name), ...(steps.size ? [marks] : [])],
        layout: { showlegend: false, yaxis: EPO.autoShare(name) },
      };
    };
    return EPO.card({ ...spec, id: `alarm-${alarm.name}-${spec.id}`, text: EPO.metric(name).text, height: 190, make });
  }

  function catalogue(run) {
    const { steps } = run;
    return el(
      "div",
      { class: "alarms" },
      el(
        "div",
        { class: "alarm-head", "aria-hidden": "true" },
        el("span", {}, "Alarm"),
        el(
          "span",
          { class: "alarm-track" },
          el("span", {}, steps.length ? `step ${steps[0]}` : ""),
          el("span", {}, steps.length ? String(steps.at(-1)) : ""),
        ),
        el("span", { class: "alarm-state" }, "Fired"),
      ),
      alarmsOf().map((alarm) => catalogueEntry(alarm, run)),
    );
  }

  // -- the tab

  EPO.tab("health", "Health", (container) => {
    let known = null;
    const fill = () => {
      container.querySelectorAll(".plot").forEach(EPO.unplot);
      EPO.replace(
        container,
        EPO.runs.detail()
          ? contentOf(EPO.runs.detail())
          : EPO.message("No run yet.", "Alarms are computed after every step."),
      );
    };
    // Anew only when something fired or another run was chosen; what stands open stays open.
    const refresh = () => {
      const detail = EPO.runs.detail();
      const now = JSON.stringify([
        detail?.index,
        EPO.runs.shown().map(({ run, index }) => [index, alarmsOf().map(({ name }) => firedSteps(run, name).length)]),
        detail && Math.floor(detail.run.steps.length / 10),
      ]);
      if (now === known) return;
      known = now;
      fill();
    };
    refresh();
    EPO.onUpdate(refresh);
    EPO.onRuns(refresh);
  });

  function contentOf({ run, label }) {
    const several = EPO.page.runs.length > 1;
    return [
      several && EPO.runs.all().some((one) => EPO.firedAlarms(one.run) !== null)
        ? el(
            "section",
            { class: "section" },
            el("h2", {}, "Alarms by run"),
            el("p", { class: "lead" }, "At how many steps each alarm fired. Choose a run to see when."),
            matrix(),
          )
        : null,
      el(
        "section",
        { class: "section" },
        el("h2", {}, several ? `Alarms of ${EPO.visible(label)}` : "Alarms"),
        el(
          "p",
          { class: "lead" },
          "Computed after every step from the run's own metrics. A filled stretch marks the steps at which an alarm fired; open one for what it looks for and what to try.",
        ),
        EPO.firedAlarms(run) === null
          ? el(
              "p",
              { class: "notes" },
              "No alarms were recorded in this run: it was made by an older version, or has no step yet.",
            )
          : null,
        catalogue(run),
      ),
    ];
  }
})();
