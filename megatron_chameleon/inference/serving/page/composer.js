// The message that is being written: its text, its images, and the keys that work in it.

import { byId, iconButton, make } from "./dom.js";
import { joinParts, placeOf, splitParts, usable } from "./parts.js";
import { MOST_IMAGES, displaySize, imagesOf, readImage } from "./pictures.js";
import { small } from "./store.js";

export class Composer {
  #text = byId("text");
  #list = byId("thumbnails");
  #files = byId("files");
  #images = [];
  #reading = 0;
  #editing = null;
  #draft = null;

  /**
   * @param {object} on What happens: `maySend()` is asked before `send(parts, editedNode)`;
   *     `edit(node or null)`, `editLast()`, and `notice(text)` for what cannot be done.
   */
  constructor(on) {
    this.on = on;
    this.takesImages = true;
    this.isBusy = false;
    // What is typed before the page is ready stays.
    this.#text.value ||= small.get("sessionStorage", "draft");
    this.#text.addEventListener("input", () => this.#changed());
    this.#text.addEventListener("keydown", (event) => this.#key(event));
    this.#text.addEventListener("paste", (event) => this.#paste(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("attach").addEventListener("click", () => this.#files.click());
    this.#files.addEventListener("change", () => {
      this.addFiles([...this.#files.files]);
      this.#files.value = ""; // the same file may be chosen again after it was removed
    });
    byId("cancel-edit").addEventListener("click", () => this.cancelEdit());
    this.#acceptDrops();
    this.#changed();
  }

  focus() {
    this.#text.focus();
  }

  get isEditing() {
    return this.#editing !== null;
  }

