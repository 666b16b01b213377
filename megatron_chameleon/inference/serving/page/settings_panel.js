// The panel of settings. On wide screens it stands beside the conversation; on narrow ones it
// covers it.

import { byId, iconButton, make } from "./dom.js";
import { SETTINGS, parse } from "./settings.js";
import { small } from "./store.js";

const WIDE = "(min-width: 64rem)";

export class SettingsPanel {
  #panel = byId("settings");
  #fields = new Map();
  #can = {};

  /** @param {() => void} onChange Called after a setting has changed. */
  constructor(settings, onChange) {
    this.settings = settings;
    this.onChange = onChange;
    byId("open-settings").addEventListener("click", () => this.toggle());
    byId("fixed-seed").addEventListener("click", () => this.#set("seed", undefined));
    this.#panel.addEventListener("click", (event) => {
      if (event.target === this.#panel) this.#panel.close(); // beside the panel
    });
    // A panel that stood beside the conversation must not cover it as if it were open for use.
    matchMedia(WIDE).addEventListener("change", () => this.#panel.close());
    this.describe({});
  }

  /** Show what a model can do, and its defaults. */
  describe(can) {
    this.#can = can;
    // Kept from another model: nobody could see what the server refuses.
    if (can.image_shapes === false) this.settings.set("size", undefined);
    this.#build();
    this.show();
  }

  toggle() {
    if (this.#panel.open) return this.#panel.close();
    if (matchMedia(WIDE).matches) this.#panel.show();
    else this.#panel.showModal();
  }

  /** Fields with a value that cannot be used; the first one gets the focus. */
  complain() {
    for (const { input, error } of this.#fields.values()) {
      if (!error?.textContent) continue;
      if (!this.#panel.open) this.toggle();
      input.focus();
      return true;
    }
    return false;
  }

  /** Show the values that hold. */
  show() {
    for (const setting of SETTINGS) {
      const field = this.#fields.get(setting.name);
      if (!field) continue;
      const value = this.settings.get(setting.name);
      const isOwn = setting.name in this.settings.own;
      if (setting.kind === "choice") {
        for (const input of field.inputs) input.checked = input.value === (value ?? "");
      } else {
        // What cannot be used stays until it is corrected, so that it can be read again.
        const isTyping = document.activeElement === field.input;
        if (!isTyping && !field.error.textContent) field.input.value = value ?? "";
      }
      field.reset.hidden = !isOwn;
    }
    const { seed } = this.settings.own;
    const chip = byId("fixed-seed");
    chip.hidden = seed === undefined;
    chip.textContent = `seed ${seed} ×`;
    chip.setAttribute("aria-label", `Seed ${seed} is fixed. Draw a new one for each answer again`);
    byId("open-settings").classList.toggle("changed", Object.keys(this.settings.own).length > 0);
  }

  #set(name, value) {
    this.settings.set(name, value);
    this.show();
    this.onChange();
  }

  #build() {
    const shown = SETTINGS.filter(({ name, needs }) =>
      name === "force" ? this.#can.images_out !== false : !needs || this.#can[needs] !== false,
    );
    this.#fields.clear();
    const fields = shown.map((setting) =>
      setting.kind === "choice" ? this.#choice(setting) : this.#number(setting),
    );
    this.#panel.replaceChildren(
      make(
        "div",
        { class: "panel-body" },
        make(
          "div",
          { class: "panel-head" },
          make("h2", { id: "settings-title", text: "Settings" }),
          iconButton("close", "Close the settings", () => this.#panel.close()),
        ),
        ...fields,
        make("button", {
          type: "button", class: "act", text: "Reset to the server's defaults",
          on: { click: () => this.#reset() },
        }),
        this.#appearance(),
      ),
    );
    this.#buildForce();
  }

  #reset() {
    this.settings.reset();
    for (const field of this.#fields.values()) this.#complainAbout(field, "");
    this.show();
    this.onChange();
  }

  #number(setting) {
    const { name, label, help, step, blank, unit } = setting;
    const id = `setting-${name}`;
    const input = make("input", {
      id, type: "text", inputmode: setting.isWhole ? "numeric" : "decimal", autocomplete: "off",
      placeholder: blank ?? "", "aria-describedby": `${id}-help ${id}-error`,
    });
    const error = make("p", { class: "field-error", id: `${id}-error`, "aria-live": "polite" });
    const reset = make("button", {
      type: "button", class: "plain small", text: "reset", "aria-label": `Reset ${label}`,
      on: { click: () => { 
        this.#complainAbout(field, "");
        this.#set(name, undefined);
        input.value = this.settings.get(name) ?? "";
        input.focus();
      } },
    });
    const field = { input, error, reset };
    this.#fields.set(name, field);
    input.addEventListener("input", () => {
      const found = parse(setting, input.value);
      this.#complainAbout(field, found.error ?? "");
      if (!found.error) this.#set(name, found.value);
    });
    // An empty field shows what holds once it is left.
    input.addEventListener("blur", () => {
      if (!input.value.trim()) this.#complainAbout(field, "");
      this.show();
    });
    input.addEventListener("keydown", (event) => {
      const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!direction || input.value.trim() === "") return;
      event.preventDefault();
      const next = parse(setting, String(Number((Number(input.value) + direction * step).toFixed(6))));
      if (next.value !== undefined) {
        this.#set(name, next.value);
        input.value = next.value;
      }
    });
    return make(
      "div",
      { class: "field" },
      make("label", { for: id, text: unit ? `${label} (${unit})` : label }),
      make("div", { class: "field-line" }, input, reset),
      make("p", { class: "help", id: `${id}-help`, text: help }),
      error,
    );
  }

