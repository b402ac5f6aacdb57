// Trouble: what went wrong, in words, and what to do next.

const NEXT = {
  key: "Enter a key that this server knows.",
  unreachable: "Is it running? Start it with “farspan serve”, then ask again.",
  broken: "What had come is kept. Ask again; if it breaks off again, look at the server's log.",
  down: "The server's log says why. Ask again when the line at the top says that it is ready.",
  busy: "Wait a moment, then ask again.",
  overflow: "Shorten the text, start a new conversation, or allow a shorter answer.",
  failed: "Ask again; the other requests of the server go on.",
  refused: "Change what it names, or reload this page if the server was started anew.",
};

const TITLES = {
  key: "The key was not accepted",
  unreachable: "The server cannot be reached",
  broken: "The answer broke off",
  down: "The engine is not running",
  busy: "The server is full at the moment",
  overflow: "Too long for the model",
  failed: "The server failed on this request",
  refused: "The server refused the request",
  stopped: "Stopped",
};

export class Trouble extends Error {
  /** kind: a key of TITLES; words: what the server said, if it said anything. */
  constructor(kind, words = "") {
    super(words || TITLES[kind]);
    this.kind = kind;
    this.title = TITLES[kind];
    this.words = words;
    this.next = NEXT[kind] ?? "";
  }
}

/** The trouble that OpenAI's error envelope tells of. */
export function troubleOf(envelope, status) {
  const { message = "", code = "" } = envelope?.error ?? {};
  if (status === 401 || code === "invalid_api_key") return new Trouble("key");
  if (code === "context_length_exceeded") return new Trouble("overflow", message);
  if (code === "engine_unavailable") return new Trouble("down", message);
  if (status === 429 || code === "overloaded") return new Trouble("busy", message);
  if (status >= 400 && status < 500) return new Trouble("refused", message);
  return new Trouble("failed", message);
}
