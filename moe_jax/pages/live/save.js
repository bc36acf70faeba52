// "Save as routing.html": this page with the text in it, and without what needs a server.
const rounded = (x) => (typeof x === "number" ? Math.round(1e4 * x) / 1e4 : x);
const snapshot = () => ({
  schema: 1,
  at: new Date().toISOString().slice(0, 10),
  model: { ...model, prompts: [] },
  settings: { temperature: Number(byId("temperature").value), seed: turns.at(-1).seed ?? null },
  view: { layer: state.layer, colour: byId("colour").value, numbers: byId("numbers").checked },
  turns: turns.map(({ role, text, finish, seed, temperature, aside: without, tokens: all }) => ({ role, text, finish, seed, temperature, aside: without, before: [], start: 0, tokens: all.map((t) => ({
    ...t, logprob: rounded(t.logprob), others: t.others.map((o) => ({ ...o, logprob: rounded(o.logprob) })), gates: t.gates?.map((row) => row.map(rounded)) ?? null,
  })) })),
});
const savedPage = () => {
  const copy = pristine.cloneNode(true), policy = copy.querySelector("meta[http-equiv]");
  policy.setAttribute("content", policy.getAttribute("content").replace("connect-src 'self'", "connect-src 'none'"));
  copy.querySelector("meta[charset]").setAttribute("charset", "utf-8"); // whatever it was: the copy is written in UTF-8
  // In the data `<` is written as a JSON escape, so no text can end the data's element or begin another.
  copy.querySelector("#routing-data").textContent = JSON.stringify(snapshot()).replaceAll("<", "\\u003c");
  return `<!doctype html>\n${copy.outerHTML}\n`;
};
const save = () => {
  const link = el("a", { href: URL.createObjectURL(new Blob([savedPage()], { type: "text/html" })), download: "routing.html" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
const openSaved = () => {
  model = saved.model;
  for (const node of document.querySelectorAll("[data-live]")) node.remove();
  startModel();
  byId("colour").value = saved.view.colour;
  byId("numbers").checked = saved.view.numbers;
  if (layersShown()) setLayer(saved.view.layer);
  showTurns(saved.turns);
};
