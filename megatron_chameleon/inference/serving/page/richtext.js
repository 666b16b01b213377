// Shows text as it is written, with its whitespace; only blocks between ``` lines look different.
//
// A text that grows is shown again with every piece of it. Elements whose text has not changed are
// left alone, so that a selection in an earlier paragraph survives.

import { copyText, make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;

/**
 * Cut a text into plain blocks and blocks of code.
 * @param {string} text
 * @returns {{kind: "text"|"code", text: string, language?: string}[]} A block of code that is not
 *     closed yet goes on to the end.
 */
export function blocksOf(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  let language = "";
  const close = (kind) => {
    if (kind === "code") blocks.push({ kind, text: lines.join("\n"), language });
    else if (lines.some((line) => line.trim())) {
      // Empty lines at the ends would only widen the space that the style sheet leaves there.
      blocks.push({ kind, text: lines.join("\n").replace(/^(\s*\n)+|\s+$/g, "") });
    }
    lines = [];
  };
  for (const line of text.split("\n")) {
    const match = FENCE.exec(line.replace(/\r$/, ""));
    if (fence && match && match[1].startsWith(fence) && !match[2].trim()) {
      close("code");
      fence = null;
    } else if (!fence && match) {
      close("text");
      fence = match[1];
      language = match[2].trim();
    } else lines.push(line);
  }
  close(fence ? "code" : "text");
  return blocks;
}

/** Show a text in an element, changing as little as possible of what it shows already. */
export function showText(host, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    let element = host.children[index];
    if (element?.dataset.kind !== block.kind) {
      const made = block.kind === "code" ? codeBlock() : make("p", { class: "plain-text", dir: "auto" });
      made.dataset.kind = block.kind;
      if (element) element.replaceWith(made);
      else host.append(made);
      element = made;
    }
    if (block.kind === "code") {
      setText(element.querySelector(".language"), block.language || "code");
      setText(element.querySelector("code"), block.text);
    } else setText(element, block.text);
  });
  while (host.children.length > blocks.length) host.lastElementChild.remove();
}

function setText(element, text) {
  const node = element.firstChild;
  if (!node) element.textContent = text;
  else if (node.data !== text) {
    if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
    else node.data = text;
  }
}

function codeBlock() {
  const code = make("code");
  const button = make("button", { type: "button", class: "plain small", text: "Copy" });
  button.addEventListener("click", async () => {
    const isCopied = await copyText(code.textContent);
    button.textContent = isCopied ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return make(
    "div",
    { class: "code" },
    make("div", { class: "code-head" }, make("span", { class: "language" }), button),
    make("pre", { tabindex: "0", dir: "ltr" }, code),
  );
}
