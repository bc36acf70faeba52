// Switch an expert off: what the text loses, token by token, and the story that the model then writes.
const ablation = data.ablation;
const HOT = 3; // nats: the strongest colour
// Half the strength is reached at a quarter of HOT, so that small changes can be seen.
const heat = (hundredths) => Math.sign(hundredths) * Math.min(1, Math.sqrt(Math.abs(hundredths) / 100 / HOT));
const heated = (hundredths) => ({ "--v": Math.abs(heat(hundredths)).toFixed(3), "--c": hundredths < 0 ? "var(--better)" : "var(--worse)" });
const signed = (nats, digits) => (+nats.toFixed(digits) === 0 ? "0" : `${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(digits)}`);
const chance = (hundredths) => { const p = Math.exp(-hundredths / 100); return percent(p, p < 0.0995 ? (p < 0.00095 ? 3 : 1) : 0); };
const row = () => ablation.layers.indexOf(state.off.layer);
const changeOf = () => ablation.change[row()][state.off.expert];
const storyOf = (a, e) => ablation.stories[a][e];
const mean = sum(ablation?.loss ?? [0]) / 100 / (ablation?.loss.length ?? 1);

// The layer and the expert without which the text loses most.
const neediest = () => {
  let best = [0, 0];
  ablation.mean.forEach((means, a) => means.forEach((v, e) => { if (v > ablation.mean[best[0]][best[1]]) best = [a, e]; }));
  return { layer: ablation.layers[best[0]], expert: best[1] };
};
const tokenText = (i) => quoted(data.text.pieces[i]).replaceAll("␣", "");
const worst = (change, most) => range(change.length).filter((i) => change[i] > 5).sort((i, j) => change[j] - change[i]).slice(0, most);
const neediestSaid = () => {
  const { layer, expert } = neediest(), a = ablation.layers.indexOf(layer), change = ablation.change[a][expert], [i] = worst(change, 1);
  if (ablation.mean[a][expert] <= 0 || i === undefined) return "No single expert is needed here: without any one of them the loss of this text stays as it is.";
  const told = sum(ablation.stories.map((stories) => stories.filter((s) => s !== ablation.story).length)), all = ablation.layers.length * E;
  const changed = ablation.stories.length ? ` Of the ${all} experts, ${told} change the story when they are switched off.` : "";
  return `The text misses expert ${expert} of layer ${layer} most: without it the loss rises by ${percent(ablation.mean[a][expert] / mean)}. ` +
    `The token that suffers most is “${tokenText(i + 1)}”, whose chance falls from ${chance(ablation.loss[i])} to ${chance(ablation.loss[i] + change[i])}.${changed}`;
};

