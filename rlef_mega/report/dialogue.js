// One dialogue as elements. Everything a model or a program wrote becomes a text node, never markup.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== ""));
  return element;
}

const COLOURS = {
  syntax: "syntax",
  logprobs: "log-prob",
  kl: "KL to the initial policy",
  advantages: "advantage",
  versions: "weight version",
};
const SCALES = {
  logprobs: ["certain", "improbable", "q"],
  kl: ["less likely than at first, by 2 nats", "more likely, by 2 nats", "d"],
  advantages: ["−2: worse than expected", "+2: better", "d"],
};
const LEVELS = 8; // of a scale, on each side

function signed(value, digits = 2) {
  const shown = value.toFixed(digits);
  if (Number(shown) === 0) return shown.replace("-", ""); // neither sign
  return (value > 0 ? "+" : "") + shown.replace("-", "−");
}

const plain = (value) => signed(value).replace("+", "");

// What each token of a turn is coloured by, and what its tooltip says.
function tokenNumbers(turn) {
  const { pieces, logprobs, refs, advantages, versions, facts } = turn;
  const version = versions.flatMap(([number, count]) => Array(Math.min(count, pieces.length)).fill(number));
  return pieces.map((_, place) => ({
    logprobs: logprobs && logprobs[place] / 100,
    kl: logprobs && refs && (logprobs[place] - refs[place]) / 100,
    advantages: advantages ? advantages[place] / 100 : facts.advantage,
    versions: version[place],
  }));
}

function tokenClass(colour, value, versionPlace) {
  if (value === undefined) return "";
  if (colour === "versions") return `v${versionPlace.get(value) % 6}`;
  const level = (size) => Math.min(LEVELS, Math.round(LEVELS * size));
  if (colour === "logprobs") return `q${level(1 - Math.exp(value))}`;
  const size = colour === "kl" ? Math.sqrt(Math.abs(value) / 2) : Math.abs(value) / 2; // most tokens move little
  return `${value < 0 ? "n" : "p"}${level(size)}`;
}

function tokenTip(number) {
  const parts = [];
  if (number.logprobs !== undefined) parts.push(`log-prob ${plain(number.logprobs)} (p ${Math.exp(number.logprobs).toFixed(3)})`);
  if (number.kl !== undefined) parts.push(`log-prob to the initial policy ${signed(number.kl)}`);
  if (number.advantages !== undefined) parts.push(`advantage ${signed(number.advantages)}`);
  if (number.versions !== undefined) parts.push(`weights of version ${number.versions}`);
  return parts.join("\n");
}

function tokenSpans(turn, colour, versionPlace) {
  const spans = [];
  let end = 0;
  const numbers = tokenNumbers(turn);
  turn.pieces.forEach((length, place) => {
    if (!length) return;
    const shown = turn.response.slice(end, (end += length));
    spans.push(h("span", { class: `token ${tokenClass(colour, numbers[place][colour], versionPlace)}`, title: tokenTip(numbers[place]) }, shown));
  });
  return [...spans, turn.response.slice(end)];
}

const span = ([kind, shown]) => (kind ? h("span", { class: kind }, shown) : shown);

function responseView(turn, language, colour, versionPlace) {
  if (colour !== "syntax" && turn.pieces) return tokenSpans(turn, colour, versionPlace);
  const response = turn.response.trimStart();
  const begun = turn.program !== null && response.startsWith(turn.program.trim().slice(0, 40) || "```");
  return responsePieces(turn.response, language, begun && !response.startsWith("```")).map(span);
}

function diffView(before, after) {
  if (before === after) return h("p", { class: "caption" }, "The same program again.");
  const marks = { "-": "less", "+": "more", "…": "folded", " ": "same" };
  return h("pre", { dir: "ltr", class: "diff" }, diffRows(before, after).map(([mark, head, changed, tail]) =>
    h("span", { class: `row ${marks[mark]}` }, h("span", { class: "gutter" }, mark), head, changed && h("mark", {}, changed), tail, "\n")));
}

const kindName = (kind) => kind.replaceAll("_", " ").toLowerCase();

function badge(good, ...words) {
  return h("span", { class: `badge ${good ? "good" : "bad"}` }, good ? "✓ " : "✗ ", ...words);
}

const fixed = (shown, kind) => h("pre", { dir: "ltr", class: kind }, shown);

function testsView(turn) {
  if (!turn.tests.length) return null;
  const heads = ["public test", "input", "expected", "got"];
  return h("div", { class: "scroll" },
    h("table", { class: "tests" },
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, turn.tests.map((test) => h("tr", {},
        h("td", {}, badge(test.status === "OK", kindName(test.status))),
        h("td", {}, fixed(test.input)), h("td", {}, fixed(test.expected)),
        h("td", {}, fixed(test.observed), test.stderr && fixed(test.stderr, "stderr")))))),
    turn.hidden ? h("p", { class: "caption" }, `and ${turn.hidden} more public tests`) : null);
}

