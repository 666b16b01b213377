// Makes elements. Text always goes through `textContent`, so nothing that a model or a user writes
// becomes markup.

/**
 * An element with attributes, handlers and children.
 * @param {string} tag
 * @param {object} attributes Names of attributes; `text` is its text, `on` maps events to handlers,
 *     and true or false sets or leaves out an attribute without a value.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name === "on") {
      for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    } else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the drawings at the head of index.html, for the eye alone. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon; its label is read aloud and shown when the mouse rests on it. */
export function iconButton(name, label, onClick, attributes = {}) {
  return make(
    "button",
    { type: "button", class: "tool", "aria-label": label, title: label, on: { click: onClick }, ...attributes },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** Copy text, also where the page comes over plain HTTP and the browser hides its clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    const host = document.querySelector("dialog[open]:modal") ?? document.body;
    const before = document.activeElement;
    host.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    before?.focus?.();
    return isCopied;
  }
}

/** Hand a file to the user. */
export function saveFile(name, url) {
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}
