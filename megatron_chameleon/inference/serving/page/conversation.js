// A conversation as a tree: asking again or editing an earlier message adds a branch, and nothing
// that was said is lost. What is shown is one path through the tree.
//
// A node is a message:
//
//     {id, conversation, parent, order, role: "user"|"assistant", parts,
//      and of an answer: state, seed, options, usage, seconds, error}
//
// `state` of an answer: "waiting", "writing", then "stop", "length", "stopped" (by the user),
// "interrupted" (the page was closed) or "error".

import { mergeParts, textOf, usable, wellFormed } from "./parts.js";

const ROOT = "root";

export const isOpen = (node) => node.state === "waiting" || node.state === "writing";

export class Conversation {
  #nodes = new Map();

  /** @param {{id?: string, started?: number, chosen?: object}} record What `record` once gave. */
  constructor(record = {}, nodes = []) {
    this.id = record.id ?? newId();
    this.started = record.started ?? Date.now();
    this.chosen = { ...record.chosen };
    for (const node of [...nodes].sort((a, b) => a.order - b.order)) {
      // Whoever closed the page also closed the connection, so no more is to come.
      if (isOpen(node)) node.state = "interrupted";
      this.#nodes.set(node.id, node);
    }
  }

  /** What is stored beside the nodes. */
  record() {
    return {
      id: this.id,
      started: this.started,
      changed: Date.now(),
      title: this.title(),
      chosen: { ...this.chosen },
    };
  }

  /** The beginning of the first message, for a list of conversations. */
  title() {
    const first = this.path()[0];
    if (!first) return "";
    const text = textOf(first.parts).trim().replace(/\s+/g, " ");
    const words = text.length > 80 ? `${[...text].slice(0, 80).join("")}…` : text;
    return words || "Image";
  }

  get isEmpty() {
    return this.#nodes.size === 0;
  }

  /** The messages that are shown, in order. */
  path() {
    const found = [];
    let node = this.#child(null);
    while (node) {
      found.push(node);
      node = this.#child(node.id);
    }
    return found;
  }

  /** The messages up to a node, without it. */
  before(node) {
    const found = [];
    let parent = this.#nodes.get(node.parent);
    while (parent) {
      found.unshift(parent);
      parent = this.#nodes.get(parent.parent);
    }
    return found;
  }

  /** The versions of a message, in the order in which they were made. */
  siblings(node) {
    return this.#children(node.parent);
  }

  get(id) {
    return this.#nodes.get(id);
  }

  /** Add a message after another one, or at the beginning, and show it. */
  add(parent, role, parts, more = {}) {
    const node = {
      id: newId(),
      conversation: this.id,
      parent: parent?.id ?? null,
      order: Math.max(0, ...[...this.#nodes.values()].map((known) => known.order)) + 1,
      role,
      parts,
      ...more,
    };
    this.#nodes.set(node.id, node);
    this.choose(node);
    return node;
  }

  /** Show this version of a message. */
  choose(node) {
    this.chosen[node.parent ?? ROOT] = node.id;
  }

  #children(parent) {
    return [...this.#nodes.values()].filter((node) => node.parent === parent);
  }

  #child(parent) {
    const children = this.#children(parent);
    return children.find((node) => node.id === this.chosen[parent ?? ROOT]) ?? children.at(-1);
  }
}

/**
 * The turns that a list of messages makes: user and assistant alternate, and none is empty. An
 * answer that failed before its first word leaves two messages of the user, which become one.
 */
export function turnsOf(messages) {
  const turns = [];
  for (const { role, parts } of messages) {
    const kept = usable(parts);
    if (!kept.length) continue;
    const last = turns.at(-1);
    if (last?.role === role) last.parts = mergeParts(last.parts, kept);
    else if (last || role === "user") turns.push({ role, parts: kept });
  }
  return turns;
}

/** Messages as the server takes them, in OpenAI's format. */
export function requestMessages(messages) {
  return turnsOf(messages).map(({ role, parts }) => ({
    role,
    content: parts.every((part) => part.type === "text")
      ? wellFormed(textOf(parts))
      : parts.map((part) =>
          part.type === "text"
            ? { type: "text", text: wellFormed(part.text) }
            : { type: "image_url", image_url: { url: part.url } },
        ),
  }));
}

/** A conversation as a document that `chameleon preprocess` and `chameleon generate` read. */
export function documentOf(messages) {
  return {
    messages: turnsOf(messages).map(({ role, parts }) => ({
      role,
      content: parts.map((part) =>
        part.type === "text"
          ? { type: "text", text: wellFormed(part.text) }
          : { type: "image", image: part.url },
      ),
    })),
  };
}

function newId() {
  // crypto.randomUUID is missing where the page comes over plain HTTP from another machine.
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
