// The text that questions are about: typed, pasted, dropped or chosen; and how many tokens a prompt with it has.

import { json } from "./api.js";
import { whole } from "./format.js";

const MOST_BYTES = 32 * 1024 * 1024;
const SHORT_WAIT = 250; // milliseconds after the last key
const LONG_WAIT = 1200; // ... of a text that takes the server a while
const LONG_TEXT = 200_000; // characters

export class Source {
  /** prompt(): the messages that would be sent now. */
  constructor(section, prompt) {
    this.section = section;
    this.prompt = prompt;
    this.area = section.querySelector("textarea");
    this.count = section.querySelector(".count");
    this.meter = section.querySelector("meter");
    this.note = section.querySelector(".note");
    this.limit = 0; // tokens
    this.asked = 0; // number of the newest question to /tokenize
    this.area.addEventListener("input", () => this.changed());
    section.querySelector("input[type=file]").addEventListener("change", (event) => {
      if (event.target.files.length) this.take(event.target.files[0]);
      event.target.value = "";
    });
    section.querySelector(".clear").addEventListener("click", () => {
      this.put("", "");
      this.area.focus();
    });
    this.acceptDrops();
  }

  get text() {
    return this.area.value;
  }

  /** Something of the prompt changed: count again, when the typing stops. */
  changed() {
    clearTimeout(this.timer);
    this.section.querySelector(".clear").disabled = !this.text;
    this.timer = setTimeout(() => this.recount(), this.text.length > LONG_TEXT ? LONG_WAIT : SHORT_WAIT);
  }

  async recount() {
    const number = ++this.asked;
    const messages = this.prompt();
    if (!this.limit) return;
    if (!messages.some((message) => message.content.trim())) return this.show(0);
    this.count.classList.add("counting");
    try {
      const { count } = await json("tokenize", { body: { messages } });
      if (number === this.asked) this.show(count);
    } catch (trouble) {
      if (number === this.asked) this.count.textContent = trouble.words || trouble.title;
    } finally {
      if (number === this.asked) this.count.classList.remove("counting");
    }
  }

  show(tokens) {
    const over = tokens - this.limit;
    this.meter.max = this.limit;
    this.meter.high = this.limit - 1;
    this.meter.value = tokens;
    this.count.classList.toggle("over", over >= 0);
    const words = `${whole(tokens)} of ${whole(this.limit)} tokens`;
    this.count.textContent = over >= 0 ? `${words}: ${whole(over + 1)} too many` : words;
  }

  /** Read a file as text, or say why not. */
  async take(file) {
    if (file.size > MOST_BYTES) return this.say(`${file.name} is larger than 32 MiB.`, true);
    const text = await file.text();
    if (text.includes("\0")) return this.say(`${file.name} is not a text file. Save it as plain text first.`, true);
    this.put(text, file.name);
  }

  put(text, name) {
    this.area.value = text;
    this.area.scrollTop = 0;
    this.say(name && `From ${name}`);
    this.changed();
  }

  say(words, isBad = false) {
    this.note.textContent = words;
    this.note.classList.toggle("bad", isBad);
  }

  /** Files and texts may be dropped anywhere. */
  acceptDrops() {
    let depth = 0; // of elements that the pointer has entered and not left
    const over = (change) => {
      depth = change === 0 ? 0 : Math.max(0, depth + change);
      document.body.classList.toggle("dragging", depth > 0);
    };
    document.addEventListener("dragenter", (event) => isOurs(event) && over(1));
    document.addEventListener("dragleave", (event) => isOurs(event) && over(-1));
    document.addEventListener("dragover", (event) => isOurs(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      over(0);
      if (!isOurs(event)) return;
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      if (file) this.take(file);
      else if (event.dataTransfer.getData("text/plain")) this.put(event.dataTransfer.getData("text/plain"), "");
    });
  }
}

/** A text that is dragged into a field is the field's own business. */
function isOurs(event) {
  return event.dataTransfer.types.includes("Files") || !event.target.closest?.("textarea, input");
}
