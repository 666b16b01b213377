// Server-sent events out of a stream of bytes.
//
// EventSource cannot send a POST request or a header, so the stream of `fetch` is read here. The
// format is that of https://html.spec.whatwg.org/multipage/server-sent-events.html, without
// reconnecting. Chunks may end anywhere: inside a character, a line or an event.

export class EventParser {
  #rest = "";
  #data = [];
  #event = "";
  #isFirst = true;

  /**
   * Take a piece of the stream's text.
   * @param {string} text
   * @returns {{event: string, data: string}[]} The events that it completes.
   */
  push(text) {
    if (this.#isFirst && text) {
      this.#isFirst = false;
      if (text.charCodeAt(0) === 0xfeff) text = text.slice(1);
    }
    const found = [];
    this.#rest += text;
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      if (end < 0) break;
      const isReturn = this.#rest[end] === "\r";
      // A return at the end of a chunk may be the first half of "\r\n": wait for the next one.
      if (isReturn && end + 1 === this.#rest.length) break;
      const width = isReturn && this.#rest[end + 1] === "\n" ? 2 : 1;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + width);
      const event = this.#line(line);
      if (event) found.push(event);
    }
    return found;
  }

  /** The events that the end of the stream completes: a last "\r" has no second half to wait for. */
  end() {
    return this.#rest.endsWith("\r") ? this.push("\n") : [];
  }

  #line(line) {
    if (line === "") {
      const event = this.#data.length
        ? { event: this.#event || "message", data: this.#data.join("\n") }
        : null;
      this.#data = [];
      this.#event = "";
      return event;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return null; // a comment, which keeps the connection open
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    if (name === "event") this.#event = value;
    return null;
  }
}

/**
 * The events of a response's body. An event that the end of the stream cuts off is left out, as the
 * format says.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        yield* parser.push(decoder.decode());
        yield* parser.end();
        return;
      }
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // who stops reading wants the server to stop writing
  }
}
