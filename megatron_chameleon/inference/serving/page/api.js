// The server's HTTP interface: which model it has, and answers as they are written.
//
// Addresses are relative to the page, so that the page also works behind a proxy under a path.

import { readEvents } from "./sse.js";

/** What went wrong, in a form that the page can act on. */
export class ServerError extends Error {
  /**
   * @param {"key"|"busy"|"context"|"request"|"server"|"lost"} kind
   * @param {string} message What the server says, or what happened.
   * @param {{status?: number, retryAfter?: number}} more
   */
  constructor(kind, message, more = {}) {
    super(message);
    this.kind = kind;
    this.status = more.status ?? 0;
    this.retryAfter = more.retryAfter ?? 0;
  }
}

export class Server {
  /** @param {string} key The API key; empty if none is known. */
  constructor(key = "", base = globalThis.document?.baseURI ?? "http://localhost/") {
    this.key = key;
    this.base = base;
  }

  /**
   * The model that is served.
   * @returns {Promise<{id: string, chameleon: object}>}
   */
  async model(signal) {
    const response = await this.#fetch("v1/models", { signal });
    let found;
    try {
      found = (await response.json()).data[0];
    } catch {
      throw new ServerError("server", "The list of models cannot be read.");
    }
    if (!found) throw new ServerError("server", "The server has no model.");
    return { id: found.id, chameleon: found.chameleon ?? {} };
  }

  /**
   * Ask for an answer and yield what comes, in order:
   *
   *     {type: "open"}                                       the server took the request
   *     {type: "text", text}                                 the next piece of text
   *     {type: "image", index, url, isComplete, progress}    an image, which may still grow
   *     {type: "finish", reason}                             "stop" or "length"
   *     {type: "usage", promptTokens, answerTokens}
   *
   * @param {object} body The request's body, without `stream`.
   * @param {AbortSignal} signal Aborting it closes the connection, and the server stops.
   * @throws {ServerError} The request is refused, or the stream ends before the answer does.
   */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    yield { type: "open" };
    const type = response.headers.get("content-type") ?? "";
    if (!type.startsWith("text/event-stream")) {
      throw new ServerError("server", `The reply is not a stream of events but ${type || "nothing"}.`);
    }
    let isFinished = false;
    try {
      for await (const { data } of readEvents(response.body)) {
        if (data === "[DONE]") return;
        for (const event of read(data)) {
          isFinished ||= event.type === "finish";
          yield event;
        }
      }
    } catch (error) {
      if (error instanceof ServerError || signal?.aborted) throw error;
      throw new ServerError("lost", "The connection was lost while the answer was written.");
    }
    // Some proxies drop the last event; an answer that has said why it ended is whole.
    if (!isFinished) throw new ServerError("lost", "The connection ended before the answer did.");
  }

  async #fetch(path, options) {
    const headers = { "content-type": "application/json" };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(new URL(path, this.base), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ServerError("lost", "The server cannot be reached.");
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

/** The events of a chunk of OpenAI's format, with our images beside the text. */
export function* read(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError("server", "A part of the answer cannot be read.");
  }
  if (chunk?.error) throw errorOf(chunk.error, 0, 0);
  const choice = chunk?.choices?.[0];
  const delta = choice?.delta ?? {};
  if (typeof delta.content === "string" && delta.content) {
    yield { type: "text", text: delta.content };
  }
  for (const image of delta.images ?? []) {
    const url = image?.image_url?.url ?? "";
    // Nothing but a picture inside the answer is shown: another address would tell a third party
    // who reads the page.
    if (url && !/^data:image\/(png|jpeg|webp|gif);base64,/.test(url)) continue;
    const progress = Number(image.progress);
    yield {
      type: "image",
      index: Number(image.index) || 0,
      url,
      isComplete: image.complete !== false,
      progress: Math.min(Math.max(Number.isFinite(progress) ? progress : 0, 0), 1),
    };
  }
  if (choice?.finish_reason) yield { type: "finish", reason: choice.finish_reason };
  if (chunk?.usage) {
    const { prompt_tokens: promptTokens, completion_tokens: answerTokens } = chunk.usage;
    yield { type: "usage", promptTokens, answerTokens };
  }
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  try {
    const body = JSON.parse(text);
    if (body.error) return errorOf(body.error, response.status, retryAfter);
    if (body.detail) return errorOf({ message: String(body.detail) }, response.status, retryAfter);
  } catch {
    // A proxy in between answers with a page of its own, which is of no use here.
  }
  const message = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  // 502 and 504 without words of ours are a proxy's, which does not reach the server.
  const type = response.status === 502 || response.status === 504 ? "unreachable" : "";
  return errorOf({ message, type }, response.status, retryAfter);
}

function errorOf(error, status, retryAfter) {
  const message = typeof error === "string" ? error : String(error.message ?? "unknown error");
  const code = `${error.code ?? ""} ${error.type ?? ""}`;
  let kind = status >= 400 && status < 500 ? "request" : "server";
  if (status === 401 || status === 403) kind = "key";
  else if (status === 429 || (status === 503 && retryAfter)) kind = "busy";
  else if (/unreachable/.test(code)) kind = "lost";
  else if (/context_length/.test(code)) kind = "context";
  else if (/invalid_request/.test(code)) kind = "request";
  return new ServerError(kind, message, { status, retryAfter });
}
