import assert from "node:assert/strict";
import { test } from "node:test";
import { Conversation } from "./page/conversation.js";
import { Store, memoryBackend, small } from "./page/store.js";

function talk(words, changed) {
  const made = new Conversation();
  const node = made.add(null, "user", [{ type: "text", text: words }]);
  const record = made.record.bind(made);
  made.record = () => ({ ...record(), changed });
  return { made, node };
}

test("a conversation comes back as it was saved", async () => {
  const store = new Store(memoryBackend());
  const { made, node } = talk("hello", 1);
  const saving = store.save(made, [node]);
  node.parts[0].text = "changed afterwards";
  await saving;
  const found = await store.load(made.id);
  assert.equal(found.nodes[0].parts[0].text, "hello");
  assert.equal(found.record.title, "hello");
  assert.equal(await store.load("nothing"), null);
  assert.equal(await store.load(""), null);
});

test("an empty conversation is not kept", async () => {
  const store = new Store(memoryBackend());
  await store.save(new Conversation(), []);
  assert.deepEqual(await store.list(), []);
});

test("the oldest conversations go, with their messages", async () => {
  const store = new Store(memoryBackend());
  const talks = [3, 1, 2].map((changed) => talk(`at ${changed}`, changed));
  for (const { made, node } of talks) await store.save(made, [node]);
  await store.trim(2);
  assert.deepEqual((await store.list()).map(({ title }) => title), ["at 3", "at 2"]);
  assert.equal(await store.load(talks[1].made.id), null);
});

test("a browser without room says so once, and the page goes on", async () => {
  const full = async () => {
    throw Object.assign(new Error("no room"), { name: "QuotaExceededError" });
  };
  const told = [];
  const backend = { put: full, records: full, read: full, remove: full };
  const store = new Store(backend, (reason) => told.push(reason));
  const { made, node } = talk("hello", 1);
  await store.save(made, [node]);
  await store.save(made, [node]);
  assert.deepEqual(await store.list(), []);
  assert.equal(await store.load(made.id), null);
  await store.trim();
  assert.deepEqual(told, ["full"]);
});

test("a browser that keeps nothing is told apart from a full one", async () => {
  const told = [];
  const off = async () => { throw new Error("closed"); };
  await new Store({ records: off }, (reason) => told.push(reason)).list();
  assert.deepEqual(told, ["off"]);
});

test("small values survive a storage that refuses", () => {
  globalThis.sessionStorage = { getItem() { throw new Error("denied"); }, setItem() { throw new Error("full"); } };
  small.set("sessionStorage", "key", "k");
  assert.equal(small.get("sessionStorage", "key"), "");
  assert.equal(small.get("noStorage", "key"), "");
});
