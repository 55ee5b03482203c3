"use strict";
// Charts: everything a run measured, in groups, and any other metric by search.
(function () {
  const { el, charts } = EPO;
  const WINDOWS = [1, 5, 10, 20];

  const several = () => EPO.page.runs.length > 1;

  const groups = () => {
    const m = charts.ofMetric;
    const splits = EPO.splits(EPO.page.runs);
    return [
      [
        "outcome",
        "Outcome",
        [
          ...(several() ? [...splits.map(charts.success), m("success/train")] : [charts.successOfRun]),
          m("reward/mean"),
          m("score/train"),
        ],
      ],
      [
        "entropy-charts",
        "Entropy",
        [
          { ...charts.entropy, wide: true, height: 300 },
          { ...charts.heatMap, wide: true, height: 300 },
          ...(several() ? ["entropy/turn_early", "entropy/turn_late", "entropy/mean"].map((name) => m(name)) : []),
          m("entropy/oscillation"),
          charts.outside,
          m("epo/effective_weight"),
          m("epo/beta"),
        ],
      ],
      [
        "optimisation",
        "Optimisation",
        [
          m("policy/kl"),
          m("policy/clip_fraction"),
          m("policy/grad_norm"),
          m("value/explained_variance", { y: { rangemode: "normal" } }),
          m("value/grad_norm"),
          m("sampler/mismatch_kl"),
          m("groups/all_equal"),
          m("update/learning_rate"),
        ],
      ],
      [
        "behaviour",
        "Behaviour",
        [m("turns/mean"), m("response/tokens"), m("turns/invalid"), m("turns/not_understood"), charts.stops],
      ],
      ["cost", "Cost", [charts.times, charts.budget, charts.tokens, m("tokens/per_second")]],
    ];
  };

  const group = ([id, title, specs]) =>
    el(
      "section",
      { class: "section", id: `group-${id}` },
      el("h2", {}, title),
      el("div", { class: "grid" }, specs.map(EPO.card)),
    );

  // -- any other metric; the address keeps the choice

  const picked = () => (EPO.params("charts").metrics || "").split(",").filter(Boolean);

  function ownCharts() {
    const grid = el("div", { class: "grid" });
    const cards = new Map();
    const sync = () => {
      const names = picked();
      for (const [name, card] of cards) if (!names.includes(name)) take(card, name);
      for (const name of names) if (!cards.has(name)) add(name);
    };
    const take = (card, name) => {
      card.querySelectorAll(".plot").forEach(EPO.unplot);
      card.remove();
      cards.delete(name);
    };
    const add = (name) => {
      const card = EPO.card({ ...charts.ofMetric(name), id: `own-${name.replace(/[^a-z0-9]+/gi, "-")}` });
      const title = EPO.metric(name).title;
      card
        .querySelector(".card-tools")
        .append(
          el(
            "button",
            {
              type: "button",
              class: "quiet",
              "aria-label": `${title}: remove this chart`,
              on: { click: () => choose(picked().filter((n) => n !== name)) },
            },
            "Remove",
          ),
        );
      cards.set(name, card);
      grid.append(card);
    };
    const choose = (names) => {
      EPO.setParams("charts", { ...EPO.params("charts"), metrics: names.join(",") });
      sync();
    };
    const picker = EPO.metricPicker({ taken: () => new Set(picked()), onPick: (name) => choose([...picked(), name]) });
    EPO.onParams("charts", sync);
    sync();
    return [picker, grid];
  }

  // -- controls

  function smoothing() {
    const select = el(
      "select",
      { id: "smoothing" },
      WINDOWS.map((n) =>
        el("option", { value: n, selected: n === EPO.smoothing.get() }, n === 1 ? "none" : `mean of ${n} steps`),
      ),
    );
    select.addEventListener("change", () => EPO.smoothing.set(Number(select.value)));
    return el("label", { class: "detail" }, "Smoothing ", select);
  }

  const jump = (id) => (event) => {
    event.preventDefault();
    const target = document.getElementById(`group-${id}`);
    target.scrollIntoView({ block: "start" });
    target.querySelector("button")?.focus({ preventScroll: true });
  };

  const contents = () =>
    el(
      "nav",
      { class: "contents", "aria-label": "Groups of charts" },
      groups().map(([id, title]) => el("a", { href: "#charts", on: { click: jump(id) } }, title)),
      el("a", { href: "#charts", on: { click: jump("own") } }, "Any metric"),
    );

  EPO.tab("charts", "Charts", (container) => {
    if (!EPO.page.runs.length)
      return container.append(EPO.message("No run yet.", "Charts appear with the first step."));
    const body = el("div", { class: "chart-groups" });
    const own = el("section", { class: "section", id: "group-own" }, el("h2", {}, "Any metric"), ownCharts());
    container.append(
      el("div", { class: "toolbar" }, contents(), smoothing()),
      el("p", { class: "lead hint-line" }, "Drag over a chart to zoom, double-click to go back."),
      body,
      own,
    );
    EPO.redrawParts(body, () => groups().map(group));
  });
})();
