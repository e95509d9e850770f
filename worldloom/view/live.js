"use strict";

// The live page: sends actions to the model and shows the states that it imagines.

const page = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const CHARTS = [
  ["reward", "Reward"],
  ["total", "Return so far"],
  ["value", "Value"],
  ["continue", "Continue"],
];
const NUMBERS = [...CHARTS, ["reach", "Reached"]];
const MOST_ROWS = 24; // of a vector

// nodes: states by number. at: the state that each sequence shows. active: "A" or "B".
// chosen: for discrete actions the choice of each group; for continuous ones a joint. values: of
// the joints. recorded: the actions of the episode after the start.
const state = { nodes: new Map(), at: { A: 0, B: 0 }, active: "A", chosen: [], values: [] };
state.recorded = [];
state.first = 0; // step of the episode at which the session starts
let busy = false;
let steps = 0; // imagined since the page was opened

function make(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

/** Send a request and return the answer, or null after an error, which is shown. */
async function ask(request, body) {
  if (busy) return null;
  busy = true;
  const began = performance.now();
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(`/${request}`, { method: "POST", headers, body: JSON.stringify(body) });
    const held = await answer.json();
    if (!answer.ok) throw new Error(held.error);
    if (request === "start") state.nodes.clear();
    for (const node of held.nodes) state.nodes.set(node.id, node);
    steps += held.nodes.length;
    showStatus(`${state.nodes.size} states, ${Math.round(performance.now() - began)} ms`);
    return held;
  } catch (error) {
    element("run").checked = false;
    showStatus(error.message, true);
    return null;
  } finally {
    busy = false;
  }
}

function showStatus(text, failed = false) {
  element("status").textContent = text;
  element("status").classList.toggle("failed", failed);
}

async function begin() {
  const [episode, step] = [element("episode"), element("start")].map((input) => Number(input.value));
  const sample = Number(element("sample").value);
  element("run").checked = false;
  const held = await ask("start", { episode, step, sample });
  if (!held) return;
  state.first = step;
  state.recorded = held.recorded;
  state.at = { A: held.nodes[0].id, B: held.nodes[0].id };
  show();
}

/** Imagine a step of the active sequence; body: {actions} or {policy}. */
async function advance(body) {
  const name = state.active;
  const held = await ask("step", { node: state.at[name], ...body });
  if (!held) return false;
  const last = held.nodes[held.nodes.length - 1];
  state.at[name] = last.id;
  if (last.action) choose(last.action);
  show();
  return true;
}

const act = () => advance({ actions: [readAction()] });
/** Let the policy, or the planner, act. */
const letPolicyAct = () => advance({ policy: 1 });

function followRecorded() {
  const action = state.recorded[state.nodes.get(state.at[state.active]).depth];
  if (action) return advance({ actions: [action] });
  showStatus("the episode ends here");
  return Promise.resolve(false);
}

function stepBack() {
  const { parent } = state.nodes.get(state.at[state.active]);
  if (parent !== null) go(parent);
}

function go(id) {
  state.at[state.active] = id;
  show();
}

function otherPane() {
  return state.active === "A" ? "B" : "A";
}

function activate(name) {
  state.active = name;
  show();
}

/** Continue in the other sequence from the state of this one. */
function branch() {
  const id = state.at[state.active];
  state.active = otherPane();
  go(id);
}

// Actions.

/** Return the chosen action in the units of the model. */
function readAction() {
  const { groups } = page.actions;
  if (!groups) return [...state.values];
  return groups.flatMap((count, g) => Array.from({ length: count }, (_, i) => Number(i === state.chosen[g])));
}

/** Show an action as the chosen one. */
function choose(action) {
  const { groups } = page.actions;
  if (!groups) state.values = [...action];
  else {
    let offset = 0;
    state.chosen = groups.map((count) => {
      offset += count;
      return action.slice(offset - count, offset).indexOf(1);
    });
  }
  showActions();
}

function pick(group, choice) {
  state.chosen[group] = choice;
  showActions();
}

