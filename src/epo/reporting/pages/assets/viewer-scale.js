"use strict";
// What the tokens of a trajectory can be coloured by: ranges, colour levels, words, and which tokens are extreme.
// The ranges are fixed, so that a colour means the same in every trajectory, step and run.
(function () {
  const SEQUENTIAL_LEVELS = 16; // classes s0..s15 of viewer.css: least to most
  const DIVERGING_LEVELS = 15; // classes d0..d14: below, d7 in the middle, above

  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

  // position: to [0, 1] for a sequential measure, to [-1, 1] for a diverging one.
  // weight: how extreme a value is; the tokens with the largest are underlined.
  const MEASURES = {
    entropy: {
      title: "Entropy",
      field: "entropy",
      unit: "nats",
      diverging: false,
      ticks: [0, 1, 2, 3],
      ends: ["", "and more"],
      position: (x) => x / 3,
      weight: (x) => x,
      definition:
        "How open the choice was: of the distribution the token was drawn from, over the whole vocabulary, at training temperature.",
    },
    logprob: {
      title: "Log-probability",
      short: "Log-prob",
      field: "logprobs",
      unit: "nats",
      diverging: false,
      ticks: [0, -1, -2, -3, -4, -5],
      ends: ["", "and less"],
      position: (x) => -x / 5,
      weight: (x) => -x,
      definition: "How likely the token was under the policy that drew it: 0 is certain, −5 is 0.7 %.",
    },
    advantage: {
      title: "Advantage",
      field: "advantages",
      unit: "",
      diverging: true,
      ticks: [-3, -2, -1, 0, 1, 2, 3],
      ends: ["and less", "and more"],
      position: (x) => x / 3,
      weight: (x) => Math.abs(x),
      definition: "What the update weighed the token with: above 0 it was made more likely, below 0 less.",
    },
    ratio: {
      title: "Ratio",
      field: "ratios",
      unit: "",
      diverging: true,
      ticks: [0.5, 0.7, 0.8, 1, 1.2, 1.5, 2],
      ends: ["and less", "and more"],
      position: (x) => Math.log2(x),
      weight: (x) => Math.abs(Math.log2(x)),
      definition:
        "Probability by the policy when the learner last saw the token in its update / by the policy that drew it. Logarithmic: 0.5 is as far from 1 as 2.",
    },
  };

  const number = (x, digits = 3) => (EPO.isNumber(x) ? EPO.format.plain(x, digits) : x > 0 ? "∞" : "–");
  // For columns of numbers that stand below each other.
  const fixed = (x) => (EPO.isNumber(x) ? x.toFixed(2).replace("-", "−") : "–");
  const signed = (x) => (x > 0 ? "+" : "") + number(x);

  function percent(p) {
    if (p >= 0.9995 && p < 1) return "> 99.9 %";
    return p < 0.001 && p > 0 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`;
  }

  // The value of token i of a turn, or null: not recorded, or not finite.
  function value(turn, i, name) {
    const values = turn[MEASURES[name].field];
    const x = Array.isArray(values) ? values[i] : null;
    return EPO.isNumber(x) ? x : null;
  }

  function levelClass(name, x) {
    const measure = MEASURES[name];
    const position = x === null ? NaN : measure.position(x);
    if (Number.isNaN(position)) return "unknown";
    if (!measure.diverging) return `s${clamp(Math.floor(position * SEQUENTIAL_LEVELS), 0, SEQUENTIAL_LEVELS - 1)}`;
    const half = (DIVERGING_LEVELS - 1) / 2;
    return `d${half + Math.round(clamp(position, -1, 1) * half)}`;
  }

  function isRecorded(record, name) {
    return record.turns.some((turn) => Array.isArray(turn[MEASURES[name].field]));
  }

  // The weight from which a token belongs to the most extreme 5 % of its trajectory. A value that most tokens share
  // (advantages of GRPO, say) is not extreme.
  function extremeFrom(record, name) {
    const weights = [];
    for (const turn of record.turns) {
      for (let i = 0; i < turn.response_ids.length; i++) {
        const x = value(turn, i, name);
        if (x !== null) weights.push(MEASURES[name].weight(x));
      }
    }
    weights.sort((a, b) => b - a);
    if (!weights.length) return Infinity;
    const threshold = weights[Math.ceil(weights.length / 20) - 1];
    return threshold > weights[Math.floor(weights.length / 2)] ? threshold : Infinity;
  }

  // The legend of a measure: its colours with numbers below.
  function legend(name) {
    const el = EPO.el;
    const measure = MEASURES[name];
    const count = measure.diverging ? DIVERGING_LEVELS : SEQUENTIAL_LEVELS;
    const bar = el("div", { class: "legend-bar", "aria-hidden": "true" });
    for (let k = 0; k < count; k++) bar.append(el("span", { class: `${measure.diverging ? "d" : "s"}${k}` }));
    const ticks = el("div", { class: "legend-ticks" });
    measure.ticks.forEach((x, k) => {
      const end = k === 0 ? measure.ends[0] : k === measure.ticks.length - 1 ? measure.ends[1] : "";
      const place = measure.diverging ? (measure.position(x) + 1) / 2 : measure.position(x);
      const tick = el("span", {}, `${measure.diverging && name !== "ratio" ? signed(x) : number(x)}`);
      if (end) tick.append(el("small", {}, ` ${end}`));
      tick.style.left = `${100 * place}%`;
      ticks.append(tick);
    });
    const unit = measure.unit ? ` (${measure.unit})` : "";
    return el(
      "figure",
      { class: "legend", role: "img", "aria-label": `Legend: ${measure.title}${unit}, ${measure.ticks.join(", ")}` },
      bar,
      ticks,
      el("figcaption", {}, el("b", {}, `${measure.title}${unit}. `), measure.definition),
    );
  }

  EPO.viewer = { MEASURES, number, fixed, signed, percent, value, levelClass, isRecorded, extremeFrom, legend };
})();
