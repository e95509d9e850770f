"use strict";

// Elements of the page: captions, charts and pictures. Texts are set as text, never as markup.

/** Make an element with properties and children, which are elements or texts. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Make a card of the page with a title and a hint; width: "wide", "left" or "right". */
function makeCard(title, hint, width) {
  const header = make("header", {}, make("h2", { textContent: title }));
  if (hint) header.append(make("p", { className: "hint", textContent: hint }));
  return make("section", { className: `card ${width}` }, header);
}

/** Make a grid of charts. */
function makeGrid(columns) {
  const grid = make("div", { className: "charts" });
  grid.style.setProperty("--columns", columns);
  return grid;
}

/**
 * A canvas with a caption of named numbers.
 *
 * name: of the chart. values: [[name, colour, dashed]] of the numbers in the caption.
 * steps: whether its x-axis has steps, so that a click goes to one.
 */
class Figure {
  constructor(name, values = [], steps = true) {
    this.name = name;
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    this.caption = make("figcaption", { className: "caption" });
    this.caption.append(make("span", { className: "name", textContent: name }));
    this.values = values.map(([label, colour, dashed]) => {
      const number = make("span", { className: dashed ? "value dashed" : "value" });
      number.style.setProperty("--colour", `var(--${colour})`);
      this.caption.append(number);
      return { label, number };
    });
    this.root = make("figure", { className: steps ? "steps" : "" }, this.caption, this.canvas);
    this.scale = null;
  }

  /** Show the numbers of the caption, which also describe the picture to screen readers. */
  show(numbers) {
    this.values.forEach(({ label, number }, i) => {
      const text = typeof numbers[i] === "string" ? numbers[i] : formatNumber(numbers[i]);
      number.textContent = `${label} ${text}`.trim();
    });
    const words = this.values.map(({ number }) => number.textContent);
    this.canvas.setAttribute("aria-label", [this.name, ...words].join(", "));
  }

  /** Call a function with the step at which the chart is clicked or dragged. */
  onStep(go) {
    const move = (event) => {
      if (this.scale && event.buttons & 1) {
        const left = this.canvas.getBoundingClientRect().left;
        go(this.scale.fromX(event.clientX - left), event.shiftKey);
      }
    };
    this.canvas.addEventListener("pointerdown", move);
    this.canvas.addEventListener("pointermove", move);
  }
}

/** A picture with a title and a line of text below. */
class Frame {
  constructor(title, smooth = false) {
    this.title = title;
    this.canvas = make("canvas", { width: 1, height: 1 });
    this.canvas.setAttribute("role", "img");
    this.line = make("span");
    const caption = make("figcaption", {}, make("b", { textContent: title }), this.line);
    this.root = make("figure", { className: smooth ? "smooth" : "" }, this.canvas, caption);
  }

  /** Set the line below the picture. */
  show(text) {
    this.line.textContent = text;
    this.canvas.setAttribute("aria-label", `${this.title}, ${text}`);
  }
}
