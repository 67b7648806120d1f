"use strict";
// Searches the samples, and marks the words by which two policies differ. The page is whole without it.
document.documentElement.classList.add("script");
const PAGE = 20; // samples shown at a time
const WORDS = 600; // most words of a text that are compared

const samples = [...document.querySelectorAll(".sample")].map((article) => ({
  article,
  found: article.textContent.toLowerCase(),
  texts: new Map(
    [...article.querySelectorAll(".answer")].map((answer) => {
      const place = answer.querySelector(".text");
      return [answer.dataset.who, { place, text: place.textContent }];
    }),
  ),
}));

// Which words of `a` and of `b` are on a longest common subsequence of both.
function common(a, b) {
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const inA = new Set();
  const inB = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      inA.add(i++);
      inB.add(j++);
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

function write(place, text, tag, shared) {
  const parts = text.split(/(\s+)/);
  place.replaceChildren(
    ...parts.map((part, i) => {
      if (i % 2 || !part || shared.has(i / 2) || i / 2 >= WORDS) return document.createTextNode(part);
      const marked = document.createElement(tag);
      marked.textContent = part;
      return marked;
    }),
  );
}

const words = (text) => text.split(/\s+/).slice(0, WORDS);

function compare(sample, before, after) {
  for (const { place, text } of sample.texts.values()) place.textContent = text;
  const old = sample.texts.get(before);
  const now = sample.texts.get(after);
  if (!old || !now || old === now) return;
  // split keeps an empty word before white space at the start, here as there, so that places agree
  const [inOld, inNew] = common(words(old.text), words(now.text));
  write(old.place, old.text, "del", inOld);
  write(now.place, now.text, "ins", inNew);
}

const controls = document.getElementById("controls");
if (controls) {
  const [search, before, after, count, more] = ["search", "before", "after", "count", "more"].map((id) =>
    document.getElementById(id),
  );
  let limit = PAGE;
  const show = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = samples.filter((sample) => wanted.every((word) => sample.found.includes(word)));
    const shown = new Set(matching.slice(0, limit));
    for (const sample of samples) {
      sample.article.hidden = !shown.has(sample);
      if (shown.has(sample)) compare(sample, before.value, after.value);
    }
    count.value = `${shown.size} of ${matching.length} shown`;
    more.hidden = shown.size === matching.length;
  };
  search.addEventListener("input", () => {
    limit = PAGE;
    show();
  });
  before.addEventListener("change", show);
  after.addEventListener("change", show);
  controls.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  show();
}

// On a phone the contents begin folded; on paper everything is open.
const contents = document.querySelector(".contents");
if (matchMedia("(max-width: 60rem)").matches) contents.open = false;
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
