// The live panel: what the engine does at this moment, asked once a second while somebody looks.

import { json } from "./api.js";
import { bytes, rate, whole } from "./format.js";

const EVERY = 1000; // milliseconds
const POINTS = 60; // of the sparkline
const STATES = ["private", "borrowed", "cached", "free"];

export class EnginePanel {
  /** onState(words, kind) hears whether requests are served; onTrouble hears of a key that is wrong. */
  constructor(section, onState, onTrouble) {
    this.section = section;
    this.onState = onState;
    this.onTrouble = onTrouble;
    this.rates = [];
    this.last = null; // stats
    this.hasKey = true; // not once one was refused: nothing is asked until there is another
    this.tick = this.tick.bind(this);
  }

  start() {
    this.tick();
    setInterval(this.tick, EVERY);
  }

  async tick() {
    if (document.hidden || this.asking || !this.hasKey) return;
    this.asking = true;
    try {
      this.show(await json("stats"));
    } catch (trouble) {
      if (!trouble.kind) throw trouble; // a mistake of this page
      if (trouble.kind === "unreachable") this.onState("The server does not answer", "bad");
      if (trouble.kind !== "key") return;
      this.hasKey = false;
      this.onState(trouble.title, "bad");
      this.onTrouble(trouble);
    } finally {
      this.asking = false;
    }
  }

  show(stats) {
    if (stats.trouble) this.onState(stats.trouble, "bad");
    else this.onState(stats.running + stats.waiting ? "Working" : "Ready", "good");
    this.put("running", whole(stats.running));
    this.put("waiting", whole(stats.waiting));
    this.put("held", bytes(stats.kv_bytes));
    this.showPages(stats);
    this.showRate(stats);
  }

  showPages(stats) {
    const words = [];
    for (const state of STATES) {
      const count = stats[`pages_${state}`];
      const part = this.section.querySelector(`.pages-${state}`);
      part.style.flexGrow = count;
      this.put(`pages-${state}`, whole(count));
      words.push(`${count} ${state}`);
    }
    this.section.querySelector(".host").hidden = !stats.pages_host;
    this.put("pages-host", whole(stats.pages_host));
    this.section.querySelector(".pages").setAttribute("aria-label", `Pages of the KV cache: ${words.join(", ")}`);
  }

  /** Tokens per second, of prompts and answers: of its last step while one runs, for steps may take long. */
  showRate(stats) {
    const busy = stats.running > 0 || (this.last !== null && stats.steps > this.last.steps);
    const now = busy && stats.step_seconds > 0 ? stats.step_tokens / stats.step_seconds : 0;
    this.last = stats;
    this.rates = [...this.rates, now].slice(-POINTS);
    this.put("rate", rate(now));
    const most = Math.max(...this.rates, 1);
    const points = this.rates.map((value, index) => {
      const x = POINTS - this.rates.length + index;
      return `${x},${(29 - (27 * value) / most).toFixed(2)}`;
    });
    this.section.querySelector(".spark polyline").setAttribute("points", points.join(" "));
    const area = `${POINTS - this.rates.length},30 ${points.join(" ")} ${POINTS - 1},30`;
    this.section.querySelector(".spark polygon").setAttribute("points", area);
  }

  put(name, words) {
    this.section.querySelector(`[data-value="${name}"]`).textContent = words;
  }
}
