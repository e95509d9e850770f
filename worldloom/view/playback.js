"use strict";

// The state of the page and its controls.

const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const state = { number: 0, step: 0, start: 0, playing: false, follow: true };
let episode = null;
let panels = [];
let pending = false;

/** Draw everything before the browser's next frame. */
function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    draw();
  });
}

/** Return what the panels show; see panels.js. */
function getView() {
  const { every, horizon } = episode.imagined;
  const last = Math.min(state.start + horizon, episode.length);
  const inside = state.step >= state.start && state.step <= last;
  return {
    step: state.step,
    start: state.start,
    index: state.start / every,
    ahead: inside ? state.step - state.start : null,
    window: [state.start, last],
  };
}

function draw() {
  const view = getView();
  find("step").value = state.step;
  find("start").value = state.start;
  find("step-value").textContent = `${state.step} of ${episode.length}`;
  find("start-value").textContent = `step ${state.start}`;
  find("follow").checked = state.follow;
  find("play").classList.toggle("playing", state.playing);
  find("play").setAttribute("aria-label", state.playing ? "Pause" : "Play");
  const status = describeEpisode(view);
  if (find("status").textContent !== status) find("status").textContent = status;
  const colours = readColours();
  for (const panel of panels) panel.draw(view, colours);
}

/** Return a line about the episode up to the current step. */
function describeEpisode(view) {
  const sum = episode.rewards.slice(0, view.step + 1).reduce((total, x) => total + x, 0);
  const returns = `return ${formatNumber(sum)} of ${formatNumber(episode.return)}`;
  return `${returns}, ${episode.ended} after ${episode.length} steps`;
}

/** Go to a step; if the imagination does not cover it and follows, it starts anew there. */
function goTo(step) {
  state.step = Math.max(0, Math.min(episode.length, Math.round(step)));
  if (state.follow && getView().ahead === null) imagineFrom(state.step);
  redraw();
}

/** Start the imagination at a step, or at the nearest earlier one from which there is one. */
function imagineFrom(step) {
  const { every } = episode.imagined;
  const last = Math.floor((episode.length - 1) / every) * every;
  state.start = Math.max(0, Math.min(last, Math.floor(Math.round(step) / every) * every));
  redraw();
}

/** Return the elements of panels; those that have nothing to show are null. */
function list(some) {
  return some.filter(Boolean).map((panel) => panel.root);
}

/** Return a column of panels. */
function stack(side, some) {
  return make("div", { className: `${side} stack` }, ...list(some));
}

/** Show another episode, if there is one of this number, from its first step on. */
function openEpisode(number) {
  if (!data.episodes[number]) return;
  state.number = number;
  episode = readEpisode(data.episodes[state.number], redraw);
  state.step = state.start = 0;
  find("episode").value = state.number;
  find("step").max = episode.length;
  find("start").max = episode.length - 1;
  find("start").step = episode.imagined.every;
  const go = (step, imagines) => {
    if (imagines) imagineFrom(step);
    else goTo(step);
  };
  // Pictures on the left and curves next to them, or, without pictures, everything below each other.
  const pictures = makePicturesPanel(episode);
  const width = pictures ? "" : "wide";
  const overview = makeOverviewPanel(episode, go, width);
  const beside = [makeSignalsPanel(episode, go, width), makePlanPanel(episode, go, width)];
  const vectors = makeVectorsPanel(episode, go, redraw);
  const below = [makeActionsPanel(episode, go), makeLatentsPanel(episode, go)];
  const columns = pictures
    ? [stack("left", [pictures, overview]), stack("right", beside)]
    : list([beside[0], vectors, overview, beside[1]]);
  const last = list(pictures ? [vectors, ...below] : below);
  panels = [pictures, overview, ...beside, vectors, ...below].filter(Boolean);
  find("panels").replaceChildren(...columns, ...last);
  redraw();
}

/** Start or stop playing. */
function play(on) {
  state.playing = on && state.step < episode.length;
  if (on && !state.playing) {
    goTo(0);
    state.playing = true;
  }
  redraw();
  if (state.playing) requestAnimationFrame((now) => advance(now, now));
}

/** Go on by as many steps as the speed asks for; called before each frame. */
function advance(before, now) {
  if (!state.playing) return;
  const steps = Math.floor(((now - before) / 1000) * Number(find("speed").value));
  if (steps > 0) {
    goTo(state.step + steps);
    if (state.step >= episode.length) state.playing = false;
  }
  requestAnimationFrame((next) => advance(steps > 0 ? now : before, next));
}

