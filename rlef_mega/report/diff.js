// What changed from one program to the next, line by line, and within a line that was changed.
const DIFF_CELLS = 4e6; // of the table of the longest common subsequence; beyond, all lines count as replaced
const CONTEXT = 3;

// [mark, line], mark one of " ", "-", "+"
function diffLines(before, after) {
  const a = before.split("\n"), b = after.split("\n");
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < a.length - head && tail < b.length - head && a.at(-1 - tail) === b.at(-1 - tail)) tail++;
  const same = (lines) => lines.map((line) => [" ", line]);
  return [
    ...same(a.slice(0, head)),
    ...diffMiddle(a.slice(head, a.length - tail), b.slice(head, b.length - tail)),
    ...same(a.slice(a.length - tail)),
  ];
}

function diffMiddle(a, b) {
  const width = b.length + 1;
  if (a.length * b.length > DIFF_CELLS) return [...a.map((line) => ["-", line]), ...b.map((line) => ["+", line])];
  const common = new Uint16Array((a.length + 1) * width); // of what follows i in a and j in b
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

// A line and the one that it became: [head, changed, tail] of each.
function changedPart(a, b) {
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < Math.min(a.length, b.length) - head && a.at(-1 - tail) === b.at(-1 - tail)) tail++;
  return [a, b].map((line) => [line.slice(0, head), line.slice(head, line.length - tail), line.slice(line.length - tail)]);
}

// Rows to show: [mark, head, changed, tail]; long runs of unchanged lines are ["…", how many].
function diffRows(before, after) {
  const lines = diffLines(before, after);
  const rows = [];
  for (let i = 0; i < lines.length; ) {
    let end = i;
    while (end < lines.length && lines[end][0] === lines[i][0]) end++;
    if (lines[i][0] === " ") {
      const first = i === 0 ? 0 : CONTEXT, last = end === lines.length ? 0 : CONTEXT;
      const folded = end - i - first - last;
      for (let k = i; k < end; k++) {
        if (folded > 1 && k === i + first) rows.push(["…", `${folded} lines as before`, "", ""]);
        if (folded <= 1 || k < i + first || k >= end - last) rows.push([" ", lines[k][1], "", ""]);
      }
    } else if (lines[i][0] === "-") {
      let stop = end;
      while (stop < lines.length && lines[stop][0] === "+") stop++;
      const paired = stop - end === end - i;
      const parts = paired ? lines.slice(i, end).map(([, line], k) => changedPart(line, lines[end + k][1])) : [];
      for (let k = i; k < end; k++) rows.push(["-", ...(paired ? parts[k - i][0] : [lines[k][1], "", ""])]);
      for (let k = end; k < stop; k++) rows.push(["+", ...(paired ? parts[k - end][1] : [lines[k][1], "", ""])]);
      end = stop;
    } else {
      for (let k = i; k < end; k++) rows.push(["+", lines[k][1], "", ""]);
    }
    i = end;
  }
  return rows;
}
