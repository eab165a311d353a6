// What only a browser can do. texts.py puts window.pageWords before it: Streamlit's own English, and the words to show.
const narrow = () => window.innerWidth < 768;

// The veil of the token that is pointed at, tapped or reached by keyboard lies over the images.
function choose(event) {
  const token = event.target.closest?.(".looked .token");
  if (!token) return;
  const looked = token.closest(".looked");
  looked.querySelector(".token.chosen")?.classList.remove("chosen");
  token.classList.add("chosen");
  const veils = token.dataset.veils.split(" ");
  looked.querySelectorAll(".veil").forEach((veil, number) => { veil.src = veils[number]; });
  looked.querySelector(".part").textContent = token.dataset.part;
  looked.querySelector(".most").textContent = token.dataset.most;
}

// On a phone the sidebar hides the page: it closes once something has been picked from a list.
function closeSidebar(event) {
  const open = document.querySelector('[data-testid=stSidebar][data-collapsed=false]');
  if (narrow() && open && event.target.closest?.("[role=option]")) {
    setTimeout(() => open.querySelector("[data-testid=stSidebarCollapseButton] button")?.click(), 150);
  }
}

function translate(node) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  for (let text = walker.currentNode; text; text = walker.nextNode()) {
    if (text.nodeType !== Node.TEXT_NODE || text.parentElement?.closest("[data-testid=stText], [data-testid=stMarkdown]")) continue;
    const found = window.pageWords.find(([english, words]) => text.data.includes(english) && text.data !== words);
    if (found) text.data = found[1];
  }
}

function show(looked) {
  looked.dataset.shown = "yes";
  setTimeout(() => looked.scrollIntoView({ block: "nearest", behavior: "smooth" }), 200);
}

if (!window.pageStarted) {
  window.pageStarted = true;
  for (const kind of ["pointerover", "click", "focusin"]) document.addEventListener(kind, choose);
  document.addEventListener("click", closeSidebar, true);
  new MutationObserver((changes) => {
    for (const change of changes) {
      (change.type === "characterData" ? [change.target] : change.addedNodes).forEach((node) => {
        translate(node);
        const looked = node.parentElement?.querySelector(".looked:not([data-shown])");
        if (looked) show(looked);
      });
    }
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
}
