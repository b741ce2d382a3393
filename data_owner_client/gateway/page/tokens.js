// Tokens as people read them: pieces, probabilities, differences. Nothing here touches the page.

const DECIDED = {
  both: "both sides' favourite",
  adapter: "the adapter overruled the model",
  plm: "the model held against the adapter",
  neither: "no side's favourite",
  you: "chosen here",
};

/** The side that decided on a token, in words. */
export function decision(token) {
  return isAlone(token) ? "the model alone" : DECIDED[token.decided_by] ?? "";
}

/** Whether the adapter had no part in a token. */
export function isAlone(token) {
  return token.decided_by !== "you" && (token.pema_logprob === null || token.lambda === 0);
}

/** The bytes of a token; none of a special token, and those of its text where the gateway sends no bytes. */
export function bytesOf(token) {
  if (token.bytes === null) return new Uint8Array();
  return token.bytes ? Uint8Array.from(token.bytes) : new TextEncoder().encode(token.text);
}

/** A token's own piece. Bytes that are no whole character are shown as numbers. */
export function pieceOf(token) {
  if (!token.bytes) return token.text;
  const bytes = bytesOf(token);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes) || token.text;
  } catch {
    return [...bytes].map(numbered).join("");
  }
}

function numbered(code) {
  return `‹${code.toString(16).toUpperCase().padStart(2, "0")}›`;
}

/** A piece with its white space made visible, where there is nothing else to see, and without control characters. */
export function visible(piece) {
  const shown = piece.replaceAll("\r", "␍").replaceAll("\n", "⏎").replaceAll("\t", "⇥")
    .replace(/[\p{Cc}\u202A-\u202E\u2066-\u2069]/gu, (one) => numbered(one.codePointAt(0)));
  if (shown === "") return "∅";
  return /^ +$/u.test(shown) ? "␣".repeat(shown.length) : shown;
}

/** The whole characters of tokens with which an answer begins. A character that is not yet whole is left out. */
export function textOf(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tokens.map((token) => decoder.decode(bytesOf(token), { stream: true })).join("");
}

export function probability(logprob) {
  return logprob === null || logprob === undefined || logprob <= -9999 ? 0 : Math.exp(logprob);
}

/** A probability in per cent, with as many digits as say something. */
export function percent(value) {
  if (value === null || value === undefined) return "–";
  if (value > 0 && value < 0.001) return "< 0.1 %";
  return `${(100 * value).toFixed(value < 0.1 && value > 0 ? 1 : 0)} %`;
}

/**
 * The indices of tokens that are not in the other text: one set for each of the two lists of ids.
 *
 * Where an answer still grows, `ended` is false for it, and the other one's tail beyond its length is not judged.
 */
export function differences(ids, ended) {
  const [a, b] = ids;
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  const common = commonPairs(a.slice(start), b.slice(start)).map(([i, j]) => [i + start, j + start]);
  return ids.map((own, side) => {
    const shared = new Set(common.map((pair) => pair[side]));
    const lastShared = common.length > 0 ? common.at(-1)[side] : start - 1;
    const other = 1 - side;
    const judged = ended[other] ? own.length : Math.max(lastShared + 1, Math.min(own.length, ids[other].length));
    const differing = new Set();
    for (let i = start; i < judged; i += 1) if (!shared.has(i)) differing.add(i);
    return differing;
  });
}

/** Pairs of indices of a longest common subsequence, by dynamic programming from the ends. */
function commonPairs(a, b) {
  const width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] = a[i] === b[j]
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const pairs = [];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) pairs.push([i++, j++]);
    else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return pairs;
}
