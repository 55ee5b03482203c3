"use strict";
// Setup: how each run was made: command, versions, machine, the resolved configuration; what differs between runs.
(function () {
  const { el } = EPO;

  // {"optimizer.learning_rate": 1e-5, ..}; lists count as one value.
  function flat(tree, prefix = "", out = new Map()) {
    for (const [key, value] of Object.entries(tree || {})) {
      const path = prefix ? `${prefix}.${key}` : key;
      if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length)
        flat(value, path, out);
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

  // Columns of the table: the arms of a comparison, else the runs.
  function columns() {
    const { comparison, runs } = EPO.page;
    if (comparison)
      return comparison.arms.map((arm, i) => ({ title: arm.name, sample: EPO.lineSample(i), members: arm.runs }));
    return runs.map((_, i) => ({ title: EPO.runLabel(i), sample: EPO.runSample(i), members: [i] }));
  }

  const valuesOf = (members, flats, key) => [...new Set(members.map((i) => text(flats[i].get(key))))].join(", ");

  function differences(keys, flats) {
    if (!keys.length) return el("p", { class: "lead" }, "The configurations are the same.");
    const groups = columns();
    return el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Settings that differ" },
      el(
        "table",
        { class: "diff" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "Setting"),
            groups.map(({ title, sample }) => el("th", { scope: "col" }, sample, " ", EPO.visible(title))),
          ),
        ),
        el(
          "tbody",
          {},
          keys.map((key) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, el("code", {}, EPO.visible(key))),
              groups.map(({ members }) => el("td", {}, EPO.visible(valuesOf(members, flats, key)))),
            ),
          ),
        ),
      ),
    );
  }

  // The text of config.yaml, a block for each section, lines of differing keys marked. The path of a line follows from
  // its indentation.
  function yaml(run, keys) {
    const marked = new Set(keys);
    const path = [];
    const blocks = [];
    let isMarked = false;
    let isNested = false;
    for (const line of (run.config_yaml || "").trimEnd().split("\n")) {
      const found = /^( *)([^\s:#-][^:]*):/.exec(line);
      if (found) {
        path.length = Math.floor(found[1].length / 2);
        path.push(found[2]);
        isMarked = marked.has(path.join("."));
      }
      const isTop = found && !found[1];
      const opens = isTop && line.endsWith(":");
      // Plain settings of the top stay together; each section is a block of its own.
      if (!blocks.length || opens || (isTop && isNested)) blocks.push([]);
      if (isTop) isNested = opens;
      blocks.at(-1).push(isMarked && line ? el("mark", {}, EPO.visible(line)) : EPO.visible(line), "\n");
    }
    return el(
      "pre",
      { class: "code config", tabindex: "0", role: "region", "aria-label": "Configuration" },
      blocks.map((lines) => el("span", { class: "config-block" }, lines)),
    );
  }

  // -- provenance

  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

  function command(provenance) {
    const words = provenance?.command;
    if (!Array.isArray(words)) return null;
    return el(
      "pre",
      { class: "code command", tabindex: "0", role: "region", "aria-label": "Command" },
      EPO.visible(words.map((w) => quoted(String(w))).join(" ")),
    );
  }

  const named = (key) => key.replace(/^packages\./, "").replaceAll(/[._]/g, " ");

  function provenance(run) {
    if (!run.provenance)
      return el("p", { class: "lead" }, "No provenance was recorded: provenance.json is missing in the run folder.");
    const { command: _, ...rest } = run.provenance;
    const pairs = [...flat(rest)].filter(([, value]) => value !== null);
    const short = pairs.filter(([, value]) => text(value).length <= 160);
    const long = pairs.filter(([, value]) => text(value).length > 160);
    return [
      el(
        "dl",
        { class: "pairs" },
        short.map(([key, value]) =>
          el("div", {}, el("dt", {}, EPO.visible(named(key))), el("dd", {}, EPO.visible(text(value)))),
        ),
      ),
      long.map(([key, value]) =>
        el(
          "details",
          { class: "long" },
          el("summary", {}, EPO.visible(named(key))),
          el("pre", { class: "code", tabindex: "0" }, EPO.visible(text(value))),
        ),
      ),
    ];
  }

  function runSection(run, label, keys, isOpen) {
    const body = [
      el("p", { class: "lead" }, "Folder: ", el("code", {}, EPO.visible(run.path || run.name))),
      el("h3", {}, "Command"),
      command(run.provenance) || el("p", { class: "lead" }, "Not recorded."),
      el("h3", {}, "Made with"),
      provenance(run),
      el("h3", {}, "Configuration, resolved"),
      yaml(run, keys),
    ];
    if (EPO.page.runs.length === 1) return el("section", { class: "section setup" }, body);
    return el(
      "details",
      { class: "run-setup setup", open: isOpen },
      el("summary", {}, el("h2", {}, EPO.visible(label))),
      body,
    );
  }

  function contentOf() {
    const runs = EPO.runs.all();
    const flats = runs.map(({ run }) => flat(run.config));
    const keys = runs.length > 1 ? differing(flats) : [];
    return [
      runs.length > 1
        ? el(
            "section",
            { class: "section" },
            el("h2", {}, "What differs"),
            el(
              "p",
              { class: "lead" },
              "Settings that are not the same in all runs; they are marked in the configurations below.",
            ),
            differences(keys, flats),
          )
        : null,
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
