"use strict";

// The panels of an episode. Each function returns {root, draw(view, colours)} or null where there
// is nothing to show. `view` has: step; start: row of the imagination; ahead: imagined steps up to
// the current step, or null; index: number of the start; window: [start, last imagined row].

const HEIGHT = { signal: 112, small: 92, overview: 130, latents: 240 };
const MOST = 32; // charts of a vector; a button shows the others

/** Decode the arrays of an episode. */
function readEpisode(packed, redraw) {
  const dream = packed.imagined;
  return {
    ...packed,
    rewards: decodeArray(packed.rewards).values,
    values: packed.values && decodeArray(packed.values).values,
    returns: packed.returns && decodeArray(packed.returns).values,
    film: packed.film && new Pictures(packed.film, redraw),
    actions: { ...packed.actions, values: decodeArray(packed.actions.values) },
    latents: packed.latents.map((part) => ({ ...part, values: decodeArray(part.values) })),
    plan: packed.plan && {
      mean: decodeArray(packed.plan.mean),
      std: decodeArray(packed.plan.std),
      elites: decodeArray(packed.plan.elites),
      weights: decodeArray(packed.plan.weights),
      returns: decodeArray(packed.plan.returns),
    },
    obs: packed.obs.map((part) => {
      const read = part.kind === "image" ? (x) => x && new Pictures(x, redraw) : decodeArray;
      const error = decodeArray(part.error);
      return { ...part, error, true: read(part.true), imagined: read(part.imagined) };
    }),
    imagined: {
      ...dream,
      rewards: decodeArray(dream.rewards),
      continues: decodeArray(dream.continues),
      values: decodeArray(dream.values),
      stateErrors: decodeArray(dream.stateErrors),
    },
  };
}

/** Return the imagined numbers of a start as a series of a chart. */
function imaginedSeries(array, view, options = {}) {
  const values = array ? readRow(array, view.index) : [];
  return { values, first: view.start, colour: "imagined", width: 2, ...options };
}

/** Return the imagined number at the current step. */
function imaginedNumber(array, view) {
  return array && view.ahead !== null ? readRow(array, view.index)[view.ahead] : NaN;
}

/** Pictures: the environment, and true and imagined images with their difference. */
function makePicturesPanel(episode) {
  const images = episode.obs.filter((part) => part.kind === "image");
  if (!images.length && !episode.film) return null;
  const hint = images.length ? "difference: black is 0, white half of the range or more" : "";
  const root = makeCard(images.length ? "Truth and imagination" : "Environment", hint, "");
  const draws = [];
  if (episode.film) {
    const frame = new Frame("Rendered", true);
    root.append(make("div", { className: "pictures group" }, frame.root));
    draws.push((view) => {
      drawPicture(frame.canvas, episode.film, view.step);
      frame.show(`step ${view.step}`);
    });
  }
  for (const part of images) {
    const frames = ["True", "Imagined", "Difference"].map((title) => new Frame(title));
    const shown = part.imagined ? frames : frames.slice(0, 1);
    const pictures = make("div", { className: "pictures" }, ...shown.map((frame) => frame.root));
    const group = make("div", { className: "group" });
    if (images.length > 1) group.append(make("h3", { textContent: part.key }));
    group.append(pictures);
    if (!part.imagined) {
      const text = "The model predicts no such observation.";
      group.append(make("p", { className: "hint", textContent: text }));
    }
    root.append(group);
    draws.push((view) => drawFrames(frames, part, episode, view));
  }
  return { root, draw: (view) => draws.forEach((draw) => draw(view)) };
}

/** Draw true and imagined image of the current step, and their difference. */
function drawFrames([real, guess, difference], part, episode, view) {
  const ready = drawPicture(real.canvas, part.true, view.step);
  real.show(`step ${view.step}`);
  if (!part.imagined) return;
  const blank = [part.true.width, part.true.height];
  const number = view.index * (episode.imagined.horizon + 1) + view.ahead;
  if (view.ahead !== null && drawPicture(guess.canvas, part.imagined, number) && ready) {
    drawDifference(difference.canvas, real.canvas, guess.canvas);
  } else {
    preparePicture(guess.canvas, ...blank);
    preparePicture(difference.canvas, ...blank);
  }
  guess.show(describeAhead(view));
  difference.show(`root mean square ${formatNumber(imaginedNumber(part.error, view))}`);
}

/** Return how many steps ahead of its start the imagination is at the current step. */
function describeAhead(view) {
  if (view.ahead === null) return "not imagined from here";
  if (view.ahead === 0) return `reconstruction of step ${view.step}`;
  return `${view.ahead} ${view.ahead === 1 ? "step" : "steps"} ahead`;
}

