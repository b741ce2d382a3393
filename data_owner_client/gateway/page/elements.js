// Elements made of text, and curves made of numbers. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties, and children that are elements or strings. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A table with a heading, from rows of texts. */
export function table(caption, headings, rows) {
  const cell = (name, text) => element(name, {}, text);
  return element("div", { className: "scrolls", tabIndex: 0, role: "region", ariaLabel: caption },
    element("table", {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...headings.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((text) => cell("td", text)))))));
}

/** Add pairs of term and text to a description list. */
export function describe(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]));
}

/** λ along a text as a line of steps, and the adapter's share as bars behind it, one unit wide for each token. */
export function lambdaLine(tokens, current) {
  const bars = tokens.map((token, i) => {
    const share = token.share ?? 0;
    return svg("rect", { class: "share", x: i, y: 1 - share, width: 1, height: share });
  });
  const points = tokens.flatMap((token, i) => {
    const y = 1 - (token.lambda ?? 0);
    return [`${i},${y}`, `${i + 1},${y}`];
  });
  const marker = current === null ? [] : [svg("rect", { class: "current", x: current, y: 0, width: 1, height: 1 })];
  return svg("svg", { viewBox: `0 0 ${Math.max(tokens.length, 1)} 1`, preserveAspectRatio: "none", role: "img",
    "aria-label": lambdaInWords(tokens) }, ...marker, ...bars, svg("polyline", { points: points.join(" ") }));
}

function lambdaInWords(tokens) {
  const values = tokens.map((token) => token.lambda ?? 0);
  if (values.length === 0) return "λ along the text: no tokens yet";
  return `λ along the text: ${values[0].toFixed(2)} at the first token, ${values.at(-1).toFixed(2)} at the last, `
    + `at most ${Math.max(...values).toFixed(2)}. Bars: the adapter's share.`;
}

/** Curves over a common axis: `series` is a list of {name, points: [[x, y], …]}. */
export function curves(title, xLabel, series) {
  const drawn = series.map((one) => ({ ...one, points: one.points.filter((pair) => pair.every(Number.isFinite)) }))
    .filter((one) => one.points.length > 0);
  const xs = drawn.flatMap((one) => one.points.map(([x]) => x));
  const ys = drawn.flatMap((one) => one.points.map(([, y]) => y));
  if (xs.length === 0) return element("p", { className: "hint" }, `${title}: nothing recorded.`);
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const [width, height, margin] = [480, 200, 44];
  const at = ([x, y]) => [
    margin + ((x - left) / (right - left || 1)) * (width - margin - 10),
    10 + (1 - (y - low) / (high - low || 1)) * (height - margin),
  ].map((value) => value.toFixed(1)).join(",");
  const text = (x, y, content, anchor) => svg("text", { x, y, "text-anchor": anchor }, content);
  const bottom = 10 + height - margin;
  const lines = drawn.map((one, i) => svg("g", { class: `series series-${i % 4}` },
    svg("polyline", { points: one.points.map(at).join(" ") }),
    // A single point has no line.
    ...(one.points.length === 1 ? [svg("circle", { cx: at(one.points[0]).split(",")[0],
      cy: at(one.points[0]).split(",")[1], r: 3 })] : [])));
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": inWords(title, drawn) },
    svg("path", { class: "axes", d: `M${margin},10 V${bottom} H${width - 10}` }),
    text(margin - 4, 18, short(high), "end"), text(margin - 4, bottom, short(low), "end"),
    text(margin, bottom + 16, short(left), "start"), text(width - 10, bottom + 16, short(right), "end"),
    text((margin + width) / 2, bottom + 30, xLabel, "middle"), ...lines);
  const names = element("ul", { className: "series-names" },
    ...drawn.map((one, i) => element("li", { className: `series-${i % 4}` }, one.name)));
  return element("figure", {}, element("figcaption", {}, title), chart, names);
}

function inWords(title, series) {
  const ranges = series.map((one) => `${one.name} from ${short(one.points[0][1])} to ${short(one.points.at(-1)[1])}`);
  return `${title}: ${ranges.join("; ")}`;
}

/** A number with four significant digits and no trailing zeros. */
export function short(number) {
  return Number.isInteger(number) ? String(number) : String(Number(number.toPrecision(4)));
}
