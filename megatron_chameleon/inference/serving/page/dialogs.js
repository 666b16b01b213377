// What opens above the conversation: the list of conversations, the key, an enlarged image; and
// notices, which come and go.

import { byId, iconButton, make, saveFile } from "./dom.js";
import { sizeOf } from "./pictures.js";
import { MOST_CONVERSATIONS } from "./store.js";

/** Say something that needs no answer. */
export function notice(text, seconds = 6) {
  const close = iconButton("close", "Dismiss", () => element.remove());
  const element = make("p", { class: "notice" }, make("span", { text }), close);
  byId("notices").append(element);
  while (byId("notices").children.length > 3) byId("notices").firstElementChild.remove();
  setTimeout(() => element.remove(), seconds * 1000);
}

/**
 * Ask for the API key.
 * @param {string} reason What the server said about the last one.
 * @returns {Promise<string>} Empty if the user does not give one.
 */
export function askForKey(reason) {
  const dialog = byId("key");
  const input = make("input", {
    id: "key-field", type: "password", autocomplete: "off", spellcheck: "false", required: true,
  });
  const form = make(
    "form",
    { method: "dialog" },
    make("h2", { id: "key-title", text: "API key" }),
    make("p", { text: "This server asks for a key. Whoever started it knows it." }),
    reason ? make("p", { class: "help", dir: "auto", text: `It says: ${reason}` }) : null,
    make("label", { for: "key-field", text: "Key" }),
    input,
    make("p", { class: "help", text: "It is kept until this tab is closed." }),
    make(
      "div",
      { class: "choices" },
      make("button", { type: "button", class: "act", text: "Cancel", on: { click: () => dialog.close("") } }),
      make("button", { type: "submit", class: "act main", text: "Use this key" }),
    ),
  );
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  return new Promise((resolve) => {
    form.addEventListener("submit", () => resolve(input.value.trim()));
    dialog.addEventListener("close", () => resolve(""), { once: true });
    dialog.showModal();
  });
}

/** Show an image as large as the window allows. */
export async function enlarge(source) {
  const dialog = byId("picture");
  const image = make("img", { src: source.src, alt: source.alt });
  const { width, height } = await sizeOf(source.src).catch(() => ({ width: 1, height: 1 }));
  const scale = Math.min((innerWidth * 0.9) / width, (innerHeight * 0.8) / height);
  // Small images grow by a whole number, so that their pixels stay squares of one size.
  const whole = scale > 1 ? Math.max(1, Math.floor(Math.min(scale, 40))) : scale;
  image.width = width * whole;
  image.height = height * whole;
  image.classList.toggle("enlarged", whole > 1);
  dialog.replaceChildren(
    make(
      "div",
      { class: "picture-head" },
      make("span", { text: `${width} × ${height} pixels` }),
      iconButton("save", "Save the image", () => saveImage(source.src)),
      iconButton("close", "Close", () => dialog.close()),
    ),
    image,
  );
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close();
  };
  dialog.showModal();
}

export function saveImage(url) {
  const type = /^data:image\/(\w+)/.exec(url)?.[1] ?? "png";
  saveFile(`image-${stamp()}.${type === "jpeg" ? "jpg" : type}`, url);
}

/** The time, for names of files. */
export function stamp(now = new Date()) {
  const local = new Date(now.getTime() - now.getTimezoneOffset() * 60000);
  return local.toISOString().slice(0, 19).replaceAll(":", "-");
}

/**
 * List the kept conversations.
 * @param {object[]} records What the store lists.
 * @param {string} current The id of the one that is shown.
 */
export function listConversations(records, current, { open, remove }) {
  const dialog = byId("conversations");
  const deleteAll = async () => {
    if (!confirm(`Delete all ${records.length} conversations?`)) return;
    await remove(records.map(({ id }) => id));
    dialog.close();
  };
  const rows = records.map((record) =>
    make(
      "li",
      {},
      make(
        "button",
        {
          type: "button", class: "row", "aria-current": record.id === current ? "true" : undefined,
          on: { click: () => { dialog.close(); open(record.id); } },
        },
        make("span", { class: "title", dir: "auto", text: record.title }),
        make("span", { class: "when", text: when(record.changed) }),
      ),
      iconButton("delete", `Delete the conversation “${record.title}”`, async (event) => {
        if (!confirm(`Delete the conversation “${record.title}”?`)) return;
        const row = event.target.closest("li");
        const next = (row.nextElementSibling ?? row.previousElementSibling)?.querySelector(".row");
        await remove([record.id]);
        row.remove();
        (next ?? dialog.querySelector("button"))?.focus();
      }),
    ),
  );
  const contents = [
    make(
      "div",
      { class: "panel-head" },
      make("h2", { id: "conversations-title", text: "Conversations" }),
      iconButton("close", "Close", () => dialog.close()),
    ),
    rows.length ? make("ul", { class: "rows" }, ...rows) : make("p", { class: "help", text: "There is none yet." }),
    make("p", { class: "help", text: `The latest ${MOST_CONVERSATIONS} are kept, in this browser alone.` }),
    rows.length > 1 ? make("button", { type: "button", class: "act", text: "Delete all", on: { click: deleteAll } }) : null,
  ];
  dialog.replaceChildren(...contents.filter(Boolean));
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close();
  };
  dialog.showModal();
}

function when(time) {
  const date = new Date(time);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday
    ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString([], { day: "numeric", month: "short" });
}
