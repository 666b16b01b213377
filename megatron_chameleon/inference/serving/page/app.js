// The chat page: puts its pieces together, and says what happens when something is sent, stopped,
// asked again, edited or opened. See conversation.js for what a conversation is, and api.js for
// what the server is asked.

import { Answering } from "./answering.js";
import { Server, ServerError } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation, documentOf, isOpen } from "./conversation.js";
import { askForKey, enlarge, listConversations, notice, saveImage, stamp } from "./dialogs.js";
import { byId, copyText, make, saveFile } from "./dom.js";
import { MessageList } from "./messages.js";
import { textOf, wellFormed } from "./parts.js";
import { Follower, fitToViewport } from "./scroll.js";
import { Settings, nextSeed } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Store, memoryBackend, openBackend, small } from "./store.js";

const TROUBLE = {
  full: "This browser's storage is full: what comes now does not survive a reload. Download the conversation to keep it, or delete older ones.",
  off: "This browser keeps nothing for this page: the conversation does not survive a reload. Download it to keep it.",
};

class App {
  server = new Server(keyOfAddress() || small.get("sessionStorage", "key"));
  settings = new Settings(small.get("localStorage", "settings"));
  conversation = new Conversation();
  model = null;
  problem = null;
  answering = null;

  async start() {
    fitToViewport();
    this.list = new MessageList(byId("log"), {
      edit: (node) => this.composer.edit(node),
      copy: (node) => this.#copy(textOf(node.parts), "The text"),
      regenerate: (node) => this.regenerate(node),
      retry: (node) => this.retry(node),
      choose: (node, selector) => this.#choose(node, selector),
      fixSeed: (seed) => this.#fixSeed(seed),
      enterKey: (node) => this.#enterKey(node.error.message).then((isGiven) => isGiven && this.retry(node)),
      startNew: () => this.startNew(),
      saveImage,
      enlarge,
    });
    this.panel = new SettingsPanel(this.settings, () =>
      small.set("localStorage", "settings", String(this.settings)),
    );
    this.composer = new Composer({
      maySend: () => !this.panel.complain(),
      send: (parts, edited) => this.send(parts, edited),
      edit: (node) => this.list.markEdited(this.conversation.path(), node),
      editLast: () => this.#editLast(),
      notice,
    });
    this.follower = new Follower(byId("scroller"), byId("log"), byId("to-end"));
    this.#listen();
    this.ready = this.#restore();
    await this.ready;
    // On a phone this would bring up the keyboard at once.
    const isFree = document.activeElement === document.body;
    if (isFree && !matchMedia("(pointer: coarse)").matches) this.composer.focus();
    await this.#meetModel();
    this.store.trim();
  }

