// The changes from one program to the next: by lines, and within a changed line.
const DIFF_CELLS = 4e6; // size of the table of common subsequences; beyond it all lines count as replaced
const CONTEXT = 3;

// [mark, line], mark one of " ", "-", "+"
function diffLines(before, after) {
  const [[head, less, tail], [, more]] = changedPart(before.split("\n"), after.split("\n"));
  const same = (lines) => lines.map((line) => [" ", line]);
  return [...same(head), ...diffMiddle(less, more), ...same(tail)];
}

function diffMiddle(a, b) {
  const width = b.length + 1;
  if (a.length * b.length > DIFF_CELLS) return [...a.map((line) => ["-", line]), ...b.map((line) => ["+", line])];
  const common = new Uint16Array((a.length + 1) * width); // length of the common subsequence of a from i and b from j
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const lines = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) lines.push([" ", a[i]]), i++, j++;
    else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) lines.push(["-", a[i++]]);
    else lines.push(["+", b[j++]]);
  }
  return lines;
}

// Split two texts, or two lists of lines, into what both begin with, what differs, and what both end with:
// [head, changed, tail] of each.
function changedPart(a, b) {
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < Math.min(a.length, b.length) - head && a.at(-1 - tail) === b.at(-1 - tail)) tail++;
  return [a, b].map((of) => [of.slice(0, head), of.slice(head, of.length - tail), of.slice(of.length - tail)]);
}

// Rows to show: [mark, head, changed, tail]; ["…", "N unchanged lines", "", ""] stands for lines far from any change.
function diffRows(before, after) {
  const lines = diffLines(before, after), rows = [];
  const near = (i) => lines.slice(Math.max(0, i - CONTEXT), i + CONTEXT + 1).some(([mark]) => mark !== " ");
  const whole = ([mark, line]) => [mark, line, "", ""];
  let folded = [];
  const unfold = () => {
    rows.push(...(folded.length > 1 ? [["…", `${folded.length} unchanged lines`, "", ""]] : folded.map(whole)));
    folded = [];
  };
  for (let i = 0; i < lines.length; ) {
    if (!near(i)) { folded.push(lines[i++]); continue; }
    unfold();
    if (lines[i][0] === " ") { rows.push(whole(lines[i++])); continue; }
    let middle = i, end = i;
    while (lines[middle]?.[0] === "-") middle++;
    for (end = middle; lines[end]?.[0] === "+"; ) end++;
    const less = lines.slice(i, middle), more = lines.slice(middle, end);
    const parts = less.length === more.length ? less.map(([, line], k) => changedPart(line, more[k][1])) : [];
    const side = (of, k) => of.map((line, n) => (parts[n] ? [line[0], ...parts[n][k]] : whole(line)));
    rows.push(...side(less, 0), ...side(more, 1));
    i = end;
  }
  unfold();
  return rows;
}
