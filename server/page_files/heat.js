// The panel of heat maps: what the prompts of the newest question read and kept, one row per plan, one scale.

import { draw } from "./heatmap.js";
import { percent, whole } from "./format.js";

export class HeatPanel {
  constructor(section) {
    this.section = section;
    this.costs = new Map(); // plan -> cost
  }

  clear() {
    this.costs.clear();
    this.show();
  }

  add(plan, cost) {
    this.costs.set(plan, cost);
    this.show();
  }

  show() {
    this.section.hidden = this.costs.size === 0;
    const rows = [...this.costs].map(([plan, cost]) => this.row(plan, cost));
    this.section.querySelector(".maps").replaceChildren(...rows);
  }

  row(plan, cost) {
    const row = document.querySelector("#maps").content.firstElementChild.cloneNode(true);
    row.querySelector("h3").textContent = plan;
    const [read, kept] = row.querySelectorAll("figure");
    const heads = cost.per_head;
    draw(read, "Read in prefill", heads.prefill_read_fraction, this.most("prefill_read_fraction"), percent);
    draw(kept, "Tokens kept", heads.kv_tokens_kept, this.most("kv_tokens_kept"), (value) => whole(value));
    return row;
  }

  /** The largest value under any plan: equal colours are equal values. */
  most(name) {
    return Math.max(...[...this.costs.values()].flatMap((cost) => cost.per_head[name].flat()));
  }
}