  /** Tell whether an answer is being written: nothing can be sent meanwhile. */
  setBusy(isBusy) {
    this.isBusy = isBusy;
    const hadFocus = document.activeElement === byId("stop") || document.activeElement === byId("send");
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    if (hadFocus) (isBusy ? byId("stop") : this.#text).focus();
    this.#changed();
  }

  submit() {
    const parts = usable(joinParts(this.#text.value, this.#images));
    if (this.isBusy) return this.on.notice("Wait for the answer to end, or stop it.");
    if (this.#reading || !parts.length || !this.on.maySend()) return;
    const edited = this.#editing;
    this.#editing = null;
    this.#draft = null;
    this.#fill("", []);
    byId("editing").hidden = true;
    this.on.send(parts, edited);
  }

  /** Put a text into the field, as an example does. */
  write(text) {
    this.#fill(text, this.#images);
    this.focus();
  }

  /** Change an earlier message; what is being written comes back afterwards. */
  edit(node) {
    if (!this.#editing) this.#draft = { text: this.#text.value, images: this.#images };
    this.#editing = node;
    const { text, images } = splitParts(node.parts);
    this.#fill(text, images);
    byId("editing").hidden = false;
    this.on.edit(node);
    this.focus();
    this.#text.setSelectionRange(text.length, text.length);
  }

  cancelEdit() {
    if (!this.#editing) return;
    this.#editing = null;
    byId("editing").hidden = true;
    this.#fill(this.#draft?.text ?? "", this.#draft?.images ?? []);
    this.#draft = null;
    this.on.edit(null);
    this.focus();
  }

  /** Add images; what is none is named and left out. */
  async addFiles(files) {
    if (!files.length) return;
    if (!this.takesImages) return this.on.notice("This model reads text only.");
    const room = MOST_IMAGES - this.#images.length - this.#reading;
    if (files.length > room) {
      this.on.notice(`A message takes ${MOST_IMAGES} images; the others were left out.`);
    }
    const taken = files.slice(0, Math.max(0, room));
    this.#reading += taken.length;
    this.#changed();
    const results = await Promise.allSettled(taken.map(readImage));
    this.#reading -= taken.length;
    for (const { value, reason } of results) {
      if (value) this.#images.push(value);
      else this.on.notice(reason.message);
    }
    this.#showImages();
    this.#changed();
    this.focus();
  }

  #fill(text, images) {
    this.#text.value = text;
    this.#images = [...images];
    this.#showImages();
    this.#changed();
  }

  #changed() {
    const text = this.#text;
    if (!this.#editing) small.set("sessionStorage", "draft", text.value);
    // The field grows with its text, up to the height that the style sheet allows.
    text.style.height = "auto";
    text.style.height = `${text.scrollHeight}px`;
    text.classList.toggle("tall", text.scrollHeight > text.clientHeight + 1);
    const hasParts = this.#images.length > 0 || text.value.trim() !== "";
    byId("send").disabled = !hasParts || this.#reading > 0;
    byId("composer").classList.toggle("reading", this.#reading > 0);
  }

  #key(event) {
    // While an input method composes a word, its keys are not ours. Safari says so by code 229.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "ArrowUp" && !this.#text.value && !this.#images.length && !this.isBusy) {
      if (this.on.editLast()) event.preventDefault();
    }
  }

  async #paste(event) {
    // Word processors put a picture of the text beside the formatted text: the text is meant. A
    // file manager puts the file's name there as plain text: the file is meant.
    const { types } = event.clipboardData;
    if (types.includes("text/html") && types.includes("text/plain")) return;
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    await this.addFiles(files);
  }

  #showImages() {
    this.#list.hidden = !this.#images.length;
    this.#list.replaceChildren(...this.#images.map((part, index) => this.#thumbnail(part, index)));
  }

  #thumbnail(part, index) {
    const name = part.name || `image ${index + 1}`;
    const image = make("img", { src: part.url, alt: "" });
    image.classList.toggle("enlarged", displaySize(part.width, part.height).isEnlarged);
    const place = make(
      "button",
      {
        type: "button", class: "place", title: `${name}. Click to put it at a place of the text`,
        "aria-label": `Image ${index + 1}, ${name}. Put it at a place of the text`,
        on: { click: () => this.#insert(placeOf(index + 1)) },
      },
      image,
      make("span", { class: "number", text: String(index + 1) }),
    );
    const remove = iconButton("close", `Remove image ${index + 1}`, () => this.#remove(index), { class: "remove" });
    return make("li", {}, place, remove);
  }

  #insert(words) {
    const { value, selectionStart: from, selectionEnd: to } = this.#text;
    const before = from && !/\s$/.test(value.slice(0, from)) ? " " : "";
    const after = /^\s|^$/.test(value.slice(to)) ? "" : " ";
    this.focus();
    this.#text.setRangeText(before + words + after, from, to, "end");
    this.#changed();
  }

  #remove(index) {
    this.#images.splice(index, 1);
    // The places of the images behind it are counted anew.
    this.#text.value = this.#text.value.replace(/\[image (\d{1,3})\] ?/gi, (words, number) => {
      if (Number(number) === index + 1) return "";
      return Number(number) > index + 1 ? words.replace(number, String(number - 1)) : words;
    });
    this.#showImages();
    this.#changed();
    (this.#list.querySelectorAll(".remove")[Math.min(index, this.#images.length - 1)] ?? this.#text).focus();
  }

  #acceptDrops() {
    const zone = byId("drop");
    let depth = 0; // dragenter and dragleave come for every element that is crossed
    let isOwn = false; // an image of this page, which some browsers drag as an address alone
    const hasImages = ({ dataTransfer }) => isOwn || dataTransfer.types.includes("Files");
    addEventListener("dragstart", (event) => (isOwn = event.target.tagName === "IMG"));
    addEventListener("dragend", () => (isOwn = false));
    const show = (isShown) => {
      zone.hidden = !isShown;
      byId("drop-text").textContent = this.takesImages
        ? "Drop images to add them to your message"
        : "This model reads text only";
    };
    addEventListener("dragenter", (event) => {
      if (!hasImages(event)) return;
      event.preventDefault();
      depth += 1;
      show(true);
    });
    addEventListener("dragover", (event) => {
      if (hasImages(event)) event.preventDefault();
    });
    addEventListener("dragleave", (event) => {
      if (!hasImages(event)) return;
      depth -= 1;
      if (depth <= 0) show(false);
    });
    addEventListener("drop", async (event) => {
      depth = 0;
      show(false);
      if (!hasImages(event)) return;
      event.preventDefault(); // else the browser leaves the page and opens the file
      const files = await imagesOf(event.dataTransfer);
      isOwn = false;
      if (!files.length) this.on.notice("Only images can be dropped here.");
      await this.addFiles(files);
    });
  }
}
