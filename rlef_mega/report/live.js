// Ask the server for news, and load the page again when there are some: the address keeps what was chosen, the browser
// the place. Not while somebody types or has marked text.
const ASK_MS = 3000;

async function ask(known) {
  const line = document.getElementById("live");
  try {
    const { stamp, doing, seconds } = await (await fetch("state")).json();
    line.textContent = `live: ${doing}${seconds === null ? "" : `, ${Math.round(seconds)} s ago`}`;
    line.className = "";
    const busy = document.activeElement.matches("input, select") || !getSelection().isCollapsed;
    if (stamp !== known && !busy) {
      sessionStorage.setItem("dialogue-top", document.getElementById("dialogue")?.scrollTop ?? 0);
      location.reload();
    } else setTimeout(ask, ASK_MS, known);
  } catch {
    line.textContent = "the server of this page does not answer";
    line.className = "lost";
    setTimeout(ask, ASK_MS, known);
  }
}
ask(document.getElementById("live").dataset.stamp);
