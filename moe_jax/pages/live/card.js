// The card of the chosen token: its experts and gates in every layer, its probability, and what else it might have been.
const card = byId("card");

const expertRows = (token) => {
  if (!token.experts) return layersShown() ? [el("p", { class: "small" }, "Its experts are not known yet: no token has been written after it.")] : [];
  const many = model.experts_per_token > 4; // then a bar is measured by the largest gate
  return [el("h4", {}, "The experts that read it"), el("div", { class: many ? "layers many" : "layers" }, token.experts.map((row, at) => {
    const gates = token.gates?.[at] ?? [];
    const said = row.map((e, k) => `expert ${e}${gates[k] === undefined ? "" : `, gate ${gates[k].toFixed(3)}`}`).join("; ");
    return el("button", { type: "button", "aria-current": at === state.layer ? "true" : false, "aria-label": `Layer ${layerName(at)}: ${said}`, title: `Colour the text by layer ${layerName(at)}`, onclick: () => { setLayer(at); card.querySelectorAll(".layers button")[at]?.focus(); } },
      el("b", {}, `Layer ${layerName(at)}`), el("span", { class: "gates" }, row.map((e, k) => el("span", { class: "gate", title: gates[k] === undefined ? null : `Expert ${e}, gate ${gates[k].toFixed(3)}` },
        el("span", { class: "dot", vars: { "--c": colourOf(e), "--on": inkOn(e) } }, `${e}`),
        el("span", { class: "track" }, el("span", { class: "bar", vars: { "--c": colourOf(e), width: `${100 * Math.min((gates[k] ?? 0) / (many ? Math.max(...gates) : 1), 1)}%` } })),
        el("span", { class: "number" }, gates[k] === undefined ? "" : gates[k].toFixed(3))))));
  }))];
};

// The likeliest tokens in this place. The token of the text is marked; another one is a button, if the text may go on from it.
const otherRows = (i, token) => {
  const shown = token.others.slice(0, 5);
  if (!shown.length) return [el("p", { class: "small" }, "The model did not say what else it might have been.")];
  if (token.logprob !== null && !shown.some((o) => o.id === token.id)) shown.push(token);
  const others = shown.filter((o) => o.id !== token.id).length, free = live && canGoOn(i);
  return [el("h4", {}, free && others ? "What else it might have been: press one to go on from there" : "What else it might have been"),
    el("div", { class: "others" }, shown.map((o) => {
      const own = o.id === token.id, name = quoted(pieceShown(o.piece)), chance = chanceOf(o.logprob);
      const inside = [el("span", { class: "word" }, name), el("span", { class: "track" }, el("span", { class: "bar", vars: { "--c": "var(--accent)", width: `${100 * Math.exp(o.logprob)}%` } })), el("span", { class: "number" }, chance)];
      return own || !free || o.id === null ? el("div", { class: own ? "other own" : "other" }, inside)
        : el("button", { type: "button", class: "other", "data-id": o.id, "aria-label": `Go on with “${name}” instead, probability ${chance}`, onclick: () => goOnFrom(i, o) }, inside);
    }))];
};

const drawCard = () => {
  const i = state.token, token = tokens[i];
  clear(card);
  card.classList.toggle("open", token !== undefined);
  if (!token) {
    card.append(el("p", { class: "small" }, live && !tokens.length ? "When there is a text, point at a token, or move to it with the arrow keys." : "Point at a token, or move to it with the arrow keys. This panel then says which experts read it and what else it might have been. Press the token, or Enter, to hold the panel."));
    return;
  }
  const by = token.given ? "given to the model" : "written by the model";
  fill(card, {}, [
    el("button", { class: "close", type: "button", "aria-label": "Close", onclick: () => { const node = nodes[state.token]; letGo(); node?.focus({ preventScroll: true }); letGo(); } }, "×"),
    el("h3", {}, quoted(pieceShown(token.piece).trim() || pieceShown(token.piece))),
    el("p", { class: "where" }, `token ${whole(i + 1)} of ${whole(tokens.length)}, ${by}${token.logprob === null ? "" : `; probability ${chanceOf(token.logprob)}`}`),
    otherRows(i, token),
    expertRows(token),
  ]);
};
const enterCard = () => card.querySelector("button:not(.close)")?.focus();
listeners.push((what) => { if (what === "layer" || what === "token") drawCard(); });
