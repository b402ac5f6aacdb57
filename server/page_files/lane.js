// A lane: one plan's answer to one question, as it comes, with what it cost; what went wrong, in words.

import { chat } from "./api.js";
import { bytes, percent, rate, seconds, whole } from "./format.js";

const SETTLED = 300; // milliseconds behind the first token before a speed means something

export class Lane {
  /** plan: its name. Told: onHeads(plan, cost) by head, onTrouble(trouble), onAgain(lane) when somebody wants it. */
  constructor(plan, { onHeads, onTrouble, onAgain }) {
    this.plan = plan;
    this.onHeads = onHeads;
    this.onTrouble = onTrouble;
    this.onAgain = onAgain;
    this.text = "";
    this.element = document.querySelector("#lane").content.firstElementChild.cloneNode(true);
    this.element.setAttribute("aria-label", `Answer under ${plan}`);
    this.part("h3").textContent = plan;
    this.state("Waits for the other plan, so that the times are fair");
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  state(words) {
    const state = this.part(".lane-state");
    if (state.textContent !== words) state.textContent = words; // what did not change is not read aloud again
  }

  /** Ask once, from the beginning; `text` holds what came. Never raises. */
  async ask(body, signal) {
    this.text = "";
    this.tokens = 0;
    this.cut = false;
    this.cost = this.usage = null;
    this.began = performance.now();
    this.first = this.last = null; // when the first and the newest token came
    this.part(".thoughts").textContent = this.part(".answer").textContent = "";
    this.part(".answer").setAttribute("aria-busy", "true");
    this.part(".trouble").hidden = true;
    this.part(".figures").replaceChildren();
    this.element.classList.add("running");
    this.part("progress").removeAttribute("value");
    this.part(".reading").hidden = false;
    this.part(".reading span").textContent = "";
    this.state("Sent to the engine");
    try {
      for await (const chunk of chat({ ...body, plan: this.plan }, signal)) this.take(chunk);
      this.state(this.cut ? "Cut at the limit of the answer" : "");
    } catch (trouble) {
      this.fail(trouble);
    } finally {
      this.element.classList.remove("running");
      this.part(".reading").hidden = true;
      this.part(".answer").setAttribute("aria-busy", "false");
    }
  }

  take(chunk) {
    const progress = chunk.farspan?.progress;
    if (progress) this.read(progress.prompt_tokens_computed, progress.prompt_tokens);
    const [choice] = chunk.choices;
    if (choice?.delta.reasoning_content) this.say(choice.delta.reasoning_content, ".thoughts");
    if (choice?.delta.content) {
      this.text += choice.delta.content;
      this.say(choice.delta.content, ".answer");
    }
    if (choice?.finish_reason) {
      this.cut = choice.finish_reason === "length";
      this.cost = chunk.farspan;
    }
    if (chunk.usage) this.usage = chunk.usage;
    if (this.cost && this.usage) this.showCost();
  }

  /** Progress of the prompt; again behind a part of the answer, where the engine was started anew. */
  read(done, total) {
    this.part(".reading").hidden = false;
    const bar = this.part("progress");
    bar.max = total;
    bar.value = done;
    this.part(".reading span").textContent = `${whole(done)} of ${whole(total)} tokens`;
    this.state("Reading the prompt");
  }

  /** New words, of the answer or of the reasoning before it. */
  say(words, place) {
    const now = performance.now();
    this.part(".reading").hidden = true;
    this.state("Answering");
    if (this.first === null) {
      this.first = now;
      this.figure("First token", seconds((now - this.began) / 1000), "from the question to its first word");
    }
    this.last = now;
    this.tokens += 1;
    this.part(place).append(words);
    if (now - this.first > SETTLED) this.figure("Speed", `${rate(this.speed(this.tokens))} tok/s`, "of the answer");
  }

  /** Tokens per second behind the first. */
  speed(tokens) {
    return ((tokens - 1) * 1000) / Math.max(this.last - this.first, 1);
  }

  showCost() {
    const { cost, usage } = this;
    const total = cost.kv_tokens_total;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const answer = usage.completion_tokens;
    if (answer > 1 && this.first !== null) {
      this.figure("Speed", `${rate(this.speed(answer))} tok/s`, `${whole(answer)} tokens of the answer`);
    }
    this.figure("Whole answer", seconds((performance.now() - this.began) / 1000), "from the question to its end");
    this.figure("Read", percent(cost.prefill_read_fraction), "of what dense attention reads of the prompt");
    if (typeof cost.decode_read_fraction === "number") {
      this.figure("Decode read", percent(cost.decode_read_fraction), "of what is held, by the tokens of the answer");
    }
    this.figure("KV kept", percent(cost.kv_tokens_kept / total), `${whole(cost.kv_tokens_kept)} of ${whole(total)} tokens per head`);
    const recall = cost.attention_recall;
    this.figure("Recall", recall === null ? "–" : percent(recall), recall === null
      ? "not sampled: everything was read" : `of the full attention; worst 5 %: ${percent(cost.attention_recall_p5)}`);
    this.figure("Cached", whole(cached), `of ${whole(usage.prompt_tokens)} prompt tokens were known before`);
    this.figure("Memory", bytes(cost.kv_bytes), "of the KV cache, at the end of the prompt");
    if (cost.per_head) this.onHeads(this.plan, cost);
  }

  /** A number with its name and, for whoever asks, its meaning. */
  figure(name, value, meaning) {
    const list = this.part(".figures");
    let item = [...list.children].find((other) => other.dataset.name === name);
    if (!item) {
      item = document.createElement("div");
      item.dataset.name = name;
      item.append(document.createElement("dt"), document.createElement("dd"));
      list.append(item);
    }
    const [term, description] = item.children;
    const aside = document.createElement("span"); // read aloud, and shown under the pointer
    aside.className = "unseen";
    aside.textContent = `, ${meaning}`;
    term.replaceChildren(name, aside);
    description.textContent = value;
    item.title = meaning;
  }

  fail(trouble) {
    if (!trouble.kind) throw trouble; // a mistake of this page
    if (trouble.kind === "stopped") return this.state("Stopped");
    this.state("");
    const box = this.part(".trouble");
    box.querySelector("strong").textContent = trouble.title;
    box.querySelector(".words").textContent = trouble.words;
    box.querySelector(".next").textContent = trouble.next;
    box.querySelector("button").onclick = () => this.onAgain(this);
    box.hidden = false;
    this.onTrouble(trouble);
  }
}
