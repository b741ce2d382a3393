// Calls of the gateway's API. The gateway's key stays in this module's memory.

let key = null;

export class ApiError extends Error {
  /** An error in OpenAI's form, or any other answer that is no success. */
  constructor(status, body, retryAfter) {
    const error = body?.error ?? {};
    super(error.message ?? `The gateway answered with status ${status}.`);
    this.status = status;
    this.param = error.param ?? null;
    this.retryAfter = retryAfter;
  }

  /** The message and what else helps to act on it, in one line. */
  describe() {
    const where = this.param ? ` (${this.param})` : "";
    const when = this.retryAfter ? ` Try again in ${this.retryAfter} s.` : "";
    return `${this.message}${where}${when}`;
  }
}

export function hasKey() {
  return key !== null;
}

/** The response of a call that succeeded. Where the gateway wants a key, the person is asked for it. */
async function call(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
    const sent = key;
    const response = await fetch(path, { ...options, headers, credentials: "omit" });
    if (response.ok) return response;
    const failure = new ApiError(response.status, await response.json().catch(() => null),
      response.headers.get("retry-after"));
    if (response.status !== 401) throw failure;
    // Another call may have asked for the key in the meantime.
    if (sent === key && !(await askForKey())) throw failure;
    options.signal?.throwIfAborted();
  }
}

let asking = null;

/** Ask once, however many calls wait for the key. Return whether one was given. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    dialog.returnValue = "";
    // Asked again: the key that was given is not the gateway's.
    document.getElementById("key-error").hidden = key === null;
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "use") key = input.value;
      input.value = "";
      asking = null;
      resolve(dialog.returnValue === "use");
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export async function getJson(path) {
  return (await call(path)).json();
}

/** Yield the chunks of a streamed chat completion. `onNote` gets what the gateway says about the request. */
export async function* streamChat(body, signal, onNote) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const note = response.headers.get("x-pema-note");
  if (note) onNote(note);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.status ?? 200, chunk, null);
    yield chunk;
  }
  throw new Error("The answer broke off: the gateway closed the stream before its end.");
}

/** Yield the data of server-sent events. EventSource cannot POST. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length > 0) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
