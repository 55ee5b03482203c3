"use strict";
// Where trajectories and new data come from: blobs inside a report, or the server of a live page.
(function () {
  const POLL_MS = 2000;
  const POLL_LOST_MS = 30000; // at most, while the connection is lost
  const KEPT_STEPS = 8; // steps whose trajectories stay in memory

  const updates = EPO.listeners();
  EPO.onUpdate = updates.add;

  const isLive = () => EPO.page.mode === "live";

  // -- trajectories

  const kept = new Map(); // "run/step" -> promise

  function trajectories(run, step) {
    const key = `${run}/${step}`;
    const promise = kept.get(key) || (isLive() ? fetchStep(run, step) : unpackStep(run, step));
    kept.delete(key);
    kept.set(key, promise);
    promise.catch(() => kept.delete(key));
    if (kept.size > KEPT_STEPS) kept.delete(kept.keys().next().value);
    return promise;
  }

  const fetchStep = (run, step) => getJson(`api/runs/${run}/trajectories/${step}`);

  async function unpackStep(run, step) {
    const blob = document.getElementById(`trajectories-${run}-${step}`);
    if (!blob) {
      const note = EPO.page.runs[run]?.embedded_note;
      throw new Error(`The trajectories of step ${step} are not in this report. ${note || ""}`.trim());
    }
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot unpack the trajectories. Any browser from 2023 on can.");
    }
    const bytes = Uint8Array.from(atob(blob.textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // -- search: case does not matter; in a report over the embedded steps only

  async function search(run, text) {
    if (isLive()) {
      const { hits, complete } = await getJson(`api/runs/${run}/search?q=${encodeURIComponent(text)}`);
      return Object.assign(hits, { complete });
    }
    const wanted = text.toLowerCase();
    const { embedded_steps: embedded, steps } = EPO.page.runs[run];
    const hits = [];
    for (const step of embedded || []) {
      const { trajectories: records } = await unpackStep(run, step);
      records.forEach((record, row) => {
        if (
          textsOf(record).some((t) =>
            String(t ?? "")
              .toLowerCase()
              .includes(wanted),
          )
        )
          hits.push({ step, row });
      });
    }
    return Object.assign(hits, { complete: (embedded || []).length >= steps.length });
  }

  const textsOf = (record) => [
    record.task,
    record.goal,
    record.error,
    ...record.turns.flatMap((turn) => [turn.observation, turn.response, turn.action]),
  ];

  async function getJson(address) {
    let response;
    try {
      response = await fetch(address, { cache: "no-store" });
    } catch {
      throw new Error("The server does not answer. Is `epo watch` still running?");
    }
    const data = await response.json().catch(() => null);
    if (!response.ok) throw new Error(data?.error || `The server answered with status ${response.status}.`);
    if (data === null) throw new Error("The server's answer could not be read.");
    return data;
  }

  EPO.source = { trajectories, search };

  // -- live: merge what is new

  function mergeRun(run, part) {
    const before = run.steps.length;
    const added = part.steps || [];
    run.steps.push(...added);
    const columns = part.metrics || {};
    for (const name of new Set([...Object.keys(run.metrics), ...Object.keys(columns)])) {
      const column = (run.metrics[name] ??= new Array(before).fill(null));
      column.push(...(columns[name] || new Array(added.length).fill(null)));
    }
    run.evaluations.push(...(part.evaluations || []));
    extendColumns(run.turn_entropy, part.turn_entropy);
    extendColumns(run.index, part.index);
    const merged = ["steps", "metrics", "evaluations", "turn_entropy", "index", "reset"];
    for (const [key, value] of Object.entries(part)) if (!merged.includes(key)) run[key] = value;
  }

  function extendColumns(columns, more) {
    for (const [name, values] of Object.entries(more || {})) (columns[name] ??= []).push(...values);
  }

  // Returns whether anything changed.
  function merge(answer) {
    const { runs } = EPO.page;
    let changed = false;
    (answer.runs || []).forEach((part, i) => {
      if (part.reset) {
        runs[i] = part;
        for (const key of kept.keys()) if (key.startsWith(`${i}/`)) kept.delete(key);
        changed = true;
        return;
      }
      const ended = part.finished !== runs[i].finished || !part.halted !== !runs[i].halted;
      const hasNew = ended || ["steps", "evaluations"].some((key) => part[key]?.length);
      mergeRun(runs[i], part);
      changed ||= hasNew;
    });
    if ("comparison" in answer) {
      EPO.page.comparison = answer.comparison;
      changed = true;
    }
    return changed;
  }

  const live = { lostSince: null, changedAt: new Date(), wait: POLL_MS };

  async function poll() {
    try {
      const cursors = JSON.stringify(EPO.page.runs.map((run) => run.cursor));
      const answer = await getJson(`api/page?after=${encodeURIComponent(cursors)}`);
      if (live.lostSince) EPO.announce("Connected again");
      live.lostSince = null;
      live.wait = POLL_MS;
      if (merge(answer)) {
        live.changedAt = new Date();
        updates.call();
        EPO.redraw();
      }
    } catch (error) {
      if (!live.lostSince) EPO.announce("Connection lost");
      live.lostSince ??= new Date();
      live.wait = Math.min(2 * live.wait, POLL_LOST_MS);
      live.error = error.message;
    } finally {
      showStatus();
      setTimeout(poll, document.hidden ? Math.max(live.wait, 5 * POLL_MS) : live.wait);
    }
  }

  // -- status line

  function showStatus() {
    const [kind, words, detail] = isLive() ? liveStatus() : reportStatus();
    const node = document.getElementById("status");
    node.dataset.kind = kind;
    node.title = detail || "";
    if (node.textContent !== words)
      EPO.replace(node, EPO.el("span", { class: "status-dot", "aria-hidden": "true" }), words);
  }

  function liveStatus() {
    const { runs } = EPO.page;
    if (live.lostSince) return ["lost", `Connection lost since ${clock(live.lostSince)}, trying again`, live.error];
    const since = clock(live.changedAt);
    if (!runs.length) return ["live", "Live, waiting for a run"];
    const running = runs.filter((run) => !run.finished && !run.halted);
    const word = runs.some((run) => run.halted) ? "ended, not all by themselves" : "finished";
    if (!running.length && runs.length > 1) return ["finished", `All ${runs.length} runs ${word}`];
    if (!running.length) return ["finished", runs[0].halted ? "Halted by an alarm" : "Finished"];
    const last = runs.length > 1 ? `${running.length} of ${runs.length} runs going on` : stepOf(running[0]);
    return ["live", `Live, ${last}, last change ${since}`];
  }

  const stepOf = (run) => `step ${run.steps.at(-1) ?? 0} of ${run.total_steps ?? "?"}`;
  const clock = (date) => date.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

  function reportStatus() {
    const made = new Date(EPO.page.generated);
    const when = Number.isNaN(made.getTime())
      ? EPO.page.generated
      : made.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    return ["report", `Report of ${when}`, `Made with epo ${EPO.page.version}`];
  }

  EPO.startSource = () => {
    showStatus();
    if (isLive()) setTimeout(poll, POLL_MS);
  };
})();
