// One dialogue as elements. Text of models and programs only ever becomes text nodes, never markup.
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
  // [label of the low end, label of the high end, first step in eighths]
  logprobs: ["certain", "improbable", 0],
  kl: ["2 nats less likely than initially", "2 nats more likely", -8],
  advantages: ["−2: worse than expected", "+2: better", -8],
};

function signed(value, digits = 2) {
  const shown = value.toFixed(digits);
  if (Number(shown) === 0) return shown.replace("-", ""); // no sign
  return (value > 0 ? "+" : "") + shown.replace("-", "−");
}

const plain = (value) => signed(value).replace("+", "");

// The numbers of each token of a turn, for its colour and tooltip.
function tokenNumbers(turn) {
  const { pieces, logprobs, refs, advantages, versions, facts } = turn;
  const version = versions.flatMap(([number, count]) => Array(Math.min(count, pieces.length)).fill(number));
  return pieces.map((_, position) => ({
    logprobs: logprobs && logprobs[position] / 100,
    kl: logprobs && refs && (logprobs[position] - refs[position]) / 100,
    advantages: advantages ? advantages[position] / 100 : facts.advantage,
    versions: version[position],
  }));
}

const shade = (kind, size) => ({ class: `token ${kind}`, style: `--size: ${Math.min(1, size).toFixed(2)}` });

function tokenStyle(colour, value, versionOrder) {
  if (value === undefined) return { class: "token" };
  if (colour === "versions") return { class: `token v${versionOrder.get(value) % 6}` };
  if (colour === "logprobs") return shade("worse", 1 - Math.exp(value));
  const size = colour === "kl" ? Math.sqrt(Math.abs(value) / 2) : Math.abs(value) / 2; // most KL is small
  return shade(value < 0 ? "worse" : "better", size);
}

function tokenTip(numbers) {
  const parts = [];
  if (numbers.logprobs !== undefined) parts.push(`log-prob ${plain(numbers.logprobs)} (p ${Math.exp(numbers.logprobs).toFixed(3)})`);
  if (numbers.kl !== undefined) parts.push(`log-prob relative to the initial policy ${signed(numbers.kl)}`);
  if (numbers.advantages !== undefined) parts.push(`advantage ${signed(numbers.advantages)}`);
  if (numbers.versions !== undefined) parts.push(`weights of version ${numbers.versions}`);
  return parts.join("\n");
}

function tokenSpans(turn, colour, versionOrder) {
  const spans = [];
  let end = 0;
  const numbers = tokenNumbers(turn);
  turn.pieces.forEach((length, position) => {
    if (!length) return;
    const shown = turn.response.slice(end, (end += length));
    spans.push(h("span", { ...tokenStyle(colour, numbers[position][colour], versionOrder), title: tokenTip(numbers[position]) }, shown));
  });
  return [...spans, turn.response.slice(end)];
}

const span = ([kind, shown]) => (kind ? h("span", { class: kind }, shown) : shown);

function responseView(turn, language, colour, versionOrder) {
  if (colour !== "syntax" && turn.pieces) return tokenSpans(turn, colour, versionOrder);
  const response = turn.response.trimStart();
  const begun = turn.program !== null && response.startsWith(turn.program.trim().slice(0, 40) || "```");
  return responsePieces(turn.response, language, begun && !response.startsWith("```")).map(span);
}

