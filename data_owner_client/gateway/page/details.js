// The popover of a token: both sides' favourites, and going on from one of them.
import { decision, percent, pieceOf, probability, visible } from "./tokens.js";
import { element } from "./elements.js";

const LEAVE_MS = 250;
const SIDES = [["plm_top", "Model (PLM)"], ["pema_top", "Adapter"], ["mixture_top", "Together"]];

export class Details {
  /** `popover` is the one element that shows the details of whichever token has the focus or the pointer. */
  constructor(popover) {
    this.popover = popover;
    this.button = null;
    this.leaving = 0;
    popover.addEventListener("pointerenter", () => clearTimeout(this.leaving));
    popover.addEventListener("pointerleave", () => this.leave());
    popover.addEventListener("keydown", (event) => this.onKey(event));
    popover.addEventListener("focusout", (event) => {
      if (!popover.contains(event.relatedTarget) && event.relatedTarget !== this.button) this.hide();
    });
    document.addEventListener("pointerdown", (event) => {
      if (!popover.contains(event.target) && !event.target.closest?.(".tokens button")) this.hide();
    });
  }

  /** Show a token's details below its button. `goOn` takes the alternative that is clicked. */
  show(button, token, goOn) {
    clearTimeout(this.leaving);
    if (this.button === button && !this.popover.hidden) return;
    // Somebody who is reading alternatives with the keyboard keeps them.
    if (this.popover.contains(document.activeElement)) return;
    this.button?.setAttribute("aria-expanded", "false");
    this.button = button;
    button.setAttribute("aria-expanded", "true");
    this.popover.setAttribute("aria-label", `Token ${visible(pieceOf(token))}`);
    this.popover.replaceChildren(...facts(token), lists(token, goOn));
    button.closest(".tokens").after(this.popover);
    this.popover.hidden = false;
    this.place(button);
  }

  place(button) {
    const parent = this.popover.offsetParent ?? document.body;
    const around = parent.getBoundingClientRect();
    const at = button.getBoundingClientRect();
    const room = document.documentElement.clientWidth - this.popover.offsetWidth - 8;
    this.popover.style.left = `${Math.max(8, Math.min(at.left, room)) - around.left - parent.clientLeft}px`;
    this.popover.style.top = `${at.bottom - around.top - parent.clientTop}px`;
  }

  /** Hide after a while, so that the pointer can travel to the popover. A focused token keeps its details. */
  leave() {
    clearTimeout(this.leaving);
    this.leaving = setTimeout(() => {
      const focused = document.activeElement;
      if (focused === this.button || this.popover.contains(focused)) return;
      this.hide();
    }, LEAVE_MS);
  }

  hide() {
    clearTimeout(this.leaving);
    this.popover.hidden = true;
    this.button?.setAttribute("aria-expanded", "false");
    this.button = null;
  }

  /** Put the focus on the first alternative. */
  enter() {
    this.popover.querySelector("button")?.focus();
  }

  onKey(event) {
    const buttons = [...this.popover.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "Escape") {
      const button = this.button;
      button?.focus();
      this.hide();
    } else if (event.key === "ArrowDown") buttons[Math.min(at + 1, buttons.length - 1)]?.focus();
    else if (event.key === "ArrowUp") (at > 0 ? buttons[at - 1] : this.button)?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function facts(token) {
  const title = element("p", { className: "details-title" },
    element("strong", {}, visible(pieceOf(token))), ` · ${token.id} · ${decision(token)}`);
  const numbers = [
    `P ${percent(token.logprob === undefined ? null : probability(token.logprob))}`,
    `λ ${token.lambda === null || token.lambda === undefined ? "–" : token.lambda.toFixed(2)}`,
    `adapter's share ${percent(token.share)}`,
    `model's mass not listed ${percent(token.unlisted)}`,
  ];
  return [title, element("p", { className: "details-numbers" }, numbers.join(" · "))];
}

function lists(token, goOn) {
  const given = SIDES.filter(([name]) => token[name]?.length > 0);
  return element("div", { className: "sides" }, ...given.map(([name, title]) => element("section", { className: name },
    element("h4", {}, title),
    element("ol", {}, ...token[name].map((one) => element("li", {}, alternative(one, token, goOn)))))));
}

function alternative(one, token, goOn) {
  const p = probability(one.logprob);
  const piece = visible(pieceOf(one));
  const chosen = one.id === token.id;
  const bar = element("span", { className: "bar" });
  bar.style.setProperty("--p", p);
  const button = element("button", { type: "button", className: "alternative" },
    bar, element("span", { className: "piece" }, piece), element("span", { className: "p" }, percent(p)));
  if (chosen) button.setAttribute("aria-current", "true");
  button.setAttribute("aria-label", `${piece}, ${percent(p)}${chosen ? ", chosen" : ""}: go on from here`);
  button.dataset.id = one.id;
  button.addEventListener("click", () => goOn(one));
  return button;
}
