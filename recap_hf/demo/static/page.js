// Behaviour of the page that needs no server: playing a part, the playhead, choosing a word.
// Listeners sit on the document, since the pieces of the page are replaced as results come.
(() => {
  "use strict";
  let stopAt = null;

  const player = () => document.querySelector(".rc-player");
  const length = () => Number(document.querySelector(".rc-recording")?.dataset.seconds || 0);

  function play(start, end) {
    const audio = player();
    if (!audio) return;
    audio.currentTime = start;
    stopAt = end;
    audio.play().catch(() => {});
  }

  function follow() {
    const audio = player();
    if (!audio) return;
    if (stopAt !== null && audio.currentTime >= stopAt) {
      audio.pause();
      stopAt = null;
    }
    const now = audio.currentTime;
    const seconds = length();
    document.querySelectorAll(".rc-playhead").forEach((head) => {
      head.style.left = `${seconds ? Math.min(100, (100 * now) / seconds) : 0}%`;
      head.classList.toggle("rc-on", !audio.paused || now > 0);
    });
    document.querySelectorAll("[data-start]").forEach((part) => {
      const inside = !audio.paused && now >= Number(part.dataset.start) && now < Number(part.dataset.end);
      part.classList.toggle("rc-playing", inside);
    });
    if (!audio.paused) requestAnimationFrame(follow);
  }

  function chooseWord(button) {
    const section = button.closest(".rc-explanation");
    section.querySelectorAll("[data-word]").forEach((other) => {
      other.setAttribute("aria-pressed", String(other === button));
    });
    section.querySelectorAll("[data-map]").forEach((map) => {
      map.hidden = map.dataset.map !== button.dataset.word;
    });
  }

  document.addEventListener("click", (event) => {
    const word = event.target.closest("[data-word]");
    if (word) return chooseWord(word);
    const link = event.target.closest("[data-goto]");
    if (link) {
      const target = document.getElementById(link.dataset.goto);
      target?.scrollIntoView({ block: "start" });
      target?.querySelector("input:checked")?.focus({ preventScroll: true });
      return;
    }
    const part = event.target.closest("[data-start]");
    if (part) return play(Number(part.dataset.start), Number(part.dataset.end));
    const plot = event.target.closest(".rc-plot");
    if (plot && length()) {
      const box = plot.getBoundingClientRect();
      play(((event.clientX - box.left) / box.width) * length(), null);
    }
  });
  for (const name of ["play", "pause", "seeked", "ended"]) {
    // These do not bubble: they are caught on their way down.
    document.addEventListener(name, (event) => {
      if (event.target.classList?.contains("rc-player")) follow();
    }, true);
  }
  document.addEventListener("pointerdown", (event) => {
    if (event.target.classList?.contains("rc-player")) stopAt = null;
  });

  // The server stops taking a file that is too large, and Gradio's page does not tell: it is told here, before the
  // file is sent. Listeners on the way down, so that Gradio's own do not see the file.
  function refuseTooLarge(event, files) {
    const notice = document.querySelector("[data-max-bytes]");
    if (!notice || !event.target.closest?.("#rc-upload")) return;
    const large = [...(files || [])].find((file) => file.size > Number(notice.dataset.maxBytes));
    notice.hidden = !large;
    // Emptied first: the same name twice in a row is announced twice.
    const text = notice.querySelector(".rc-status-text");
    text.textContent = "";
    if (!large) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (event.type === "change") event.target.value = "";
    else event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
    const megabytes = (Math.ceil(large.size / 1e5) / 10).toFixed(1);
    text.textContent = `“${large.name}” has ${megabytes} MB; ${notice.dataset.advice}`;
    reveal(notice);
  }
  document.addEventListener("change", (event) => {
    if (event.target.type === "file") refuseTooLarge(event, event.target.files);
  }, true);
  document.addEventListener("drop", (event) => refuseTooLarge(event, event.dataTransfer?.files), true);

  function reveal(element) {
    const box = element.getBoundingClientRect();
    if (box.top >= 0 && box.bottom <= innerHeight) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    element.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
  }

  // What the page is doing is read out, and on a phone it is scrolled to when something begins.
  function watchStatus(region) {
    region.setAttribute("role", "status");
    region.setAttribute("aria-live", "polite");
    let wasBusy = false;
    new MutationObserver(() => {
      const line = region.querySelector(".rc-status");
      const busy = Boolean(line?.classList.contains("rc-busy"));
      const begins = busy && !wasBusy;
      wasBusy = busy;
      const notice = document.querySelector("[data-max-bytes]");
      if (begins && notice) notice.hidden = true;
      if (begins || line?.classList.contains("rc-refused")) reveal(region);
    }).observe(region, { childList: true, subtree: true, characterData: true });
  }
  new MutationObserver((_, observer) => {
    const region = document.getElementById("rc-status");
    if (region) {
      observer.disconnect();
      watchStatus(region);
    }
  }).observe(document, { childList: true, subtree: true });
})();
