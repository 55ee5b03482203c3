"use strict";
// The list of all trajectories of a run: filters, sorting, search. Only the rows in sight are elements, so that tens of
// thousands stay smooth.
(function () {
  const V = EPO.viewer;
  const ROW = 48; // pixels; .list-row in viewer.css
  const SPARE = 6; // rows kept above and below those in sight

  const SORTS = { step: "step", reward: "reward", turns: "turns", entropy: "entropy" };
  const STOP_WORDS = {
    success: "success",
    failure: "failure",
    max_turns: "turn limit",
    context_overflow: "context full",
    environment_error: "environment error",
  };

  function stopWords(reason) {
    return Object.hasOwn(STOP_WORDS, reason) ? STOP_WORDS[reason] : V.shortened(String(reason), 60);
  }

  function field(label, input) {
    return EPO.el("label", { class: "field" }, EPO.el("span", {}, label), input);
  }

  // [[value, how many], ...] of a column, most frequent first.
  function counts(column) {
    const found = new Map();
    for (const x of column || []) found.set(x, (found.get(x) || 0) + 1);
    return [...found].sort((a, b) => b[1] - a[1]);
  }

  function fillChoices(select, first, pairs, words) {
    const kept = select.value;
    const options = pairs.map(([x, n]) => EPO.el("option", { value: String(x) }, `${words(String(x))} (${n})`));
    select.replaceChildren(EPO.el("option", { value: "" }, first), ...options);
    select.value = [...select.options].some((option) => option.value === kept) ? kept : "";
  }

  // What a list shows of trajectory n; null where an old run does not say.
  const cell = (index, name, n) => index[name]?.[n] ?? null;

  // Tasks of a goal differ at their ends: where there is no room, the middle is left out.
  function taskName(text) {
    const characters = [...text];
    const end = characters.length > 16 ? characters.splice(-6).join("") : "";
    return EPO.el("span", { class: "c-task", title: text }, EPO.el("span", {}, characters.join("")), EPO.el("span", {}, end));
  }

  // open(step, row) is called when a trajectory is chosen. Returns {element, update, show, neighbour}.
  function trajectoryList(runOf, runIndexOf, open) {
    const el = EPO.el;
    const input = (attributes) => el("input", attributes);
    const controls = {
      outcome: el("select", {}, el("option", { value: "" }, "any"), el("option", { value: "1" }, "success"), el("option", { value: "0" }, "failure")),
      stop: el("select", {}),
      goal: el("select", {}),
      from: input({ type: "number", min: "0", placeholder: "first" }),
      to: input({ type: "number", min: "0", placeholder: "last" }),
      invalid: input({ type: "checkbox" }),
      embedded: input({ type: "checkbox" }),
      task: input({ type: "search", placeholder: "task or goal", autocomplete: "off" }),
      text: input({ type: "search", placeholder: "words in the turns", autocomplete: "off" }),
    };
    const names = { outcome: "Outcome", stop: "Stopped by", goal: "Goal", from: "Step from", to: "to" };
    for (const [name, label] of Object.entries(names)) controls[name].setAttribute("aria-label", label);

    const searchForm = el("form", { class: "search", role: "search" }, field("Text", controls.text), el("button", { type: "submit" }, "Search"));
    const searchNote = el("p", { class: "note search-note", role: "status" });
    const reset = el("button", { type: "button", class: "reset" }, "Clear filters");
    const embeddedField = el("label", { class: "check" }, controls.embedded, " can be opened here");
    const filters = el(
      "details",
      { class: "filters" },
      el("summary", {}, "Filters"),
      el(
        "div",
        { class: "filter-grid" },
        field("Outcome", controls.outcome),
        field("Stopped by", controls.stop),
        field("Goal", controls.goal),
        el("div", { class: "field" }, el("span", {}, "Steps"), el("span", { class: "range" }, controls.from, "–", controls.to)),
        el("label", { class: "check" }, controls.invalid, " has an invalid action"),
        embeddedField,
      ),
    );
    const status = el("p", { class: "note list-status", role: "status" });
    const sortButtons = {};
    const head = el("div", { class: "list-head", role: "group", "aria-label": "Sort by" });
    for (const name of Object.keys(SORTS)) {
      const button = el("button", { type: "button", class: `sort sort-${name}` }, SORTS[name]);
      button.addEventListener("click", () => {
        state.ascending = state.sort === name ? !state.ascending : false;
        state.sort = name;
        filter();
      });
      sortButtons[name] = button;
      head.append(button);
      if (name === "step") head.append(el("span", { class: "sort-task" }, "task"));
    }
    const spacer = el("div", { class: "list-spacer" });
    const box = el("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Trajectories" }, spacer);
    const element = el(
      "section",
      { class: "viewer-list", "aria-label": "All trajectories of the run" },
      field("Task", controls.task),
      searchForm,
      searchNote,
      filters,
      el("p", { class: "list-line" }, status, reset),
      head,
      box,
    );

    const state = { sort: "step", ascending: false, found: null, foundText: "", matches: [], active: -1, open: null };
    const drawn = new Map(); // place in matches -> element

    // ---- which rows, in which order

    function accepts() {
      const index = runOf().index;
      const wanted = controls.task.value.trim().toLowerCase();
      const { outcome, stop, goal, invalid } = controls;
      const from = controls.from.value === "" ? -Infinity : Number(controls.from.value);
      const to = controls.to.value === "" ? Infinity : Number(controls.to.value);
      const steps = controls.embedded.checked ? embeddedSteps() : null;
      const texts = new Map(); // a task's lower-case text, made once
      const textOf = (n) => {
        const task = String(cell(index, "task", n));
        if (!texts.has(task)) texts.set(task, `${task} ${cell(index, "goal", n)}`.toLowerCase());
        return texts.get(task);
      };
      return (n) =>
        (outcome.value === "" || Boolean(cell(index, "success", n)) === (outcome.value === "1")) &&
        (stop.value === "" || String(cell(index, "stop_reason", n)) === stop.value) &&
        (goal.value === "" || String(cell(index, "goal", n)) === goal.value) &&
        (!invalid.checked || cell(index, "invalid", n) > 0) &&
        index.step[n] >= from &&
        index.step[n] <= to &&
        (steps === null || steps.has(index.step[n])) &&
        (state.found === null || state.found.has(`${index.step[n]}/${index.row[n]}`)) &&
        (wanted === "" || textOf(n).includes(wanted));
    }

    function embeddedSteps() {
      const steps = runOf().embedded_steps;
      return Array.isArray(steps) ? new Set(steps) : null;
    }

    function filter() {
      const index = runOf().index;
      const accept = accepts();
      const matches = [];
      for (let n = 0; n < index.step.length; n++) if (accept(n)) matches.push(n);
      const column = index[state.sort] || [];
      const sign = state.ascending ? 1 : -1;
      // What has no value comes last, whatever the direction.
      const order = (a, b) => {
        const x = column[a];
        const y = column[b];
        if (x === y) return a - b;
        if (x === null || x === undefined) return 1;
        if (y === null || y === undefined) return -1;
        return sign * (x - y);
      };
      matches.sort(order);
      state.matches = matches;
      state.active = state.open === null ? -1 : matches.indexOf(find(state.open.step, state.open.row));
      const total = index.step.length;
      const count = (n) => n.toLocaleString("en");
      status.textContent =
        matches.length === total ? `${count(total)} trajectories` : `${count(matches.length)} of ${count(total)} trajectories`;
      reset.hidden = matches.length === total && !isFiltered();
      filters.querySelector("summary").textContent = `Filters${numFilters() ? ` (${numFilters()} on)` : ""}`;
      for (const [name, button] of Object.entries(sortButtons)) {
        const isBy = name === state.sort;
        button.textContent = `${SORTS[name]}${isBy ? (state.ascending ? " ▲" : " ▼") : ""}`;
        button.setAttribute("aria-pressed", String(isBy));
        button.setAttribute("aria-label", `Sort by ${name}${isBy ? (state.ascending ? ", least first" : ", most first") : ""}`);
      }
      spacer.style.height = `${matches.length * ROW}px`;
      for (const row of drawn.values()) row.remove();
      drawn.clear();
      draw();
    }

    function numFilters() {
      const { outcome, stop, goal, from, to, invalid, embedded } = controls;
      return [outcome, stop, goal, from, to].filter((c) => c.value !== "").length + [invalid, embedded].filter((c) => c.checked).length;
    }

    const isFiltered = () => numFilters() > 0 || controls.task.value !== "" || state.found !== null;

    // ---- the rows in sight

    function draw() {
      const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
      const last = Math.min(state.matches.length, Math.ceil((box.scrollTop + (box.clientHeight || 600)) / ROW) + SPARE);
      for (const [place, row] of drawn) {
        if (place < first || place >= last) {
          row.remove();
          drawn.delete(place);
        }
      }
      for (let place = first; place < last; place++) {
        if (!drawn.has(place)) {
          const row = rowElement(place);
          drawn.set(place, row);
          spacer.append(row);
        }
      }
      markRows();
    }

    function markRows() {
      const index = runOf().index;
      box.removeAttribute("aria-activedescendant");
      for (const [place, row] of drawn) {
        const n = state.matches[place];
        const isOpen = state.open !== null && index.step[n] === state.open.step && index.row[n] === state.open.row;
        row.setAttribute("aria-selected", String(isOpen));
        row.classList.toggle("active", place === state.active);
        if (place === state.active) box.setAttribute("aria-activedescendant", row.id);
      }
    }

    function rowElement(place) {
      const index = runOf().index;
      const n = state.matches[place];
      const embedded = embeddedSteps();
      const isClosed = embedded !== null && !embedded.has(index.step[n]);
      const show = (name) => cell(index, name, n);
      const success = Boolean(show("success"));
      const details = [stopWords(show("stop_reason"))];
      if (show("invalid")) details.push(`${show("invalid")} invalid`);
      if (isClosed) details.push("not embedded");
      const row = el(
        "div",
        {
          class: `list-row${isClosed ? " closed" : ""}`,
          role: "option",
          id: `trajectory-row-${place}`,
          "aria-posinset": String(place + 1),
          "aria-setsize": String(state.matches.length),
        },
        el("span", { class: "c-step" }, String(index.step[n])),
        el("span", { class: success ? "c-mark good" : "c-mark bad", title: success ? "success" : "failure" }, success ? "✓" : "✗"),
        taskName(V.shortened(String(show("task")), 200)),
        el("span", { class: "c-detail" }, details.join(" · ")),
        el("span", { class: "c-reward" }, V.fixed(show("reward"))),
        el("span", { class: "c-turns" }, V.number(show("turns"))),
        el("span", { class: "c-entropy" }, el("i", { class: V.levelClass("entropy", show("entropy")) }), V.fixed(show("entropy"))),
      );
      row.style.top = `${place * ROW}px`;
      row.addEventListener("click", () => choose(place));
      return row;
    }

    function choose(place) {
      const index = runOf().index;
      const n = state.matches[place];
      if (n === undefined) return;
      state.active = place;
      open(index.step[n], index.row[n]);
    }

    function move(to) {
      if (!state.matches.length) return;
      state.active = Math.min(state.matches.length - 1, Math.max(0, to));
      reveal(state.active);
      draw();
    }

    function reveal(place) {
      const top = place * ROW;
      if (top < box.scrollTop) box.scrollTop = top;
      else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
    }

    box.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    new ResizeObserver(() => draw()).observe(box);
    box.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(box.clientHeight / ROW) - 1);
      const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.key in moves) move(event.key === "Home" ? 0 : event.key === "End" ? Infinity : state.active + moves[event.key]);
      else if (event.key === "Enter" || event.key === " ") choose(state.active);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });

    // ---- controls

    controls.task.addEventListener("input", filter);
    for (const control of [controls.outcome, controls.stop, controls.goal, controls.from, controls.to, controls.invalid, controls.embedded]) {
      control.addEventListener("input", filter);
    }
    let search = 0;
    searchForm.addEventListener("submit", async (event) => {
      event.preventDefault();
      const text = controls.text.value;
      const mine = ++search;
      state.found = null;
      state.foundText = "";
      searchNote.textContent = "";
      if (text.trim() !== "") {
        searchNote.textContent = "Searching…";
        try {
          const hits = await EPO.source.search(runIndexOf(), text);
          if (mine !== search) return;
          state.found = new Set(hits.map(({ step, row }) => `${step}/${row}`));
          state.foundText = text;
          const many = hits.length === 1 ? "1 trajectory has" : `${hits.length.toLocaleString("en")} trajectories have`;
          const part = hits.complete ? "" : embeddedSteps() ? ", of those whose texts this report holds" : "; the search ended there";
          searchNote.textContent = `${many} “${EPO.visible(text.slice(0, 80))}”${part}.`;
        } catch (error) {
          if (mine !== search) return;
          searchNote.textContent = EPO.visible(String(error.message || error));
        }
      }
      filter();
    });
    // The cross of a search field empties it.
    controls.text.addEventListener("search", () => controls.text.value === "" && searchForm.requestSubmit());
    reset.addEventListener("click", () => {
      for (const control of Object.values(controls)) {
        if (control.type === "checkbox") control.checked = false;
        else control.value = "";
      }
      search++;
      state.found = null;
      state.foundText = "";
      searchNote.textContent = "";
      filter();
    });

    // ---- for the viewer

    function find(step, row) {
      const index = runOf().index;
      for (let n = 0; n < index.step.length; n++) if (index.step[n] === step && index.row[n] === row) return n;
      return -1;
    }

    // Another run, or new data of this one.
    function update() {
      const index = runOf().index;
      fillChoices(controls.stop, "any", counts(index.stop_reason), stopWords);
      fillChoices(controls.goal, "any", counts(index.goal), (goal) => V.shortened(goal, 60));
      embeddedField.hidden = embeddedSteps() === null;
      filter();
    }

    function show(step, row) {
      state.open = { step, row };
      state.active = state.matches.indexOf(find(step, row));
      const top = state.active * ROW;
      const isInSight = top >= box.scrollTop && top + ROW <= box.scrollTop + box.clientHeight;
      if (state.active >= 0 && !isInSight) box.scrollTop = top - box.clientHeight / 2;
      draw();
    }

    // The trajectory before (-1) or after (+1) the open one in the list, as {step, row}; null: there is none.
    function neighbour(by) {
      const n = state.matches[state.active + by];
      const index = runOf().index;
      return state.active < 0 || n === undefined ? null : { step: index.step[n], row: index.row[n] };
    }

    return { element, update, show, find, neighbour, foundText: () => state.foundText };
  }

  Object.assign(V, { trajectoryList, stopWords });
})();
