// The list of messages. An element stays as long as its message is shown: what grows is changed in
// place, so that selections, focus and the place in the page survive.

import { isOpen } from "./conversation.js";
import { icon, iconButton, make } from "./dom.js";
import { usable } from "./parts.js";
import { displaySize } from "./pictures.js";
import { showText } from "./richtext.js";

/** What the user can do about each kind of error: the button's words, and what the button calls. */
const REMEDIES = {
  key: ["Enter the key", "enterKey"],
  busy: ["Try again", "retry"],
  context: ["Start a new conversation", "startNew"],
  request: ["Try again", "retry"],
  server: ["Try again", "retry"],
  lost: ["Try again", "retry"],
};
const HEADINGS = {
  key: "The server asks for an API key",
  busy: "The server is busy",
  context: "The context is full",
  request: "The server refused this message",
  server: "The server could not answer",
  lost: "No connection",
};

export class MessageList {
  #host;
  #actions;
  #views = new Map();

  /** @param {object} actions What the buttons of a message call, each with its node. */
  constructor(host, actions) {
    this.#host = host;
    this.#actions = actions;
  }

  /** Show these messages. @param {(node) => object[]} siblings The versions of a message. */
  show(path, siblings) {
    const elements = path.map((node) => {
      if (!this.#views.has(node.id)) this.#views.set(node.id, new MessageView(node, this.#actions));
      const view = this.#views.get(node.id);
      view.update(siblings(node));
      return view.element;
    });
    const wanted = new Set(elements);
    for (const [id, view] of this.#views) {
      if (!wanted.has(view.element)) {
        view.element.remove();
        this.#views.delete(id);
      }
    }
    elements.forEach((element, index) => {
      // Moving an element would take the focus out of it.
      const there = this.#host.children[index];
      if (there !== element) this.#host.insertBefore(element, there ?? null);
    });
  }

  /** Show what has changed in one message. */
  update(node, siblings) {
    this.#views.get(node.id)?.update(siblings);
  }

  /** Put the focus on a button of a message, as after it has been replaced by another version. */
  focus(node, selector) {
    const element = this.#views.get(node.id)?.element;
    (element?.querySelector(`${selector}:not(:disabled)`) ?? element?.querySelector(".pager button:not(:disabled)"))?.focus();
  }

  /** Pale what comes after the message that is being edited. */
  markEdited(path, node) {
    const from = node ? path.indexOf(node) : -1;
    path.forEach((other, index) => {
      this.#views.get(other.id)?.element.classList.toggle("pale", from >= 0 && index >= from);
    });
  }
}

class MessageView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.body = make("div", { class: "body" });
    this.after = make("div", { class: "after" });
    this.tools = make("div", { class: "tools" });
    const who = node.role === "user" ? "You" : "Model";
    this.element = make(
      "li",
      { class: `message ${node.role}` },
      make("span", { class: "hidden", text: `${who}: ` }),
      this.body,
      this.after,
      this.tools,
    );
    this.shown = "";
  }

  update(siblings) {
    const { node } = this;
    this.#updateParts();
    // The rest changes seldom; rebuilding it with every token would take the focus away.
    const state = JSON.stringify([
      node.state, node.error, node.usage, siblings.map(({ id }) => id), usable(node.parts).length,
    ]);
    if (state !== this.shown) {
      this.shown = state;
      this.element.setAttribute("aria-busy", String(isOpen(node)));
      this.after.replaceChildren(...this.#notes());
      this.tools.replaceChildren(...this.#tools(siblings));
    }
  }

  #updateParts() {
    const { body, node } = this;
    node.parts.forEach((part, index) => {
      let element = body.children[index];
      if (element?.dataset.type !== part.type) {
        const made = part.type === "text" ? make("div", { class: "text" }) : picture(this.actions);
        made.dataset.type = part.type;
        if (element) element.replaceWith(made);
        else body.append(made);
        element = made;
      }
      if (part.type === "text") showText(element, part.text);
      else showPicture(element, part, node);
    });
    while (body.children.length > node.parts.length) body.lastElementChild.remove();
    body.hidden = !node.parts.length;
    // An image behind a text has its place in the sentence.
    const first = node.parts.findIndex((part) => part.type === "text");
    const isWoven = first >= 0 && node.parts.slice(first).some((part) => part.type === "image");
    body.classList.toggle("woven", isWoven);
  }

  #notes() {
    const { node } = this;
    const notes = [];
    if (node.state === "waiting") notes.push(waiting(node));
    if (node.state === "stopped") notes.push(note("You stopped this answer."));
    if (node.state === "interrupted") {
      notes.push(note("This answer was interrupted when the page was closed."));
    }
    if (node.state === "length") notes.push(note(lengthNote(node)));
    if (node.state === "stop" && !usable(node.parts).length) notes.push(note("The model ended its answer without a word."));
    if (node.error) notes.push(this.#problem(node.error));
    return notes;
  }

  #problem({ kind, message, retryAfter }) {
    const [label, action] = REMEDIES[kind];
    const wait = retryAfter ? ` It asks to wait ${retryAfter} s.` : "";
    const button = make("button", {
      type: "button", class: "act", text: label, on: { click: () => this.actions[action](this.node) },
    });
    return make(
      "div",
      { class: "problem", role: "alert" },
      make("strong", { text: HEADINGS[kind] }),
      make("p", { dir: "auto", text: message + wait }),
      button,
    );
  }

  #tools(siblings) {
    const { node, actions } = this;
    if (isOpen(node)) return [];
    // Of an answer that has not begun, the error above says what to do.
    const isBegun = node.parts.length > 0 || !node.error;
    const tools = [];
    if (node.role === "user") tools.push(iconButton("edit", "Edit this message", () => actions.edit(node), { class: "tool edit" }));
    if (usable(node.parts).some((part) => part.type === "text")) {
      tools.push(iconButton("copy", "Copy the text", () => actions.copy(node), { class: "tool copy" }));
    }
    if (node.role === "assistant" && isBegun) {
      const label = "Answer again with another seed";
      tools.push(iconButton("again", label, () => actions.regenerate(node), { class: "tool again" }));
    }
    if (siblings.length > 1) tools.push(pager(node, siblings, actions));
    if (node.seed !== undefined && isBegun) tools.push(seed(node, actions));
    const figures = figuresOf(node);
    if (figures && isBegun) tools.push(make("span", { class: "figures", text: figures }));
    return tools;
  }
}

