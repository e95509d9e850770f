"use strict";

// The panel of the plan; see panels.js.

/** The plan at the current step: its distribution, its best sequences, and its spread over time. */
function makePlanPanel(episode, go, width) {
  const plan = episode.plan;
  if (!plan) return null;
  const { names, groups, values } = episode.actions;
  const hint = groups
    ? "probabilities over the planned steps; orange: the action taken"
    : "over the planned steps: mean and standard deviation (blue), best sequences by weight " +
      "(green), the action taken (orange)";
  const root = makeCard("Plan", hint, width);
  const outlook = new Figure("Returns of the best sequences", [["best", "second"], ["last", "muted"]]);
  const spread = new Figure("Spread of the first action", [["mean of all actions", "true"]]);
  const over = makeGrid(2);
  over.append(outlook.root, spread.root);
  const grid = makeGrid(groups ? 1 : Math.min(4, Math.max(2, names.length)));
  const both = [make("div", { className: "group" }, over), make("div", { className: "group" }, grid)];
  root.append(...both);
  [outlook, spread].forEach((figure) => figure.onStep(go));
  const kept = plan.returns.shape[1];
  const best = readColumn(plan.returns, 0);
  const worst = readColumn(plan.returns, kept - 1);
  const widths = Float32Array.from(best, (_, step) => measureSpread(plan, step));
  const legend = [["taken", "imagined"], ["mean", "true"]];
  const figures = groups
    ? [new Figure("Choice", legend.slice(0, 1), false)]
    : names.map((name) => new Figure(name, legend, false));
  grid.append(...figures.map((figure) => figure.root));
  const draw = (view, colours) => {
    const at = Math.min(view.step, episode.length - 1);
    outlook.show([best[at], worst[at]]);
    spread.show([widths[at]]);
    const lines = [{ values: worst, colour: "muted" }, { values: best, colour: "second" }];
    const none = { window: null, height: HEIGHT.small };
    outlook.scale = drawSteps(outlook.canvas, episode, view, { series: lines, ...none }, colours);
    const series = [{ values: widths, colour: "true" }];
    const y = [0, Math.max(...widths, 1e-3) * 1.06];
    spread.scale = drawSteps(spread.canvas, episode, view, { series, y, ...none }, colours);
    if (groups) drawDiscretePlan(figures[0], plan, at, episode.actions, colours);
    else drawContinuousPlan(figures, plan, at, values, colours);
  };
  return { root, draw };
}

/** Return the mean standard deviation of the first planned action, over its dimensions. */
function measureSpread(plan, step) {
  const [, , width] = plan.mean.shape;
  if (plan.std) {
    const first = readRow(plan.std, step).subarray(0, width);
    return first.reduce((sum, x) => sum + x, 0) / width;
  }
  const first = readRow(plan.mean, step).subarray(0, width);
  return Math.sqrt(first.reduce((sum, p) => sum + p * (1 - p), 0) / width);
}

function drawContinuousPlan(figures, plan, step, actions, colours) {
  const [, horizon, width] = plan.mean.shape;
  const kept = plan.weights.shape[1];
  const [mean, std] = [readRow(plan.mean, step), readRow(plan.std, step)];
  const elites = readRow(plan.elites, step);
  const weights = Array.from(readRow(plan.weights, step));
  const taken = readRow(actions, step);
  const pick = (values, i, first = 0) =>
    Array.from({ length: horizon }, (_, h) => values[first + h * width + i]);
  figures.forEach((figure, i) => {
    const rows = Array.from({ length: kept }, (_, k) => pick(elites, i, k * horizon * width));
    const parts = { mean: pick(mean, i), std: pick(std, i), elites: rows, weights };
    figure.show([taken[i], parts.mean[0]]);
    drawPlan(figure.canvas, { height: HEIGHT.signal, taken: taken[i], ...parts }, colours);
  });
}

function drawDiscretePlan(figure, plan, step, actions, colours) {
  const [, horizon, width] = plan.mean.shape;
  const probabilities = { shape: [horizon, width], values: readRow(plan.mean, step) };
  const row = readRow(actions.values, step);
  const taken = row.indexOf(Math.max(...row));
  const height = Math.max(70, Math.min(22 * width, 400) + 24);
  figure.show([actions.names[taken]]);
  const drawn = { height, probabilities, names: actions.names, taken, left: 130 };
  drawChoices(figure.canvas, drawn, colours);
}
