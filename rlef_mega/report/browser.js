// The episode list: filters, a list that only creates its visible rows, keyboard shortcuts, and a state that is kept in
// the URL, so that a reload or a link restores the view.
const ROW = 46; // pixels, as in the style sheet
const SPARE = 6; // rows created above and below the visible ones
const START = { stage: "", outcome: "", family: "", kind: "", turn: "", query: "", deep: "", order: "", colour: "syntax", diff: "1", episode: "" };
const GLYPHS = { "": "✓", NO_VALID_CODE: "∅", PRIVATE_TEST: "P", WRONG_ANSWER: "W", TIME_LIMIT: "T", IDLE_LIMIT: "T", MEMORY_LIMIT: "M", RUNTIME_ERROR: "E", OUTPUT_LIMIT: "O", COMPILE_ERROR: "C", SECURITY_VIOLATION: "S" };
const ORDERS = { turns: "most turns first", tokens: "most tokens first", kl: "largest KL first" };
const byId = (id) => document.getElementById(id);

class Browser {
  constructor(store) {
    this.store = store;
    this.state = { ...START, ...Object.fromEntries(new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "")) };
    this.list = byId("list");
    this.rows = byId("rows");
    this.found = [];
    this.drawing = 0; // number of the last requested dialogue: only that one is shown
    this.fillControls();
    this.list.addEventListener("scroll", () => this.drawRows());
    this.list.addEventListener("keydown", (event) => this.listKey(event));
    document.addEventListener("keydown", (event) => this.pageKey(event));
    new ResizeObserver(() => this.drawRows()).observe(this.list);
    this.filter();
  }

  fillControls() {
    const { index } = this.store;
    const fill = (id, key, first, options) => {
      const select = byId(id);
      select.append(h("option", { value: "" }, first), ...options.map(([value, label]) => h("option", { value }, label)));
      this.bind(select, key);
    };
    const same = (names) => names.map((name) => [name, name]);
    const longest = Math.max(1, ...index.rows.map((row) => row[4].length));
    const counts = (key) => Map.groupBy(this.store.episodes, (episode) => episode[key]);
    const sizes = counts("stage");
    fill("by-stage", "stage", "all stages", index.stages.map((stage) => [stage, `${stage} (${sizes.get(stage).length})`]));
    const outcomes = counts("outcome");
    fill("by-outcome", "outcome", "all outcomes", Object.entries(index.outcomes).map(([key, label]) => [key, `${label} (${outcomes.get(key)?.length ?? 0})`]));
    fill("by-family", "family", "all families", same([...index.families].sort()));
    fill("by-kind", "kind", "any result", index.kinds.filter(Boolean).sort().map((kind) => [kind, kindName(kind)]));
    fill("by-turn", "turn", "at any turn", [...Array(longest).keys()].map((turn) => [String(turn + 1), `at turn ${turn + 1}`]));
    fill("order", "order", "in order", Object.entries(ORDERS));
    byId("colour").append(...Object.entries(COLOURS).map(([value, label]) => h("option", { value }, label)));
    this.bind(byId("colour"), "colour", () => this.showDialogue());
    this.bind(byId("diff"), "diff", () => this.showDialogue());
    this.bind(byId("search"), "query");
    this.bind(byId("deep"), "deep");
    byId("reset").addEventListener("click", () => {
      this.state = { ...START, colour: this.state.colour, diff: this.state.diff, episode: this.state.episode };
      for (const show of this.shows) show();
      this.filter();
    });
  }

  // Bind a control to the part of the state that it shows and sets.
  bind(control, key, changed = () => this.filter()) {
    const box = control.type === "checkbox";
    const show = () => (box ? (control.checked = Boolean(this.state[key])) : (control.value = this.state[key]));
    (this.shows ??= []).push(show);
    show();
    control.addEventListener("input", () => {
      this.state[key] = box ? (control.checked ? "1" : "") : control.value;
      changed();
      this.remember();
    });
  }

  remember() {
    const changed = Object.entries(this.state).filter(([key, value]) => value !== START[key]);
    history.replaceState(null, "", "#" + new URLSearchParams(changed.length ? changed : [["episode", ""]]));
  }

  async filter() {
    if (this.state.deep && this.state.query && !this.store.texts) {
      await this.store.readTexts((share) => (byId("count").textContent = `reading dialogues: ${Math.round(100 * share)}%`));
    }
    this.found = this.store.select(this.state);
    const all = this.store.episodes.length.toLocaleString("en");
    byId("count").textContent = `${this.found.length.toLocaleString("en")} of ${all} episodes`;
    this.rows.style.height = `${ROW * this.found.length}px`;
    const position = this.found.findIndex((episode) => episode.name === this.state.episode);
    this.list.scrollTop = Math.max(0, ROW * position - this.list.clientHeight / 2);
    this.choose(this.found[Math.max(0, position)]);
  }

  choose(episode) {
    this.chosen = episode;
    if (episode && this.state.episode !== episode.name) {
      this.state.episode = episode.name;
      if (this.ready) this.remember();
    }
    this.ready = true; // the first choice is automatic: the URL stays as it is
    this.drawRows();
    return this.showDialogue();
  }

  drawRows() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - SPARE);
    const last = Math.min(this.found.length, first + Math.ceil(this.list.clientHeight / ROW) + 2 * SPARE);
    this.rows.replaceChildren(...this.found.slice(first, last).map((episode, k) => this.row(episode, first + k)));
    this.list.setAttribute("aria-activedescendant", this.chosen ? `option-${this.chosen.position}` : "");
  }

  row(episode, position) {
    const results = episode.errors.map((kind) => h("span", { class: `glyph ${kind ? "bad" : "good"}`, title: kind ? kindName(kind) : "passes" }, GLYPHS[kind] ?? "?"));
    const row = h("div", {
      role: "option", id: `option-${episode.position}`, class: "row", "aria-selected": String(episode === this.chosen),
      "aria-setsize": this.found.length, "aria-posinset": position + 1,
      "aria-label": `${episode.problem}, ${episode.stage}, ${this.store.index.outcomes[episode.outcome]}, turns: ${episode.errors.map((kind) => kindName(kind) || "passes").join(", ")}`,
      onclick: () => this.choose(episode),
    }, h("span", { class: `mark ${episode.outcome}` }), h("b", {}, episode.problem), h("span", { class: "glyphs" }, results),
    h("small", {}, `${episode.stage} · ${episode.family}`));
    row.style.top = `${ROW * position}px`;
    return row;
  }

  async showDialogue() {
    const request = ++this.drawing, episode = this.chosen, pane = byId("dialogue");
    if (!episode) return pane.replaceChildren(h("p", { class: "none" }, "No episode matches these filters."));
    const dialogue = await this.store.dialogue(episode);
    if (request !== this.drawing) return;
    const elsewhere = this.store.episodes.filter((other) => other.problem === episode.problem && other !== episode).slice(0, 12);
    const outcomes = this.store.index.outcomes;
    const moved = pane.dataset.episode !== episode.name;
    pane.dataset.episode = episode.name;
    pane.replaceChildren(
      h("h3", {}, h("span", { class: `mark ${episode.outcome}` }), episode.problem),
      h("p", { class: "about" }, `${outcomes[episode.outcome]} · ${episode.stage} · ${episode.family}`),
      elsewhere.length ? h("p", { class: "elsewhere" }, "The same problem: ", elsewhere.map((other) =>
        h("button", { type: "button", onclick: () => this.choose(other) }, h("span", { class: `mark ${other.outcome}` }), `${other.stage}, ${outcomes[other.outcome]}`))) : "",
      ...dialogueView(dialogue, { colour: this.state.colour, diff: Boolean(this.state.diff) }).filter(Boolean),
    );
    if (moved) pane.scrollTop = request === 1 ? Store.lastScroll() : 0;
  }

  move(by) {
    const position = this.found.indexOf(this.chosen);
    const next = Math.min(this.found.length - 1, Math.max(0, position + by));
    if (next < 0 || next === position) return;
    const top = ROW * next, bottom = top + ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (bottom > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = bottom - this.list.clientHeight;
    this.choose(this.found[next]);
  }

  // Show the tooltip of the next token, for keyboard users.
  walkTokens(by) {
    const tokens = [...byId("dialogue").querySelectorAll(".response .token")];
    const position = tokens.findIndex((token) => token.classList.contains("current"));
    const token = tokens[Math.min(tokens.length - 1, Math.max(0, position + by))];
    tokens[position]?.classList.remove("current");
    token.classList.add("current");
    token.scrollIntoView({ block: "nearest" });
    byId("token").hidden = false;
    byId("token").textContent = `“${token.textContent.replaceAll("\n", "⏎")}”  ${token.title.replaceAll("\n", " · ")}`;
  }

  listKey(event) {
    const page = Math.floor(this.list.clientHeight / ROW);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter") byId("dialogue").focus();
    else if (!(event.key in steps)) return;
    else this.move(steps[event.key]);
    event.preventDefault();
  }

  pageKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === byId("search")) return this.list.focus();
    if (event.target.matches("input, select, textarea")) return;
    const press = (id, set) => {
      set(byId(id));
      byId(id).dispatchEvent(new Event("input"));
    };
    const keys = {
      j: () => this.move(1),
      k: () => this.move(-1),
      "/": () => byId("search").focus(),
      c: () => press("colour", (select) => (select.selectedIndex = (select.selectedIndex + 1) % select.length)),
      d: () => press("diff", (box) => (box.checked = !box.checked)),
      "?": () => (byId("keys").open = !byId("keys").open),
    };
    if (byId("token")) Object.assign(keys, { ArrowRight: () => this.walkTokens(1), ArrowLeft: () => this.walkTokens(-1) });
    if (!(event.key in keys)) return;
    if (!event.key.startsWith("Arrow")) byId("episodes").scrollIntoView({ block: "start" });
    keys[event.key]();
    event.preventDefault();
  }
}

async function openBrowser() {
  if (!byId("browser")) return;
  const began = performance.now();
  const store = new Store(await unpack("index"));
  byId("browser").hidden = false;
  const browser = new Browser(store);
  if (browser.state.episode && location.hash.includes("=")) byId("episodes").scrollIntoView({ block: "start" });
  document.documentElement.dataset.openedMs = String(Math.round(performance.now() - began));
}
openBrowser();