function buildActions() {
  const { names, groups } = page.actions;
  const row = element("actions");
  if (groups) {
    state.chosen = groups.map(() => 0);
    let offset = 0;
    groups.forEach((count, group) => {
      const buttons = make("div", "", "buttons");
      names.slice(offset, offset + count).forEach((name, i) => {
        const button = make("button", group || i > 8 ? name : `${i + 1} ${name}`);
        button.onclick = () => {
          pick(group, i);
          if (groups.length === 1) act();
        };
        buttons.append(button);
      });
      row.append(buttons);
      offset += count;
    });
  } else {
    state.values = names.map(() => 0);
    state.chosen = [0];
    names.forEach((name, i) => {
      const joint = make("label", "", "joint");
      const slider = make("input");
      Object.assign(slider, { type: "range", min: -1, max: 1, step: 0.01, value: 0 });
      slider.oninput = () => {
        state.values[i] = Number(slider.value);
        state.chosen = [i];
        showActions();
      };
      slider.onpointerup = () => slider.blur(); // the arrow keys act again
      joint.append(make("span", name), slider, make("output"));
      row.append(joint);
    });
  }
  element("key-choice").hidden = !groups;
  element("key-joint").hidden = Boolean(groups) || names.length === 1;
  const sides = groups ? "act with the first, last choice" : "act with −1, +1";
  element("key-sides").textContent = sides;
  showActions();
}

function showActions() {
  const { groups } = page.actions;
  [...element("actions").children].forEach((child, i) => {
    if (groups) {
      [...child.children].forEach((b, choice) => b.classList.toggle("chosen", choice === state.chosen[i]));
      return;
    }
    child.classList.toggle("chosen", i === state.chosen[0]);
    child.querySelector("input").value = state.values[i];
    child.querySelector("output").textContent = formatNumber(state.values[i]);
  });
}

/** Act as an arrow key says; return whether it means something. */
function actByArrow(key) {
  const { names, groups } = page.actions;
  const side = key.replace("Arrow", "").toLowerCase();
  if (groups) {
    const size = groups[0];
    const named = names.slice(0, size).findIndex((name) => name.toLowerCase() === side);
    const choice = named >= 0 ? named : side === "left" ? 0 : side === "right" ? size - 1 : -1;
    if (choice < 0) return false;
    pick(0, choice);
    act();
    return true;
  }
  const joint = state.chosen[0];
  if (side === "up" || side === "down") {
    const last = names.length - 1;
    state.chosen = [Math.max(0, Math.min(last, joint + (side === "up" ? -1 : 1)))];
  } else {
    state.values[joint] = side === "left" ? -1 : 1;
    act();
  }
  showActions();
  return true;
}

// Showing.

/** Return the states from the start to a state. */
function listPath(id) {
  const path = [];
  for (let next = id; next !== null; next = state.nodes.get(next).parent) path.unshift(state.nodes.get(next));
  return path;
}

function show() {
  if (!state.nodes.size) return; // before the first answer
  const colours = readColours();
  for (const name of ["A", "B"]) showPane(name);
  const paths = { A: listPath(state.at.A), B: listPath(state.at.B) };
  const last = Math.max(5, ...Object.values(paths).map((path) => path.length - 1));
  const cursor = state.nodes.get(state.at[state.active]).depth;
  CHARTS.forEach(([key, title], i) => {
    const chart = element("compare").children[i];
    const value = state.nodes.get(state.at[state.active])[key];
    chart.querySelector(".caption").textContent = `${title} ${formatNumber(value)}`;
    const series = [
      ["B", "imagined"],
      ["A", "true"],
    ].map(([name, colour]) => {
      const values = paths[name].map((node) => (node[key] === null ? NaN : node[key]));
      return { values, colour, width: name === state.active ? 2.4 : 1.4 };
    });
    const dots = series.map((s) => ({
      points: s.values.map((v, x) => [x, v]),
      colour: s.colour,
      kind: "dots",
      radius: last > 60 ? 0 : 2,
    }));
    const options = { height: 150, x: [0, last], cursor, series: [...series, ...dots] };
    drawChart(chart.querySelector("canvas"), options, colours);
  });
  drawTree(colours);
}

