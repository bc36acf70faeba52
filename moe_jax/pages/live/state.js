// What the scripts of this page share: the model, the text, and what is shown of it.
//
// A token  {id, piece, logprob, others: [{id, piece, logprob}], experts, gates, given}: experts and gates are
//          [expert layers][K] or null; `given` tokens were not written by the model.
// A turn   {role, text, before, tokens, finish, seed, temperature, aside}: `before` are the ids that the model read before
//          the first of `tokens`, `aside` says what else it was written with.
//          The role is "text" for a plain text, "user" or "assistant" in a conversation. What a user said has no tokens.
const pristine = document.documentElement.cloneNode(true); // the page before any change, to save a copy of it
const saved = JSON.parse(byId("routing-data").textContent);
const live = saved === null;
const NARROW = matchMedia("(max-width: 60rem)"); // as in the style

let model = { id: "", layers: 0, expert_layers: [], experts: 0, experts_per_token: 0, chat: false, prompts: [] };
let turns = [];
const state = { layer: 0, token: null, lit: null, held: false }; // `layer` counts the layers with experts from 0
const listeners = [];
const change = (what, value) => {
  state[what] = value;
  for (const listener of listeners) listener(what);
};

// All tokens of all turns in a row, with the turn of each.
const tokens = [], owners = [];
const startOf = (turn) => owners.indexOf(turn);
const layerName = (at) => model.expert_layers[at];
const layersShown = () => model.expert_layers.length;

// Bytes that are not a whole character are written in hexadecimal, and special tokens between bars.
const SPELLED = /^(<[0-9A-F]{2}( [0-9A-F]{2})*>|<\|.*\|>|)$/;
const pieceShown = (piece) => piece || "⟨⟩";
const chanceOf = (logprob) => (logprob === null ? "unknown" : percent(Math.exp(logprob), logprob < Math.log(0.1) ? 2 : 1));
