"use strict";
// Numbers for people.
(function () {
  const MINUS = "−";
  const minus = (text) => text.replace(/^-/, MINUS);

  // About `digits` significant digits: 0.0123, 12.3, 1,234, 1.2e-7.
  function plain(x, digits = 3) {
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size < 1e-3 || size >= 1e9) {
      const [head, tail] = x.toExponential(digits - 1).split("e");
      return minus(`${Number(head)}e${minus(tail.replace("+", ""))}`);
    }
    if (size >= 1000) return minus(Math.round(x).toLocaleString("en-US"));
    return minus(String(Number(x.toPrecision(digits))));
  }

  const share = (x, places = 1) => minus(`${(100 * x).toFixed(places)} %`);

  // 630 -> "10 min 30 s"
  function duration(seconds) {
    if (!EPO.isNumber(seconds)) return "unknown";
    if (seconds < 1) return `${plain(1000 * seconds, 2)} ms`;
    if (seconds < 10) return `${seconds.toFixed(1)} s`;
    if (seconds < 60) return `${Math.round(seconds)} s`;
    const s = Math.round(seconds);
    if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${s % 60} s` : ""}`;
    const minutes = Math.round(s / 60);
    if (minutes < 1440) return `${Math.floor(minutes / 60)} h${minutes % 60 ? ` ${minutes % 60} min` : ""}`;
    return `${Math.floor(minutes / 1440)} d ${Math.round((minutes % 1440) / 60)} h`;
  }

  // 2838 -> "2,838", 1234567 -> "1.23 million"
  function count(x) {
    if (Math.abs(x) < 1e6) return minus(Math.round(x).toLocaleString("en-US"));
    if (Math.abs(x) < 1e9) return `${plain(x / 1e6)} million`;
    return `${plain(x / 1e9)} billion`;
  }

  // A value of a metric in its unit; "no data" when there is none.
  EPO.format = (x, name) => {
    if (!EPO.isNumber(x)) return "no data";
    const { unit } = EPO.metric(name || "");
    if (unit === "share") return share(x);
    if (unit === "s") return duration(x);
    if (unit === "count") return Number.isInteger(x) || Math.abs(x) >= 100 ? count(x) : plain(x);
    return unit ? `${plain(x)} ${unit}` : plain(x);
  };
  Object.assign(EPO.format, { plain, share, duration, count });

  // "58.1 % (47.9 to 67.6)"
  EPO.format.interval = (low, high) =>
    EPO.isNumber(low) && EPO.isNumber(high)
      ? `${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)} %`
      : "no interval";

  // [3, 4, 5, 8] -> [[3, 5], [8, 8]]; neighbours are neighbours in `all`
  EPO.ranges = (steps, all) => {
    const place = new Map(all.map((step, i) => [step, i]));
    const ranges = [];
    for (const step of steps) {
      const last = ranges.at(-1);
      if (last && place.get(step) === place.get(last[1]) + 1) last[1] = step;
      else ranges.push([step, step]);
    }
    return ranges;
  };
  EPO.rangeText = ([from, to]) => (from === to ? String(from) : `${from}–${to}`);

  EPO.plural = (n, one, many = `${one}s`) => `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
})();
