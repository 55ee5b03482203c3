"use strict";
// Setup: how each run was made: command, versions, machine, the resolved configuration; what differs between runs.
(function () {
  const { el } = EPO;

  // {"optimizer.learning_rate": 1e-5, ..}; lists count as one value.
  function flat(tree, prefix = "", out = new Map()) {
    for (const [key, value] of Object.entries(tree || {})) {
      const path = prefix ? `${prefix}.${key}` : key;
      if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) flat(value, path, out);
      else out.set(path, value);
    }
    return out;
  }

  const text = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));

  // Keys that are not the same in all runs.
  function differing(flats) {
    const keys = new Set(flats.flatMap((one) => [...one.keys()]));
    return [...keys].filter((key) => new Set(flats.map((one) => JSON.stringify(one.get(key)))).size > 1).sort();
  }

  function differences(keys, flats) {
    if (!keys.length) return el("p", { class: "lead" }, "The configurations are the same.");
    return el("div", { class: "scroll" }, el("table", { class: "diff" },
      el("caption", { class: "unseen" }, "Settings that differ"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Run"), keys.map((key) => el("th", { scope: "col" }, el("code", {}, EPO.visible(key)))))),
      el("tbody", {}, EPO.runs.all().map(({ index, label }, i) => el("tr", {},
        el("th", { scope: "row" }, EPO.runSample(index), " ", EPO.visible(label)),
        keys.map((key) => el("td", {}, EPO.visible(text(flats[i].get(key))))))))));
  }

  // The text of config.yaml, lines of differing keys marked. The path of a line follows from its indentation.
  function yaml(run, keys) {
    const marked = new Set(keys);
    const path = [];
    let isMarked = false;
    const lines = (run.config_yaml || "").split("\n").map((line) => {
      const found = /^( *)([^\s:#-][^:]*):/.exec(line);
      if (found) {
        path.length = Math.floor(found[1].length / 2);
        path.push(found[2]);
        isMarked = marked.has(path.join("."));
      }
      const shown = EPO.visible(line);
      return [isMarked && line ? el("mark", {}, shown) : shown, "\n"];
    });
    return el("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "Configuration" }, lines);
  }

  // -- provenance

  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

  function command(provenance) {
    const words = provenance?.command;
    if (!Array.isArray(words)) return null;
    return el("pre", { class: "code command", tabindex: "0", role: "region", "aria-label": "Command" }, EPO.visible(words.map((w) => quoted(String(w))).join(" ")));
  }

  function provenance(run) {
    if (!run.provenance) return el("p", { class: "lead" }, "No provenance was recorded: provenance.json is missing in the run folder.");
    const { command: _, ...rest } = run.provenance;
    const pairs = [...flat(rest)].filter(([, value]) => value !== null);
    const short = pairs.filter(([, value]) => text(value).length <= 160);
    const long = pairs.filter(([, value]) => text(value).length > 160);
    return [
      el("dl", { class: "pairs" }, short.map(([key, value]) => el("div", {}, el("dt", {}, EPO.visible(key)), el("dd", {}, EPO.visible(text(value)))))),
      long.map(([key, value]) => el("details", { class: "long" }, el("summary", {}, EPO.visible(key)), el("pre", { class: "code", tabindex: "0" }, EPO.visible(text(value))))),
    ];
  }

  function runSection(run, label, keys, isOpen) {
    const body = [
      el("p", { class: "lead" }, "Folder: ", el("code", {}, EPO.visible(run.path || run.name))),
      el("h3", {}, "Command"), command(run.provenance) || el("p", { class: "lead" }, "Not recorded."),
      el("h3", {}, "Made with"), provenance(run),
      el("h3", {}, "Configuration, resolved"), yaml(run, keys),
    ];
    if (EPO.page.runs.length === 1) return el("section", { class: "section setup" }, body);
    return el("details", { class: "run-setup setup", open: isOpen }, el("summary", {}, el("h2", {}, EPO.visible(label))), body);
  }

  function contentOf() {
    const runs = EPO.runs.all();
    const flats = runs.map(({ run }) => flat(run.config));
    const keys = runs.length > 1 ? differing(flats) : [];
    return [
      runs.length > 1 ? el("section", { class: "section" },
        el("h2", {}, "What differs"),
        el("p", { class: "lead" }, "Settings that are not the same in all runs; they are marked in the configurations below."),
        differences(keys, flats)) : null,
      runs.map(({ run, label }, i) => runSection(run, label, keys, i === 0)),
    ];
  }

  EPO.tab("setup", "Setup", (container) => {
    const fill = () => EPO.replace(container, EPO.page.runs.length ? contentOf() : EPO.message("No run yet."));
    let known = EPO.page.runs.length;
    fill();
    EPO.onUpdate(() => {
      if (known === EPO.page.runs.length) return;
      known = EPO.page.runs.length;
      fill();
    });
  });
})();
