"use strict";
// The tab "trajectories": a run's trajectories as a list, and one of them, or its group, to read.
// Address: #trajectories?run=0&step=12&row=3&colour=advantage&compare=1
(function () {
  const V = EPO.viewer;
  const TAB = "trajectories";

  // ---- the address

  function readParams(params) {
    const whole = (text) => (/^\d{1,9}$/.test(text || "") ? Number(text) : null);
    return {
      run: whole(params.run),
      step: whole(params.step),
      row: whole(params.row),
      colour: Object.hasOwn(V.MEASURES, params.colour) ? params.colour : "entropy",
      compare: params.compare === "1",
    };
  }

  function paramsOf(state) {
    const { run, step, row, colour, compare } = state;
    return { run, step, row, colour: colour === "entropy" ? null : colour, compare: compare ? "1" : null };
  }

  // ---- the tab

  function render(container) {
    const el = EPO.el;
    const state = { run: 0, step: null, row: null, colour: "entropy", compare: false, loaded: null, request: 0 };
    // As shown: the colour that was chosen, or entropy where a trajectory has no such numbers.
    state.view = { colour: "entropy", numbers: false, extremeFrom: new Map(), found: "" };
    const run = () => EPO.page.runs[state.run];

    if (!EPO.page.runs.length) {
      container.append(el("p", {}, "There is no run."));
      return;
    }

    const list = V.trajectoryList(run, () => state.run, (step, row) => open(step, row, { byHand: true }));
    const pick = {
      run: el("select", { "aria-label": "Run" }),
      step: el("select", { "aria-label": "Step" }),
      task: el("select", { "aria-label": "Task" }),
      row: el("select", { "aria-label": "Trajectory" }),
    };
    const before = el("button", { type: "button", "aria-label": "Previous in the list", title: "Previous in the list" }, "‹");
    const after = el("button", { type: "button", "aria-label": "Next in the list", title: "Next in the list" }, "›");
    const listButton = el("button", { type: "button", class: "list-button", "aria-pressed": "true" }, "List");
    const picker = el(
      "div",
      { class: "picker" },
      labelled("Run", pick.run),
      labelled("Step", pick.step),
      labelled("Task", pick.task),
      labelled("Trajectory", pick.row),
      el("span", { class: "walk" }, listButton, before, after),
    );
    const reader = el("div", { class: "reader-body" });
    const { card, hide } = V.tokenCard(reader, () => state.loaded);
    const right = el("section", { class: "viewer-reader", "aria-label": "Trajectory" }, picker, reader);
    const root = el("div", { class: "viewer" }, list.element, right, card);
    container.append(root);

    // A group side by side takes the room of the list.
    function showList(isOn) {
      root.classList.toggle("without-list", !isOn);
      listButton.setAttribute("aria-pressed", String(isOn));
    }
    listButton.addEventListener("click", () => showList(root.classList.contains("without-list")));

    function labelled(label, control) {
      return el("label", { class: "field" }, el("span", {}, label), control);
    }

    // ---- opening

    async function open(step, row, { byHand = false } = {}) {
      const isOther = step !== state.step || row !== state.row;
      state.step = step;
      state.row = row;
      state.view.found = list.foundText();
      if (byHand && isOther) remember();
      else remember({ replace: true });
      list.show(step, row);
      const mine = ++state.request;
      const isHere = state.loaded && state.loaded.run === state.run && state.loaded.step === step;
      if (!isHere) {
        state.loaded = null;
        reader.replaceChildren(el("p", { class: "note", role: "status" }, `Loading step ${step}…`));
        try {
          const { vocabulary, trajectories } = await EPO.source.trajectories(state.run, step);
          if (mine !== state.request) return;
          const filter = run().config?.algorithm?.filter;
          state.loaded = { run: state.run, step, vocabulary: vocabulary || {}, raw: trajectories, filter };
          state.loaded.records = trajectories.map((record) => V.wellFormed(record, step));
          state.view.extremeFrom = new Map();
        } catch (error) {
          if (mine !== state.request) return;
          fillPicker();
          showFailure(step, error);
          return;
        }
      }
      fillPicker();
      try {
        showReader();
      } catch (error) {
        showFailure(step, error);
        throw error;
      }
      if (byHand && window.matchMedia("(max-width: 800px)").matches) right.scrollIntoView({ block: "start" });
    }

    // A new place in the history of the browser, or, with `replace`, the present one under another address.
    function remember({ replace = false } = {}) {
      if (replace) EPO.setParams(TAB, paramsOf(state));
      else EPO.go(TAB, paramsOf(state));
    }

    function showFailure(step, error) {
      const embedded = run().embedded_steps;
      const parts = [el("h3", {}, `Step ${step} cannot be shown`)];
      if (Array.isArray(embedded) && !embedded.includes(step)) {
        const nearest = embedded.reduce((a, b) => (a === null || Math.abs(b - step) < Math.abs(a - step) ? b : a), null);
        const holds = embedded.length ? `; it holds those of the steps ${shortList(embedded)}` : "";
        parts.push(
          el("p", {}, `This report does not hold the texts of step ${step}${holds}.`),
          command("To read every step:", `epo watch ${run().path}`),
          command("To have this step in a report:", `epo report ${run().path} --steps ${step}`),
        );
        if (nearest !== null) {
          const button = el("button", { type: "button" }, `Go to step ${nearest}`);
          button.addEventListener("click", () => open(nearest, firstRow(nearest), { byHand: true }));
          parts.push(button);
        }
      } else {
        const again = el("button", { type: "button" }, "Try again");
        again.addEventListener("click", () => open(state.step, state.row));
        parts.push(el("p", {}, EPO.visible(String(error.message || error))), again);
      }
      reader.replaceChildren(el("div", { class: "failure", role: "alert" }, ...parts));
    }

    function command(why, text) {
      const shown = EPO.visible(text);
      return el("div", {}, el("p", {}, why), el("p", { class: "command" }, el("code", {}, shown), V.copyButton("Copy", "Copy the command", () => shown)));
    }

    function shortList(steps) {
      return steps.length <= 12 ? steps.join(", ") : `${steps.slice(0, 5).join(", ")}, …, ${steps.slice(-5).join(", ")}`;
    }

    function firstRow(step) {
      const index = run().index;
      const n = index.step.indexOf(step);
      return n < 0 ? 0 : index.row[n];
    }

    // ---- picking

    function options(select, pairs, value) {
      select.replaceChildren(...pairs.map(([x, words]) => el("option", { value: String(x) }, words)));
      select.value = String(value);
      select.disabled = pairs.length < 2;
    }

    // Rows of the list of all trajectories that belong to the open step.
    function rowsOfStep() {
      const index = run().index;
      const rows = [];
      index.step.forEach((step, n) => step === state.step && rows.push(n));
      return rows;
    }

    function fillPicker() {
      const { runs } = EPO.page;
      const index = run().index;
      options(pick.run, runs.map((_, k) => [k, EPO.visible(EPO.runLabel(k))]), state.run);
      const embedded = run().embedded_steps;
      const held = Array.isArray(embedded) ? new Set(embedded) : null;
      const steps = [...new Set(index.step)].sort((a, b) => a - b);
      options(pick.step, steps.map((s) => [s, held && !held.has(s) ? `${s} (not embedded)` : String(s)]), state.step);
      const rows = rowsOfStep();
      const groups = new Map();
      for (const n of rows) if (!groups.has(index.group[n])) groups.set(index.group[n], n);
      const here = rows.find((n) => index.row[n] === state.row);
      const group = here === undefined ? null : index.group[here];
      options(pick.task, [...groups].map(([g, n]) => [g, V.shortened(String(index.task[n]), 80)]), group);
      const members = rows.filter((n) => index.group[n] === group);
      const words = (n, k) => `${k + 1}: ${index.success[n] ? "✓" : "✗"} reward ${V.number(index.reward[n], 2)}`;
      options(pick.row, members.map((n, k) => [index.row[n], words(n, k)]), state.row);
      before.disabled = !list.neighbour(-1);
      after.disabled = !list.neighbour(1);
    }

    pick.run.addEventListener("change", () => {
      state.run = Number(pick.run.value);
      state.loaded = null;
      list.update();
      openFirst({ byHand: true });
    });
    pick.step.addEventListener("change", () => {
      const step = Number(pick.step.value);
      open(step, firstRow(step), { byHand: true });
    });
    pick.task.addEventListener("change", () => {
      const index = run().index;
      const n = rowsOfStep().find((k) => String(index.group[k]) === pick.task.value);
      open(state.step, index.row[n], { byHand: true });
    });
    pick.row.addEventListener("change", () => open(state.step, Number(pick.row.value), { byHand: true }));
    for (const [button, by] of [[before, -1], [after, 1]]) {
      button.addEventListener("click", () => {
        const to = list.neighbour(by);
        if (to) open(to.step, to.row, { byHand: true });
      });
    }

    // ---- reading

    function members() {
      const record = state.loaded.records[state.row];
      return state.loaded.records.map((r, row) => ({ record: r, row })).filter((member) => member.record.group === record.group);
    }

    function showReader() {
      hide();
      const { records } = state.loaded;
      const record = records[state.row];
      if (!record) {
        reader.replaceChildren(el("p", { class: "failure", role: "alert" }, `Step ${state.step} has no trajectory ${state.row}.`));
        return;
      }
      const group = members();
      if (group.length < 2) state.compare = false;
      if (state.compare !== root.classList.contains("comparing")) showList(!state.compare);
      root.classList.toggle("comparing", state.compare);
      chooseRecordedColour(state.compare ? group.map((m) => m.record) : [record]);
      const body = el("div", { class: "turns" });
      reader.replaceChildren(summary(record, group), viewControls(record, group, body), body);
      fillTurns(body, record, group);
    }

    function fillTurns(body, record, group) {
      for (const { record: r } of group) state.view.extremeFrom.set(r, V.extremeFrom(r, state.view.colour));
      if (state.compare) {
        const read = (row) => {
          state.compare = false;
          open(state.step, row, { byHand: true });
        };
        body.replaceChildren(V.comparison(group, state.loaded, state.view, { openRow: state.row, read }));
        return;
      }
      const goTo = (k) => {
        const turn = body.querySelector(`.turn[data-turn="${k}"]`);
        turn.scrollIntoView({ block: "start" });
        turn.querySelector(".tok")?.focus({ preventScroll: true });
      };
      body.replaceChildren(V.strip(record, goTo), ...record.turns.map((_, k) => V.turnElement(record, state.row, k, state.loaded, state.view)));
      if (!record.turns.length) body.append(el("p", { class: "note" }, "It ended before its first turn."));
      const first = body.querySelector(".tok");
      if (first) first.tabIndex = 0; // one stop of the Tab key; arrow keys walk on
    }

    function chooseRecordedColour(records) {
      state.view.colour = records.some((r) => V.isRecorded(r, state.colour)) ? state.colour : "entropy";
    }

    function summary(record, group) {
      const place = group.findIndex(({ row }) => row === state.row);
      const tokens = record.turns.reduce((sum, turn) => sum + turn.response_ids.length, 0);
      const facts = [
        [record.success ? "good" : "bad", `${record.success ? "✓ success" : "✗ failure"}`],
        ["", `stopped by: ${V.stopWords(record.stop_reason)}`],
      ];
      if (typeof record.reward === "number") facts.push(["", `reward ${V.signed(record.reward)}`]);
      if (typeof record.score === "number") facts.push(["", `score ${V.number(record.score)}`]);
      facts.push(["", `${record.turns.length} turns`], ["", `${tokens.toLocaleString("en")} tokens`]);
      if (record.trained === true) facts.push(["", "trained on"]);
      if (record.trained === false) facts.push(["warn", "not trained on"]);
      if (record.restarts) facts.push(["warn", `environment restarted ${record.restarts}×`]);
      const title = el("h3", {}, V.shortened(record.task));
      const where = `step ${record.step}, ${place + 1} of ${group.length} of this task`;
      const goal = record.goal ? el("span", {}, " · goal: ", V.shortened(record.goal)) : "";
      const box = el(
        "div",
        { class: "summary" },
        title,
        el("p", { class: "note" }, where, goal),
        el("p", { class: "facts" }, ...facts.map(([kind, words]) => el("span", { class: `fact ${kind}` }, words))),
      );
      if (record.instruction) box.append(el("div", { class: "instruction" }, el("b", {}, "Asked: "), V.foldable(record.instruction, { limit: 1000 })));
      if (record.error) box.append(el("div", { class: "error" }, el("b", {}, "Error: "), V.foldable(String(record.error), { limit: 1000 })));
      box.append(
        el(
          "p",
          { class: "copies" },
          V.copyButton("Copy text", "The turns as plain text; control characters made visible", () => V.transcript(record)),
          V.copyButton("Copy actions", "The actions as a JSON list, to replay them", () => V.asciiJson(record.turns.map((turn) => turn.action))),
          V.copyButton("Copy JSON", "The whole record", () => V.asciiJson(state.loaded.raw[state.row])),
          compareButton(group),
        ),
      );
      return box;
    }

    function compareButton(group) {
      const button = el("button", { type: "button", class: "compare-button", "aria-pressed": String(state.compare) });
      button.textContent = state.compare ? "Read one" : `Compare the group (${group.length})`;
      button.disabled = group.length < 2;
      if (group.length < 2) button.title = "This task was played once in this step";
      button.addEventListener("click", () => {
        state.compare = !state.compare;
        remember();
        showReader();
        reader.querySelector(".compare-button").focus();
      });
      return button;
    }

    function viewControls(record, group, body) {
      const legend = el("div", { class: "legend-box" });
      const showLegend = () => legend.replaceChildren(V.legend(state.view.colour));
      const shown = state.compare ? group.map((m) => m.record) : [record];
      const colours = el("fieldset", { class: "segments" }, el("legend", {}, "Colour"));
      for (const [name, measure] of Object.entries(V.MEASURES)) {
        const radio = el("input", { type: "radio", name: "token-colour", value: name });
        radio.checked = name === state.view.colour;
        const isRecorded = shown.some((r) => V.isRecorded(r, name));
        radio.disabled = !isRecorded;
        radio.addEventListener("change", () => {
          state.colour = state.view.colour = name;
          for (const { record: r } of group) state.view.extremeFrom.set(r, V.extremeFrom(r, name));
          remember({ replace: true });
          showLegend();
          V.repaint(body, state.view);
        });
        const label = el("label", isRecorded ? {} : { title: "Not recorded for this trajectory" }, radio, el("span", {}, measure.short || measure.title));
        colours.append(label);
      }
      showLegend();

      const toggle = (label, title, isOn, change) => {
        const box = el("input", { type: "checkbox" });
        box.checked = isOn;
        box.addEventListener("change", () => change(box.checked));
        return el("label", { class: "check", title }, box, ` ${label}`);
      };
      const mark = (name) => (isOn) => {
        root.classList.toggle(name, isOn);
      };
      const switches = el(
        "div",
        { class: "switches" },
        toggle("Underline extremes", "The most extreme 5 % of the tokens of each trajectory", root.classList.contains("show-extremes"), mark("show-extremes")),
        toggle("Numbers", "The value of every token, after it", state.view.numbers, (isOn) => {
          state.view.numbers = isOn;
          V.repaint(body, state.view);
        }),
        toggle("Loss mask", "Trained tokens stand out, all that was only read stands back", root.classList.contains("show-mask"), mark("show-mask")),
      );
      return el("div", { class: "view-controls" }, el("div", { class: "view-line" }, colours, switches), legend);
    }

    // ---- coming and going

    function openFirst(options) {
      const { index, embedded_steps: embedded } = run();
      if (!index.step.length) {
        state.step = state.row = null;
        fillPicker();
        reader.replaceChildren(el("p", { class: "note" }, "No trajectories yet."));
        return;
      }
      const steps = Array.isArray(embedded) && embedded.length ? embedded : index.step;
      const last = steps.reduce((a, b) => Math.max(a, b));
      open(last, firstRow(last), options);
    }

    // True when `params` name a trajectory.
    function follow(params) {
      const wanted = readParams(params);
      const run = wanted.run !== null && wanted.run < EPO.page.runs.length ? wanted.run : state.run;
      if (wanted.step === null) return false;
      const row = wanted.row === null ? firstRow(wanted.step) : wanted.row;
      const isSame = run === state.run && wanted.step === state.step && row === state.row;
      if (isSame && wanted.compare === state.compare && wanted.colour === state.colour) return true;
      state.colour = wanted.colour;
      state.compare = wanted.compare;
      if (run !== state.run) {
        state.run = run;
        state.loaded = null;
        list.update();
      }
      open(wanted.step, row);
      return true;
    }

    const signature = (step, row) => {
      const index = run().index;
      const n = list.find(step, row);
      return n < 0 ? null : [index.task[n], index.reward[n], index.turns[n], index.tokens?.[n], index.entropy?.[n]].join();
    };
    let seen = null;

    function onUpdate() {
      if (state.run >= EPO.page.runs.length) state.run = 0;
      list.update();
      if (state.step === null) openFirst();
      else {
        fillPicker();
        list.show(state.step, state.row);
        const now = signature(state.step, state.row);
        // A run that went back to a checkpoint writes its steps anew.
        if (state.loaded && seen && seen.at === `${state.run}/${state.step}/${state.row}` && now !== null && now !== seen.signature) {
          state.loaded = null;
          open(state.step, state.row);
        }
      }
      seen = { at: `${state.run}/${state.step}/${state.row}`, signature: signature(state.step, state.row) };
    }

    root.classList.add("show-extremes");
    list.update();
    if (!follow(EPO.params(TAB))) openFirst();
    EPO.onParams(TAB, follow);
    EPO.onUpdate(onUpdate);
  }

  EPO.tab(TAB, "Trajectories", render);
})();
