import assert from "node:assert/strict";
import { test } from "node:test";
import { blocksOf } from "./page/richtext.js";
import { displaySize } from "./page/pictures.js";

const plain = (text) => ({ kind: "text", text });
const code = (text, language = "") => ({ kind: "code", text, language });

test("text keeps its whitespace, and code its lines", () => {
  assert.deepEqual(blocksOf("  a\n\n\tb  c"), [plain("  a\n\n\tb  c")]);
  assert.deepEqual(blocksOf("a\n\n```py\n  x\n\n```\n\nb"), [plain("a"), code("  x\n", "py"), plain("b")]);
  assert.deepEqual(blocksOf("~~~\n```\n~~~"), [code("```")]);
  assert.deepEqual(blocksOf("````\n```\n````"), [code("```")]);
});

test("a block that is still written is code already", () => {
  assert.deepEqual(blocksOf("```js\nlet x"), [code("let x", "js")]);
  assert.deepEqual(blocksOf("```"), [code("")]);
});

test("what is no fence stays text", () => {
  for (const words of ["``x``", "`", "a ``` b", "    ```", "```a`b```"]) {
    assert.deepEqual(blocksOf(words).map(({ kind }) => kind), ["text"], words);
  }
  assert.deepEqual(blocksOf(" \n "), []);
  assert.deepEqual(blocksOf(""), []);
});

test("nothing is lost, wherever the text is cut", () => {
  const text = "one\n```py\ntwo\n```\nthree\n~~~\nfour";
  for (let at = 0; at <= text.length; at += 1) {
    const shown = blocksOf(text.slice(0, at)).map((block) => block.text).join(" ");
    for (const word of ["one", "two", "three", "four"]) {
      if (text.indexOf(word) + word.length <= at) assert.ok(shown.includes(word), `${word} at ${at}`);
    }
  }
});

test("tiny images are enlarged by a whole number", () => {
  assert.deepEqual(displaySize(16, 16), { width: 192, height: 192, isEnlarged: true });
  for (const [width, height] of [[1, 1], [8, 3], [28, 28], [96, 20], [97, 10], [512, 512], [4000, 3]]) {
    const shown = displaySize(width, height);
    assert.equal(shown.width % width, 0);
    assert.equal(shown.width / width, shown.height / height);
    assert.equal(shown.isEnlarged, Math.max(width, height) <= 96);
  }
});