  /**
   * Read the conversation that was shown last. What is done meanwhile waits for it, so that no
   * message ends up in a conversation that is replaced a moment later.
   */
  async #restore() {
    const backend = (await openBackend().catch(() => null)) ?? this.#withoutBackend();
    this.store = new Store(backend, (reason) => notice(TROUBLE[reason], 20));
    this.conversation = await this.#read(
      small.get("sessionStorage", "conversation") || (await this.#latest()),
    );
    small.set("sessionStorage", "conversation", this.conversation.id);
    this.show();
    this.follower.toEnd();
  }

  #withoutBackend() {
    notice(TROUBLE.off, 20);
    return memoryBackend();
  }

  /** Ask the server for its model; until it answers, the page says what is missing. */
  async #meetModel() {
    try {
      this.model = await this.server.model();
      this.problem = null;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.problem = error;
      // The first time, everybody lacks the key; only a wrong one is worth the server's words.
      const reason = this.server.key ? error.message : "";
      if (error.kind === "key" && (await this.#askForKey(reason))) return this.#meetModel();
    }
    const can = this.model?.chameleon ?? {};
    byId("model").textContent = this.model?.id ?? "";
    byId("model").title = this.model?.id ?? "";
    document.title = this.model ? `${this.model.id} · Chameleon` : "Chameleon";
    this.composer.takesImages = can.images_in !== false;
    byId("text").placeholder =
      can.format === "document" ? "Write the beginning of a document" : "Write a message";
    byId("attach").hidden = !this.composer.takesImages;
    this.settings.defaults = can.defaults ?? {};
    this.panel.describe(can);
    this.show();
  }

  /** Send a message; `edited` is the earlier one that it takes the place of. */
  async send(parts, edited) {
    await this.ready;
    const path = this.conversation.path();
    const parent = edited ? this.conversation.get(edited.parent) : path.at(-1);
    const message = this.conversation.add(parent, "user", parts);
    this.store.save(this.conversation, [message]);
    this.#answer(message, nextSeed(this.settings.own, []));
  }

  /** Write another version of an answer, and keep those that are there. */
  regenerate(node) {
    if (this.answering || this.panel.complain()) return;
    const seed = nextSeed(this.settings.own, this.conversation.siblings(node));
    this.#answer(this.conversation.get(node.parent), seed);
  }

  /** Try a failed answer again. One that has not begun is no version worth keeping. */
  retry(node) {
    if (this.answering || this.panel.complain()) return;
    if (node.parts.length) return this.regenerate(node);
    this.#answer(this.conversation.get(node.parent), nextSeed(this.settings.own, []), node);
  }

  async #answer(message, seed, again) {
    const { own } = this.settings;
    const fresh = {
      parts: [],
      state: "waiting",
      seed,
      options: { ...own, seed },
      began: Date.now(),
      context: this.model?.chameleon.context_tokens,
    };
    const cleared = { error: undefined, usage: undefined, seconds: undefined, isAccepted: false };
    const node = again
      ? Object.assign(again, cleared, fresh)
      : this.conversation.add(message, "assistant", [], fresh);
    const { conversation } = this;
    this.answering = new Answering(this.server, this.model, conversation, node, {
      onChange: () => {
        if (this.conversation === conversation) this.list.update(node, conversation.siblings(node));
      },
      onKeep: () => this.store.save(conversation, [node]),
    });
    this.composer.setBusy(true);
    this.show();
    this.follower.toEnd();
    say("The model is answering.");
    await this.answering.run();
    this.answering = null;
    this.composer.setBusy(false);
    if (this.conversation === conversation) this.show();
    say(summaryOf(node));
    if (node.error?.kind === "key" && (await this.#enterKey(node.error.message))) this.retry(node);
  }

  stop() {
    this.answering?.stop();
  }

  async startNew() {
    await this.ready;
    await this.#replace(new Conversation());
    this.composer.focus();
  }

  async #open(id) {
    await this.#replace(await this.#read(id));
  }

  /** A kept conversation, or a new one if it is not there. */
  async #read(id) {
    const found = await this.store.load(id);
    return found ? new Conversation(found.record, found.nodes) : new Conversation();
  }

  /** Show another conversation. An answer of this one that is still written is stopped and kept. */
  async #replace(conversation) {
    this.stop();
    await this.answering?.done;
    this.conversation = conversation;
    small.set("sessionStorage", "conversation", conversation.id);
    this.composer.cancelEdit();
    this.show();
    this.follower.toEnd();
  }

  /** A new tab goes on with the conversation that was last changed. */
  async #latest() {
    return (await this.store.list())[0]?.id;
  }

  show() {
    const { conversation } = this;
    this.list.show(conversation.path(), (node) => conversation.siblings(node));
    byId("copy-document").disabled = byId("save-document").disabled = conversation.isEmpty;
    byId("empty").hidden = !conversation.isEmpty && !this.problem;
    byId("empty").replaceChildren(...(this.problem ? this.#trouble() : this.#welcome()));
  }

  #trouble() {
    const again = make("button", {
      type: "button", class: "act", text: this.problem.kind === "key" ? "Enter the key" : "Try again",
      on: { click: () => this.#meetModel() },
    });
    const title = this.problem.kind === "key" ? "The server asks for an API key" : "No connection to the model";
    return [
      make("div", { class: "problem", role: "alert" }, make("strong", { text: title }),
        make("p", { text: this.problem.message + (this.problem.kind === "lost" ? " Is “chameleon serve” still running?" : "") }), again),
    ];
  }

  #welcome() {
    const can = this.model?.chameleon;
    if (!can) return [];
    const kinds = can.images_out === false ? "text" : "text and images";
    const isDocument = can.format === "document";
    const lines = isDocument
      ? `This model was not trained on conversations. It takes each message as the beginning of a new document, and goes on in ${kinds}.`
      : `It answers in ${kinds}${can.images_in === false ? "" : ", and reads both"}.`;
    const given = Array.isArray(can.examples) ? can.examples.slice(0, 6) : [];
    const examples = given.map((example) => {
      const { text, force } = typeof example === "string" ? { text: example } : (example ?? {});
      return make("button", {
        type: "button", class: "example", text, dir: "auto",
        on: { click: () => this.#tryExample(text, force) },
      });
    });
    return [
      make("h2", { text: isDocument ? "Begin a document" : "Talk to the model" }),
      make("p", { text: lines }),
      make("div", { class: "examples" }, ...examples),
      make("p", { class: "help", text: this.#figures(can) }),
    ];
  }

  /** How much the model reads at a time. */
  #figures({ context_tokens: context, codes_per_image: codes }) {
    if (!context) return "";
    const image = codes ? `; an image takes ${codes.toLocaleString("en")}` : "";
    return `The model reads ${context.toLocaleString("en")} tokens at a time${image}.`;
  }

  #tryExample(text, force) {
    if (force !== undefined) {
      this.settings.set("force", force);
      this.panel.show();
    }
    this.composer.write(text);
  }

  #choose(node, selector) {
    if (this.answering) return notice("Wait for the answer to end, or stop it.");
    this.conversation.choose(node);
    this.store.save(this.conversation, [node]);
    this.show();
    this.list.focus(node, selector);
  }

  #fixSeed(seed) {
    this.settings.set("seed", seed);
    small.set("localStorage", "settings", String(this.settings));
    this.panel.show();
    notice(`The next answers use seed ${seed}.`);
  }

  #editLast() {
    const last = this.conversation.path().findLast((node) => node.role === "user");
    if (last) this.composer.edit(last);
    return Boolean(last);
  }

  async #askForKey(reason) {
    const key = await askForKey(reason);
    if (!key) return false;
    this.server.key = key;
    small.set("sessionStorage", "key", key);
    return true;
  }

  /** Ask for the key that an answer lacks. */
  async #enterKey(reason) {
    if (!(await this.#askForKey(reason))) return false;
    if (!this.model) await this.#meetModel();
    return true;
  }

  async #copy(text, what) {
    const isCopied = await copyText(wellFormed(text));
    notice(isCopied ? `${what} was copied.` : "This browser does not let the page copy.");
  }

  #listen() {
    byId("stop").addEventListener("click", () => this.stop());
    byId("new").addEventListener("click", () => this.startNew());
    byId("copy-document").addEventListener("click", () =>
      this.#copy(JSON.stringify(documentOf(this.conversation.path())), "The conversation"),
    );
    byId("save-document").addEventListener("click", () => this.#download());
    byId("open-conversations").addEventListener("click", async () => {
      await this.ready;
      listConversations(await this.store.list(), this.conversation.id, {
        open: (id) => this.#open(id),
        remove: async (ids) => {
          for (const id of ids) await this.store.remove(id);
          if (ids.includes(this.conversation.id)) await this.#replace(new Conversation());
        },
      });
    });
    addEventListener("keydown", (event) => this.#key(event));
    // What was written until now is kept, even if the page is closed before the answer ends.
    addEventListener("pagehide", () => this.answering?.keep());
  }

  #download() {
    const line = `${JSON.stringify(documentOf(this.conversation.path()))}\n`;
    const url = URL.createObjectURL(new Blob([line], { type: "application/jsonl" }));
    saveFile(`conversation-${stamp()}.jsonl`, url);
    setTimeout(() => URL.revokeObjectURL(url), 60000); // not before the browser has read it
  }

  #key(event) {
    if (event.isComposing || event.defaultPrevented) return;
    if (document.querySelector("dialog:modal")) return; // its own keys, such as Esc, come first
    const isTyping = event.target.closest?.("input, textarea, select, [contenteditable]");
    const isShortcut = event.key === "k" && (event.ctrlKey || event.metaKey) && !event.altKey;
    if (event.key === "Escape") {
      if (this.answering) this.stop();
      else if (byId("settings").open) byId("settings").close();
      else this.composer.cancelEdit();
    } else if (isShortcut || (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey)) {
      event.preventDefault();
      this.composer.focus();
    }
  }
}

/** Have screen readers read something, once. */
function say(text) {
  byId("said").textContent = text;
}

function summaryOf(node) {
  if (node.error) return ""; // the error is read where it is shown
  const images = node.parts.filter((part) => part.type === "image" && !part.isPartial).length;
  const text = textOf(node.parts).trim();
  const seen = images ? ` with ${images === 1 ? "an image" : `${images} images`}` : "";
  const cut = text.length > 600 ? `${text.slice(0, 600)} …` : text;
  return `${node.state === "stopped" ? "Stopped" : "Answer"}${seen}: ${cut}`;
}

/** A key in the address (#key=...), which is taken out of it so that no history keeps it. */
function keyOfAddress() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key") ?? "";
  if (key) {
    history.replaceState(null, "", location.pathname + location.search);
    small.set("sessionStorage", "key", key);
  }
  return key;
}

new App().start();
