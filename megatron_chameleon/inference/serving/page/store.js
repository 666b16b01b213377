// Keeps conversations in this browser, so that they survive a reload.
//
// IndexedDB holds them, because images are too large for the few megabytes of sessionStorage. Each
// message is an entry of its own: a growing answer rewrites one entry and not the whole
// conversation. Where the browser has no room, or keeps nothing (private windows of some), the page
// goes on without, and says so once.

const DATABASE = "chameleon";
const VERSION = 1;

/** Conversations beyond this number are removed, the oldest first. */
export const MOST_CONVERSATIONS = 50;

export class Store {
  #backend;
  #onTrouble;
  #isBroken = false;

  /**
   * @param {object} backend What `openBackend` gives, or an object with the same methods.
   * @param {(reason: "full"|"off") => void} onTrouble Called once, when something is not kept.
   */
  constructor(backend, onTrouble = () => {}) {
    this.#backend = backend;
    this.#onTrouble = onTrouble;
  }

  /** Keep a conversation's record and some of its messages. */
  async save(conversation, nodes = []) {
    if (conversation.isEmpty) return;
    // One transaction: a record never names a message that is not there. The copies are made now,
    // because the messages go on changing.
    const copies = nodes.map((node) => structuredClone(node));
    await this.#try(() => this.#backend.put(conversation.record(), copies));
  }

  /** The records of all kept conversations, the latest first. */
  async list() {
    const found = (await this.#try(() => this.#backend.records())) ?? [];
    return found.sort((a, b) => b.changed - a.changed);
  }

  /** A conversation's record and messages; null if it is not here. */
  async load(id) {
    if (!id) return null;
    return (await this.#try(() => this.#backend.read(id))) ?? null;
  }

  async remove(id) {
    await this.#try(() => this.#backend.remove(id));
  }

  /** Remove the oldest conversations, so that the browser's room is not used up in silence. */
  async trim(keep = MOST_CONVERSATIONS) {
    for (const record of (await this.list()).slice(keep)) await this.remove(record.id);
  }

  async #try(work) {
    try {
      return await work();
    } catch (error) {
      if (!this.#isBroken) this.#onTrouble(error?.name === "QuotaExceededError" ? "full" : "off");
      this.#isBroken = true;
      return undefined;
    }
  }
}

/** The browser's own database. */
export async function openBackend(factory = globalThis.indexedDB) {
  const database = await open(factory);
  // Another tab with a newer version of this page must be able to change the database.
  database.onversionchange = () => database.close();
  const run = (mode, work) =>
    new Promise((resolve, reject) => {
      const transaction = database.transaction(["conversations", "nodes"], mode);
      let result;
      transaction.oncomplete = () => resolve(result);
      transaction.onabort = () => reject(transaction.error ?? new Error("aborted"));
      work(
        transaction.objectStore("conversations"),
        transaction.objectStore("nodes"),
        (value) => (result = value),
      );
    });
  return {
    put: (record, nodes) =>
      run("readwrite", (conversations, stored) => {
        conversations.put(record);
        for (const node of nodes) stored.put(node);
      }),
    records: () =>
      run("readonly", (conversations, _, give) => {
        conversations.getAll().onsuccess = (event) => give(event.target.result);
      }),
    read: (id) =>
      run("readonly", (conversations, stored, give) => {
        conversations.get(id).onsuccess = ({ target: { result: record } }) => {
          if (!record) return give(null);
          stored.index("conversation").getAll(id).onsuccess = (event) =>
            give({ record, nodes: event.target.result });
        };
      }),
    remove: (id) =>
      run("readwrite", (conversations, stored) => {
        conversations.delete(id);
        stored.index("conversation").openKeyCursor(IDBKeyRange.only(id)).onsuccess = (event) => {
          const cursor = event.target.result;
          if (!cursor) return;
          stored.delete(cursor.primaryKey);
          cursor.continue();
        };
      }),
  };
}

function open(factory) {
  return new Promise((resolve, reject) => {
    const request = factory.open(DATABASE, VERSION);
    request.onupgradeneeded = () => {
      const database = request.result;
      database.createObjectStore("conversations", { keyPath: "id" });
      database.createObjectStore("nodes", { keyPath: "id" }).createIndex(
        "conversation",
        "conversation",
      );
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version"));
  });
}

/** A backend that keeps nothing beyond the page, for browsers that do not let it. */
export function memoryBackend() {
  const records = new Map();
  const nodes = new Map();
  return {
    put: async (record, changed) => {
      records.set(record.id, record);
      for (const node of changed) nodes.set(node.id, node);
    },
    records: async () => [...records.values()],
    read: async (id) =>
      records.has(id)
        ? {
            record: records.get(id),
            nodes: [...nodes.values()].filter((node) => node.conversation === id),
          }
        : null,
    remove: async (id) => {
      records.delete(id);
      for (const node of [...nodes.values()]) if (node.conversation === id) nodes.delete(node.id);
    },
  };
}

/** A value of localStorage or sessionStorage, which browsers may refuse to give or to keep. */
export const small = {
  get(storage, name) {
    try {
      return globalThis[storage].getItem(`chameleon.${name}`) ?? "";
    } catch {
      return "";
    }
  },
  set(storage, name, value) {
    try {
      if (value) globalThis[storage].setItem(`chameleon.${name}`, value);
      else globalThis[storage].removeItem(`chameleon.${name}`);
    } catch {
      // It holds until the page is left.
    }
  },
};
