// Runs the calls of tests/server/test_sdks.py with OpenAI's SDK for Node: JSON on standard input and output.
const { OpenAI } = require("openai");

async function run(client, { method, args }) {
  try {
    const found = method.split(".").reduce(([, at], name) => [at, at[name]], [null, client]);
    const reply = await found[1].call(found[0], ...args);
    if (reply[Symbol.asyncIterator] === undefined || reply.data !== undefined) return reply;
    const chunks = [];
    for await (const chunk of reply) chunks.push(chunk);
    return chunks;
  } catch (error) {
    return { error: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

async function main() {
  let text = "";
  for await (const part of process.stdin) text += part;
  const { url, key, calls } = JSON.parse(text);
  const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
  const replies = [];
  for (const call of calls) replies.push((await run(client, call)) ?? null);
  console.log(JSON.stringify(replies));
}

main();