  #complainAbout(field, words) {
    if (!field.error) return;
    field.error.textContent = words;
    if (words) field.input.setAttribute("aria-invalid", "true");
    else field.input.removeAttribute("aria-invalid");
  }

  #choice(setting) {
    const reset = make("button", { type: "button", hidden: true });
    const { element, inputs } = segments(setting, "panel", (value) => this.#set(setting.name, value));
    this.#fields.set(setting.name, { inputs, reset });
    return make("div", { class: "field" }, element, make("p", { class: "help", text: setting.help }));
  }

  /** The same choice below the message, where it is needed most. */
  #buildForce() {
    const host = byId("force");
    host.hidden = this.#can.images_out === false;
    const setting = SETTINGS.find(({ name }) => name === "force");
    const { inputs, labels } = segments(setting, "composer", (value) => this.#set("force", value));
    const words = make("span", { class: "words", "aria-hidden": "true", text: "Answer in" });
    host.replaceChildren(host.querySelector("legend"), words, ...labels);
    const panel = this.#fields.get("force");
    if (panel) panel.inputs.push(...inputs);
  }

  #appearance() {
    const setting = {
      name: "appearance", label: "Appearance",
      choices: [["", "System"], ["light", "Light"], ["dark", "Dark"]],
    };
    const { element, inputs } = segments(setting, "panel", (value) => {
      small.set("localStorage", "appearance", value);
      if (value) document.documentElement.dataset.theme = value;
      else delete document.documentElement.dataset.theme;
    });
    const now = document.documentElement.dataset.theme ?? "";
    for (const input of inputs) input.checked = input.value === now;
    return make("div", { class: "field apart" }, element);
  }
}

/** A choice of a few values as buttons side by side, which are radio buttons underneath. */
function segments({ name, label, choices }, place, onChoose) {
  const inputs = [];
  const labels = choices.map(([value, words]) => {
    const input = make("input", {
      type: "radio", name: `${place}-${name}`, value, on: { change: () => onChoose(value) },
    });
    inputs.push(input);
    return make("label", {}, input, make("span", { text: words }));
  });
  const element = make("fieldset", { class: "segments" }, make("legend", { text: label }), ...labels);
  return { element, inputs, labels };
}
