"use strict";

// Drawing functions. They keep no state: all take a canvas and what to draw on it.

const FONT = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";
// Perceptually uniform colours, dark to light: viridis and inferno.
const VIRIDIS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725".split(" ");
const INFERNO = "000004 210c4a 57106e 8a226a bc3754 e45a31 f98e09 f9cb35 fcffa4".split(" ");

/** Return the colours of the style sheet, which depend on light or dark mode. */
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["surface", "sunken", "text", "muted", "line", "grid"];
  names.push("true", "imagined", "error", "second", "window");
  return Object.fromEntries(names.map((name) => [name, read(name)]));
}

/** Return a table of 256 colours [red, green, blue]. */
function makePalette(stops) {
  const colours = stops.map((text) => [0, 2, 4].map((i) => parseInt(text.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (colours.length - 1);
    const left = Math.min(Math.floor(place), colours.length - 2);
    return colours[left].map((low, c) => low + (place - left) * (colours[left + 1][c] - low));
  });
}

const PALETTES = { state: makePalette(VIRIDIS), error: makePalette(INFERNO) };

/** Fit a canvas to its width on the page and to a height; return context, width and height. */
function prepareCanvas(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(40, canvas.clientWidth);
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) {
    [canvas.width, canvas.height] = size;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = FONT;
  return { context, width, height };
}

/** Return a number as a short text. */
function formatNumber(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("-", "−");
  const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  const text = value.toLocaleString("en", { maximumFractionDigits: digits });
  return text.replace("-", "−");
}

/** Return round numbers within a range. */
function listTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough) || 10 * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(i * step || 0);
  }
  return ticks;
}

/** Return [lowest, highest] of lists of numbers with a margin; NaN is left out. */
function findRange(lists, margin = 0.06) {
  let low = Infinity;
  let high = -Infinity;
  for (const list of lists) {
    for (const value of list) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return [0, 1];
  const pad = high > low ? (high - low) * margin : Math.max(1e-3, Math.abs(high) * 0.1);
  return [low - pad, high + pad];
}

/** Return the scale of a chart: places of its axes, and functions from numbers to pixels. */
function makeScale(width, height, x, y, left = 44) {
  const box = { left, right: width - 6, top: 6, bottom: height - 18 };
  const across = (box.right - box.left) / (x[1] - x[0] || 1);
  const up = (box.bottom - box.top) / (y[1] - y[0] || 1);
  return {
    ...box,
    toX: (value) => box.left + (value - x[0]) * across,
    toY: (value) => box.bottom - (value - y[0]) * up,
    fromX: (pixel) => x[0] + (pixel - box.left) / across,
  };
}

/**
 * Draw curves over a common x-axis, and return their scale.
 *
 * chart: {height, x: [low, high], y: [low, high] or null, series, window: [low, high] or null,
 *   cursor: x or null, whole: whether x has ticks at whole numbers only}
 * series: [{values, first: x of the first value, or points: [[x, y], ...], colour,
 *   kind: "line" or "dots" or "band" (with low and high instead of values), dash, faint}]
 */
function drawChart(canvas, chart, colours) {
  const { context, width, height } = prepareCanvas(canvas, chart.height);
  const lists = chart.series.flatMap((s) =>
    s.points ? [s.points.map((p) => p[1])] : s.kind === "band" ? [s.low, s.high] : [s.values],
  );
  const y = chart.y || findRange(lists);
  const scale = makeScale(width, height, chart.x, y);
  if (chart.window) {
    const [from, to] = chart.window.map((x) => Math.max(scale.left, Math.min(scale.right, scale.toX(x))));
    context.fillStyle = colours.window;
    context.fillRect(from, scale.top, Math.max(1, to - from), scale.bottom - scale.top);
  }
  drawAxes(context, scale, chart, y, colours);
  context.save();
  context.beginPath();
  context.rect(scale.left - 3, 0, scale.right - scale.left + 6, scale.bottom + 3);
  context.clip();
  for (const series of chart.series) drawSeries(context, scale, series, colours);
  context.restore();
  drawCursor(context, scale, chart.cursor, colours);
  return scale;
}

/** Draw grid lines and numbers of a chart. */
function drawAxes(context, scale, chart, y, colours) {
  context.fillStyle = colours.muted;
  context.strokeStyle = colours.grid;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of listTicks(...y, Math.max(2, chart.height / 40))) {
    const at = Math.round(scale.toY(tick)) + 0.5;
    context.beginPath();
    context.moveTo(scale.left, at);
    context.lineTo(scale.right, at);
    context.stroke();
    context.fillText(formatNumber(tick), scale.left - 6, at);
  }
  drawPositions(context, scale, chart.x, chart.whole !== false, colours);
}

