// Leafs through the samples in #data. Texts of a model reach the page as text alone, never as markup.
"use strict";
(() => {
  const samples = JSON.parse(document.getElementById("data").textContent);
  const model = document.getElementById("viewer").content.firstElementChild;

  // Text with what was searched for marked in it.
  function write(node, text, sought) {
    const pieces = sought ? text.split(new RegExp(`(${sought.source})`, "iu")) : [text];
    node.replaceChildren(...pieces.filter(Boolean).map(piece => {
      if (!sought || !sought.test(piece)) return piece;
      const mark = document.createElement("mark");
      mark.textContent = piece;
      return mark;
    }));
  }

  function choice([text, value], sample, sought) {
    const line = document.createElement("li"), name = document.createElement("span"), figure = document.createElement("b");
    write(name, text, sought);
    figure.textContent = value === null ? "–" : value.toFixed(3);
    const said = [[sample.answer, "chosen"], [sample.target, "target"]].filter(([other]) => other.trim() === text.trim());
    const what = document.createElement("em");
    what.textContent = said.map(([, word]) => word).join(", ");
    const left = document.createElement("span");
    left.append(name, "  ", what);
    line.append(left, figure);
    return line;
  }

  function view(holder, all, lower) {
    const made = model.cloneNode(true), of = name => made.querySelector("." + name);
    const search = made.querySelector("input"), output = made.querySelector("output");
    const buttons = [...made.querySelectorAll("[data-want]")];
    const isRight = sample => lower ? sample.score < 0.5 : sample.score >= 0.5;
    const kinds = { all: () => true, right: isRight, wrong: sample => !isRight(sample) };
    const names = lower ? { all: "all", right: "< 0.5", wrong: "≥ 0.5" }
      : { all: "all", right: "right", wrong: "wrong" };
    let want = "all", at = 0, found = all;

    function verdict({ score }) {
      if (score === null) return "no score";
      return lower || score % 1 ? "score " + score.toFixed(2) : score ? "right" : "wrong";
    }
    function show() {
      const sought = search.value && new RegExp(search.value.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "iu");
      const texts = one => [one.part, one.prompt, one.answer, one.taken, one.target, ...one.choices.map(([text]) => text)];
      found = all.filter(kinds[want]).filter(one => !sought || texts(one).some(text => sought.test(text)));
      at = Math.max(0, Math.min(at, found.length - 1));
      const sample = found[at];
      buttons.forEach(button => button.setAttribute("aria-pressed", button.dataset.want === want));
      output.textContent = found.length ? `${at + 1} of ${found.length}` : "none";
      of("back").disabled = at === 0;
      of("on").disabled = at >= found.length - 1;
      made.querySelector("article").hidden = !sample;
      of("none").hidden = Boolean(sample);
      if (!sample) return;
      of("verdict").className = "verdict " + (isRight(sample) ? "right" : "wrong");
      of("verdict").textContent = verdict(sample);
      write(of("which"), sample.part.replaceAll("_", " ") + (sample.doc === null ? "" : `, document ${sample.doc}`), sought);
      ["prompt", "answer", "taken", "target"].forEach(name => write(of(name), sample[name], sought));
      of("from").hidden = !sample.taken;
      of("scored").hidden = !sample.choices.length;
      of("choices").replaceChildren(...sample.choices.map(pair => choice(pair, sample, sought)));
      // A prompt's question comes after its examples.
      const mark = of("prompt").querySelector("mark");
      of("prompt").scrollTop = mark ? mark.offsetTop - 40 : of("prompt").scrollHeight;
    }
    function turn(by) {
      at = Math.max(0, Math.min(at + by, found.length - 1));
      show();
    }

    buttons.forEach(button => {
      button.textContent = `${names[button.dataset.want]} (${all.filter(kinds[button.dataset.want]).length})`;
      button.addEventListener("click", () => { [want, at] = [button.dataset.want, 0]; show(); });
    });
    search.addEventListener("input", () => { at = 0; show(); });
    of("back").addEventListener("click", () => turn(-1));
    of("on").addEventListener("click", () => turn(1));
    made.addEventListener("keydown", event => {
      if (event.target === search || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "ArrowLeft") turn(-1);
      if (event.key === "ArrowRight") turn(1);
    });
    holder.append(made);
    show();
  }

  document.querySelectorAll("details.task").forEach(row => row.addEventListener("toggle", () => {
    const holder = row.querySelector(".samples");
    if (row.open && holder && !holder.firstChild) view(holder, samples[row.dataset.row], row.dataset.lower === "yes");
  }));
  // An address that ends in #row-NAME opens that row.
  const asked = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (asked && asked.tagName === "DETAILS") asked.open = true;
})();