// A table of buttons: layers down, experts across.
const drawOffGrid = () => {
  const top = Math.max(...ablation.mean.flat().map(Math.abs), 1e-9);
  const cell = (a, e) => {
    const v = ablation.mean[a][e], layer = ablation.layers[a], chosen = layer === state.off.layer && e === state.off.expert;
    return el("td", {}, el("button", { type: "button", class: "cell", vars: { "--v": Math.sqrt(Math.abs(v) / top).toFixed(3), "--c": v < 0 ? "var(--better)" : "var(--worse)" },
      "data-layer": layer, "data-expert": e, "aria-pressed": String(chosen), "aria-label": `Without expert ${e} of layer ${layer}: ${signed(v, 3)} nats a token`,
      onclick: () => switchOff(layer, e), ...(MANY ? tipped(`Without expert ${e} of layer ${layer}: ${signed(v, 3)} nats a token`) : {}) }, MANY ? "" : signed(v, 3)));
  };
  fill(clear(byId("off-grid")), {}, [
    caption("Change of the loss without each expert", `Nats a token, on average over the text. Press a ${MANY ? "cell" : "number"} to see what that expert is good for. The slider above does not change this section.`),
    el("div", { class: "scroll" }, el("table", { class: MANY ? "cells many" : "cells" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Expert"), range(E).map((e) => el("th", { scope: "col" }, el("span", { class: "dot", vars: { "--c": colourOf(e), "--on": inkOn(e) } }, `${e}`))))),
      el("tbody", {}, ablation.layers.map((layer, a) => el("tr", {}, el("th", { scope: "row" }, `Layer ${layer}`), range(E).map((e) => cell(a, e))))))),
  ]);
  roving(byId("off-grid"), ".cell", { down: E });
  const chosen = byId("off-grid").querySelector('[aria-pressed="true"]'), box = chosen.closest(".scroll");
  box.scrollLeft += chosen.getBoundingClientRect().left - box.getBoundingClientRect().left - box.clientWidth / 2;
};

const offTip = (i, change) => i === 0 ? "The first token is not predicted." : i > change.length ? "The losses of later tokens were not computed."
  : `“${tokenText(i)}”\nchance ${chance(ablation.loss[i - 1])} → ${chance(ablation.loss[i - 1] + change[i - 1])}\nloss ${signed(change[i - 1] / 100, 2)} nats`;
const offNodes = [];
const drawOffText = () => {
  const box = byId("off-tokens"), change = changeOf();
  if (!offNodes.length) {
    box.append(...paragraphs().filter((p) => p[0] <= change.length).map((p) => el("p", { dir: direction(p) }, p.filter((i) => i <= change.length).flatMap((i) => {
      const [, space, rest] = data.text.pieces[i].match(/^( (?=\S))?(.*)$/s);
      offNodes[i] = el("span", { class: `o${marks.has(i) ? " mark" : ""}`, role: "img", "data-off": i }, visible(rest).replace(/\n/g, "↵"));
      return space ? [space, offNodes[i]] : [offNodes[i]];
    }))));
    const tell = (event) => { const node = event.target.closest("[data-off]"); if (node) showTip({ currentTarget: node, clientX: event.clientX, clientY: event.clientY }, offTip(Number(node.dataset.off), changeOf())); };
    box.addEventListener("pointerover", tell);
    box.addEventListener("pointerleave", hideTip);
    box.addEventListener("focusin", tell);
    box.addEventListener("focusout", hideTip);
    roving(box, ".o");
  }
  offNodes.forEach((node, i) => {
    const v = i ? change[i - 1] : 0;
    for (const [name, value] of Object.entries(heated(v))) node.style.setProperty(name, value);
    node.setAttribute("aria-label", offTip(i, change).replaceAll("\n", ", "));
  });
};

// The tokens just before token i, back to the beginning of its text.
const before = (i) => {
  const near = range(Math.min(i, 5)).map((n) => i - 1 - n), end = near.findIndex((j) => marks.has(j));
  return near.slice(0, end < 0 ? near.length : end).reverse();
};
const drawWorst = (change) => {
  const { layer, expert } = state.off, found = worst(change, 6), { expert: chosen } = data.routing;
  const took = (i) => range(K).some((k) => chosen[layer][i * K + k] === expert);
  fill(clear(byId("off-worst")), {}, [
    caption("The tokens that suffer most", found.length ? "The chance that the model gives to the token in bold, before and after." : null),
    found.length ? el("ol", { class: "worst" }, found.map((i) => el("li", {},
      el("span", { class: "said", dir: direction([i + 1]) }, before(i + 1).map((j) => quoted(data.text.pieces[j]).replaceAll("␣", " ")), el("b", {}, quoted(data.text.pieces[i + 1]).replaceAll("␣", " "))),
      el("span", { class: "fall" }, el("span", {}, chance(ablation.loss[i])), el("span", { "aria-label": "falls to" }, "→"), el("b", {}, chance(ablation.loss[i] + change[i]))),
      el("small", {}, took(i) ? "the token before it chose this expert" : "reached through later layers and attention")))) : el("p", { class: "small" }, "No token is worse by more than 0.05 nats."),
  ]);
};

// Both texts in words, and which words of each are in the longest common sequence of words.
const compared = (one, other) => {
  const [a, b] = [one, other].map((text) => text.match(/\S+\s*|\s+/g) ?? []), same = (i, j) => a[i].trim() === b[j].trim();
  const longest = range(a.length + 1).map(() => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) longest[i][j] = same(i, j) ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const told = [a, b].map((words) => words.map((word) => ({ word, kept: false })));
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (same(i, j)) told[0][i++].kept = told[1][j++].kept = true;
    else if (longest[i + 1][j] >= longest[i][j + 1]) i++;
    else j++;
  }
  return told;
};
const drawStories = () => {
  if (!ablation.stories.length) return;
  const { layer, expert } = state.off, [before, after] = compared(ablation.story, storyOf(row(), expert));
  const text = (words) => el("p", { class: "story", dir: "auto" }, el("span", { class: "prompt" }, visible(ablation.prompt)),
    words.map(({ word, kept }) => el("span", { class: kept ? "same" : "parted" }, visible(word))));
  fill(clear(byId("off-stories")), {}, [
    el("figure", { class: "before" }, caption("The story with all experts"), text(before)),
    el("figure", { class: "after" }, caption(`The story without expert ${expert} of layer ${layer}`), text(after)),
    el("p", { class: "small" }, `Both begin with “${visible(ablation.prompt)}” and are drawn with the same random numbers (temperature ${ablation.temperature}, seed ${ablation.seed}), so only the missing expert can part them. ` +
      (after.every(({ kept }) => kept) && before.length === after.length ? "Here they are the same, word for word." : "Words that the other story has not are coloured.")),
  ]);
};

