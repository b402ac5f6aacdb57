// A heat map of layers and KV heads: layers from left to right, heads from top to bottom.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Fills `figure` (of the template #heatmap) with values [layers][heads].
 * most: the value of the darkest colour. words: a value as text.
 */
export function draw(figure, title, values, most, words) {
  const layers = values.length;
  const heads = values[0]?.length ?? 0;
  figure.querySelector(".map-title").textContent = title;
  figure.querySelector(".map-least").textContent = words(0);
  figure.querySelector(".map-most").textContent = words(most);
  const rows = heads === 1 ? "1 KV head" : `${heads} KV heads`;
  figure.querySelector(".map-axes").textContent = `${layers} layers across, ${rows} down`;

  const svg = figure.querySelector("svg");
  svg.setAttribute("viewBox", `0 0 ${layers} ${heads}`);
  svg.setAttribute("aria-label", summary(title, values, words));
  svg.style.setProperty("--heads", heads);
  svg.replaceChildren();
  values.forEach((row, layer) => row.forEach((value, head) => svg.append(cell(layer, head, value / most))));
  const cursor = cell(0, 0, 0);
  cursor.classList.replace("cell", "cursor");
  svg.append(cursor);
  readable(svg, figure.querySelector("output"), cursor, values, words);
}

function cell(layer, head, share) {
  const rect = document.createElementNS(SVG, "rect");
  rect.setAttribute("class", "cell");
  place(rect, layer, head);
  rect.setAttribute("width", 0.94);
  rect.setAttribute("height", 0.94);
  rect.style.setProperty("--share", Number.isFinite(share) ? share.toFixed(4) : 0);
  return rect;
}

function place(rect, layer, head) {
  rect.setAttribute("x", layer + 0.03);
  rect.setAttribute("y", head + 0.03);
}

function summary(title, values, words) {
  const all = values.flat();
  const mean = all.reduce((sum, value) => sum + value, 0) / all.length;
  const [least, most] = [Math.min(...all), Math.max(...all)];
  return `${title} by layer and KV head: mean ${words(mean)}, from ${words(least)} to ${words(most)}.`
    + " Arrow keys go from cell to cell.";
}

/** One cell at a time in words, under the pointer or by arrow keys. */
function readable(svg, output, cursor, values, words) {
  let [layer, head] = [0, 0];
  const show = () => {
    place(cursor, layer, head);
    svg.classList.add("pointed");
    output.textContent = `layer ${layer + 1}, head ${head + 1}: ${words(values[layer][head])}`;
  };
  const hide = () => {
    svg.classList.remove("pointed");
    output.textContent = "";
  };
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    layer = clamp(((event.clientX - box.left) / box.width) * values.length, values.length);
    head = clamp(((event.clientY - box.top) / box.height) * values[0].length, values[0].length);
    show();
  };
  svg.onpointerleave = hide;
  svg.onfocus = show;
  svg.onblur = hide;
  svg.onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    layer = clamp(layer + step[0], values.length);
    head = clamp(head + step[1], values[0].length);
    show();
  };
}

const clamp = (value, length) => Math.max(0, Math.min(length - 1, Math.floor(value)));
