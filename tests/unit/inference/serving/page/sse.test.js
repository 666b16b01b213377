import assert from "node:assert/strict";
import { test } from "node:test";
import { EventParser, readEvents } from "./page/sse.js";

const STREAM =
  ": a comment\n\ndata: one\n\nevent: named\r\ndata:two\r\ndata:  three\r\n\r\n" +
  "id: 4\nretry: 5\ndata\n\rdata: ünïcödé 🦎\r\rdata: [DONE]\n\n";
const EVENTS = [
  { event: "message", data: "one" },
  { event: "named", data: "two\n three" },
  { event: "message", data: "" },
  { event: "message", data: "ünïcödé 🦎" },
  { event: "message", data: "[DONE]" },
];

function body(chunks) {
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}

async function events(chunks) {
  const found = [];
  for await (const event of readEvents(body(chunks))) found.push(event);
  return found;
}

test("a stream is read as the standard says", async () => {
  assert.deepEqual(await events([new TextEncoder().encode(STREAM)]), EVENTS);
});

test("chunks may end at any byte", async () => {
  const bytes = new TextEncoder().encode(STREAM);
  for (let at = 0; at <= bytes.length; at += 1) {
    assert.deepEqual(await events([bytes.slice(0, at), bytes.slice(at)]), EVENTS, `cut at ${at}`);
  }
  assert.deepEqual(await events([...bytes].map((byte) => Uint8Array.of(byte))), EVENTS);
});

test("a mark of the byte order is no part of the first line", () => {
  assert.deepEqual(new EventParser().push("\ufeffdata: a\n\n"), [{ event: "message", data: "a" }]);
});

test("an event that the end cuts off is left out", async () => {
  for (const cut of ["data: a", "data: a\n", "data: a\r"]) {
    assert.deepEqual(await events([new TextEncoder().encode(cut)]), []);
  }
  assert.equal((await events([new TextEncoder().encode("data: a\n\r")])).length, 1);
});

test("who stops reading ends the stream", async () => {
  let isCancelled = false;
  const stream = new ReadableStream({
    pull: (controller) => controller.enqueue(new TextEncoder().encode("data: more\n\n")),
    cancel: () => { isCancelled = true; },
  });
  for await (const _ of readEvents(stream)) break;
  assert.ok(isCancelled);
});

test("a long line of many chunks is read in time", async () => {
  const piece = new TextEncoder().encode("x".repeat(1 << 14));
  const began = performance.now();
  const found = await events([new TextEncoder().encode("data: "), ...Array(128).fill(piece), new TextEncoder().encode("\n\n")]);
  assert.equal(found[0].data.length, 128 << 14);
  assert.ok(performance.now() - began < 5000);
});
