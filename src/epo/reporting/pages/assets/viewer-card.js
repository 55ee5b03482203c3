"use strict";
// The card of a token: everything recorded about it, on hover and on keyboard focus; arrow keys walk the tokens.
(function () {
  const V = EPO.viewer;
  const MARGIN = 8; // pixels between card, token and window

  function row(name, ...value) {
    return [EPO.el("dt", {}, name), EPO.el("dd", {}, ...value)];
  }

  function tokenText(text) {
    const box = EPO.el("span", { class: "piece" });
    const short = text.length > 200 ? `${text.slice(0, 200)}…` : text;
    V.appendText(box, short, { every: true });
    if (text === "") box.append("⟨empty⟩");
    return box;
  }

  // [[id, log-probability], ...], most probable first.
  function alternativesOf(turn, i) {
    const flat = Array.isArray(turn.alternatives) ? turn.alternatives[i] : null;
    const pairs = [];
    if (Array.isArray(flat)) for (let k = 0; k + 1 < flat.length; k += 2) pairs.push([flat[k], flat[k + 1]]);
    return pairs;
  }

  function alternativesTable(turn, i, vocabulary) {
    const el = EPO.el;
    const pairs = alternativesOf(turn, i);
    if (!pairs.length) return el("p", { class: "note" }, "What else could have been drawn was not recorded.");
    const drawn = turn.response_ids[i];
    const table = el("table", {}, el("caption", {}, "Most probable tokens"));
    const add = (id, logprob, place) => {
      const p = typeof logprob === "number" ? Math.exp(logprob) : null;
      const bar = el("span", { class: "share" });
      bar.style.width = `${100 * Math.min(1, p || 0)}%`;
      table.append(
        el(
          "tr",
          id === drawn ? { class: "drawn" } : {},
          el("td", {}, place),
          el("td", {}, tokenText(V.pieceOf(vocabulary, id)), id === drawn ? el("b", {}, " drawn") : ""),
          el("td", {}, el("span", { class: "shares" }, bar)),
          el("td", {}, p === null ? "–" : V.percent(p)),
        ),
      );
    };
    pairs.forEach(([id, logprob], k) => add(id, logprob, `${k + 1}.`));
    let rest = 1 - pairs.reduce((sum, [, logprob]) => sum + (typeof logprob === "number" ? Math.exp(logprob) : 0), 0);
    if (!pairs.some(([id]) => id === drawn)) {
      const logprob = V.value(turn, i, "logprob");
      add(drawn, logprob, "…");
      if (logprob !== null) rest -= Math.exp(logprob);
    }
    if (rest > 0.0005) table.append(el("tr", {}, el("td", {}), el("td", {}, "all others"), el("td", {}), el("td", {}, V.percent(rest))));
    return table;
  }

  function content({ record, turn: k, i }, step) {
    const el = EPO.el;
    const turn = record.turns[k];
    const id = turn.response_ids[i];
    const known = (name, show) => {
      const x = V.value(turn, i, name);
      if (x !== null) return show(x);
      return Array.isArray(turn[V.MEASURES[name].field]) ? "not finite" : "not recorded";
    };
    const reason = V.untrainedReason(record, turn, step);
    const advantage = V.value(turn, i, "advantage");
    const trained = reason === null ? (advantage === 0 ? "yes, with weight 0" : "yes") : reason.replace(/^not trained on/, "no");
    return [
      el("p", { class: "token-card-head" }, tokenText(V.pieceOf(step.vocabulary, id)), el("span", { class: "note" }, ` token ${i + 1} of ${turn.response_ids.length}, turn ${k + 1}`)),
      el(
        "dl",
        {},
        ...row("id", String(id)),
        ...row("entropy", known("entropy", (x) => `${V.number(x)} nats, like ${V.number(Math.exp(x), 1)} equal choices`)),
        ...row("log-probability", known("logprob", (x) => V.number(x))),
        ...row("probability", known("logprob", (x) => V.percent(Math.exp(x)))),
        ...row("advantage", known("advantage", V.signed)),
        ...row("ratio", known("ratio", (x) => V.number(x))),
        ...row("trained", trained),
      ),
      alternativesTable(turn, i, step.vocabulary),
    ];
  }

  // A card for the tokens inside `container`. `stepOf()` gives {vocabulary, records, filter} of what is shown.
  function tokenCard(container, stepOf) {
    const card = EPO.el("div", { class: "token-card", role: "tooltip", id: "token-card", hidden: "" });
    let shown = null;

    const tokenOf = (target) => (target instanceof Element ? target.closest(".tok") : null);

    function show(span) {
      if (shown === span) return;
      hide();
      shown = span;
      card.replaceChildren(...content(V.places.get(span), stepOf()));
      span.classList.add("current");
      span.setAttribute("aria-describedby", "token-card");
      card.hidden = false;
      place(span);
    }

    // Below the token, or above where there is no room; on narrow windows the style sheet pins it to the bottom.
    function place(span) {
      const token = span.getClientRects()[0] || span.getBoundingClientRect();
      const { width, height } = card.getBoundingClientRect();
      const left = Math.min(token.left, document.documentElement.clientWidth - width - MARGIN);
      const below = token.bottom + MARGIN;
      const top = below + height <= window.innerHeight ? below : Math.max(MARGIN, token.top - height - MARGIN);
      card.style.setProperty("--left", `${Math.max(MARGIN, left)}px`);
      card.style.setProperty("--top", `${top}px`);
    }

    function hide() {
      if (!shown) return;
      shown.classList.remove("current");
      shown.removeAttribute("aria-describedby");
      shown = null;
      card.hidden = true;
    }

    function focus(span) {
      for (const other of container.querySelectorAll('.tok[tabindex="0"]')) other.tabIndex = -1;
      span.tabIndex = 0;
      span.focus({ preventScroll: true });
      span.scrollIntoView({ block: "nearest", inline: "nearest" });
      show(span);
    }

    container.addEventListener("mouseover", (event) => {
      const span = tokenOf(event.target);
      if (span) show(span);
      else if (!tokenOf(document.activeElement)) hide();
    });
    container.addEventListener("mouseleave", () => {
      const focused = tokenOf(document.activeElement);
      if (focused && container.contains(focused)) show(focused);
      else hide();
    });
    container.addEventListener("click", (event) => {
      const span = tokenOf(event.target);
      if (span) focus(span);
    });
    container.addEventListener("focusin", (event) => {
      const span = tokenOf(event.target);
      if (span) show(span);
      else hide();
    });
    container.addEventListener("focusout", hide);
    // A card beside a token that was scrolled away would point at another one.
    window.addEventListener("scroll", () => shown && place(shown), { passive: true, capture: true });

    container.addEventListener("keydown", (event) => {
      const span = tokenOf(event.target);
      if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") {
        hide();
        event.preventDefault();
        return;
      }
      const to = neighbour(span, event.key);
      if (!to) return;
      event.preventDefault();
      event.stopPropagation();
      focus(to);
    });

    // Left and right: the token before and after. Up and down: the same place in the turn before and after of the same
    // trajectory. Home and End: the ends of the turn.
    function neighbour(span, key) {
      const inTurn = [...span.closest(".tokens").children].filter((child) => child.matches(".tok"));
      if (key === "Home") return inTurn[0];
      if (key === "End") return inTurn[inTurn.length - 1];
      if (key !== "ArrowLeft" && key !== "ArrowRight" && key !== "ArrowUp" && key !== "ArrowDown") return null;
      const { record } = V.places.get(span);
      const all = [...container.querySelectorAll(".tok")].filter((other) => V.places.get(other).record === record);
      const at = all.indexOf(span);
      if (key === "ArrowLeft") return all[at - 1];
      if (key === "ArrowRight") return all[at + 1];
      const first = at - inTurn.indexOf(span);
      const neighbourTurn = key === "ArrowUp" ? all[first - 1] : all[first + inTurn.length];
      if (!neighbourTurn) return null;
      const row = [...neighbourTurn.closest(".tokens").children].filter((child) => child.matches(".tok"));
      return row[Math.min(row.length - 1, inTurn.indexOf(span))];
    }

    return { card, hide, focus };
  }

  V.tokenCard = tokenCard;
})();