/** Choose a slower or faster speed. */
function changeSpeed(by) {
  const choice = find("speed");
  const last = choice.options.length - 1;
  choice.selectedIndex = Math.max(0, Math.min(last, choice.selectedIndex + by));
}

const KEYS = {
  " ": () => play(!state.playing),
  ArrowLeft: (event) => goTo(state.step - (event.shiftKey ? 10 : 1)),
  ArrowRight: (event) => goTo(state.step + (event.shiftKey ? 10 : 1)),
  Home: () => goTo(0),
  End: () => goTo(episode.length),
  ArrowUp: () => openEpisode(state.number - 1),
  ArrowDown: () => openEpisode(state.number + 1),
  i: () => imagineFrom(state.step),
  "[": () => imagineFrom(state.start - episode.imagined.every),
  "]": () => imagineFrom(state.start + episode.imagined.every),
  f: () => setFollow(!state.follow),
  "-": () => changeSpeed(-1),
  "+": () => changeSpeed(1),
  "=": () => changeSpeed(1),
};

function setFollow(on) {
  state.follow = on;
  goTo(state.step);
}

function onKey(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const action = KEYS[key];
  const tag = event.target.tagName;
  // Controls that have the focus keep the keys that they use themselves.
  const used = { SELECT: /^(Arrow|Home|End| )/, BUTTON: /^ $/, SUMMARY: /^ $/ };
  const slides = tag === "INPUT" && event.target.id === "start" && /^(Arrow|Home|End)/.test(key);
  const taken = (used[tag] && used[tag].test(key)) || (event.target.id === "follow" && key === " ");
  if (!action || taken || slides || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action(event);
}

/** Fill the parts of the page that do not change. */
function fillPage() {
  const { run, notes } = data;
  find("title").textContent = run.title;
  for (const [name, value] of run.facts) {
    const fact = make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }));
    find("facts").append(fact);
  }
  find("notes").append(...notes.map((note) => make("li", { textContent: note })));
  for (const [key, value] of run.config) {
    const cells = [make("th", { textContent: key, scope: "row" }), make("td", { textContent: value })];
    find("config").append(make("tr", {}, ...cells));
  }
  data.episodes.forEach((packed, number) => {
    const text = `${packed.name}: return ${formatNumber(packed.return)}`;
    find("episode").append(make("option", { value: number, textContent: text }));
  });
}

/** Draw the returns of the run during its training. */
function drawReturns() {
  const { curves, unit } = data.run;
  const colours = { "training episodes": "muted", evaluations: "true", "final model": "imagined" };
  const legend = curves.map(({ name }) => [name, colours[name]]);
  const figure = new Figure("Return during training", legend, false);
  figure.show(curves.map(({ points }) => points[points.length - 1][1]));
  const series = curves.flatMap(({ name, points }) => {
    const colour = colours[name];
    if (name === "training episodes") return [{ kind: "dots", points, colour, radius: 1.5, faint: 0.6 }];
    if (name === "final model") return [{ kind: "dots", points, colour, radius: 4.5 }];
    return [{ points, colour }, { kind: "dots", points, colour, radius: 2.5 }];
  });
  if (!series.length) return;
  const most = Math.max(...curves.flatMap(({ points }) => points.map((point) => point[0])), 1);
  const root = make("section", { className: "card" }, figure.root);
  root.append(make("p", { className: "hint", textContent: `over ${unit}` }));
  find("returns").replaceChildren(root);
  drawChart(figure.canvas, { height: 120, x: [0, most], series }, readColours());
}

function connectControls() {
  find("episode").addEventListener("change", (event) => openEpisode(Number(event.target.value)));
  find("step").addEventListener("input", (event) => goTo(Number(event.target.value)));
  find("start").addEventListener("input", (event) => imagineFrom(Number(event.target.value)));
  find("follow").addEventListener("change", (event) => setFollow(event.target.checked));
  find("here").addEventListener("click", () => imagineFrom(state.step));
  find("play").addEventListener("click", () => play(!state.playing));
  find("first").addEventListener("click", () => goTo(0));
  find("back").addEventListener("click", () => goTo(state.step - 1));
  find("forward").addEventListener("click", () => goTo(state.step + 1));
  find("last").addEventListener("click", () => goTo(episode.length));
  document.addEventListener("keydown", onKey);
  const again = () => {
    drawReturns();
    redraw();
  };
  window.addEventListener("resize", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
}

fillPage();
drawReturns();
connectControls();
openEpisode(0);
