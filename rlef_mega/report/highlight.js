// Highlight keywords, built-in names, strings, numbers and comments. One regular expression rather than a parser,
// because much of what a model writes does not parse. No alternative backtracks over text it has matched, so hostile
// text takes linear time. A piece is [class, text]; the texts of all pieces joined are the input.
const WORDS = {
  python: {
    keywords: new Set(("False None True and as assert async await break class continue def del elif else except finally for " +
      "from global if import in is lambda nonlocal not or pass raise return try while with yield match case").split(" ")),
    builtins: new Set(("abs all any ascii bin bool breakpoint bytearray bytes callable chr classmethod compile complex delattr " +
      "dict dir divmod enumerate eval exec filter float format frozenset getattr globals hasattr hash help hex id input int " +
      "isinstance issubclass iter len list locals map max memoryview min next object oct open ord pow print property range " +
      "repr reversed round set setattr slice sorted staticmethod str sum super tuple type vars zip").split(" ")),
    tokens: /(?<comment>#[^\n]*)|(?<string>[A-Za-z]{0,2}(?:"""(?:\\[\s\S]?|[^\\])*?(?:"""|$)|'''(?:\\[\s\S]?|[^\\])*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))|(?<number>\b\d[\w.]*)|(?<word>[A-Za-z_]\w*)/g,
  },
  cpp: {
    keywords: new Set(("alignas auto bool break case catch char class const constexpr continue decltype default delete do double " +
      "else enum explicit false float for friend goto if inline int long mutable namespace new noexcept nullptr operator " +
      "private protected public return short signed sizeof static struct switch template this throw true try typedef " +
      "typename union unsigned using virtual void volatile while").split(" ")),
    builtins: new Set("cin cout cerr endl vector string map set pair queue stack sort min max abs swap printf scanf push_back".split(" ")),
    tokens: /(?<comment>\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$))|(?<keyword>^[ \t]*#[ \t]*\w+)|(?<string>"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?)|(?<number>\b\d[\w.']*)|(?<word>[A-Za-z_]\w*)/gm,
  },
};

// `language`: python, cpp, or cpp with a year.
function codePieces(code, language) {
  const { keywords, builtins, tokens } = WORDS[language.startsWith("cpp") ? "cpp" : "python"];
  const pieces = [];
  let end = 0;
  for (const match of code.matchAll(tokens)) {
    const { comment, string, number, word } = match.groups;
    let kind = comment !== undefined ? "comment" : string !== undefined ? "string" : number !== undefined ? "number" : "keyword";
    if (word !== undefined) kind = keywords.has(word) ? "keyword" : builtins.has(word) ? "builtin" : "";
    if (!kind) continue;
    pieces.push(["", code.slice(end, match.index)], [kind, match[0]]);
    end = match.index + match[0].length;
  }
  pieces.push(["", code.slice(end)]);
  return pieces.filter(([, text]) => text);
}

// Highlight the fenced blocks of a response. `startsInCode`: the prompt had opened the fence.
function responsePieces(response, language, startsInCode) {
  const pieces = [];
  let end = 0;
  if (startsInCode) {
    const fence = response.indexOf("```");
    end = fence < 0 ? response.length : fence;
    pieces.push(...codePieces(response.slice(0, end), language), ["fence", response.slice(end, end + 3)]);
    end += 3;
  }
  const rest = response.slice(end);
  end = 0;
  for (const match of rest.matchAll(/(```[\w+-]*\n?)([\s\S]*?)(```|$)/g)) {
    pieces.push(["", rest.slice(end, match.index)], ["fence", match[1]]);
    pieces.push(...codePieces(match[2], language), ["fence", match[3]]);
    end = match.index + match[0].length;
  }
  pieces.push(["", rest.slice(end)]);
  return pieces.filter(([, text]) => text);
}
