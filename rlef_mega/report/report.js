// Filter the episodes by stage and outcome. Without this script all are shown and open as they are.
"use strict";
const chosen = { stage: "", outcome: "" };
const episodes = [...document.querySelectorAll(".episode")];
const shown = document.getElementById("shown");

function apply() {
  let count = 0;
  for (const episode of episodes) {
    const fits = Object.entries(chosen).every(([key, value]) => !value || episode.dataset[key] === value);
    episode.hidden = !fits;
    count += fits;
  }
  shown.textContent = `${count} of ${episodes.length} shown`;
}

for (const button of document.querySelectorAll("#filters button[data-key]")) {
  button.addEventListener("click", () => {
    chosen[button.dataset.key] = button.dataset.value;
    for (const other of button.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    apply();
  });
}

document.getElementById("toggle")?.addEventListener("click", () => {
  const visible = episodes.filter((episode) => !episode.hidden);
  const open = !visible.every((episode) => episode.open);
  for (const episode of visible) episode.open = open;
});

// A link to an episode that the filter hides, or that is closed, must still show it.
function reveal() {
  const episode = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (episode?.classList.contains("episode")) {
    episode.hidden = false;
    episode.open = true;
    episode.scrollIntoView();
  }
}
window.addEventListener("hashchange", reveal);

if (shown) {
  document.getElementById("filters").hidden = false;
  apply();
  reveal();
}
