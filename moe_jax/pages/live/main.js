// The beginning: the model is asked for, or the saved text is shown.
const facts = () => [
  layersShown() ? `${count(layersShown(), "layer")} with ${count(model.experts, "expert")}, ${model.experts_per_token} for each token` : `${count(model.layers, "layer")} without experts`,
  model.context ? `reads ${count(model.context, "token")}` : "",
  model.val_bits_per_byte ? `${model.val_bits_per_byte.toFixed(3)} bits per byte` : "",
].filter(Boolean).join(" · ");

const startModel = () => {
  addColours(model.experts);
  document.title = `Routing of ${model.id}`;
  byId("model-name").textContent = `${model.id} · ${facts()}`;
  const more = live ? ", and go on from there" : "", look = NARROW.matches ? "Press" : "Point at";
  if (layersShown()) byId("lead").textContent = `Each token has the colour of the expert that it chooses first. ${look} a token to see what else it might have been${more}.`;
  else {
    byId("title").textContent = "Watch every token and its chances";
    byId("lead").textContent = `This model has no experts: each token is shaded by its probability. ${look} a token to see what else it might have been${more}.`;
    for (const node of document.querySelectorAll("[data-routed]")) node.hidden = true;
  }
  byId("foot").textContent = live ? ABOUT : `One file, no network. Saved on ${saved.at}; temperature ${saved.settings.temperature}, seed ${saved.settings.seed}.`;
  startText();
  startLoads();
  if (layersShown()) setLayer(0);
  startGlance();
  dressAll();
  drawCard();
};

let connected = false, connecting = null;
// Asked for twice before the server has answered, it is still one request.
const connect = () => {
  connecting ??= askForModel().finally(() => { connecting = null; });
  return connecting;
};
const askForModel = async () => {
  if (connected) return true;
  try {
    const entry = await askForEntry();
    model = { ...model, id: entry.id, ...entry.moe_jax };
  } catch (error) {
    say(troubleLine(error));
    show("key-row", error.needsKey === true);
    return false;
  }
  connected = true;
  say("");
  show("key-row", false);
  startModel();
  byId("length").max = model.max_tokens;
  byId("prompt").placeholder = model.prompts[0] ?? "";
  if (model.chat) startChat();
  fill(byId("suggested"), {}, model.prompts.map((text) => el("button", { type: "button", title: text, onclick: () => {
    byId("prompt").value = text;
    submit();
  } }, quoted(text))));
  drawButtons();
  return true;
};
const startChat = () => {
  document.body.classList.add("chat");
  byId("prompt-label").textContent = "Your message";
  byId("prompt").placeholder = `A message to ${model.id}`;
  byId("enter-does").textContent = "sends";
  show("system-label", true);
  document.querySelector(".glance").before(byId("composer"));
};

const submit = async () => {
  if (running) { running.abort(); return; }
  if (!connected && !await connect()) return;
  await allShown();
  if (running) return; // begun by a second press, while the former text came onto the page
  const text = byId("prompt").value;
  if (model.chat && !text.trim()) { byId("prompt").focus(); return; }
  await (model.chat ? send(text) : writeNew(text));
};
const quietly = (action) => async () => {
  if (running) return;
  await allShown();
  if (running) return;
  byId("write").focus();
  await action();
};

// A reload keeps what was typed.
const PROMPT = "moe-jax-prompt";
const keepPrompt = () => {
  byId("prompt").value = sessionStorage.getItem(PROMPT) ?? "";
  window.addEventListener("pagehide", () => sessionStorage.setItem(PROMPT, byId("prompt").value));
};

// A page that shows this one in a frame adds #write: a first text is written at once, and headline and colours are its own.
const framed = location.hash === "#write";
const startInFrame = () => {
  document.body.classList.add("framed");
  window.addEventListener("message", ({ data }) => { if (["light", "dark"].includes(data?.theme)) document.documentElement.dataset.theme = data.theme; });
};

startTheme();
// The bar stays at the top of the window, so what is scrolled to has to stop below it.
new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${byId("bar").offsetHeight}px`)).observe(byId("bar"));
if (live) {
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) submit();
  });
  byId("again").addEventListener("click", quietly(again));
  byId("go-on").addEventListener("click", quietly(goOn));
  byId("fresh").addEventListener("click", quietly(startOver));
  byId("edit").addEventListener("click", quietly(edit));
  byId("copy").addEventListener("click", copy);
  byId("temperature").addEventListener("input", drawButtons);
  byId("save").addEventListener("click", save);
  startTransport();
  keepPrompt();
  if (NARROW.matches) byId("settings").open = false;
  else if (!framed) byId("prompt").focus();
  if (framed) startInFrame();
  connect().then((ready) => { if (ready && framed) byId("suggested").querySelector("button")?.click(); });
} else openSaved();
