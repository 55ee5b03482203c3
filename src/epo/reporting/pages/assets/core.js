"use strict";
// The frame: tabs with deep links, theme, status line, start. Other files register tabs and draw them.
(function () {
  const { el } = EPO;
  const ORDER = ["overview", "charts", "figures", "health", "trajectories", "setup"];
  const THEMES = ["auto", "light", "dark"];

  const tabs = new Map(); // id -> {id, title, render, hidden, button, panel, isDrawn}
  const paramListeners = new Map();
  const themeListeners = EPO.listeners();
  const lastParams = new Map();
  const system = matchMedia("(prefers-color-scheme: dark)");
  let current = null;
  let choice = "auto";

  // Registers a tab; render(container) is called once, when it is first shown. hidden(): leave it out of this page.
  EPO.tab = (id, title, render, { hidden = () => false } = {}) => {
    tabs.set(id, { id, title, render, hidden, isDrawn: false });
  };
  EPO.currentTab = () => current;

  // -- deep links: #charts, #trajectories?run=0&step=12

  function readHash() {
    const [id, query] = location.hash.replace(/^#/, "").split("?");
    return { id, params: Object.fromEntries(new URLSearchParams(query || "")) };
  }

  function hashOf(id, params) {
    const kept = Object.entries(params || {}).filter(
      ([, value]) => value !== null && value !== undefined && value !== "",
    );
    const query = new URLSearchParams(kept.map(([key, value]) => [key, String(value)])).toString();
    return `#${id}${query ? `?${query}` : ""}`;
  }

  EPO.params = (id) => ({ ...(lastParams.get(id) || {}) });

  EPO.setParams = (id, params) => {
    lastParams.set(id, { ...params });
    // Where history is closed to the page (a sandboxed frame), the address stays as it is.
    if (current === id) quietly(() => history.replaceState(null, "", hashOf(id, params)));
  };

  EPO.onParams = (id, f) => {
    if (!paramListeners.has(id)) paramListeners.set(id, EPO.listeners());
    paramListeners.get(id).add(f);
  };

  EPO.go = (id, params) => {
    if (params) lastParams.set(id, { ...params });
    quietly(() => history.pushState(null, "", hashOf(id, EPO.params(id))));
    show(id);
    if (params) paramListeners.get(id)?.call(EPO.params(id));
  };

  function quietly(f) {
    try {
      f();
    } catch {
      // Deep links are a convenience.
    }
  }

  function followHash() {
    const { id, params } = readHash();
    const known = visibleTabs().some((tab) => tab.id === id);
    if (!known && id && current) return; // a link inside the page, such as "skip to the content"
    const target = known ? id : visibleTabs()[0].id;
    const isNew = known && JSON.stringify(params) !== JSON.stringify(EPO.params(target));
    if (isNew) lastParams.set(target, params);
    show(target);
    if (isNew) paramListeners.get(target)?.call(params);
  }

  // -- tabs

  const visibleTabs = () => ORDER.map((id) => tabs.get(id)).filter((tab) => tab && !tab.hidden());

  function makeTabs() {
    const list = document.getElementById("tabs");
    const main = document.getElementById("main");
    for (const tab of ORDER.map((id) => tabs.get(id)).filter(Boolean)) {
      tab.button = el(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${tab.id}`,
          "aria-controls": `panel-${tab.id}`,
          "aria-selected": "false",
          tabindex: "-1",
          on: { click: () => EPO.go(tab.id), keydown: onTabKey },
        },
        tab.title,
      );
      tab.panel = el("section", {
        role: "tabpanel",
        id: `panel-${tab.id}`,
        "aria-labelledby": `tab-${tab.id}`,
        tabindex: "0",
        hidden: true,
      });
      list.append(tab.button);
      main.append(tab.panel);
    }
  }

  // A comparison may come while a live page is open.
  function offerTabs() {
    for (const tab of tabs.values()) if (tab.button) tab.button.hidden = tab.hidden();
  }

  function onTabKey(event) {
    const shown = visibleTabs();
    const at = shown.findIndex((tab) => tab.button === event.currentTarget);
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const tab = shown[(moves[event.key] + shown.length) % shown.length];
    EPO.go(tab.id);
    tab.button.focus();
  }

  function show(id) {
    const changed = current !== id;
    current = id;
    for (const tab of tabs.values()) {
      if (!tab.button) continue;
      const isCurrent = tab.id === id;
      tab.button.setAttribute("aria-selected", String(isCurrent));
      tab.button.tabIndex = isCurrent ? 0 : -1;
      tab.panel.hidden = !isCurrent;
    }
    EPO.showRunsBar(id);
    const tab = tabs.get(id);
    if (!tab.isDrawn) draw(tab);
    if (!changed) return;
    // Only the strip of tabs scrolls sideways; the page stays where its top is.
    const strip = tab.button.parentElement;
    strip.scrollLeft = tab.button.offsetLeft - (strip.clientWidth - tab.button.offsetWidth) / 2;
    window.scrollTo(0, 0);
  }

  function draw(tab) {
    tab.isDrawn = true;
    try {
      tab.render(tab.panel);
    } catch (error) {
      EPO.replace(tab.panel, EPO.message("This part of the page could not be drawn.", error.message));
      throw error;
    }
  }

  // A box with words for an empty or failed part.
  EPO.message = (title, text) =>
    el(
      "div",
      { class: "message" },
      el("p", { class: "message-title" }, title),
      text ? el("p", {}, EPO.visible(text)) : null,
    );

  EPO.announce = (text) => {
    document.getElementById("announcer").textContent = EPO.visible(text);
  };

  // -- theme

  EPO.theme = () => document.documentElement.dataset.theme;
  EPO.onTheme = themeListeners.add;

  function applyTheme() {
    const dark = choice === "dark" || (choice === "auto" && system.matches);
    const before = EPO.theme();
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const button = document.getElementById("theme");
    EPO.replace(
      button,
      { auto: "◐", light: "○", dark: "●" }[choice],
      el("span", { class: "theme-word" }, ` ${choice}`),
    );
    button.setAttribute("aria-label", `Theme: ${choice}. Change`);
    button.title = `Theme: ${choice}`;
    if (!before || before === EPO.theme()) return;
    themeListeners.call(EPO.theme());
    EPO.redraw();
  }

  function startTheme() {
    const remembered = EPO.remembered("theme");
    if (THEMES.includes(remembered)) choice = remembered;
    document.getElementById("theme").addEventListener("click", () => {
      choice = THEMES[(THEMES.indexOf(choice) + 1) % THEMES.length];
      EPO.remember("theme", choice);
      applyTheme();
      EPO.announce(`Theme: ${choice}`);
    });
    system.addEventListener("change", applyTheme);
    applyTheme();
  }

  // -- start

  function start() {
    startTheme();
    EPO.page = JSON.parse(document.getElementById("page-data").textContent);
    EPO.startRuns();
    makeTabs();
    offerTabs();
    EPO.onUpdate(offerTabs);
    addEventListener("hashchange", followHash);
    addEventListener("popstate", followHash);
    followHash();
    EPO.startSource();
  }

  addEventListener("DOMContentLoaded", () => {
    try {
      start();
    } catch (error) {
      document.getElementById("main").append(EPO.message("The page could not be built from its data.", error.message));
      throw error;
    }
  });
})();
