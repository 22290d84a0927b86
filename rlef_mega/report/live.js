// Poll the server, and reload the page when the run has changed: the URL contains the filters, the browser restores
// the scroll position. Do not reload while the user types or has selected text.
const POLL_MS = 3000;

async function poll(known) {
  const line = document.getElementById("live");
  try {
    const { stamp, doing, seconds } = await (await fetch("state")).json();
    line.textContent = `live: ${doing}${seconds === null ? "" : `, ${Math.round(seconds)} s ago`}`;
    line.className = "";
    const busy = document.activeElement.matches("input, select") || !getSelection().isCollapsed;
    if (stamp !== known && !busy) {
      sessionStorage.setItem("dialogue-top", document.getElementById("dialogue")?.scrollTop ?? 0);
      location.reload();
    } else setTimeout(poll, POLL_MS, known);
  } catch {
    line.textContent = "the server of this page does not answer";
    line.className = "lost";
    setTimeout(poll, POLL_MS, known);
  }
}
poll(document.getElementById("live").dataset.stamp);