/** Rewards, continues, values and errors over the steps. */
function makeSignalsPanel(episode, go, width) {
  const hint = "imagined with the actions of the episode; the shaded steps";
  const root = makeCard("Predictions over the steps", hint, width);
  const dream = episode.imagined;
  const errors = episode.obs.filter((part) => part.error);
  const continues = Float32Array.from(episode.rewards, () => 1);
  if (episode.ended === "terminated") continues[episode.length] = 0;
  const pair = [["true", "true"], ["imagined", "imagined", true]];
  const after = [["after observing", "true"], ["imagined", "imagined", true]];
  if (episode.returns) after.push(["collected", "muted"]);
  const rows = [
    ["Reward", pair, episode.rewards, dream.rewards, null],
    ["Continue", pair, continues, dream.continues, [-0.08, 1.08]],
    ["Value", after, episode.values || [], dream.values, null, episode.returns],
  ];
  if (!episode.values && !dream.values) rows.pop();
  for (const part of errors) {
    const name = errors.length > 1 ? `Error of ${part.key}` : "Error of the observation";
    rows.push([name, [["root mean square", "error"]], null, part.error, null]);
  }
  rows.push(["Error of the latent state", [["relative", "error"]], null, dream.stateErrors, null]);
  const grid = makeGrid(2);
  root.append(grid);
  const draws = rows.map(([name, legend, real, imagined, limits, collected]) => {
    const figure = new Figure(name, legend);
    figure.onStep(go);
    grid.append(figure.root);
    const y = limits || findRange([real || [0], imagined ? imagined.values : [], collected || []]);
    return (view, colours) => {
      const colour = real ? "imagined" : "error";
      const series = [imaginedSeries(imagined, view, { colour, dash: Boolean(real) })];
      if (real) series.unshift({ values: real, colour: "true" });
      if (collected) series.unshift({ values: collected, colour: "muted", width: 1.2 });
      const numbers = real ? [real[view.step]] : [];
      numbers.push(imaginedNumber(imagined, view));
      if (collected) numbers.push(collected[view.step]);
      figure.show(numbers);
      figure.scale = drawSteps(figure.canvas, episode, view, { series, y }, colours);
    };
  });
  return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
}

/** Errors of all imagined steps: one column for each start, one line for each step ahead. */
function makeOverviewPanel(episode, go, width) {
  const hint = "one column for each start, downwards the steps ahead; dark is exact";
  const root = makeCard("Where the imagination fails", hint, width);
  const dream = episode.imagined;
  const parts = episode.obs.filter((part) => part.error).map((part) => [part.key, part.error]);
  parts.push(["latent state", dream.stateErrors]);
  const grid = makeGrid(width === "wide" ? Math.min(3, parts.length) : 1);
  root.append(grid);
  const draws = parts.map(([name, error]) => {
    const range = [0, findRange([error.values], 0)[1]];
    const figure = new Figure(`Error of ${name}`, [["", "error"]]);
    figure.onStep((step) => go(step, true));
    grid.append(figure.root);
    let picture = null;
    return (view, colours) => {
      picture = picture || makeHeatmap(error, range, PALETTES.error);
      figure.show([`0 to ${formatNumber(range[1])}`]);
      const chart = { height: HEIGHT.overview, picture, every: dream.every, cursor: view.start };
      figure.scale = drawHeatmap(figure.canvas, chart, colours);
    };
  });
  return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
}

/** Draw a chart over the steps of an episode. */
function drawSteps(canvas, episode, view, chart, colours) {
  const common = { height: HEIGHT.signal, x: [0, episode.length], cursor: view.step };
  return drawChart(canvas, { ...common, window: view.window, ...chart }, colours);
}

/** A chart for each dimension of the vectors that the model observes. */
function makeVectorsPanel(episode, go, redraw) {
  const vectors = episode.obs.filter((part) => part.kind === "vector");
  if (!vectors.length) return null;
  const hint = vectors.some((part) => part.imagined)
    ? "one chart for each dimension"
    : "one chart for each dimension; the model predicts no observations";
  const root = makeCard("Observations", hint, "wide");
  const draws = [];
  for (const part of vectors) {
    const group = make("div", { className: "group" });
    if (vectors.length > 1) group.append(make("h3", { textContent: part.key }));
    const grid = makeGrid(Math.min(4, Math.max(2, part.names.length)));
    root.append(group);
    group.append(grid);
    const add = (name, i) => draws.push(addDimension(grid, name, part, i, episode, go));
    part.names.slice(0, MOST).forEach(add);
    if (part.names.length > MOST) {
      const text = `Show all ${part.names.length} dimensions`;
      const button = make("button", { textContent: text });
      button.addEventListener("click", () => {
        part.names.slice(MOST).forEach((name, i) => add(name, MOST + i));
        button.remove();
        redraw();
      });
      group.append(button);
    }
  }
  return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
}