function pager(node, siblings, actions) {
  const place = siblings.indexOf(node);
  const go = (step, name) => () => actions.choose(siblings[place + step], `.${name}`);
  const button = (name, label, step) =>
    iconButton(name, label, go(step, name), {
      class: `tool ${name}`, disabled: !siblings[place + step],
    });
  const count = `${place + 1}/${siblings.length}`;
  return make(
    "span",
    { class: "pager", role: "group", "aria-label": `Version ${place + 1} of ${siblings.length}` },
    button("before", "Version before", -1),
    make("span", { class: "count", text: count }),
    button("after", "Version after", 1),
  );
}

function seed(node, actions) {
  const label = `Seed ${node.seed}. Use it for the next answers too`;
  return make(
    "button",
    { type: "button", class: "seed", title: "Use this seed for the next answers too", "aria-label": label, on: { click: () => actions.fixSeed(node.seed) } },
    `seed ${node.seed}`,
    icon("pin"),
  );
}

function figuresOf({ usage, seconds }) {
  const figures = [];
  if (usage?.answerTokens) figures.push(`${usage.answerTokens.toLocaleString("en")} tokens`);
  if (seconds) figures.push(`${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`);
  return figures.join(" · ");
}

const note = (text) => make("p", { class: "note", text });

/** Why an answer has no more tokens, with the numbers, and what to do for more. */
function lengthNote({ options, usage, context }) {
  const { promptTokens: before = 0, answerTokens: written = 0 } = usage ?? {};
  const number = (value) => value.toLocaleString("en");
  if (context && before + written >= context) {
    return `The context of ${number(context)} tokens is full: ${number(before)} came before this answer, and it has ${number(written)}. A new conversation has room again.`;
  }
  if (options?.max_tokens) {
    return `The answer ended at ${number(options.max_tokens)} tokens, the limit in the settings.`;
  }
  return `The answer ended after ${number(written)} tokens, which is as long as the server lets it be.`;
}

/** What is shown before the first piece of an answer: that something happens, and for how long. */
function waiting(node) {
  const words = make("span", { text: node.isAccepted ? "The model is starting" : "Sending" });
  const element = make(
    "p",
    { class: "waiting" },
    make("span", { class: "dots", "aria-hidden": "true" }, make("i"), make("i"), make("i")),
    words,
  );
  const began = node.began ?? Date.now();
  const timer = setInterval(() => {
    if (!element.isConnected) return clearInterval(timer);
    const seconds = Math.round((Date.now() - began) / 1000);
    if (seconds < 2) return;
    words.textContent = node.isAccepted
      ? `In the queue for ${seconds} s`
      : `Waiting for the server for ${seconds} s`;
  }, 500);
  return element;
}

function picture(actions) {
  const image = make("img", { alt: "" });
  const open = make("button", { type: "button", class: "open", "aria-label": "Enlarge the image" }, image);
  const bar = make("progress", { max: "1", "aria-label": "Progress of the image" });
  const save = iconButton("save", "Save the image", () => actions.saveImage(image.src));
  open.addEventListener("click", () => actions.enlarge(image));
  const figure = make("figure", {}, open, bar, make("figcaption", {}, save));
  image.addEventListener("load", () => figure.classList.remove("broken"));
  image.addEventListener("error", () => {
    figure.classList.add("broken");
    image.alt = "An image that this browser cannot show";
  });
  return figure;
}

function showPicture(figure, part, node) {
  const image = figure.querySelector("img");
  const bar = figure.querySelector("progress");
  const isGrowing = Boolean(part.isPartial) && isOpen(node);
  if (part.url && image.getAttribute("src") !== part.url) image.src = part.url;
  if (part.width) {
    const { width, height, isEnlarged } = displaySize(part.width, part.height);
    image.width = width;
    image.height = height;
    image.classList.toggle("enlarged", isEnlarged);
  }
  const whose = node.role === "user" ? part.name || "Your image" : "Image by the model";
  image.alt = isGrowing ? "Image, not finished" : whose;
  figure.classList.toggle("empty", !part.url);
  figure.classList.toggle("growing", isGrowing);
  figure.classList.toggle("cut", Boolean(part.isPartial) && !isOpen(node));
  bar.hidden = !isGrowing;
  bar.value = part.progress ?? 0;
  figure.querySelector(".open").disabled = !part.url || isGrowing;
  figure.querySelector("figcaption").hidden = Boolean(part.isPartial) || node.role === "user";
}
