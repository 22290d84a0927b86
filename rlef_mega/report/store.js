// The episodes in the page: the index, unpacked at once, and chunks of dialogues, unpacked when needed.
async function unpack(id) {
  const packed = document.getElementById(id).textContent;
  const bytes = Uint8Array.fromBase64?.(packed) ?? Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(inflated).json();
}

class Store {
  static KEPT = 12; // unpacked chunks

  constructor(index) {
    this.index = index;
    this.chunks = new Map();
    this.texts = null; // of all dialogues, after the first search in them
    const { rows, stages, problems, families, kinds, outcomes } = index;
    const labels = Object.values(outcomes), keys = Object.keys(outcomes);
    const nth = new Map();
    this.episodes = rows.map(([stage, problem, family, outcome, turns, tokens, kl], position) => {
      const number = nth.get(stage) ?? 0;
      nth.set(stage, number + 1);
      const errors = turns.map((kind) => kinds[kind]);
      const names = [stages[stage], problems[problem], families[family]];
      return {
        position, stage: names[0], problem: names[1], family: names[2], outcome: keys[outcome], errors, tokens, kl,
        name: `${names[0]}/${number}`, // stays the same as the run grows
        words: [...names, labels[outcome], ...errors].join(" ").toLowerCase(),
      };
    });
  }

  // The scroll position of the dialogue before a live page reloaded itself.
  static lastScroll() {
    const top = sessionStorage.getItem("dialogue-top") ?? 0;
    sessionStorage.removeItem("dialogue-top");
    return Number(top);
  }

  async dialogue({ position }) {
    return (await this.chunk(Math.floor(position / this.index.chunk)))[position % this.index.chunk];
  }

  chunk(number) {
    const found = this.chunks.get(number) ?? unpack(`chunk-${number}`);
    this.chunks.delete(number);
    this.chunks.set(number, found); // the last in order is the most recently used
    if (this.chunks.size > Store.KEPT) this.chunks.delete(this.chunks.keys().next().value);
    return found;
  }

  // Read the texts of all dialogues, in lower case; call `report` with the fraction read so far.
  async readTexts(report) {
    const texts = [], count = Math.ceil(this.episodes.length / this.index.chunk);
    for (let number = 0; number < count; number++) {
      for (const { turns } of await unpack(`chunk-${number}`)) {
        texts.push(turns.flatMap((turn) => [turn.observation, turn.response, ...turn.tests.flatMap((test) =>
          [test.input, test.expected, test.observed, test.stderr])]).join("\n").toLowerCase());
      }
      report(number / count);
      if (number % 8 === 7) await new Promise((resume) => setTimeout(resume));
    }
    this.texts = texts;
  }

  // Return the episodes that match, in the requested order.
  select({ stage, outcome, family, kind, turn, query, deep, order }) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const at = turn ? Number(turn) - 1 : null;
    const found = this.episodes.filter((episode) =>
      (!stage || episode.stage === stage) && (!outcome || episode.outcome === outcome) && (!family || episode.family === family) &&
      (at === null || episode.errors.length > at) &&
      (!kind || (at === null ? episode.errors.includes(kind) : episode.errors[at] === kind)) &&
      words.every((word) => episode.words.includes(word) || (deep && this.texts?.[episode.position].includes(word))));
    const size = { tokens: (episode) => episode.tokens, kl: (episode) => episode.kl ?? -Infinity, turns: (episode) => episode.errors.length }[order];
    return size ? found.sort((a, b) => size(b) - size(a) || a.position - b.position) : found;
  }
}