const drawOff = () => {
  const { layer, expert } = state.off, a = row(), change = changeOf(), v = ablation.mean[a][expert];
  const chose = range(change.length + 1).filter((i) => range(K).some((k) => choice(layer, i, k).expert === expert)).length;
  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)));
  byId("off-title").replaceChildren(`Layer ${layer} without `, el("span", { class: "dot", vars: { "--c": colourOf(expert), "--on": inkOn(expert) } }, `expert ${expert}`));
  fill(clear(byId("off-facts")), {}, [
    fact("Loss", `${signed(100 * v / mean, 1)} %`, `from ${mean.toFixed(3)} to ${(mean + v).toFixed(3)} nats a token`),
    fact("Worse", count(change.filter((c) => c > 10).length, "token"), `by more than 0.1 nats, of ${whole(change.length)}`),
    fact("Better", count(change.filter((c) => c < -10).length, "token"), "by more than 0.1 nats"),
    fact("Had chosen it", percent(chose / (change.length + 1), 0), "of the tokens; the next-best expert serves them now"),
  ]);
  for (const b of byId("off-grid").querySelectorAll(".cell")) b.setAttribute("aria-pressed", String(Number(b.dataset.layer) === layer && Number(b.dataset.expert) === expert));
  drawOffText();
  drawWorst(change);
  drawStories();
};
const switchOff = (layer, expert) => {
  change("off", { layer, expert });
  if (layer !== state.layer) setLayer(layer);
};

const startAblation = () => {
  if (!ablation) {
    for (const id of ["off-said", "off-explain", "off-shown"]) byId(id).remove();
    byId("ablation").append(el("p", { class: "explain" }, data.ablation_missing));
    return;
  }
  state.off = neediest();
  listeners.push((what) => {
    if (what === "layer" && state.layer !== state.off.layer && ablation.layers.includes(state.layer)) change("off", { layer: state.layer, expert: state.off.expert });
  });
  byId("off-said").append(el("p", {}, lost ? lostSaid : neediestSaid()));
  byId("off-said").classList.toggle("bad", lost);
  if (!lost) byId("found").append(el("p", { id: "needed-said" }, `${neediestSaid().split(". ")[0].replace(/\.$/, "")}. `, el("a", { href: "#ablation" }, "Switch an expert off")));
  if (ablation.layers.length < L) byId("off-explain").append(` This model is large, so the page holds only ${ablation.layers.length > 1 ? "the layers" : "layer"} ${listed(ablation.layers.map(String))}${ablation.stories.length ? "" : `, ${whole(ablation.loss.length)} tokens of the text and no stories`}.`);
  byId("off-scale").append(heatScale([-1, -0.1, 0, 0.1, 1, HOT], (v) => heated(100 * v), (v) => signed(v, Math.abs(v) < 1 ? 1 : 0), "nats: the change of the loss. 0.69 nats more halve a token's chance."));
  section("ablation", () => { drawOffGrid(); drawOff(); }, ["off"], drawOff);
};
