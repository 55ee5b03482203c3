"use strict";
// The episodes of one task side by side, turn by turn.
(function () {
  const V = EPO.viewer;
  const FOLD_CHARACTERS = 280;
  const FOLD_TOKENS = 200;

  function outcomeWords(record) {
    const mark = record.success ? "✓" : "✗";
    return `${mark} ${V.stopWords(record.stop_reason)}`;
  }

  // Where the members stop doing the same, in words.
  function partingWords(members) {
    const longest = Math.max(...members.map(({ record }) => record.turns.length));
    for (let k = 0; k < longest; k++) {
      const actions = new Set(members.map(({ record }) => (k < record.turns.length ? record.turns[k].action : null)));
      if (actions.size > 1) {
        const before = k === 0 ? "They part" : `The same actions up to turn ${k}; they part`;
        const ended = actions.has(null) ? " (some had ended)" : "";
        const many = actions.size - (actions.has(null) ? 1 : 0);
        return `${before} at turn ${k + 1}: ${many} different ${many === 1 ? "action" : "actions"}${ended}.`;
      }
    }
    return "All of them did the same.";
  }

  // members: [{record, row}] of one task; step: {vocabulary, records, filter}; read(row) opens one alone.
  function comparison(members, step, view, { openRow, read }) {
    const el = EPO.el;
    const longest = Math.max(1, ...members.map(({ record }) => record.turns.length));
    const grid = el("div", { class: "compare-grid" });
    grid.style.setProperty("--members", String(members.length));
    grid.style.setProperty("--turns", String(longest));
    const cell = { ...view, foldCharacters: FOLD_CHARACTERS, foldTokens: FOLD_TOKENS };
    members.forEach(({ record, row }, m) => {
      const button = el("button", { type: "button" }, "Read");
      button.setAttribute("aria-label", `Read trajectory ${m + 1} alone`);
      button.addEventListener("click", () => read(row));
      const column = el(
        "section",
        { class: `member${row === openRow ? " open" : ""}`, "aria-label": `Trajectory ${m + 1}: ${outcomeWords(record)}` },
        el(
          "header",
          { class: "member-head" },
          el("b", {}, `${m + 1}`),
          el("span", { class: record.success ? "good" : "bad" }, outcomeWords(record)),
          typeof record.reward === "number" ? el("span", {}, `reward ${V.signed(record.reward)}`) : "",
          button,
        ),
      );
      record.turns.forEach((turn, k) => {
        const article = V.turnElement(record, row, k, step, cell);
        const alike = members.filter((other) => other.record.turns[k]?.action === turn.action).length;
        const words = alike === members.length ? "all did this" : `${alike} of ${members.length} did this`;
        article.querySelector(".outcome").append(el("span", { class: "flag alike" }, words));
        // The heads of the columns scroll out of sight.
        article.querySelector("header").append(el("span", {}, `trajectory ${m + 1} ${record.success ? "✓" : "✗"}`));
        column.append(article);
      });
      grid.append(column);
    });
    return el(
      "div",
      {},
      el("p", { class: "note" }, partingWords(members)),
      el("div", { class: "compare", role: "region", tabindex: "0", "aria-label": "The group side by side" }, grid),
    );
  }

  V.comparison = comparison;
})();