/** Add the chart of one dimension to a grid, and return what draws it. */
function addDimension(grid, name, part, i, episode, go) {
  const legend = [["true", "true"], ["imagined", "imagined", true]];
  const figure = new Figure(name, part.imagined ? legend : legend.slice(0, 1));
  figure.onStep(go);
  grid.append(figure.root);
  const real = readColumn(part.true, i);
  const guesses = part.imagined && readColumn(part.imagined, i);
  const y = findRange([real, guesses || []]);
  const size = episode.imagined.horizon + 1;
  return (view, colours) => {
    const series = [{ values: real, colour: "true" }];
    const numbers = [real[view.step]];
    if (guesses) {
      const values = guesses.subarray(view.index * size, (view.index + 1) * size);
      const line = { values, first: view.start, colour: "imagined", width: 2, dash: true };
      series.push(line);
      numbers.push(view.ahead === null ? NaN : values[view.ahead]);
    }
    figure.show(numbers);
    figure.scale = drawSteps(
      figure.canvas, episode, view, { series, y, height: HEIGHT.small }, colours,
    );
  };
}

/** The actions that were taken. */
function makeActionsPanel(episode, go) {
  const { names, groups, values } = episode.actions;
  const root = makeCard("Actions", "as the model gives them", "wide");
  const draws = [];
  if (groups) {
    const taken = findChoices(values, groups);
    const figure = new Figure("Choice", [["", "true"]]);
    figure.onStep(go);
    root.append(figure.root);
    const height = Math.max(70, Math.min(18 * names.length, 320) + 24);
    let picture = null;
    draws.push((view, colours) => {
      picture = picture || makeHeatmap(values, [0, 1], PALETTES.state);
      const at = Math.min(view.step, episode.length - 1);
      figure.show([taken[at].map((choice) => names[choice]).join(", ")]);
      const chart = { height, picture, cursor: at };
      const labels = names.length <= 24 ? names : null;
      figure.scale = drawHeatmap(figure.canvas, { ...chart, labels, left: 130 }, colours);
    });
    return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
  }
  const grid = makeGrid(Math.min(4, Math.max(2, names.length)));
  root.append(grid);
  names.forEach((name, i) => {
    const figure = new Figure(name, [["", "true"]]);
    figure.onStep(go);
    grid.append(figure.root);
    const column = readColumn(values, i);
    draws.push((view, colours) => {
      const series = [{ values: column, colour: "true" }];
      figure.show([column[Math.min(view.step, episode.length - 1)]]);
      const chart = { series, y: [-1.08, 1.08], height: HEIGHT.small, window: null };
      figure.scale = drawSteps(figure.canvas, episode, view, chart, colours);
    });
  });
  return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
}

/** Return the numbers of the chosen classes of each step. */
function findChoices(values, groups) {
  return Array.from({ length: values.shape[0] }, (_, step) => {
    const row = readRow(values, step);
    let first = 0;
    return groups.map((size) => {
      const part = row.subarray(first, first + size);
      const choice = first + part.indexOf(Math.max(...part));
      first += size;
      return choice;
    });
  });
}

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

/** Latent states after each observation, as heat maps. */
function makeLatentsPanel(episode, go) {
  if (!episode.latents.length) return null;
  const hint = "after each observation; dark is low, bright is high; one line for each unit";
  const root = makeCard("Latent state", hint, "wide");
  const draws = episode.latents.map((part) => {
    const shown = part.stride > 1 ? `, every ${part.stride}th` : "";
    const name = `${part.name}: ${part.units.toLocaleString("en")} units${shown}`;
    const figure = new Figure(name, [["range", "muted"]]);
    figure.onStep(go);
    root.append(make("div", { className: "group" }, figure.root));
    const range = findRange([part.values.values], 0);
    let picture = null;
    return (view, colours) => {
      picture = picture || makeHeatmap(part.values, range, PALETTES.state);
      figure.show([`${formatNumber(range[0])} to ${formatNumber(range[1])}`]);
      const chart = { height: HEIGHT.latents, picture, cursor: view.step, window: view.window };
      figure.scale = drawHeatmap(figure.canvas, chart, colours);
    };
  });
  return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
}
