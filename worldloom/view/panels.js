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
    surprise: packed.surprise && decodeArray(packed.surprise).values,
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
  const rows = [
    { name: "Reward", legend: pair, real: episode.rewards, imagined: dream.rewards },
    { name: "Continue", legend: pair, real: continues, imagined: dream.continues },
  ];
  rows[1].limits = [-0.08, 1.08];
  if (episode.values) {
    const legend = [["after observing", "true"], pair[1]];
    if (episode.returns) legend.push(["collected", "muted"]);
    const { values: real, returns: collected } = episode;
    rows.push({ name: "Value", legend, real, imagined: dream.values, collected });
  }
  for (const part of errors) {
    const name = errors.length > 1 ? `Error of ${part.key}` : "Error of the observation";
    rows.push({ name, legend: [["root mean square", "error"]], imagined: part.error });
  }
  const relative = [["relative", "error"]];
  rows.push({ name: "Error of the latent state", legend: relative, imagined: dream.stateErrors });
  if (episode.surprise) {
    const legend = [["divergence in nats", "error"]];
    rows.push({ name: "Surprise by the observation", legend, real: episode.surprise });
  }
  const grid = makeGrid(2);
  root.append(grid);
  const draws = rows.map((row) => addSignal(grid, row, episode, go));
  return { root, draw: (view, colours) => draws.forEach((draw) => draw(view, colours)) };
}

/**
 * Add a chart over the steps to a grid, and return what draws it.
 *
 * row: {name, legend, real: numbers of all steps, imagined: array [starts, H + 1], collected:
 *   further numbers of all steps, limits}; real, imagined and the last two may be missing.
 */
function addSignal(grid, row, episode, go) {
  const { real, imagined, collected } = row;
  const figure = new Figure(row.name, row.legend);
  figure.onStep(go);
  grid.append(figure.root);
  const lists = [real || [0], imagined ? imagined.values : [], collected || []];
  const y = row.limits || findRange(lists);
  return (view, colours) => {
    const series = [];
    const numbers = [];
    if (collected) series.push({ values: collected, colour: "muted", width: 1.2 });
    if (real) {
      series.push({ values: real, colour: row.legend[0][1] });
      numbers.push(real[view.step]);
    }
    if (imagined) {
      const colour = real ? "imagined" : "error";
      series.push(imaginedSeries(imagined, view, { colour, dash: Boolean(real) }));
      numbers.push(imaginedNumber(imagined, view));
    }
    if (collected) numbers.push(collected[view.step]);
    figure.show(numbers);
    const shaded = imagined ? view.window : null;
    const chart = { series, y, window: shaded };
    figure.scale = drawSteps(figure.canvas, episode, view, chart, colours);
  };
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
