"use strict";
// Which runs are drawn and how: the strip of runs under the tabs, one colour and dash for each, arms of a comparison.
(function () {
  const { el, svg } = EPO;
  // Okabe and Ito's colours, each adjusted in lightness for contrast; style.css holds them for both themes.
  const COLOURS = 7;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
  const DASH_ARRAYS = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4" };
  const MANY = 8; // from here on the strip has a filter
  const TABS = ["overview", "charts", "health"];

  const state = { hidden: new Set(), hiddenArms: new Set(), mode: "runs", detail: 0, filter: "" };
  const listeners = EPO.listeners();
  EPO.onRuns = listeners.add;

  EPO.series = (i, dash = i) => ({
    color: EPO.color(`--series-${i % COLOURS}`),
    dash: DASHES[dash % DASHES.length],
    symbol: SYMBOLS[i % SYMBOLS.length],
  });

  EPO.lineSample = (i, dash = i) =>
    svg(
      "svg",
      { class: "line-sample", width: 30, height: 10, "aria-hidden": "true" },
      svg("line", {
        x1: 1,
        x2: 29,
        y1: 5,
        y2: 5,
        "stroke-dasharray": DASH_ARRAYS[DASHES[dash % DASHES.length]],
        style: `stroke: var(--series-${i % COLOURS})`,
      }),
    );

  const comparison = () => EPO.page.comparison;
  const armOf = (i) => (comparison()?.arms || []).findIndex((arm) => arm.runs.includes(i));

  // Place of a run's colour and dash: with arms the colour says the arm, the dash which of its runs.
  function place(i) {
    const arm = armOf(i);
    return arm < 0 ? [i, i] : [arm, comparison().arms[arm].runs.indexOf(i)];
  }

  EPO.runLabel = (i) => {
    const run = EPO.page.runs[i];
    const label = run.label || run.name;
    const isTwin = EPO.page.runs.some((other, j) => j !== i && (other.label || other.name) === label);
    return isTwin && run.name !== label ? `${label} (${run.name})` : label;
  };

  EPO.runSample = (i) => EPO.lineSample(...place(i));

  const describe = (run, i) => ({ run, index: i, label: EPO.runLabel(i), style: EPO.series(...place(i)) });

  EPO.runs = {
    // The runs to draw: [{run, index, label, style}]
    shown: () => EPO.page.runs.map(describe).filter(({ index }) => !state.hidden.has(index)),
    all: () => EPO.page.runs.map(describe),
    isArms: () => state.mode === "arms" && Boolean(comparison()),
    // The arms to draw: [{name, runs, seeds, style}]
    arms: () =>
      (comparison()?.arms || [])
        .map((arm, i) => ({ ...arm, style: EPO.series(i) }))
        .filter((arm) => !state.hiddenArms.has(arm.name)),
    // The run that charts of one run show.
    detail: () => {
      const i = Math.min(state.detail, EPO.page.runs.length - 1);
      return EPO.page.runs.length ? describe(EPO.page.runs[i], i) : null;
    },
    setDetail: (i) => {
      state.detail = i;
      changed();
    },
  };

  function changed() {
    listeners.call();
    EPO.redraw();
  }

  // -- the strip

  EPO.startRuns = () => {
    state.mode = comparison()?.arms.some((arm) => arm.runs.length > 1) ? "arms" : "runs";
    drawBar();
    EPO.onUpdate(() => {
      if (known !== signature()) drawBar();
    });
  };

  let known = "";
  const signature = () =>
    JSON.stringify([EPO.page.runs.map((_, i) => EPO.runLabel(i)), (comparison()?.arms || []).map((a) => a.name)]);

  EPO.showRunsBar = (tab) => {
    document.getElementById("runs-bar").hidden = EPO.page.runs.length < 2 || !TABS.includes(tab);
  };

  function drawBar() {
    known = signature();
    const isArms = EPO.runs.isArms();
    const many = !isArms && EPO.page.runs.length >= MANY;
    EPO.replace(
      document.getElementById("runs-bar"),
      el(
        "div",
        { class: "runs-inner", role: "group", "aria-label": isArms ? "Arms shown" : "Runs shown" },
        comparison() ? modeSwitch() : el("span", { class: "runs-title" }, "Runs"),
        many ? filterBox() : null,
        el("div", { class: "chips" }, isArms ? armChips() : runChips()),
        many ? allAndNone() : null,
        detailSelect(),
      ),
    );
    if (EPO.currentTab()) EPO.showRunsBar(EPO.currentTab());
  }

  const modeSwitch = () =>
    el(
      "div",
      { class: "switch" },
      [
        ["arms", "Arms: mean and interval"],
        ["runs", "Single runs"],
      ].map(([mode, title]) =>
        el(
          "button",
          { type: "button", "aria-pressed": String(state.mode === mode), on: { click: () => setMode(mode) } },
          title,
        ),
      ),
    );

  function setMode(mode) {
    state.mode = mode;
    drawBar();
    document.querySelector("#runs-bar .switch [aria-pressed=true]").focus();
    changed();
  }

  function chip(isOn, sample, label, toggle, title) {
    const button = el(
      "button",
      { type: "button", class: "chip", "aria-pressed": String(isOn), title },
      sample,
      el("span", {}, EPO.visible(label)),
    );
    button.addEventListener("click", () => {
      const next = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(next));
      toggle(next);
      changed();
    });
    return button;
  }

  const put = (set, key, isOn) => (isOn ? set.delete(key) : set.add(key));

  const runChips = () =>
    EPO.page.runs.map((run, i) => {
      const node = chip(
        !state.hidden.has(i),
        EPO.runSample(i),
        EPO.runLabel(i),
        (on) => put(state.hidden, i, on),
        EPO.visible(run.path || run.name),
      );
      node.hidden = !matches(i);
      return node;
    });

  const armChips = () =>
    comparison().arms.map((arm, i) =>
      chip(
        !state.hiddenArms.has(arm.name),
        EPO.lineSample(i),
        `${arm.name} (${EPO.plural(arm.runs.length, "seed")})`,
        (on) => put(state.hiddenArms, arm.name, on),
        EPO.visible(arm.name),
      ),
    );

  const matches = (i) =>
    `${EPO.runLabel(i)} ${EPO.page.runs[i].name}`.toLowerCase().includes(state.filter.toLowerCase());

  function filterBox() {
    const input = el("input", {
      type: "search",
      class: "runs-filter",
      placeholder: "Filter runs",
      "aria-label": "Filter runs",
      value: state.filter,
    });
    input.addEventListener("input", () => {
      state.filter = input.value;
      document.querySelectorAll("#runs-bar .chip").forEach((node, i) => (node.hidden = !matches(i)));
    });
    return input;
  }

  const allAndNone = () =>
    [
      ["All", true],
      ["None", false],
    ].map(([title, isOn]) =>
      el(
        "button",
        {
          type: "button",
          class: "quiet",
          title: `${title} of the runs that the filter lets through`,
          on: { click: () => setAll(isOn) },
        },
        title,
      ),
    );

  function setAll(isOn) {
    EPO.page.runs.forEach((_, i) => matches(i) && put(state.hidden, i, isOn));
    document
      .querySelectorAll("#runs-bar .chip")
      .forEach((node, i) => node.setAttribute("aria-pressed", String(!state.hidden.has(i))));
    changed();
  }

  function detailSelect() {
    const select = el(
      "select",
      { id: "detail-run" },
      EPO.page.runs.map((_, i) =>
        el("option", { value: i, selected: i === state.detail }, EPO.visible(EPO.runLabel(i))),
      ),
    );
    select.addEventListener("change", () => EPO.runs.setDetail(Number(select.value)));
    return el("label", { class: "detail" }, "In detail ", select);
  }
})();