function showPane(name) {
  const pane = element(`pane-${name}`);
  const node = state.nodes.get(state.at[name]);
  pane.classList.toggle("active", name === state.active);
  const header = make("header");
  header.append(make("h2", `Sequence ${name}`), make("p", describePlace(node), "hint"));
  const numbers = make("dl", "", "numbers");
  for (const [key, title] of NUMBERS) {
    const item = make("div");
    item.append(make("dt", title), make("dd", formatNumber(node[key])));
    item.lastChild.dataset.key = key;
    numbers.append(item);
  }
  const parts = [header, numbers];
  const images = make("div", "", "pictures");
  const truth = node.truth ? node.truth.obs : [];
  for (const obs of node.obs) {
    const real = truth.find((other) => other.key === obs.key);
    if (obs.kind === "image") {
      images.append(makePicture(obs, `${obs.key}, imagined`));
      if (real) images.append(makePicture(real, `${obs.key}, true`));
    } else parts.push(makeTable(obs, real));
  }
  if (!node.obs.length) {
    const real = truth.filter((obs) => obs.kind === "image");
    real.forEach((obs) => images.append(makePicture(obs, `${obs.key}, true`)));
    parts.push(make("p", "This model decodes no observations.", "empty"));
  }
  if (images.children.length) parts.splice(2, 0, images);
  parts.push(make("p", describeActions(node), "taken"));
  pane.replaceChildren(...parts);
  element("notes").replaceChildren(...[...page.notes, ...node.notes].map((note) => make("li", note)));
}

function describePlace(node) {
  const real = node.truth ? `, reward of the episode ${formatNumber(node.truth.reward)}` : "";
  return `${node.depth} steps after step ${state.first}${node.depth ? real : ""}`;
}

/** Return the names of the last actions of a sequence. */
function describeActions(node) {
  const actions = listPath(node.id).slice(1).slice(-12).map((step) => nameAction(step.action));
  return actions.length ? `actions: ${actions.join(", ")}` : "no action yet";
}

function nameAction(action) {
  const { names, groups } = page.actions;
  if (groups) return names.filter((_, i) => action[i] === 1).join(" + ");
  return action.length === 1 ? formatNumber(action[0]) : `(${action.map(formatNumber).join(" ")})`;
}

function makePicture(obs, caption) {
  const figure = make("figure");
  const canvas = make("canvas");
  const context = preparePicture(canvas, obs.width, obs.height);
  const bytes = decodeBase64(obs.data);
  const image = context.createImageData(obs.width, obs.height);
  for (let i = 0, j = 0; i < bytes.length; i += 3, j += 4) {
    image.data.set([bytes[i], bytes[i + 1], bytes[i + 2], 255], j);
  }
  context.putImageData(image, 0, 0);
  figure.append(canvas, make("figcaption", caption));
  return figure;
}

function makeTable(obs, real) {
  const table = make("table", "", "vector");
  const names = page.obs[obs.name] || [];
  const head = table.insertRow();
  for (const title of [obs.key, "imagined", ...(real ? ["true"] : [])]) head.append(make("th", title));
  obs.values.slice(0, MOST_ROWS).forEach((value, i) => {
    const row = table.insertRow();
    row.insertCell().textContent = names[i] || `${obs.key}[${i}]`;
    row.insertCell().textContent = formatNumber(value);
    if (real) row.insertCell().textContent = formatNumber(real.values[i]);
  });
  const more = obs.values.length - MOST_ROWS;
  if (more > 0) table.insertRow().insertCell().textContent = `and ${more} more`;
  return table;
}

/** Place every state: its depth across, and a line for each branch. */
function placeNodes() {
  const places = new Map();
  let lines = 0;
  for (const node of state.nodes.values()) {
    const parent = places.get(node.parent);
    const line = parent ? (parent.continued ? ++lines : parent.line) : 0;
    if (parent) parent.continued = true;
    places.set(node.id, { x: node.depth, line, continued: false });
  }
  return { places, lines };
}

