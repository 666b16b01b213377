import assert from "node:assert/strict";
import { test } from "node:test";
import { Conversation, documentOf, requestMessages } from "./page/conversation.js";
import { joinParts, placeOf, splitParts, wellFormed } from "./page/parts.js";

const text = (words) => ({ type: "text", text: words });
const image = (url, more = {}) => ({ type: "image", url, width: 1, height: 1, ...more });

test("a version is added beside the earlier ones, and each keeps what follows it", () => {
  const talk = new Conversation();
  const first = talk.add(null, "user", [text("hello")]);
  const one = talk.add(first, "assistant", [text("one")], { state: "stop" });
  const next = talk.add(one, "user", [text("and?")]);
  const two = talk.add(first, "assistant", [text("two")], { state: "stop" });
  assert.deepEqual(talk.siblings(two), [one, two]);
  assert.deepEqual(talk.path(), [first, two]);
  talk.choose(one);
  assert.deepEqual(talk.path(), [first, one, next]);
  assert.deepEqual(talk.before(next), [first, one]);
  const edited = talk.add(null, "user", [text("good day")]);
  assert.deepEqual(talk.path(), [edited]);
  assert.deepEqual(talk.siblings(first), [first, edited]);
});

test("what was kept comes back, with what was cut off marked", () => {
  const talk = new Conversation();
  const asked = talk.add(null, "user", [text("hello")]);
  talk.add(asked, "assistant", [text("one")], { state: "stop" });
  talk.add(asked, "assistant", [text("tw")], { state: "writing" });
  const nodes = talk.path().concat(talk.siblings(talk.path()[1])[0]);
  const again = new Conversation(structuredClone(talk.record()), structuredClone(nodes).reverse());
  assert.deepEqual(again.path().map(({ id }) => id), talk.path().map(({ id }) => id));
  assert.equal(again.path()[1].state, "interrupted");
  assert.equal(again.siblings(again.path()[1]).length, 2);
});

test("a request alternates, and leaves out what failed, is empty or half an image", () => {
  const messages = [
    { role: "user", parts: [text("a")] },
    { role: "assistant", parts: [] },
    { role: "user", parts: [image("data:1"), text("b")] },
    { role: "assistant", parts: [image("data:half", { isPartial: true }), text(" ")] },
    { role: "user", parts: [text("c \ud83e")] },
    { role: "assistant", parts: [text("d"), image("data:2")] },
    { role: "user", parts: [text("e")] },
  ];
  assert.deepEqual(requestMessages(messages), [
    {
      role: "user",
      content: [
        { type: "text", text: "a" },
        { type: "image_url", image_url: { url: "data:1" } },
        { type: "text", text: "b\n\nc \ufffd" },
      ],
    },
    {
      role: "assistant",
      content: [
        { type: "text", text: "d" },
        { type: "image_url", image_url: { url: "data:2" } },
      ],
    },
    { role: "user", content: "e" },
  ]);
  assert.equal(requestMessages([{ role: "assistant", parts: [text("a")] }]).length, 0);
});

test("a document has parts in every message", () => {
  const talk = [{ role: "user", parts: [text("a")] }, { role: "assistant", parts: [image("data:1")] }];
  assert.deepEqual(documentOf(talk), {
    messages: [
      { role: "user", content: [{ type: "text", text: "a" }] },
      { role: "assistant", content: [{ type: "image", image: "data:1" }] },
    ],
  });
});

test("images stand first unless the text has their place", () => {
  const [one, two] = [image("1"), image("2")];
  assert.deepEqual(joinParts("what?", [one, two]), [one, two, text("what?")]);
  assert.deepEqual(joinParts("Add [image 1] to [Image 2].", [one, two]), [
    text("Add "), one, text(" to "), two, text("."),
  ]);
  assert.deepEqual(joinParts("[image 2] and [image 2] [image 3] [image 0]", [one, two]), [
    one, two, text(" and [image 2] [image 3] [image 0]"),
  ]);
  assert.deepEqual(joinParts("", [one]), [one]);
});

test("what was sent comes back for editing", () => {
  const images = ["1", "2", "3"].map((url) => image(url));
  const words = ["", "a", `x ${placeOf(2)}`, `${placeOf(1)}${placeOf(3)} y`, `a ${placeOf(3)} b ${placeOf(1)}`];
  for (const written of words) {
    const parts = joinParts(written, images);
    const again = splitParts(parts);
    assert.deepEqual(joinParts(again.text, again.images), parts, written);
  }
});

test("text is always valid Unicode", () => {
  assert.equal(wellFormed("🦎 \ud83e x \udd8e"), "🦎 \ufffd x \ufffd");
});

test("a title is short, and an image alone has one", () => {
  const talk = new Conversation();
  talk.add(null, "user", [text(`\n ${"🦎".repeat(200)}`)]);
  assert.equal([...talk.title()].length, 81);
  const other = new Conversation();
  assert.equal(other.title(), "");
  other.add(null, "user", [image("1")]);
  assert.equal(other.title(), "Image");
});