function diffView(before, after) {
  if (before === after) return h("p", { class: "caption" }, "The program is unchanged.");
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

// What the reward saw of private tests: how many passed until the first failure.
function privateView({ private: seen }) {
  if (!seen) return null;
  const good = seen.passed === seen.run;
  const line = h("p", { class: "private" }, h("span", { class: "role" }, "private tests, seen by the reward only "),
    badge(good, `${seen.passed} passed of ${seen.run} run`), ` ${seen.tests} in all`,
    good ? null : [", ended by ", h("b", {}, kindName(seen.status))]);
  if (!seen.failed) return line;
  return [line, h("div", { class: "scroll" }, h("table", { class: "tests" },
    h("thead", {}, h("tr", {}, ["private test", "input", "expected"].map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, h("tr", {}, h("td", {}, badge(false, kindName(seen.status))), h("td", {}, fixed(seen.failed.input)), h("td", {}, fixed(seen.failed.expected))))))];
}

const FACTS = [
  ["value", "value", plain], ["return", "return", plain], ["advantage", "advantage", signed],
  ["KL", "kl", plain], ["log-prob", "logprob", plain], ["tokens", "tokens", (value) => value.toLocaleString("en")],
];

function versionText(versions) {
  const numbers = [...new Set(versions.map(([number]) => number))];
  return numbers.length > 3 ? `${numbers[0]} … ${numbers.at(-1)}` : numbers.join(", ");
}

// The turns in a table: verdict, the facts of each (value, log-prob, tokens and others), and weight versions.
function turnsTable(turns) {
  const present = FACTS.filter(([, key]) => turns.some((turn) => turn.facts[key] !== undefined));
  const versions = turns.some((turn) => turn.versions.length);
  return h("div", { class: "scroll" }, h("table", { class: "plain glance" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "turn"), present.map(([head]) => h("th", { scope: "col" }, head)), versions ? h("th", { scope: "col" }, "weights") : null)),
    h("tbody", {}, turns.map((turn, position) => h("tr", {},
      h("th", { scope: "row" }, h("button", { type: "button", onclick: () => document.getElementById(`turn-${position + 1}`).scrollIntoView({ container: "nearest" }) }, String(position + 1)), " ", badge(!turn.error, turn.verdict)),
      present.map(([, key, format]) => h("td", {}, turn.facts[key] === undefined ? "—" : format(turn.facts[key]))),
      versions ? h("td", {}, versionText(turn.versions)) : null)))));
}

function turnView(turn, position, turns, { language, colour, diff }, versionOrder) {
  const before = turns.slice(0, position).findLast((other) => other.program !== null);
  return h("li", { id: `turn-${position + 1}` },
    h("div", { class: "block prompt" }, h("span", { class: "role" }, position ? "feedback as the model saw it" : "prompt"), fixed(turn.observation)),
    h("div", { class: "block response" }, h("span", { class: "role" }, `response ${position + 1}`),
      h("pre", { dir: "ltr" }, responseView(turn, language, colour, versionOrder))),
    diff && before && turn.program !== null
      ? h("div", { class: "block" }, h("span", { class: "role" }, `changes to the program of turn ${turns.indexOf(before) + 1}`), diffView(before.program, turn.program))
      : null,
    h("div", { class: "verdict" }, badge(!turn.error, turn.verdict), FACTS.filter(([, key]) => turn.facts[key] !== undefined)
      .map(([name, key, format]) => h("span", { class: "fact" }, `${name} `, h("b", {}, format(turn.facts[key]))))),
    testsView(turn), privateView(turn));
}

function scaleView(colour, versionOrder) {
  if (colour === "versions") {
    return h("span", { class: "scale" }, [...versionOrder].map(([number, position]) => h("span", { class: `token v${position % 6}` }, ` ${number} `)));
  }
  const [low, high, first] = SCALES[colour];
  const sizes = [...Array(9 - first).keys()].map((step) => (step + first) / 8);
  return h("span", { class: "scale" }, `${low} `, sizes.map((size) => {
    const { style, class: kind } = shade(first === 0 || size < 0 ? "worse" : "better", Math.abs(size));
    return h("span", { class: `${kind} cell`, style });
  }), ` ${high}`);
}

function dialogueView(dialogue, options) {
  const { turns, language } = dialogue;
  const numbers = new Set(turns.flatMap((turn) => turn.versions.map(([number]) => number)));
  const versionOrder = new Map([...numbers].sort((a, b) => a - b).map((number, position) => [number, position]));
  const coloured = options.colour !== "syntax";
  const known = turns.some((turn) => turn.pieces && tokenNumbers(turn).some((numbers) => numbers[options.colour] !== undefined));
  return [
    turnsTable(turns),
    coloured ? h("p", { class: "caption legend-line" }, known ? scaleView(options.colour, versionOrder) : `No ${COLOURS[options.colour]} was recorded for these tokens.`) : null,
    h("ol", { class: "turns" }, turns.map((turn, position) => turnView(turn, position, turns, { ...options, language }, versionOrder))),
    coloured && known ? h("p", { id: "token", class: "readout", role: "status", hidden: true }) : null,
  ];
}
