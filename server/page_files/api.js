// The server's API: sends the key, reads streams of events, and turns every failure into Trouble.

import { Trouble, troubleOf } from "./trouble.js";

const STORED = "farspan-key";

/** The API key, kept as long as this tab. */
export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => sessionStorage.setItem(STORED, value),
};

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new Trouble(signal?.aborted ? "stopped" : "unreachable");
  }
  if (!response.ok) throw troubleOf(await response.json().catch(() => null), response.status);
  return response;
}

/** The JSON at a path; with a body, of a POST. Raises Trouble. */
export async function json(path, options = {}) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch {
    throw new Trouble(options.signal?.aborted ? "stopped" : "unreachable");
  }
}

/** The chunks of a streamed chat, until [DONE]. Raises Trouble, also for a stream without its end. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", { body: { ...body, stream: true }, signal });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw troubleOf(chunk, 500);
    yield chunk;
  }
  throw new Trouble("broken");
}

/** The data of server-sent events. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        for (const line of part.split("\n")) {
          if (line.startsWith("data: ")) yield line.slice(6);
        }
      }
    }
  } catch {
    throw new Trouble(signal.aborted ? "stopped" : "broken");
  } finally {
    reader.cancel().catch(() => {});
  }
}
