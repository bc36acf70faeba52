// Text to ids and back, as `moe_jax/data/tokenizers.py` does it: plain bytes, or byte-level BPE. A string of bytes is kept
// as a string with one character for each byte.
const bytesOf = (text) => Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
const utf8 = (bytes, fatal) => new TextDecoder("utf-8", { fatal, ignoreBOM: true }).decode(Uint8Array.from(bytes, (c) => c.charCodeAt(0)));
// The rule by which text is cut into words. White space is what Unicode calls so; \s has another character, and lacks one.
const SPACE = "\\p{White_Space}", OTHER = `[^${SPACE}\\p{L}\\p{N}]`;
const WORD = new RegExp(`'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?${OTHER}+|${SPACE}+(?!\\P{White_Space})|${SPACE}`, "gu");

class Tokenizer {
  constructor({ merges = [] }) {
    this.entries = Array.from({ length: 256 }, (_, byte) => String.fromCharCode(byte));
    for (const [left, right] of merges) this.entries.push(this.entries[left] + this.entries[right]);
    this.ids = new Map(this.entries.map((entry, id) => [entry, id]));
    this.separator = this.entries.length;
    this.longest = Math.max(...this.entries.map((entry) => entry.length)); // in bytes
    this.pieces = [...this.entries.map(shownAs), "<|endoftext|>"];
  }

  encode(text) { return (text.match(WORD) ?? []).flatMap((word) => this.merged(bytesOf(word))); }

  // Of all neighbours in a word, those that join to the entry with the lowest id are joined first, from the left. Their
  // new neighbours join to higher ids, so all of one id are joined in one pass.
  merged(word) {
    let parts = this.ids.has(word) ? [word] : [...word];
    for (;;) {
      let best = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) best = Math.min(best, this.ids.get(parts[i] + parts[i + 1]) ?? Infinity);
      if (best === Infinity) return parts.map((part) => this.ids.get(part));
      const joined = [];
      for (let i = 0; i < parts.length; i++) {
        const pair = i + 1 < parts.length ? parts[i] + parts[i + 1] : "";
        joined.push(pair === this.entries[best] ? (i++, pair) : parts[i]);
      }
      parts = joined;
    }
  }

  // The tokens after which a tuned model writes its answer to a conversation.
  conversation(messages) {
    const turns = messages.flatMap(({ role, content }) => [...this.encode(`${role}\n${content.trim()}`), this.separator]);
    return [this.separator, ...turns, ...this.encode("assistant\n")];
  }
}
// The text of an entry by itself. Bytes that are no whole characters are written in hexadecimal.
const shownAs = (entry) => {
  try { return utf8(entry, true); } catch { return `<${[...entry].map((c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join(" ").toUpperCase()}>`; }
};
