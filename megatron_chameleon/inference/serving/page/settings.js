// How answers are drawn: what can be set, within which bounds, and what goes into a request.

/** Seeds are drawn below this number: short enough to be read aloud. */
const SEEDS = 2 ** 31;

/**
 * The settings of the panel, in its order. `needs` names what the model must be able to do;
 * `blank` says what an empty field means, where one is allowed.
 */
export const SETTINGS = [
  {
    name: "force", label: "Answer in", kind: "choice", needs: null,
    choices: [["", "Free"], ["text", "Text"], ["image", "Image"]],
    help: "Free lets the model choose between text and images. Text and Image allow only one of them.",
  },
  {
    name: "size", label: "Shape of images", kind: "choice", needs: "image_shapes",
    choices: [["", "Free"], ["1:1", "1:1"], ["3:2", "3:2"], ["2:3", "2:3"], ["16:9", "16:9"], ["9:16", "9:16"]],
    help: "Width and height. Free lets the model choose the shape of each image.",
  },
  {
    name: "seed", label: "Seed", low: 0, high: 2 ** 53 - 1, isWhole: true, step: 1,
    blank: "a new one for each answer",
    help: "The same seed, settings and conversation give the same answer again.",
  },
  {
    name: "temperature", label: "Temperature", low: 0, high: 10, step: 0.1,
    help: "Higher is more varied. 0 always takes the most likely token.",
  },
  {
    name: "top_p", label: "Top p", low: 0, high: 1, isAbove: true, step: 0.05,
    help: "Draws from the most likely tokens that together have this probability. 1 draws from all.",
  },
  {
    name: "top_k", label: "Top k", low: 0, high: 1e6, isWhole: true, step: 1,
    help: "Draws from this many of the most likely tokens. 0 draws from all.",
  },
  {
    name: "repetition_penalty", label: "Repetition penalty", low: 0, high: 100, isAbove: true, step: 0.1,
    help: "Above 1, words that were already used become less likely. 1 changes nothing.",
  },
  {
    name: "max_tokens", label: "Longest answer", low: 1, high: 1e6, isWhole: true, step: 16,
    blank: "as much as fits", unit: "tokens",
    help: "An image that does not fit is not begun.",
  },
  {
    name: "guidance", label: "Guidance", low: 0, high: 100, step: 0.5, needs: "images_out",
    help: "Above 1, images follow the conversation more closely and vary less. 1 turns it off.",
  },
  {
    name: "guidance_image", label: "Image guidance", low: 0, high: 100, step: 0.1,
    needs: "images_out", blank: "the same as guidance",
    help: "How closely images follow the images of the conversation alone.",
  },
];

/**
 * Read what was typed into a field.
 * @returns {{value?: number, error?: string}} Neither of them if the field is empty and may be.
 */
export function parse(setting, typed) {
  const text = typed.trim();
  if (!text) return setting.blank ? {} : { error: "Enter a number." };
  const value = Number(text.replace(",", "."));
  const { low, high, isAbove, isWhole } = setting;
  const bound = isAbove ? `above ${low}` : `${low} or more`;
  const words = `Enter a ${isWhole ? "whole number" : "number"}, ${bound} and at most ${high}.`;
  if (!Number.isFinite(value) || (isWhole && !Number.isInteger(value))) return { error: words };
  if (value < low || (isAbove && value === low) || value > high) return { error: words };
  return { value };
}

/** The settings that a user has changed; the server's defaults hold for all others. */
export class Settings {
  constructor(kept = "", defaults = {}) {
    this.defaults = defaults;
    this.own = {};
    try {
      // Kept by an earlier version of this page, or by hand: only what is valid now counts.
      for (const [name, value] of Object.entries(JSON.parse(kept))) this.set(name, value);
    } catch {
      this.own = {};
    }
  }

  /** The value that holds: the user's, or else the server's; undefined if neither has one. */
  get(name) {
    return this.own[name] ?? this.defaults[name] ?? undefined;
  }

  /** Change a setting; undefined, null and the server's own value go back to the default. */
  set(name, value) {
    const setting = SETTINGS.find((known) => known.name === name);
    if (!setting) return;
    delete this.own[name];
    if (value === undefined || value === null || value === "") return;
    if (setting.kind === "choice") {
      if (setting.choices.some(([choice]) => choice === value)) this.own[name] = value;
      return;
    }
    const parsed = parse(setting, String(value)).value;
    if (parsed !== undefined && parsed !== this.defaults[name]) this.own[name] = parsed;
  }

  reset() {
    this.own = {};
  }

  /** What a request says beside its messages, with a seed in any case. */
  request(seed) {
    return { ...this.own, seed };
  }

  /** Text to keep. */
  toString() {
    return JSON.stringify(this.own);
  }
}

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS;

/**
 * The seed of the next version of an answer: the fixed one if it has not been used with these
 * settings, else a new one, because the same seed would only give the same answer again.
 * @param {object} own The changed settings.
 * @param {{options: object}[]} earlier The versions that are there.
 */
export function nextSeed(own, earlier) {
  if (own.seed === undefined) return newSeed();
  const wanted = JSON.stringify(sorted(own));
  const isUsed = earlier.some(({ options }) => JSON.stringify(sorted(options ?? {})) === wanted);
  return isUsed ? newSeed() : own.seed;
}

const sorted = (object) => Object.fromEntries(Object.entries(object).sort());