/** Draw the numbers of the x-axis. */
function drawPositions(context, scale, x, whole, colours) {
  context.fillStyle = colours.muted;
  context.textBaseline = "top";
  const room = Math.max(2, Math.floor((scale.right - scale.left) / 90));
  for (const tick of listTicks(...x, room)) {
    if (whole && !Number.isInteger(tick)) continue;
    const at = scale.toX(tick);
    context.textAlign = at > scale.right - 14 ? "right" : at < scale.left + 8 ? "left" : "center";
    context.fillText(tick.toLocaleString("en"), at, scale.bottom + 5);
  }
}

/** Draw one curve, band or set of dots of a chart. */
function drawSeries(context, scale, series, colours) {
  context.strokeStyle = context.fillStyle = colours[series.colour];
  context.globalAlpha = series.faint || 1;
  context.lineWidth = series.width || 1.6;
  context.lineJoin = "round";
  context.setLineDash(series.dash ? [4, 3] : []);
  const first = series.first || 0;
  const points = series.points || Array.from(series.values || [], (v, i) => [first + i, v]);
  if (series.kind === "band") {
    const at = (list, i) => [scale.toX(first + i), scale.toY(list[i])];
    context.beginPath();
    for (let i = 0; i < series.low.length; i++) context.lineTo(...at(series.low, i));
    for (let i = series.high.length - 1; i >= 0; i--) context.lineTo(...at(series.high, i));
    context.fill();
  } else if (series.kind === "dots") {
    for (const [x, y] of points) drawDot(context, scale.toX(x), scale.toY(y), series.radius || 2);
  } else {
    context.beginPath();
    let pen = false;
    for (const [x, y] of points) {
      if (Number.isFinite(y)) {
        context[pen ? "lineTo" : "moveTo"](scale.toX(x), scale.toY(y));
        pen = true;
      } else pen = false;
    }
    context.stroke();
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
}

function drawDot(context, x, y, radius) {
  if (!Number.isFinite(y)) return;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

/** Draw the vertical line of the current step. */
function drawCursor(context, scale, x, colours) {
  if (x === null || x === undefined) return;
  const at = Math.round(scale.toX(x)) + 0.5;
  context.strokeStyle = colours.text;
  context.globalAlpha = 0.65;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(at, scale.top);
  context.lineTo(at, scale.bottom);
  context.stroke();
  context.globalAlpha = 1;
}

/** Return a canvas with one pixel per number of [columns, rows]; rows become lines. */
function makeHeatmap(array, range, palette) {
  const [columns, rows] = array.shape;
  const picture = document.createElement("canvas");
  picture.width = columns;
  picture.height = rows;
  const context = picture.getContext("2d");
  const image = context.createImageData(columns, rows);
  const span = range[1] - range[0] || 1;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const share = (array.values[column * rows + row] - range[0]) / span;
      if (Number.isNaN(share)) continue; // stays transparent
      const code = Math.max(0, Math.min(255, Math.round(255 * share)));
      image.data.set([...palette[code], 255], 4 * (row * columns + column));
    }
  }
  context.putImageData(image, 0, 0);
  return picture;
}

/**
 * Draw a heat map over the steps, and return its scale.
 *
 * chart: {height, picture: of makeHeatmap, every: steps from column to column, cursor, window,
 *   labels: names of the rows or null, left: pixels for the names}
 */
