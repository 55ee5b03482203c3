"use strict";
// Building blocks of the page: elements without HTML strings, text made visible, small helpers.
// Text from models, environments and files is untrusted: it reaches the document through text nodes only.
(function () {
  const EPO = (window.EPO = {});
  const SVG = "http://www.w3.org/2000/svg";

  // An element. Attributes: `class`, any attribute by its name, `on: {click: f}`, `data: {key: value}`; null, undefined
  // and false leave an attribute out, true sets it empty. Children: nodes, text, numbers, lists of them; null is left out.
  EPO.el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
  EPO.svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

  function build(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
      else if (key === "data") Object.assign(node.dataset, value);
      else if (typeof value === "function") throw new Error(`attribute ${key}: use on: {..} for handlers`);
      else node.setAttribute(key, value === true ? "" : value);
    }
    append(node, children);
    return node;
  }

  function append(node, children) {
    for (const child of children) {
      if (child === null || child === undefined || child === false) continue;
      if (Array.isArray(child)) append(node, child);
      else node.append(child instanceof Node ? child : String(child));
    }
  }

  EPO.replace = (node, ...children) => {
    node.replaceChildren();
    append(node, children);
    return node;
  };

  const CONTROL = /[\u0000-\u0008\u000b-\u001f]/g;
  // DEL and C1 controls; soft hyphen, zero-width, bidi, separators, variation selectors, tags, other invisible fillers;
  // lone surrogates.
  const INVISIBLE =
    /[\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb]|[\u{1bca0}-\u{1bca3}]|[\u{1d173}-\u{1d17a}]|[\u{e0000}-\u{e0fff}]|[\ud800-\udfff]/gu;

  // What cannot be seen or what changes the direction of writing, as signs: ␛, ⟨U+202E⟩. Tab and newline stay.
  EPO.visible = (text) =>
    String(text)
      .replace(CONTROL, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(INVISIBLE, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  // For labels of charts: Plotly reads a little HTML in them.
  EPO.plotText = (text, longest = 60) => {
    const flat = EPO.visible(text).replace(/\s+/g, " ");
    const short = [...flat].length > longest ? [...flat].slice(0, longest - 1).join("") + "…" : flat;
    return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  };

  EPO.isNumber = (x) => typeof x === "number" && Number.isFinite(x);

  // f(..) at most once per frame.
  EPO.oncePerFrame = (f) => {
    let waiting = false;
    return () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        f();
      });
    };
  };

  // A list of listeners that one failing does not stop: its error is reported after the others ran.
  EPO.listeners = () => {
    const all = [];
    return {
      add: (f) => void all.push(f),
      call: (...values) => {
        const errors = [];
        for (const f of all) {
          try {
            f(...values);
          } catch (error) {
            errors.push(error);
          }
        }
        if (errors.length) throw errors[0];
      },
    };
  };

  // What the page remembers between visits; a browser that forbids it costs nothing but the memory.
  EPO.remembered = (key) => {
    try {
      return localStorage.getItem(`epo.${key}`);
    } catch {
      return null;
    }
  };
  EPO.remember = (key, value) => {
    try {
      localStorage.setItem(`epo.${key}`, value);
    } catch {
      // Not allowed here (a file, private browsing): nothing to do.
    }
  };
})();
