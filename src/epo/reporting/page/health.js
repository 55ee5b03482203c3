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
    return alarmsOf().map((alarm) => ({ ...alarm, steps: firedSteps(run, alarm.name), run })).filter(({ steps }) => steps.length);
  };

  EPO.stepWords = (steps, run) => {
    const ranges = EPO.ranges(steps, run.steps);
    const shown = ranges.slice(0, RANGES_SHOWN).map(EPO.rangeText).join(", ");
    const rest = ranges.length > RANGES_SHOWN ? " and later" : "";
    return `${steps.length === 1 ? "step" : "steps"} ${shown}${rest}`;
  };

  // -- timeline

  function bars(run, name) {
    const { steps } = run;
    const span = Math.max(1, steps.length);
    const at = new Map(steps.map((step, i) => [step, i]));
    const shapes = EPO.ranges(firedSteps(run, name), steps).map(([from, to]) =>
      svg("rect", { x: at.get(from), y: 0, width: Math.max(at.get(to) - at.get(from) + 1, span / 300), height: 1, class: "fired" },
        svg("title", {}, `steps ${EPO.rangeText([from, to])}`)));
    return svg("svg", { class: "timeline-track", viewBox: `0 0 ${span} 1`, preserveAspectRatio: "none", "aria-hidden": "true" }, shapes);
  }

  function timelineRow(run, alarm) {
    const column = columnOf(run, alarm.name);
    const recorded = column?.some(EPO.isNumber);
    const steps = firedSteps(run, alarm.name);
    const words = !recorded ? "not recorded" : steps.length ? EPO.plural(steps.length, "step") : "quiet";
    return el("tr", { class: steps.length ? "has-fired" : null },
      el("th", { scope: "row" }, el("button", { type: "button", class: "link", on: { click: () => openAlarm(alarm.name) } }, alarm.title)),
      el("td", { class: "timeline-cell" }, bars(run, alarm.name)),
      el("td", { class: "timeline-words" }, words));
  }

  function timeline(run) {
    if (!run.steps.length) return EPO.message("No step yet.", "Alarms are computed after every step.");
    const names = alarmsOf();
    if (EPO.firedAlarms(run) === null) return EPO.message("No alarms were recorded in this run.", "Runs of an older version have none.");
    return el("table", { class: "timeline" },
      el("caption", { class: "unseen" }, "Steps at which each alarm fired"),
      el("thead", {}, el("tr", {},
        el("th", { scope: "col" }, "Alarm"),
        el("th", { scope: "col", class: "timeline-cell" }, el("span", {}, `step ${run.steps[0]}`), el("span", {}, String(run.steps.at(-1)))),
        el("th", { scope: "col" }, "Fired"))),
      el("tbody", {}, names.map((alarm) => timelineRow(run, alarm))));
  }

  // -- several runs: how many steps of each run an alarm fired at

  function matrix() {
    const runs = EPO.runs.shown();
    const rows = alarmsOf().map((alarm) => ({ alarm, counts: runs.map(({ run }) => firedSteps(run, alarm.name).length) }));
    const loud = rows.filter(({ counts }) => counts.some((n) => n > 0));
    if (!loud.length) return el("p", { class: "quiet-good" }, "No alarm fired in any of the runs shown.");
    return el("div", { class: "scroll" }, el("table", { class: "matrix" },
      el("caption", { class: "unseen" }, "Steps at which an alarm fired, by run"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Run"), loud.map(({ alarm }) => el("th", { scope: "col", class: "number" }, alarm.title)))),
      el("tbody", {}, runs.map(({ label, index }, i) => el("tr", {},
        el("th", { scope: "row" }, el("button", { type: "button", class: "link", on: { click: () => EPO.runs.setDetail(index) } }, EPO.visible(label))),
        loud.map(({ counts }) => el("td", { class: counts[i] ? "number loud" : "number muted" }, counts[i] || "–")))))));
  }

  // -- catalogue

  const open = new Set(); // names of alarms that stand open

  function openAlarm(name) {
    const entry = document.getElementById(`alarm-${name}`);
    entry.open = true;
    entry.scrollIntoView({ block: "start" });
    entry.querySelector("summary").focus({ preventScroll: true });
  }

  function catalogueEntry(alarm, run) {
    const steps = firedSteps(run, alarm.name);
    const pairs = [["Looks for", alarm.definition], ["Threshold", alarm.threshold], ["Source", alarm.source], ["What to try", alarm.advice]];
    const metrics = (alarm.needs || []).filter((name) => run.metrics[name]?.some(EPO.isNumber));
    const entry = el("details", { class: "alarm", id: `alarm-${alarm.name}`, open: open.has(alarm.name) },
      el("summary", {}, el("span", { class: "alarm-title" }, alarm.title),
        el("span", { class: steps.length ? "alarm-state loud" : "alarm-state" }, steps.length ? `fired at ${EPO.plural(steps.length, "step")}` : "quiet")),
      el("dl", { class: "alarm-text" },
        pairs.filter(([, text]) => text).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
        steps.length ? el("div", {}, el("dt", {}, "Fired"), el("dd", {}, stepLinks(steps, run))) : null),
      metrics.length ? el("div", { class: "grid" }, metrics.slice(0, 4).map((name) => evidence(alarm, name))) : null);
    entry.addEventListener("toggle", () => (entry.open ? open.add(alarm.name) : open.delete(alarm.name)));
    return entry;
  }

  function stepLinks(steps, run) {
    const ranges = EPO.ranges(steps, run.steps);
    const index = EPO.page.runs.indexOf(run);
    const links = ranges.slice(0, RANGES_SHOWN).flatMap((range, i) => [
      i ? ", " : null,
      el("a", { href: `#trajectories?run=${index}&step=${range[0]}`, title: `Read the trajectories of step ${range[0]}` }, EPO.rangeText(range)),
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
        type: "scatter", mode: "markers", name: "alarm", plainName: "alarm", metric: name, x: run.steps, y: at,
        marker: { color: EPO.color("--bad"), symbol: "diamond-open", size: 9, line: { width: 2 } }, hoverinfo: "skip",
      };
      return { traces: [...EPO.lines(label, run.steps, y, EPO.series(0), name), ...(steps.size ? [marks] : [])], layout: { showlegend: false, yaxis: EPO.autoShare(name) } };
    };
    return EPO.card({ ...spec, id: `alarm-${alarm.name}-${spec.id}`, text: EPO.metric(name).text, height: 190, make });
  }

  // -- the tab

  EPO.tab("health", "Health", (container) => {
    const top = el("div");
    const list = el("div", { class: "section" });
    container.append(top, list);
    const fillTop = () => {
      const detail = EPO.runs.detail();
      if (!detail) return EPO.replace(top, EPO.message("No run yet."));
      const several = EPO.page.runs.length > 1;
      EPO.replace(top,
        several ? el("section", { class: "section" },
          el("h2", {}, "Alarms by run"),
          el("p", { class: "lead" }, "At how many steps each alarm fired. Choose a run to see when."),
          matrix()) : null,
        el("section", { class: "section" },
          el("h2", {}, several ? ["When alarms fired: ", EPO.visible(detail.label)] : "When alarms fired"),
          el("p", { class: "lead" }, "Alarms are computed after every step from the run's own metrics. A filled stretch marks the steps at which one fired."),
          timeline(detail.run)));
    };
    const fillList = () => {
      const detail = EPO.runs.detail();
      list.querySelectorAll(".plot").forEach(EPO.unplot);
      EPO.replace(list,
        el("h2", {}, "What the alarms look for"),
        el("div", { class: "alarms" }, detail ? alarmsOf().map((alarm) => catalogueEntry(alarm, detail.run)) : null));
    };
    const counts = () => JSON.stringify([EPO.runs.detail()?.index, alarmsOf().map(({ name }) => EPO.runs.detail() && firedSteps(EPO.runs.detail().run, name).length)]);
    let known = counts();
    const refresh = () => {
      fillTop();
      if (known === counts()) return;
      known = counts();
      fillList();
    };
    fillTop();
    fillList();
    EPO.onUpdate(refresh);
    EPO.onRuns(refresh);
  });
})();
