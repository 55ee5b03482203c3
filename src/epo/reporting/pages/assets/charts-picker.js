"use strict";
// A searchable list of all metrics; what is picked becomes a chart. The address keeps the choice.
(function () {
  const { el } = EPO;

  // onPick(name) when one is picked; taken() -> Set of names not offered again.
  EPO.metricPicker = ({ onPick, taken }) => {
    const list = el("ul", {
      role: "listbox",
      id: "metric-list",
      class: "picker-list",
      "aria-label": "Metrics",
      hidden: true,
    });
    const input = el("input", {
      type: "search",
      id: "metric-search",
      role: "combobox",
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "entropy, tokens, …",
      "aria-expanded": "false",
      "aria-controls": "metric-list",
      "aria-autocomplete": "list",
    });
    let found = [];
    let active = -1;

    function search() {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      found = EPO.metricNames()
        .filter((name) => !taken().has(name))
        .map(EPO.metric)
        .filter(({ name, title }) => words.every((word) => `${name} ${title}`.toLowerCase().includes(word)));
      active = found.length && words.length ? 0 : -1;
      showList();
    }

    function showList() {
      EPO.replace(
        list,
        found.length ? found.map(option) : el("li", { class: "picker-none" }, "No metric has this in its name."),
      );
      list.hidden = false;
      input.setAttribute("aria-expanded", "true");
      markActive();
    }

    const option = ({ name, title }, i) =>
      el(
        "li",
        {
          role: "option",
          id: `metric-option-${i}`,
          "aria-selected": "false",
          on: { mousedown: (event) => (event.preventDefault(), pick(i)) },
        },
        el("span", {}, EPO.visible(title)),
        title === name ? null : el("code", {}, EPO.visible(name)),
      );

    function markActive() {
      [...list.children].forEach((node, i) => node.setAttribute("aria-selected", String(i === active)));
      if (active < 0) return input.removeAttribute("aria-activedescendant");
      input.setAttribute("aria-activedescendant", `metric-option-${active}`);
      list.children[active].scrollIntoView({ block: "nearest" });
    }

    function close() {
      list.hidden = true;
      input.setAttribute("aria-expanded", "false");
      input.removeAttribute("aria-activedescendant");
    }

    function pick(i) {
      const { name, title } = found[i];
      input.value = "";
      close();
      onPick(name);
      EPO.announce(`${title}: chart added`);
    }

    function onKey(event) {
      if (event.key === "Escape") return close();
      if (event.key === "Enter" && active >= 0 && !list.hidden) return (event.preventDefault(), pick(active));
      const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      if (list.hidden) search();
      if (found.length) active = (active + move + found.length) % found.length;
      markActive();
    }

    input.addEventListener("input", search);
    input.addEventListener("focus", search);
    input.addEventListener("blur", close);
    input.addEventListener("keydown", onKey);
    return el(
      "div",
      { class: "picker" },
      el("label", { for: "metric-search" }, "Add a chart of any metric "),
      el("div", { class: "picker-field" }, input, list),
    );
  };
})();
