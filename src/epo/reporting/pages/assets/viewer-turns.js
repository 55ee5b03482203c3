"use strict";
// A trajectory as a chat: observations, responses token by token, what came of them. All text arrives as text nodes.
(function () {
  const V = EPO.viewer;
  const FOLD_CHARACTERS = 4000; // longer text is folded
  const FOLD_LINES = 80;
  const FOLD_TOKENS = 3000;
  const FOLD_TOKEN = 120; // characters of one token
  const PLAIN_FROM = 50000; // from here on whitespace signs are plain text, not elements of their own
  const BLOCK = 20000; // characters that are laid out together in such a text

  const SPACE = /(\r\n|\n|\t| )/;
  const ODD_SPACE = /(\r\n|\n|\t|^ +| +$| {2,}| +(?=\n))/m;
  const SIGNS = { "\n": "⏎", "\t": "→", " ": "·", "\r\n": "␍⏎" };

  // token element -> {record, row, turn, i}
  const places = new WeakMap();

  // A record with the kinds of values that this viewer counts on, whatever version or damage it is of. A field that is not
  // there stays undefined.
  function wellFormed(record, step) {
    const text = (x) => (typeof x === "string" ? x : x === undefined || x === null ? "" : JSON.stringify(x));
    const list = (x) => (Array.isArray(x) ? x : undefined);
    const turns = (list(record.turns) || []).map((turn) => ({
      ...turn,
      observation: text(turn.observation),
      response: text(turn.response),
      action: text(turn.action),
      response_ids: (list(turn.response_ids) || []).filter((id) => Number.isInteger(id)),
      entropy: list(turn.entropy),
      logprobs: list(turn.logprobs),
      advantages: list(turn.advantages),
      ratios: list(turn.ratios),
      alternatives: list(turn.alternatives),
    }));
    const { task, goal, stop_reason: reason } = record;
    return { ...record, step, turns, task: text(task) || "unknown task", goal: text(goal), instruction: text(record.instruction), stop_reason: text(reason) || "unknown" };
  }

  // Appends `text` so that whitespace and what is invisible can be seen. The signs of whitespace are drawn by the style
  // sheet: who selects and copies gets the whitespace itself.
  function appendText(parent, text, { every = false, found = "" } = {}) {
    if (text.length > PLAIN_FROM) {
      appendBlocks(parent, text);
      return;
    }
    for (const [part, isMatch] of split(text, found)) {
      const target = isMatch ? parent.appendChild(EPO.el("mark", {})) : parent;
      for (const piece of part.split(every ? SPACE : ODD_SPACE)) {
        if (piece === "") continue;
        const isSpace = /^(\r?\n|\t| +)$/.test(piece);
        if (!isSpace) target.append(EPO.visible(piece));
        else if (piece[0] === " ") for (const _ of piece) target.append(sign(" ", "·"));
        else target.append(sign(piece.replace("\r", ""), SIGNS[piece]));
      }
    }
  }

  // Blocks out of sight cost no layout: a million lines stay smooth.
  function appendBlocks(parent, text) {
    for (let from = 0; from < text.length; ) {
      const line = text.lastIndexOf("\n", from + BLOCK - 1);
      let to = line >= from ? line + 1 : Math.min(text.length, from + BLOCK);
      if (/[\ud800-\udbff]/.test(text[to - 1]) && to < text.length) to++; // two halves of one character
      const shown = text.slice(from, to).split("\n").map(EPO.visible).join("⏎\n");
      parent.append(EPO.el("div", { class: "block" }, shown));
      from = to;
    }
  }

  function sign(space, shown) {
    const span = EPO.el("span", { class: space === "\n" ? "ws nl" : "ws" }, space);
    span.dataset.sign = shown;
    return span;
  }

  // [[part, whether it is `found`], ...]
  function split(text, found) {
    if (!found) return [[text, false]];
    const parts = [];
    const low = text.toLowerCase();
    const wanted = found.toLowerCase();
    // Lower case may be longer than the text itself; then places do not match, and nothing is marked.
    if (low.length !== text.length) return [[text, false]];
    let from = 0;
    for (let at = low.indexOf(wanted); at >= 0; at = low.indexOf(wanted, from)) {
      parts.push([text.slice(from, at), false], [text.slice(at, at + wanted.length), true]);
      from = at + wanted.length;
    }
    parts.push([text.slice(from), false]);
    return parts;
  }

  // The beginning of a long text, and a button that shows all of it.
  function foldable(text, options = {}) {
    const box = EPO.el("div", { class: "text", dir: "auto" });
    let end = options.limit || FOLD_CHARACTERS;
    let line = 0;
    for (let at = text.indexOf("\n"); at >= 0 && at < end; at = text.indexOf("\n", at + 1)) {
      if (++line === FOLD_LINES) end = at;
    }
    if (text.length <= end * 1.2) {
      appendText(box, text, options);
      return box;
    }
    const fill = (isWhole) => {
      box.replaceChildren();
      appendText(box, isWhole ? text : text.slice(0, end), options);
      if (!isWhole) box.append(EPO.el("span", { class: "cut" }, " …"));
    };
    fill(false);
    return EPO.el("div", {}, box, unfolding(`all ${text.length.toLocaleString("en")} characters`, fill));
  }

  // For titles and names: the beginning of a long text, and how long it is. Copying the record gives all of it.
  function shortened(text, limit = 300) {
    const end = text.length > limit ? `… (${text.length.toLocaleString("en")} characters)` : "";
    return EPO.visible(text.slice(0, limit)).replace(/\s+/g, " ") + end;
  }

  function unfolding(what, fill) {
    let isWhole = false;
    const button = EPO.el("button", { type: "button", class: "fold", "aria-expanded": "false" }, `Show ${what}`);
    button.addEventListener("click", () => {
      isWhole = !isWhole;
      fill(isWhole);
      button.textContent = isWhole ? "Show less" : `Show ${what}`;
      button.setAttribute("aria-expanded", String(isWhole));
    });
    return button;
  }

  function pieceOf(vocabulary, id) {
    return Object.hasOwn(vocabulary, id) && typeof vocabulary[id] === "string" ? vocabulary[id] : `⟨#${id}⟩`;
  }

  function tokenElement(place, vocabulary, view) {
    const turn = place.record.turns[place.turn];
    const text = pieceOf(vocabulary, turn.response_ids[place.i]);
    const span = EPO.el("span", { class: "tok", tabindex: "-1" });
    if (text === "") span.append(EPO.el("span", { class: "cut" }, "⟨empty⟩"));
    else if (text.length <= FOLD_TOKEN) appendText(span, text, { every: true });
    else {
      appendText(span, text.slice(0, FOLD_TOKEN), { every: true });
      span.append(EPO.el("span", { class: "cut" }, `… (${text.length.toLocaleString("en")} characters)`));
    }
    places.set(span, place);
    paint(span, view);
    return span;
  }

  // Colour, number and underline of one token.
  function paint(span, view) {
    const { record, turn, i } = places.get(span);
    const x = V.value(record.turns[turn], i, view.colour);
    span.className = `tok ${V.levelClass(view.colour, x)}`;
    if (x !== null && V.MEASURES[view.colour].weight(x) >= view.extremeFrom.get(record)) span.classList.add("extreme");
    if (view.numbers) span.dataset.number = V.number(x, 2);
    else delete span.dataset.number;
  }

  function repaint(container, view) {
    for (const span of container.querySelectorAll(".tok")) paint(span, view);
  }

  function responseTokens(record, row, k, vocabulary, view) {
    const ids = record.turns[k].response_ids;
    const box = EPO.el("div", { class: "tokens", role: "group", "aria-label": `Response of turn ${k + 1}, by token` });
    const limit = view.foldTokens || FOLD_TOKENS;
    const fill = (isWhole) => {
      box.replaceChildren();
      const end = isWhole || ids.length <= limit * 1.2 ? ids.length : limit;
      for (let i = 0; i < end; i++) box.append(tokenElement({ record, row, turn: k, i }, vocabulary, view));
      if (end < ids.length) box.append(EPO.el("span", { class: "cut" }, " …"));
    };
    fill(false);
    const longest = ids.find((id) => pieceOf(vocabulary, id).length > FOLD_TOKEN);
    const parts = [box];
    if (ids.length > limit * 1.2) parts.push(unfolding(`all ${ids.length.toLocaleString("en")} tokens`, fill));
    // Without the texts of the tokens, or with one too long to show in its place, the response itself says what it says.
    const isNamed = ids.length > 0 && ids.every((id) => Object.hasOwn(vocabulary, id));
    if (!isNamed || longest !== undefined) {
      parts.push(EPO.el("p", { class: "role" }, ids.length ? "as text" : "as text; its tokens were not recorded"));
      parts.push(foldable(record.turns[k].response, { found: view.found }));
    }
    return parts;
  }

  // Why a turn was not trained on, as far as it is known; null: it was.
  function untrainedReason(record, turn, step) {
    if (Array.isArray(turn.advantages)) return null;
    if (record.trained === undefined) return "not recorded whether it was trained on (an older run)";
    if (record.stop_reason === "environment_error") return "not trained on: the environment failed, so the outcome teaches nothing";
    const filter = step.filter;
    const group = step.records.filter((other) => other.group === record.group);
    const isEqual = group.length > 1 && group.every((other) => other.reward === record.reward);
    if (filter && filter !== "none" && record.trained === false && step.records.some((other) => other.trained)) {
      return `not trained on: algorithm.filter=${filter} kept other task groups${isEqual ? " (the rewards of this one are all equal)" : ""}`;
    }
    if (!step.records.some((other) => other.trained)) return "not trained on, like everything of this step: no update was made";
    return "not trained on; why was not recorded";
  }

  function meanEntropy(turn) {
    const values = (turn.entropy || []).filter((x) => typeof x === "number");
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  }

  function turnElement(record, row, k, step, view) {
    const el = EPO.el;
    const turn = record.turns[k];
    const reason = untrainedReason(record, turn, step);
    const trainedClass = reason === null ? "is-trained" : record.trained === undefined ? "" : "is-untrained";
    const count = turn.response_ids.length;
    const head = el("header", {}, el("h4", {}, `Turn ${k + 1}`));
    if (typeof turn.prompt_tokens === "number") head.append(el("span", { class: "prompt" }, `prompt ${turn.prompt_tokens} tokens`));
    if (turn.dropped_turns) {
      const what = turn.dropped_turns === 1 ? "1 earlier turn" : `${turn.dropped_turns} earlier turns`;
      head.append(el("span", { class: "flag warn", title: "They no longer fitted: agent.overflow" }, `prompt without ${what}`));
    }

    const mean = meanEntropy(turn);
    const facts = [`${count} ${count === 1 ? "token" : "tokens"}`];
    if (mean !== null) facts.push(`mean entropy ${V.number(mean)} nats`);
    const responseRole = el("p", { class: "role" }, el("b", {}, "response"), ` ${facts.join(" · ")} `);
    responseRole.append(el("span", { class: "flag mask" }, reason === null ? "trained" : reason));

    const outcome = el("div", { class: "outcome" });
    const action = el("div", { class: "action" }, foldable(turn.action, { limit: 500, found: view.found }));
    outcome.append(el("span", { class: "label" }, "action"), action);
    if (typeof turn.reward === "number") outcome.append(el("span", {}, `reward ${V.signed(turn.reward)}`));
    if (typeof turn.score === "number") outcome.append(el("span", {}, `score ${V.number(turn.score)}`));
    if (turn.is_valid === false) outcome.append(el("span", { class: "flag bad" }, "✗ wrong format"));
    if (turn.understood === false) outcome.append(el("span", { class: "flag warn" }, "? not understood by the environment"));

    return el(
      "article",
      { class: `turn ${trainedClass}`, "data-turn": String(k) },
      head,
      el(
        "div",
        { class: "observation" },
        el("p", { class: "role" }, el("b", {}, "observation"), " ", el("span", { class: "flag mask" }, "context, not trained")),
        foldable(turn.observation, { found: view.found, limit: view.foldCharacters }),
      ),
      el("div", { class: "response" }, responseRole, ...responseTokens(record, row, k, step.vocabulary, view), outcome),
    );
  }

  // Mean entropy of every turn as bars, the highest of the trajectory at full height; click or Enter goes to the turn.
  function strip(record, goTo) {
    const el = EPO.el;
    const box = el("div", { class: "strip", role: "toolbar", "aria-label": "Mean entropy by turn; choose one to go there" });
    const highest = Math.max(0, ...record.turns.map((turn) => meanEntropy(turn) ?? 0));
    record.turns.forEach((turn, k) => {
      const mean = meanEntropy(turn);
      const words = `Turn ${k + 1}: ${mean === null ? "no tokens" : `mean entropy ${V.number(mean)} nats`}`;
      const bar = el("span", { class: `bar ${V.levelClass("entropy", mean)}` });
      bar.style.height = `${Math.max(4, highest > 0 ? (100 * (mean || 0)) / highest : 0)}%`;
      const flags = turn.is_valid === false ? el("span", { class: "bar-flag", "aria-hidden": "true" }, "✗") : "";
      const button = el("button", { type: "button", title: words, "aria-label": words, tabindex: k ? "-1" : "0" }, flags, bar);
      button.addEventListener("click", () => goTo(k));
      box.append(button);
    });
    box.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      const buttons = [...box.children];
      const at = buttons.indexOf(document.activeElement);
      const to = buttons[Math.min(buttons.length - 1, Math.max(0, at + move))];
      buttons.forEach((button) => (button.tabIndex = button === to ? 0 : -1));
      to.focus();
    });
    return el("div", {}, el("p", { class: "note" }, `Mean entropy by turn, highest ${V.number(highest)} nats; choose one to go there`), box);
  }

  Object.assign(V, { wellFormed, shortened, places, appendText, foldable, pieceOf, repaint, turnElement, untrainedReason, meanEntropy, strip });
})();