function drawTree(colours) {
  const { places, lines } = placeNodes();
  const canvas = element("tree");
  const { context, width } = prepareCanvas(canvas, Math.min(600, 34 + 14 * lines));
  const deepest = Math.max(20, ...[...places.values()].map((place) => place.x));
  const across = Math.min(28, (width - 40) / deepest);
  for (const place of places.values()) {
    place.left = 20 + across * place.x;
    place.top = 17 + 14 * place.line;
  }
  context.strokeStyle = colours.line;
  context.lineWidth = 2;
  for (const node of state.nodes.values()) {
    if (node.parent === null) continue;
    const [from, to] = [places.get(node.parent), places.get(node.id)];
    context.beginPath();
    context.moveTo(from.left, from.top);
    context.lineTo(to.left, to.top);
    context.stroke();
  }
  context.fillStyle = colours.muted;
  for (const place of places.values()) drawDot(context, place.left, place.top, 2.5);
  for (const [name, colour, radius] of [
    ["B", "imagined", 7],
    ["A", "true", 5],
  ]) {
    const place = places.get(state.at[name]);
    context.fillStyle = colours[colour];
    drawDot(context, place.left, place.top, radius);
  }
  canvas.onclick = (event) => {
    const distance = ([, place]) => Math.hypot(place.left - event.offsetX, place.top - event.offsetY);
    const nearest = [...places].sort((a, b) => distance(a) - distance(b))[0];
    if (distance(nearest) < 14) go(nearest[0]);
  };
}

// Controls.

function buildPage() {
  element("title").textContent = page.run.title;
  for (const [name, value] of page.run.facts) {
    const item = make("div");
    item.append(make("dt", name), make("dd", value));
    element("facts").append(item);
  }
  page.episodes.forEach((episode, i) => element("episode").append(new Option(episode.name, i)));
  for (const [, title] of CHARTS) {
    const chart = make("div");
    chart.append(make("p", title, "caption"), make("canvas"));
    element("compare").append(chart);
  }
  buildActions();
  chooseEpisode();
}

function chooseEpisode() {
  element("start").max = page.episodes[Number(element("episode").value)].length;
  element("start").value = 0;
  showStart();
}

function showStart() {
  const slider = element("start");
  element("start-value").textContent = `${slider.value} of ${slider.max}`;
}

/** Repeat the chosen mode while "Run" is on, as fast as the model answers. */
async function keepRunning() {
  const modes = { policy: letPolicyAct, act, recorded: followRecorded };
  while (element("run").checked && (await modes[element("mode").value]())) {
    await new Promise(requestAnimationFrame);
  }
  element("run").checked = false;
}

const KEYS = {
  " ": act,
  Backspace: stepBack,
  Enter: begin,
  p: letPolicyAct,
  r: followRecorded,
  b: branch,
  x: () => activate(otherPane()),
};

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.tagName === "SELECT" || target.type === "number") return;
  const presses = target.tagName === "BUTTON" || target.type === "checkbox";
  if (presses && (key === " " || key === "Enter")) return;
  if (key.startsWith("Arrow")) {
    if (target.type === "range" || !actByArrow(key)) return;
  } else if (/^[1-9]$/.test(key) && page.actions.groups && Number(key) <= page.actions.groups[0]) {
    pick(0, Number(key) - 1);
    act();
  } else {
    const handle = KEYS[key.length === 1 ? key.toLowerCase() : key];
    if (!handle) return;
    handle();
  }
  event.preventDefault();
}

element("begin").onclick = begin;
element("episode").onchange = chooseEpisode;
element("start").oninput = showStart;
element("back").onclick = stepBack;
element("act").onclick = act;
element("policy").onclick = letPolicyAct;
element("recorded").onclick = followRecorded;
element("branch").onclick = branch;
element("swap").onclick = () => activate(otherPane());
element("run").onchange = keepRunning;
for (const name of ["A", "B"]) element(`pane-${name}`).onclick = () => activate(name);
document.addEventListener("keydown", onKey);
window.addEventListener("resize", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
buildPage();
begin();
