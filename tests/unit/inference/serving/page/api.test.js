import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { Server, ServerError, read } from "./page/api.js";

const PNG = "data:image/png;base64,AAAA";
let http;
let answer;
let asked;

before(async () => {
  http = createServer(async (request, response) => {
    let body = "";
    for await (const piece of request) body += piece;
    asked = { url: request.url, headers: request.headers, body: body && JSON.parse(body) };
    answer(response);
  });
  await new Promise((resolve) => http.listen(0, "127.0.0.1", resolve));
});
after(() => {
  http.close();
  http.closeAllConnections(); // fetch keeps them for later
});

const server = (key = "") => new Server(key, `http://127.0.0.1:${http.address().port}/behind/proxy/`);
const chunk = (delta, finish = null) =>
  `data: ${JSON.stringify({ choices: [{ delta, finish_reason: finish }] })}\n\n`;

function streams(...pieces) {
  answer = (response) => {
    response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8" });
    for (const piece of pieces) response.write(piece);
    response.end();
  };
}

function refuses(status, body, headers = {}) {
  answer = (response) => {
    response.writeHead(status, headers);
    response.end(typeof body === "string" ? body : JSON.stringify(body));
  };
}

async function chat(signal) {
  const found = [];
  for await (const event of server("k").chat({ messages: [] }, signal)) found.push(event);
  return found;
}

const fails = (kind, words) => (error) => {
  assert.ok(error instanceof ServerError, String(error.stack));
  assert.equal(error.kind, kind);
  assert.match(error.message, words);
  return true;
};

test("an answer of text and a growing image", async () => {
  const image = (more) => [{ type: "image_url", index: 0, image_url: { url: PNG }, ...more }];
  streams(
    chunk({ role: "assistant", content: "" }),
    chunk({ content: "A " }),
    ": ping\n\n",
    chunk({ content: null, images: image({ complete: false, progress: 0.5 }) }),
    chunk({ content: null, images: image({ complete: true }) }),
    chunk({}, "stop"),
    'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}\n\n',
    "data: [DONE]\n\n",
  );
  assert.deepEqual(await chat(), [
    { type: "open" },
    { type: "text", text: "A " },
    { type: "image", index: 0, url: PNG, isComplete: false, progress: 0.5 },
    { type: "image", index: 0, url: PNG, isComplete: true, progress: 0 },
    { type: "finish", reason: "stop" },
    { type: "usage", promptTokens: 3, answerTokens: 9 },
  ]);
  assert.equal(asked.url, "/behind/proxy/v1/chat/completions");
  assert.equal(asked.headers.authorization, "Bearer k");
  assert.deepEqual(asked.body, { messages: [], stream: true, stream_options: { include_usage: true } });
});

test("a stream that ends before the answer does is a lost connection", async () => {
  streams(chunk({ content: "half" }));
  await assert.rejects(chat(), fails("lost", /ended before/));
});

test("an answer that has said why it ended is whole without the last event", async () => {
  streams(chunk({ content: "whole" }, "length"));
  assert.equal((await chat()).at(-1).reason, "length");
});

test("errors inside a stream, and what is no JSON", async () => {
  streams(chunk({ content: "a" }), 'data: {"error": {"message": "too slow", "code": "request_timeout"}}\n\n');
  await assert.rejects(chat(), fails("server", /too slow/));
  streams("data: {oops\n\n");
  await assert.rejects(chat(), fails("server", /cannot be read/));
  for (const data of ["null", "1", "[]", "{}", '{"choices": [null]}', '{"choices": [{"delta": null}]}']) {
    assert.deepEqual([...read(data)], [], data);
  }
});

test("a picture at another address is not loaded", () => {
  for (const url of ["https://example.org/a.png", "javascript:alert(1)", "data:image/svg+xml;base64,AA", "data:text/html,x"]) {
    const data = JSON.stringify({ choices: [{ delta: { images: [{ image_url: { url } }] } }] });
    assert.deepEqual([...read(data)], [], url);
  }
});

test("each refusal becomes what the page can act on", async () => {
  const error = (message, code) => ({ error: { message, code, type: "x" } });
  const cases = [
    [401, error("give a key"), "key", /give a key/],
    [429, error("256 wait", "queue_full"), "busy", /256 wait/],
    [503, error("it is stopping"), "busy", /stopping/],
    [400, error("5,000 tokens", "context_length_exceeded"), "context", /5,000/],
    [400, error("seed: -1"), "request", /seed/],
    [413, "<html>too large</html>", "request", /413/],
    [500, "oops", "server", /500/],
    [502, "<html>", "lost", /502/],
    [504, error("longer than 900 seconds", "request_timeout"), "server", /900/],
    [422, { detail: "not so" }, "request", /not so/],
    [400, { error: "only words" }, "request", /only words/],
  ];
  for (const [status, body, kind, words] of cases) {
    refuses(status, body, { "retry-after": "7" });
    await assert.rejects(chat(), (refusal) => {
      assert.equal(refusal.retryAfter, 7);
      return fails(kind, words)(refusal);
    });
  }
  refuses(503, error("its engine has failed"));
  await assert.rejects(chat(), fails("server", /failed/));
});

test("a page in place of a stream, and a server that is not there", async () => {
  refuses(200, "<html>", { "content-type": "text/html" });
  await assert.rejects(chat(), fails("server", /text\/html/));
  const nowhere = new Server("", "http://127.0.0.1:9/");
  await assert.rejects(nowhere.model(), fails("lost", /cannot be reached/));
  for (const body of ["{}", "[]", "null", '{"data": []}']) {
    refuses(200, body);
    await assert.rejects(server().model(), fails("server", /model/));
  }
});

test("stopping closes the connection", async () => {
  let isClosed;
  const closed = new Promise((resolve) => { isClosed = resolve; });
  answer = (response) => {
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write(chunk({ content: "a" }));
    response.on("close", isClosed);
  };
  const abort = new AbortController();
  await assert.rejects(async () => {
    for await (const event of server().chat({}, abort.signal)) if (event.type === "text") abort.abort();
  }, { name: "AbortError" });
  await closed;
});
