"use strict";
// Figures: what a comparison says, as in EPO's paper, and the table of arms. Only where runs are compared.
(function () {
  const { el } = EPO;

  const comparison = () => EPO.page.comparison;
  const percent = (x) => Math.round(100 * x);
  const signed = (x) => (EPO.isNumber(x) ? `${x > 0 ? "+" : ""}${EPO.format.share(x)}` : "–");
  const splitsOf = (rows) => [...new Set(rows.map((row) => row.split))];

  // A word in the head of a table with one sentence on what it means.
  EPO.hint = (word, sentence) => {
    const id = `hint-${(EPO.hint.count = (EPO.hint.count || 0) + 1)}`;
    return [
      word,
      el(
        "button",
        { type: "button", class: "hint", "aria-label": `What is ${word}?`, "aria-describedby": id },
        "?",
        el("span", { role: "tooltip", id }, sentence),
      ),
    ];
  };

  function armIndex(name) {
    return comparison().arms.findIndex((arm) => arm.name === name);
  }

  const armHead = (name) => el("th", { scope: "row" }, EPO.lineSample(armIndex(name)), " ", EPO.visible(name));
  const intervalOf = (row) =>
    EPO.isNumber(row.low) ? EPO.format.interval(row.low, row.high) : "one seed, no interval";

  // -- the short table of the overview: mean of the window with its interval, a column for each split

  function briefTable() {
    const { table, arms, window } = comparison();
    const splits = splitsOf(table);
    const cell = (arm, split) => {
      const row = table.find((r) => r.arm === arm.name && r.split === split);
      if (!row) return el("td", { class: "muted" }, "no data");
      return el(
        "td",
        {},
        el("span", { class: "figure-number" }, EPO.format.share(row.window_mean)),
        el("span", { class: "interval" }, intervalOf(row)),
        EPO.track([
          {
            value: row.window_mean,
            low: row.low,
            high: row.high,
            kind: "after",
            color: `var(--series-${armIndex(arm.name) % 7})`,
          },
        ]),
      );
    };
    return [
      el(
        "p",
        { class: "lead" },
        `Mean over the last ${percent(window)} % of the steps and over seeds. `,
        el("a", { href: "#figures" }, "Figures and the whole table"),
      ),
      el(
        "div",
        { class: "scroll" },
        el(
          "table",
          { class: "result brief" },
          el("caption", { class: "unseen" }, "Success by arm"),
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              el("th", { scope: "col" }, "Arm"),
              el("th", { scope: "col", class: "number" }, "Seeds"),
              splits.map((s) => el("th", { scope: "col" }, s)),
            ),
          ),
          el(
            "tbody",
            {},
            arms.map((arm) =>
              el(
                "tr",
                {},
                armHead(arm.name),
                el("td", { class: "number" }, arm.runs.length),
                splits.map((s) => cell(arm, s)),
              ),
            ),
          ),
        ),
      ),
    ];
  }

  // -- the whole table

  function columns() {
    const { window, confidence, baseline } = comparison();
    const level = percent(confidence);
    return [
      ["Seeds", "How many finished runs the numbers rest on.", (row, arm) => row.seeds ?? arm.runs.length],
      [
        `Last ${percent(window)} %`,
        `Mean success over the evaluations in the last ${percent(window)} % of the steps, then over seeds.`,
        (row) => EPO.format.share(row.window_mean),
      ],
      [`${level} % interval`, `Bootstrap interval over seeds of that mean, at ${level} %.`, intervalOf],
      [
        "Middle mean",
        "Interquartile mean over seeds: the mean of the middle half, which one odd seed does not move.",
        (row) => share(row.iqm),
      ],
      [
        "Change",
        `Relative change of the mean against the arm without entropy control (${baseline} where there is no nearer one).`,
        (row) => signed(row.relative),
      ],
      [
        "Better",
        "Probability that a random seed of this arm beats a random seed of that arm; 50 % is a draw.",
        (row) => share(row.improvement_probability),
      ],
      [
        "Best, biased",
        "Mean over seeds of each run's best evaluation. Biased upwards: the best of many noisy evaluations is partly luck. Papers report it; do not rank by it.",
        (row) => share(row.best_mean),
      ],
      ["Turns", "Turns played in training, mean over seeds.", (row) => number(row.environment_steps)],
      ["Tokens", "Tokens drawn in training, mean over seeds.", (row) => number(row.tokens)],
    ];
  }

  const share = (x) => (EPO.isNumber(x) ? EPO.format.share(x) : "–");
  const number = (x) => (EPO.isNumber(x) ? EPO.format.count(x) : "–");

  function wholeTable() {
    const { table, arms } = comparison();
    if (!table.length)
      return EPO.message("No result to compare yet.", "The table needs runs that reached their last step.");
    const heads = columns();
    return el(
      "div",
      { class: "scroll hints" },
      el(
        "table",
        { class: "arms-table" },
        el("caption", { class: "unseen" }, "Arms compared"),
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "Arm"),
            heads.map(([title, text]) => el("th", { scope: "col", class: "number" }, EPO.hint(title, text))),
          ),
        ),
        splitsOf(table).map((split) =>
          el(
            "tbody",
            {},
            el(
              "tr",
              { class: "table-group" },
              el("th", { colspan: heads.length + 1, scope: "colgroup" }, `Success on ${EPO.visible(split)}`),
            ),
            table
              .filter((row) => row.split === split)
              .map((row) =>
                el(
                  "tr",
                  {},
                  armHead(row.arm),
                  heads.map(([title, , show]) =>
                    el(
                      "td",
                      { class: title === "Best, biased" ? "number muted" : "number" },
                      show(row, arms[armIndex(row.arm)]),
                    ),
                  ),
                ),
              ),
          ),
        ),
      ),
    );
  }

  // -- figures

  function panel(figure, { metric, arms }, i) {
    const known = EPO.metric(metric);
    const wanted = new Set(arms);
    return EPO.card({
      id: `${figure.id}-${i}`,
      title: known.title,
      unit: known.unit === "nats" ? "nats" : "",
      text: known.text,
      height: 240,
      make: () => {
        const drawn = comparison()
          .arms.map((arm, k) => ({ ...arm, style: EPO.series(k) }))
          .filter(({ name }) => wanted.has(name));
        const isSuccess = metric.startsWith("eval/") || metric === "success/train";
        return {
          traces: EPO.armTraces(metric, drawn),
          layout: {
            showlegend: false,
            yaxis: isSuccess ? { tickformat: ".0%", range: [-0.02, 1.02] } : EPO.autoShare(metric),
          },
        };
      },
    });
  }

  function legend(figure) {
    const names = [...new Set(figure.panels.flatMap((one) => one.arms))];
    return el(
      "ul",
      { class: "legend", "aria-label": "Arms" },
      names.map((name) => el("li", {}, EPO.lineSample(armIndex(name)), " ", EPO.visible(name))),
    );
  }

  const section = (figure) =>
    el(
      "section",
      { class: "section", id: EPO.visible(figure.id) },
      el("h2", {}, EPO.visible(figure.title)),
      el("p", { class: "lead" }, EPO.visible(figure.caption || "")),
      legend(figure),
      el(
        "div",
        { class: "grid thirds" },
        figure.panels.map((one, i) => panel(figure, one, i)),
      ),
    );

  function reading() {
    const { window, confidence, arms } = comparison();
    const seeds = arms.map((arm) => `${arm.name}: ${arm.seeds.join(", ")}`).join("; ");
    return el(
      "p",
      { class: "lead" },
      `Lines are means over seeds, bands ${percent(confidence)} % bootstrap intervals over seeds at every step; an arm with one seed has no band. ` +
        `Scores are means over the last ${percent(window)} % of the steps, a window fixed beforehand. Seeds: ${EPO.visible(seeds)}.`,
    );
  }

  EPO.comparisonTable = ({ brief = false } = {}) => (brief ? briefTable() : wholeTable());

  const contentOf = () => [
    el(
      "section",
      { class: "section" },
      el("h2", {}, "Arms compared"),
      reading(),
      comparison().notes?.length
        ? el(
            "ul",
            { class: "notes" },
            comparison().notes.map((text) => el("li", {}, EPO.visible(text))),
          )
        : null,
      wholeTable(),
    ),
    comparison().figures.map(section),
    comparison().figures.length
      ? null
      : el(
          "div",
          { class: "section" },
          EPO.message(
            "No figure of the paper fits these arms.",
            "Figures need arms with and without entropy control; `epo sweep` makes them.",
          ),
        ),
  ];

  EPO.tab(
    "figures",
    "Figures",
    (container) => {
      const fill = () => {
        container.querySelectorAll(".plot").forEach(EPO.unplot);
        EPO.replace(container, contentOf());
      };
      // Figures are redrawn in place; the table and the list of figures are made anew when a comparison changes.
      let known = JSON.stringify([comparison().table, comparison().figures]);
      EPO.onUpdate(() => {
        const now = JSON.stringify([comparison()?.table, comparison()?.figures]);
        if (!comparison() || now === known) return;
        known = now;
        fill();
      });
      fill();
    },
    { hidden: () => !EPO.page.comparison },
  );
})();
