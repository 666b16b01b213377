// One answer while it is written: from the request to its last word.

import { ServerError } from "./api.js";
import { requestMessages } from "./conversation.js";
import { addText } from "./parts.js";
import { sizeOf } from "./pictures.js";

/** How often an answer that grows is kept, in milliseconds. */
const KEEP_EVERY = 1500;

export class Answering {
  #abort = new AbortController();
  #places = new Map();
  #kept = 0;
  #isDrawing = false;

  /**
   * @param {object} node The answer's node, which is changed as the answer grows.
   * @param {{onChange: () => void, onKeep: () => Promise<void>}} on Called when there is something
   *     to show, and to keep.
   */
  constructor(server, model, conversation, node, on) {
    this.server = server;
    this.node = node;
    this.on = on;
    this.messages = messagesFor(model, conversation.before(node));
    this.body = {
      model: model?.id, // left out while it is not known: a server has one
      messages: requestMessages(this.messages),
      stream_images: true,
      ...withoutBlank(node.options),
    };
  }

  /** Ask, and take what comes until the answer ends. It never fails: the node has the error. */
  run() {
    this.done = this.#run();
    return this.done;
  }

  stop() {
    this.#abort.abort();
  }

  keep() {
    this.#kept = Date.now();
    return this.on.onKeep();
  }

  async #run() {
    const { node } = this;
    const began = performance.now();
    try {
      for await (const event of this.server.chat(this.body, this.#abort.signal)) this.#take(event);
      if (node.state !== "length") node.state = "stop";
    } catch (error) {
      if (this.#abort.signal.aborted) node.state = "stopped";
      else {
        const { kind, message, retryAfter } = error instanceof ServerError
          ? error
          : { kind: "server", message: `The page failed: ${error.message}` };
        node.state = "error";
        node.error = { kind, message, retryAfter };
      }
    }
    node.seconds = (performance.now() - began) / 1000;
    await Promise.all(node.parts.map((part) => part.type === "image" && measure(part)));
    await this.keep();
  }

  #take(event) {
    const { node } = this;
    if (event.type === "open") node.isAccepted = true;
    if (event.type === "usage") node.usage = event;
    if (event.type === "finish") node.state = event.reason === "length" ? "length" : "writing";
    if (event.type === "text") {
      node.state = "writing";
      addText(node.parts, event.text);
    }
    if (event.type === "image") {
      node.state = "writing";
      this.#takeImage(event);
    }
    this.#draw();
  }

  #takeImage({ index, url, isComplete, progress }) {
    const { node } = this;
    if (!this.#places.has(index)) {
      this.#places.set(index, node.parts.length);
      node.parts.push({ type: "image", url: "" });
    }
    const part = node.parts[this.#places.get(index)];
    if (url) part.url = url;
    part.isPartial = !isComplete;
    part.progress = progress;
    if (url && !part.width) measure(part).then(() => this.#draw());
  }

  /** Show what has come, at most once a frame: tokens may come faster than a screen shows them. */
  #draw() {
    if (Date.now() - this.#kept > KEEP_EVERY) this.keep();
    if (this.#isDrawing) return;
    this.#isDrawing = true;
    const draw = () => {
      this.#isDrawing = false;
      this.on.onChange();
    };
    // A tab in the background draws no frames.
    if (document.hidden) setTimeout(draw, 200);
    else requestAnimationFrame(draw);
  }
}

/**
 * The messages that the model sees. One that was not trained on conversations takes each message as
 * the beginning of a document of its own.
 */
function messagesFor(model, before) {
  return model?.chameleon.format === "document" ? before.slice(-1) : before;
}

function withoutBlank(options) {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== ""));
}

async function measure(part) {
  if (part.width || !part.url) return;
  try {
    Object.assign(part, await sizeOf(part.url));
  } catch {
    // It is shown as large as the browser finds it.
  }
}