function drawHeatmap(canvas, chart, colours) {
  const { context, width, height } = prepareCanvas(canvas, chart.height);
  const rows = chart.picture.height;
  const every = chart.every || 1;
  // A step is in the middle of its column.
  const x = [-0.5 * every, (chart.picture.width - 0.5) * every];
  const scale = makeScale(width, height, x, [0, rows], chart.left || 44);
  const size = [scale.right - scale.left, scale.bottom - scale.top];
  context.imageSmoothingEnabled = rows > size[1];
  context.drawImage(chart.picture, scale.left, scale.top, ...size);
  context.fillStyle = colours.muted;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const line = size[1] / rows;
  const ticks = chart.labels ? chart.labels.map((_, i) => i) : listTicks(0, rows - 1, 4);
  for (const tick of ticks) {
    if (!chart.labels && !Number.isInteger(tick)) continue;
    const text = chart.labels ? chart.labels[tick] : tick.toLocaleString("en");
    context.fillText(text, scale.left - 6, scale.top + (tick + 0.5) * line, scale.left - 8);
  }
  drawPositions(context, scale, x, true, colours);
  if (chart.window) {
    const [from, to] = [scale.toX(chart.window[0] - 0.5), scale.toX(chart.window[1] + 0.5)];
    context.strokeStyle = colours.imagined;
    context.lineWidth = 1.5;
    context.strokeRect(from, scale.top + 0.75, Math.max(2, to - from), size[1] - 1.5);
  }
  drawCursor(context, scale, chart.cursor, colours);
  return scale;
}

/**
 * Draw the plan of one continuous action, over the steps of the plan.
 *
 * plan: {height, mean: [H], std: [H], elites: K lists [H], weights: [K], taken: number}
 */
function drawPlan(canvas, plan, colours) {
  const heaviest = Math.max(...plan.weights, 1e-9);
  const elites = plan.elites.map((values, k) => ({
    values,
    colour: "second",
    width: 1,
    faint: 0.12 + 0.6 * (plan.weights[k] / heaviest),
  }));
  const low = plan.mean.map((m, i) => Math.max(-1, m - plan.std[i]));
  const high = plan.mean.map((m, i) => Math.min(1, m + plan.std[i]));
  const series = [
    { kind: "band", low, high, colour: "true", faint: 0.18 },
    ...elites,
    { values: plan.mean, colour: "true", width: 2 },
    { kind: "dots", points: [[0, plan.taken]], colour: "imagined", radius: 4 },
  ];
  const x = [0, Math.max(1, plan.mean.length - 1)];
  return drawChart(canvas, { height: plan.height, x, y: [-1.08, 1.08], series }, colours);
}

/**
 * Draw the plan of a discrete action: one line of cells per class, one column per planned step.
 *
 * plan: {height, probabilities: {shape: [H, A], values}, names: [A], taken: class, left}
 */
function drawChoices(canvas, plan, colours) {
  const picture = makeHeatmap(plan.probabilities, [0, 1], PALETTES.state);
  const chart = { height: plan.height, picture, labels: plan.names, left: plan.left };
  const scale = drawHeatmap(canvas, chart, colours);
  const context = canvas.getContext("2d");
  const line = (scale.bottom - scale.top) / plan.names.length;
  context.strokeStyle = colours.imagined;
  context.lineWidth = 2;
  const width = scale.toX(0.5) - scale.left;
  context.strokeRect(scale.left + 1, scale.top + plan.taken * line + 1, width - 2, line - 2);
  return scale;
}

/** Fit a canvas to a picture's pixels; the style sheet enlarges it. */
function preparePicture(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, width, height);
  return context;
}

/** Draw one of `Pictures`; return whether it is there. */
function drawPicture(canvas, pictures, index) {
  return pictures.draw(preparePicture(canvas, pictures.width, pictures.height), index);
}

/** Draw the absolute difference of two drawn pictures of one size; half of the range is white. */
function drawDifference(canvas, first, second) {
  const { width, height } = first;
  const context = preparePicture(canvas, width, height);
  const read = (source) => source.getContext("2d").getImageData(0, 0, width, height).data;
  const [a, b] = [read(first), read(second)];
  const image = context.createImageData(width, height);
  for (let i = 0; i < a.length; i += 4) {
    let sum = 0;
    for (let c = 0; c < 3; c++) sum += Math.abs(a[i + c] - b[i + c]);
    image.data.set([...PALETTES.error[Math.min(255, Math.round((2 * sum) / 3))], 255], i);
  }
  context.putImageData(image, 0, 0);
}
