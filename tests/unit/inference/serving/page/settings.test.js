import assert from "node:assert/strict";
import { test } from "node:test";
import { SETTINGS, Settings, nextSeed, parse } from "./page/settings.js";

const DEFAULTS = { temperature: 0.7, top_p: 0.9, top_k: 0, repetition_penalty: 1.2, guidance: 1, guidance_image: null };
const named = (name) => SETTINGS.find((setting) => setting.name === name);

test("only what differs from the server's defaults is sent", () => {
  const settings = new Settings("", DEFAULTS);
  assert.deepEqual(settings.request(5), { seed: 5 });
  settings.set("temperature", 0.7);
  settings.set("top_p", 0.5);
  settings.set("force", "image");
  assert.deepEqual(settings.request(5), { top_p: 0.5, force: "image", seed: 5 });
  settings.set("force", "");
  settings.set("top_p", undefined);
  assert.deepEqual(settings.own, {});
  assert.equal(settings.get("temperature"), 0.7);
  assert.equal(settings.get("guidance_image"), undefined);
});

test("what was kept is checked again", () => {
  const kept = '{"temperature": -1, "top_p": "x", "top_k": 3, "force": "dance", "gone": 1, "seed": 7}';
  assert.deepEqual(new Settings(kept, DEFAULTS).own, { top_k: 3, seed: 7 });
  for (const broken of ["", "{", "null", "[1]", '"a"', "1"]) {
    assert.deepEqual(new Settings(broken, DEFAULTS).own, {}, broken);
  }
  const settings = new Settings('{"top_k": 3}', DEFAULTS);
  assert.deepEqual(new Settings(String(settings), DEFAULTS).own, settings.own);
});

test("a field says what it takes", () => {
  assert.deepEqual(parse(named("temperature"), "0,5"), { value: 0.5 });
  assert.deepEqual(parse(named("seed"), " "), {});
  assert.match(parse(named("temperature"), "").error, /number/);
  assert.match(parse(named("top_p"), "0").error, /above 0 and at most 1/);
  assert.match(parse(named("top_k"), "1.5").error, /whole number/);
  for (const typed of ["-1", "1e400", "NaN", "seven", "0x", "--", "９"]) {
    for (const setting of SETTINGS.filter(({ kind }) => kind !== "choice")) {
      assert.ok(parse(setting, typed).error, `${setting.name} ${typed}`);
    }
  }
});

test("asking again draws another seed, unless the fixed one is new to these settings", () => {
  assert.equal(nextSeed({ seed: 7 }, []), 7);
  assert.equal(nextSeed({ seed: 7, top_k: 2 }, [{ options: { seed: 7 } }]), 7);
  assert.notEqual(nextSeed({ top_k: 2, seed: 7 }, [{ options: { seed: 7, top_k: 2 } }]), 7);
  const drawn = new Set(Array.from({ length: 50 }, () => nextSeed({}, [])));
  assert.ok(drawn.size > 45 && [...drawn].every((seed) => seed >= 0 && seed < 2 ** 31));
});
