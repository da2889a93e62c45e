// Lists of predictions and captions with filters and pages. Texts of files become text nodes only.
"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE_SIZE = 20;
  const numRuns = data.runs.length;

  function make(tag, className, ...content) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...content.filter((part) => part !== null));
    return node;
  }

  const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : String(i + 1));
  const count = (n) => n.toLocaleString("en");
  const runDot = (run) => make("span", `dot run-${run % 6}`);

  // What the files say, with what the filters ask for, computed once.
  const captionsByVideo = new Map();
  for (const caption of data.captions) {
    caption.search = [caption.video, caption.split, ...caption.references, ...caption.texts]
      .join("\n").toLowerCase();
    const same = captionsByVideo.get(caption.video) || [];
    captionsByVideo.set(caption.video, [...same, caption]);
  }
  for (const item of data.questions) {
    const given = item.answers.filter((answer) => answer !== null).map((answer) => answer[0]);
    item.changed = new Set(given).size > 1;
    item.right = item.answers.map((answer) =>
      answer === null || item.answer === null ? null : answer[0] === item.answer);
    item.search = [item.video, item.qid, item.type, item.question, ...(item.options || [])]
      .join("\n").toLowerCase();
  }

  // A section's list: `matches` is asked for each item, `card` makes the element of one.
  class List {
    constructor(id, items, noun, readFilters, card) {
      Object.assign(this, { items, noun, readFilters, card, found: items, page: 0 });
      this.section = document.getElementById(id);
      this.form = this.section.querySelector("form");
      this.status = this.section.querySelector(".count");
      this.holder = this.section.querySelector(".items");
      this.pages = this.section.querySelector(".pages");
      const [previous, next] = this.pages.querySelectorAll("button");
      this.previous = previous;
      this.next = next;
      this.number = this.pages.querySelector("input");
      if (!items.length) return;
      this.section.hidden = false;
      this.form.addEventListener("input", () => this.filter());
      this.form.addEventListener("submit", (event) => event.preventDefault());
      previous.addEventListener("click", () => this.show(this.page - 1, true));
      next.addEventListener("click", () => this.show(this.page + 1, true));
      this.number.addEventListener("change", () => this.show(Number(this.number.value) - 1, true));
    }

    filter() {
      const matches = this.readFilters(this.form.elements);
      this.found = this.items.filter(matches);
      this.show(0, false);
    }

    show(page, scroll) {
      const last = Math.max(0, Math.ceil(this.found.length / PAGE_SIZE) - 1);
      this.page = Math.min(last, Math.max(0, Math.trunc(page) || 0));
      const start = this.page * PAGE_SIZE;
      const shown = this.found.slice(start, start + PAGE_SIZE);
      this.holder.replaceChildren(...shown.map(this.card));
      const range = shown.length ? `: ${count(start + 1)} to ${count(start + shown.length)}` : "";
      this.status.textContent =
        `${count(this.found.length)} of ${count(this.items.length)} ${this.noun}${range}`;
      this.pages.hidden = last === 0;
      this.pages.querySelector("span").textContent = `of ${count(last + 1)}`;
      this.number.value = this.page + 1;
      this.number.max = last + 1;
      this.previous.disabled = this.page === 0;
      this.next.disabled = this.page === last;
      if (scroll) this.status.scrollIntoView();
    }
  }

  // ---- Predictions

  // The probability of each option: softmax of minus the scores.
  function probabilities(scores) {
    const lowest = Math.min(...scores);
    const weights = scores.map((score) => Math.exp(lowest - score));
    const sum = weights.reduce((a, b) => a + b);
    return weights.map((weight) => weight / sum);
  }

  function optionCell(item, run, option, shares) {
    const answer = item.answers[run];
    if (answer === null) return make("td", "", "–");
    const [prediction, scores] = answer;
    const bar = make("span", `bar run-${run % 6}`);
    bar.style.width = `${(100 * shares[option]).toFixed(1)}%`;
    const cell = make("td", "", `${(100 * shares[option]).toFixed(1)} % `,
      make("span", "score", `(${scores[option].toFixed(3)})`));
    if (prediction === option) {
      const right = item.right[run];
      const word = { true: "✓ right", false: "✗ wrong", null: "given" }[right];
      cell.append(" ", make("span", right === null ? "mark" : `mark ${right ? "right" : "wrong"}`, word));
    }
    cell.append(bar);
    return cell;
  }

  function optionTable(item) {
    const head = make("tr", "", make("th", "", "Option"));
    head.firstChild.scope = "col";
    for (let run = 0; run < numRuns; run++) {
      const cell = make("th", "", runDot(run), data.runs[run]);
      cell.scope = "col";
      head.append(cell);
    }
    const shares = item.answers.map((answer) => answer && probabilities(answer[1]));
    const body = make("tbody", "");
    for (let option = 0; option < item.numOptions; option++) {
      const text = item.options ? item.options[option] : "(text not at hand)";
      const name = make("th", "", `(${letter(option)}) ${text}`);
      name.scope = "row";
      const isRight = option === item.answer;
      if (isRight) name.append(" ", make("span", "mark right", "right answer"));
      const row = make("tr", isRight ? "correct" : "", name);
      for (let run = 0; run < numRuns; run++) row.append(optionCell(item, run, option, shares[run]));
      body.append(row);
    }
    const scroller = make("div", "scroll", make("table", "options", make("thead", "", head), body));
    scroller.tabIndex = 0;
    scroller.setAttribute("role", "region");
    scroller.setAttribute("aria-label", "Options");
    return scroller;
  }

  function frames(video) {
    const uris = data.frames[video];
    if (!uris) return null;
    const strip = make("div", "frames");
    uris.forEach((uri, i) => {
      const image = document.createElement("img");
      image.src = uri;
      image.alt = `frame ${i + 1} of ${uris.length} of video ${video}`;
      strip.append(image);
    });
    return strip;
  }

  function captionList(caption) {
    const list = make("dl", "");
    caption.texts.forEach((text, run) => {
      if (text !== null) {
        const cut = caption.cut[run] ? make("span", "score", " (cut off: it reached no end)") : null;
        list.append(make("dt", "", runDot(run), data.runs[run]), make("dd", "", text, cut));
      }
    });
    for (const text of caption.references) {
      list.append(make("dt", "", "reference"), make("dd", "", text));
    }
    return list;
  }

  function captionsOf(item) {
    const [dataset, split] = data.sets[item.set];
    const same = (captionsByVideo.get(item.video) || []).filter((caption) =>
      caption.split === split && (!dataset || !caption.dataset || caption.dataset === dataset));
    if (!same.length) return null;
    return make("details", "", make("summary", "", "Captions of the video"), ...same.map(captionList));
  }

  function questionCard(item) {
    const about = make("div", "about", make("span", "", `video ${item.video}`),
      make("span", "", `question ${item.qid}`), make("span", "", `type ${item.type}`),
      make("span", "", data.sets[item.set][2]));
    if (item.changed) about.append(make("span", "", "changed between runs"));
    const text = item.question === null ? "(text not at hand)" : item.question;
    return make("article", "item", about, make("p", "question", text), frames(item.video),
      optionTable(item), captionsOf(item));
  }

  const ANSWER_FILTERS = [["all", "all", () => true]];
  const wrong = (right) => right === false;
  if (numRuns === 1) {
    ANSWER_FILTERS.push(["wrong", "wrong", (item) => item.right[0] === false]);
    ANSWER_FILTERS.push(["right", "right", (item) => item.right[0] === true]);
  } else {
    ANSWER_FILTERS.push(["wrong", "wrong in any run", (item) => item.right.some(wrong)]);
    ANSWER_FILTERS.push(["all-wrong", "wrong in every run", (item) => item.right.every(wrong)]);
    ANSWER_FILTERS.push(["right", "right in every run", (item) => item.right.every(Boolean)]);
    data.runs.forEach((name, run) => {
      ANSWER_FILTERS.push([`wrong-${run}`, `wrong in ${name}`, (item) => item.right[run] === false]);
    });
  }

  function fill(select, pairs) {
    select.append(...pairs.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
    select.parentElement.hidden = pairs.length < 3; // "all", and no choice besides one
  }

  function questionFilters(fields) {
    const text = fields.text.value.trim().toLowerCase();
    const [set, type, changed] = [fields.set.value, fields.type.value, fields.changed.checked];
    const answers = ANSWER_FILTERS.find(([value]) => value === fields.answers.value)[2];
    return (item) => (!set || String(item.set) === set) && (!type || item.type === type.slice(1))
      && (!changed || item.changed) && answers(item) && (!text || item.search.includes(text));
  }

  function captionFilters(fields) {
    const text = fields.text.value.trim().toLowerCase();
    return (item) => !text || item.search.includes(text);
  }

  function captionCard(caption) {
    const about = make("div", "about", make("span", "", `video ${caption.video}`),
      make("span", "", [caption.dataset, caption.split].filter(Boolean).join(" ")));
    return make("article", "item", about, frames(caption.video), captionList(caption));
  }

  const questions = new List("predictions", data.questions, "questions", questionFilters, questionCard);
  const fields = questions.form.elements;
  fill(fields.set, [["", "all"], ...data.sets.map(([, , name], i) => [String(i), name])]);
  const types = [...new Set(data.questions.map((item) => item.type))].sort();
  fill(fields.type, [["", "all"], ...types.map((type) => [`=${type}`, type])]);
  fill(fields.answers, ANSWER_FILTERS);
  fields.changed.parentElement.hidden = numRuns < 2;
  questions.filter();
  const captions = new List("captions", data.captions, "videos", captionFilters, captionCard);
  captions.filter();
  document.documentElement.dataset.listed = "true";
}
