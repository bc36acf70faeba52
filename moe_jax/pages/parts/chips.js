// A text as chips, one for each token: how it is cut into paragraphs, which way it is written, what is above and below.
const RTL = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/, LETTER = /\p{L}/u;
// The direction of the first letter in some pieces of text.
const directionOf = (pieces) => {
  const letter = pieces.join("").match(LETTER);
  return letter && RTL.test(letter[0]) ? "rtl" : "ltr";
};

// A paragraph ends after a line break, and after the end of a sentence if it is already long. Short paragraphs matter,
// because the browser lays out only those in the window (content-visibility). `length` is the number of tokens in the
// paragraph, `last` is the newest of them, and `next` is the token after it.
const LONG = 120;
const endsParagraph = (length, last, next) => last.includes("\n") || length >= 2 * LONG
  || (length >= LONG && /[.!?]["”’)]*\s*$/.test(last) && /^\s/.test(next));

// The chip of a token, as nodes to append. The space that begins a token is put before its box, so that lines break
// between boxes and words stay apart.
const tokenChip = (piece, i) => {
  const [, space, rest] = piece.match(/^( (?=\S))?(.*)$/s);
  const node = el("span", { class: "t", role: "button", tabindex: "-1", "data-i": i }, visible(rest).replace(/\n/g, "↵"));
  node.slim = [...rest].length < 2;
  return space ? [space, node] : [node];
};

// The chip one line above (sign -1) or below (sign 1) whose middle is nearest.
const vertical = (nodes, i, sign) => {
  const from = nodes[i].getBoundingClientRect(), middle = from.left + from.width / 2;
  let best = i, distance = Infinity, line = null;
  for (let j = i + sign; j >= 0 && j < nodes.length; j += sign) {
    const box = nodes[j].getBoundingClientRect();
    if (sign * (box.top - from.top) < from.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > from.height / 2) break;
    const d = Math.abs(box.left + box.width / 2 - middle);
    if (d < distance) [best, distance] = [j, d];
  }
  return best;
};