// Of private tests, what the reward saw: how many passed until the first that did not.
function privateView({ private: seen }) {
  if (!seen) return null;
  const good = seen.passed === seen.run;
  const line = h("p", { class: "private" }, h("span", { class: "role" }, "private tests, seen by the reward alone "),
    badge(good, `${seen.passed} passed of ${seen.run} run`), ` ${seen.tests} in all`,
    good ? null : [", ended by ", h("b", {}, kindName(seen.status))]);
  if (!seen.failed) return line;
  return [line, h("div", { class: "scroll" }, h("table", { class: "tests" },
    h("thead", {}, h("tr", {}, ["private test", "input", "expected"].map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, h("tr", {}, h("td", {}, badge(false, kindName(seen.status))), h("td", {}, fixed(seen.failed.input)), h("td", {}, fixed(seen.failed.expected))))))];
}

const FACTS = [
  ["value", "value", plain], ["return", "return", plain], ["advantage", "advantage", signed],
  ["KL", "kl", (value) => plain(value)], ["log-prob", "logprob", plain], ["tokens", "tokens", (value) => value.toLocaleString("en")],
];

function versionText(versions) {
  const numbers = [...new Set(versions.map(([number]) => number))];
  return numbers.length > 3 ? `${numbers[0]} … ${numbers.at(-1)}` : numbers.join(", ");
}

// The turns at a glance: how each went, and what critic and reward made of it.
function turnsTable(turns) {
  const present = FACTS.filter(([, key]) => turns.some((turn) => turn.facts[key] !== undefined));
  const versions = turns.some((turn) => turn.versions.length);
  return h("div", { class: "scroll" }, h("table", { class: "plain glance" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "turn"), present.map(([head]) => h("th", { scope: "col" }, head)), versions ? h("th", { scope: "col" }, "weights") : null)),
    h("tbody", {}, turns.map((turn, place) => h("tr", {},
      h("th", { scope: "row" }, h("button", { type: "button", onclick: () => document.getElementById(`turn-${place + 1}`).scrollIntoView({ container: "nearest" }) }, String(place + 1)), " ", badge(!turn.error, turn.verdict)),
      present.map(([, key, format]) => h("td", {}, turn.facts[key] === undefined ? "—" : format(turn.facts[key]))),
      versions ? h("td", {}, versionText(turn.versions)) : null)))));
}

function turnView(turn, place, turns, { language, colour, diff }, versionPlace) {
  const before = turns.slice(0, place).findLast((other) => other.program !== null);
  return h("li", { id: `turn-${place + 1}` },
    h("div", { class: "block prompt" }, h("span", { class: "role" }, place ? "feedback, as the model saw it" : "prompt"), fixed(turn.observation)),
    h("div", { class: "block response" }, h("span", { class: "role" }, `response ${place + 1}`),
      h("pre", { dir: "ltr" }, responseView(turn, language, colour, versionPlace))),
    diff && before && turn.program !== null
      ? h("div", { class: "block" }, h("span", { class: "role" }, `program, against that of turn ${turns.indexOf(before) + 1}`), diffView(before.program, turn.program))
      : null,
    h("div", { class: "verdict" }, badge(!turn.error, turn.verdict), FACTS.filter(([, key]) => turn.facts[key] !== undefined)
      .map(([name, key, format]) => h("span", { class: "fact" }, `${name} `, h("b", {}, format(turn.facts[key]))))),
    testsView(turn), privateView(turn));
}

function scaleView(colour, versionPlace) {
  if (colour === "versions") {
    return h("span", { class: "scale" }, [...versionPlace].map(([number, place]) => h("span", { class: `token v${place % 6}` }, ` ${number} `)));
  }
  const [low, high, kind] = SCALES[colour] ?? [];
  if (!low) return null;
  const steps = [...Array(LEVELS + 1).keys()];
  const classes = kind === "q" ? steps.map((step) => `q${step}`)
    : [...steps.toReversed().map((step) => `n${step}`), ...steps.slice(1).map((step) => `p${step}`)];
  return h("span", { class: "scale" }, `${low} `, classes.map((name) => h("span", { class: `cell ${name}` })), ` ${high}`);
}

function dialogueView(dialogue, options) {
  const { turns, language } = dialogue;
  const numbers = new Set(turns.flatMap((turn) => turn.versions.map(([number]) => number)));
  const versionPlace = new Map([...numbers].sort((a, b) => a - b).map((number, place) => [number, place]));
  const coloured = options.colour !== "syntax";
  const known = turns.some((turn) => turn.pieces && tokenNumbers(turn).some((number) => number[options.colour] !== undefined));
  return [
    turnsTable(turns),
    coloured ? h("p", { class: "caption legend-line" }, known ? scaleView(options.colour, versionPlace) : `No ${COLOURS[options.colour]} was recorded of these tokens.`) : null,
    h("ol", { class: "turns" }, turns.map((turn, place) => turnView(turn, place, turns, { ...options, language }, versionPlace))),
    coloured && known ? h("p", { id: "token", class: "readout", role: "status", hidden: true }) : null,
  ];
}
