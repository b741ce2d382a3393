// One answer: its tokens as buttons in a list, its text, λ along it, and what the owner was shown.
import { decision, isAlone, percent, pieceOf, textOf, visible } from "./tokens.js";
import { describe, element, lambdaLine } from "./elements.js";

export class Answer {
  /** `start(prefix)` begins this answer again with the tokens of the prefix. */
  constructor(title, details, start) {
    const parts = document.getElementById("answer").content.cloneNode(true);
    this.root = parts.firstElementChild;
    this.details = details;
    this.start = start;
    this.part = (name) => this.root.querySelector(name);
    this.part("h2").textContent = title;
    this.list = this.part(".tokens");
    this.list.setAttribute("aria-label", `Tokens: ${title}`);
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    this.tokens = [];
    this.ended = true;
    this.empty();
  }

  empty() {
    if (this.details.button && this.list.contains(this.details.button)) this.details.hide();
    this.tokens = [];
    this.current = null;
    this.list.replaceChildren();
    this.part(".text").textContent = "";
    for (const name of [".error", ".note", ".lambda", ".shown"]) this.part(name).hidden = true;
    this.say("");
  }

  /** Show a text that begins with these tokens. */
  begin(prefix) {
    this.empty();
    this.ended = false;
    this.began = performance.now();
    this.given = prefix.length;
    // The gateway leaves the space around an answer out.
    this.add(prefix, textOf(prefix).trim());
    this.say("Waiting for the first token …");
  }

  /** Append tokens that became final, and the text that came with them. */
  add(tokens, text) {
    for (const token of tokens) {
      const at = this.tokens.push(token) - 1;
      this.list.append(element("li", {}, this.button(token, at)));
      if (pieceOf(token).includes("\n")) this.list.append(element("li", { className: "break", ariaHidden: "true" }));
    }
    this.part(".text").append(text);
    if (tokens.length === 0) return;
    this.drawLambda();
    this.say(`${this.counted()} …`);
  }

  note(text) {
    this.part(".note").textContent = text;
    this.part(".note").hidden = false;
  }

  end(reason) {
    this.ended = true;
    this.say(`${this.counted()}. ${reason}`);
  }

  fail(message) {
    this.ended = true;
    this.say(this.tokens.length > 0 ? `${this.counted()}.` : "");
    this.part(".error").textContent = message;
    this.part(".error").hidden = false;
  }

  /** Show the tokens, round trips, bytes and quotas of this answer. */
  shown({ tokens, round_trips, sent_bytes, received_bytes, quota }) {
    const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
    const left = (one) => `${number(one.left)} ${one.unit} left`
      + (one.resets_s ? `, all again in ${one.resets_s.toLocaleString("en")} s` : "");
    describe(this.part(".shown dl"), [
      ["Tokens", number(tokens)],
      ["Round trips", number(round_trips)],
      ["Bytes sent", number(sent_bytes)],
      ["Bytes received", number(received_bytes)],
      ...(quota ?? []).map((one) => [`Quota: ${one.name}`, left(one)]),
    ]);
    this.part(".shown").hidden = false;
  }

  /** Mark the tokens that are not in the other text. */
  mark(differing) {
    this.buttons().forEach((button, i) => button.classList.toggle("differs", differing.has(i)));
  }

  say(text) {
    if (this.part(".status").textContent !== text) this.part(".status").textContent = text;
  }

  counted() {
    const fresh = this.tokens.length - this.given;
    const overruled = this.tokens.filter((token) => token.decided_by === "adapter").length;
    const rate = fresh / Math.max((performance.now() - this.began) / 1000, 1e-3);
    const decided = overruled > 0 ? `, the adapter overruled ${percent(overruled / this.tokens.length)}` : "";
    return `${this.tokens.length} tokens${decided}, ${rate.toFixed(1)} tokens/s`;
  }

  buttons() {
    return [...this.list.querySelectorAll("button")];
  }

  button(token, at) {
    const piece = visible(pieceOf(token));
    const button = element("button", { type: "button", className: "token", tabIndex: at === 0 ? 0 : -1 }, piece);
    button.dataset.decided = token.decided_by;
    button.dataset.id = token.id;
    button.classList.toggle("alone", isAlone(token));
    const share = token.share ?? 0;
    button.dataset.share = share;
    button.style.setProperty("--share", share);
    button.setAttribute("aria-label", `${piece}: ${decision(token)}, adapter's share ${percent(share)}`);
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", "details");
    const show = () => {
      this.current = at;
      this.drawLambda();
      this.details.show(button, token, (one) => this.goOn(at, one));
    };
    button.addEventListener("focus", () => {
      for (const other of this.buttons()) other.tabIndex = other === button ? 0 : -1;
      show();
      // In a narrow window the details cover the lower part of it.
      button.scrollIntoView({ block: "nearest" });
    });
    button.addEventListener("click", () => button.focus());
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show());
    button.addEventListener("pointerleave", () => this.details.leave());
    button.addEventListener("blur", () => this.details.leave());
    return button;
  }

  /** Begin again with the tokens before `at` and the alternative there. */
  goOn(at, one) {
    const replaced = this.tokens[at];
    const logprob = replaced.mixture_top?.find((other) => other.id === one.id)?.logprob;
    this.start([...this.tokens.slice(0, at),
      { ...replaced, id: one.id, text: one.text, bytes: one.bytes, logprob, share: null, decided_by: "you" }]);
    this.list.querySelector("li:last-child button")?.focus();
  }

  drawLambda() {
    this.part(".lambda").replaceChildren(lambdaLine(this.tokens, this.current));
    this.part(".lambda").hidden = this.tokens.every((token) => !token.lambda);
  }

  onKey(event) {
    const buttons = this.buttons();
    const at = buttons.indexOf(document.activeElement);
    const target = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (target !== undefined) buttons[Math.max(0, Math.min(target, buttons.length - 1))].focus();
    else if (event.key === "ArrowDown") this.details.enter();
    else if (event.key === "Escape") this.details.hide();
    else return;
    event.preventDefault();
  }
}
