"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const control = new Set(data.control);
  const main = byId("examples");
  const tip = byId("tip");
  const [source, text, warned, order, edges, open] = ["source", "text", "warned", "order", "edges", "open"].map(byId);
  const COLLAPSE_TOKENS = 500; // a longer example is folded until it is asked for
  const FIRST_CARDS = 6; // drawn at once; the others when they come near the screen
  const number = (n) => n.toLocaleString("en");
  const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

  const make = (tag, className, content) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content;
    return element;
  };

  // -- one token ---------------------------------------------------------------------------------

  // What steers the direction of writing or shows nothing is spelled out; joiners stay, emoji need them.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/;
  const SPECIAL = new RegExp(`(\\n|${UNSEEN.source})`, "g");
  const spelled = (letter) => {
    const code = letter.codePointAt(0);
    return code < 0x20 ? String.fromCodePoint(0x2400 + code) : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  };

  const textOf = (example, i) => example.other[i] ?? data.texts[example.ids[i]];

  const write = (span, said) => {
    for (const piece of said.split(SPECIAL)) {
      if (piece === "\n") {
        span.append(make("i", "nl", "↵"), "\n");
      } else if (UNSEEN.test(piece)) {
        span.append(make("i", "odd", `⟨${spelled(piece)}⟩`));
      } else if (piece) {
        span.append(piece);
      }
    }
  };

  const weightsOf = (example) => {
    const weights = new Float64Array(example.ids.length);
    for (const [start, end, weight] of example.runs) weights.fill(weight, start, end);
    return weights;
  };

  const draw = (card) => {
    if (card.drawn) return;
    card.drawn = true;
    const { example } = card;
    card.weights ??= weightsOf(example);
    const all = document.createDocumentFragment();
    for (let i = 0; i < example.ids.length; i++) {
      const said = textOf(example, i);
      const span = make("span");
      const weight = card.weights[i];
      const kinds = [];
      if (weight > 0) kinds.push("t");
      if (control.has(example.ids[i])) kinds.push("c");
      if (said === "") kinds.push("p");
      if (kinds.length) span.className = kinds.join(" ");
      if (weight > 0 && weight !== 1) span.style.setProperty("--w", Math.min(weight, 1.5));
      if (said === "") span.textContent = "·";
      else if (SPECIAL.test(said)) write(span, said);
      else span.textContent = said;
      SPECIAL.lastIndex = 0;
      span.position = i;
      all.append(span);
    }
    card.tokens.replaceChildren(all);
    card.tokens.style.minHeight = "";
  };

  const forget = (card) => {
    // Far from the screen a card keeps its height and gives its thousands of elements back.
    if (!card.drawn || card.element.contains(document.activeElement)) return;
    card.tokens.style.minHeight = `${card.tokens.offsetHeight}px`;
    card.tokens.replaceChildren();
    card.drawn = false;
    card.at = -1;
  };

  // -- cards -------------------------------------------------------------------------------------

  const gradient = (example) => {
    const length = example.ids.length;
    const stops = [];
    for (const [start, end, weight] of example.runs) {
      const colour = `color-mix(in srgb, var(--trained) ${Math.round(Math.min(1, 0.25 + 0.75 * weight) * 100)}%, var(--line))`;
      const from = `${((100 * start) / length).toFixed(2)}%`;
      const to = `${((100 * end) / length).toFixed(2)}%`;
      stops.push(`var(--line) ${from}`, `${colour} ${from}`, `${colour} ${to}`, `var(--line) ${to}`);
    }
    return stops.length ? `linear-gradient(to right, ${stops.join(", ")})` : "";
  };

  const percent = (part, whole) => (part && part / whole < 0.01 ? "< 1" : Math.round((100 * part) / whole));

  const fold = (card, folded) => {
    card.tokens.classList.toggle("long", folded && card.example.ids.length > COLLAPSE_TOKENS);
    card.more.textContent = folded ? `Show all ${number(card.example.ids.length)} tokens` : "Fold";
    card.more.setAttribute("aria-expanded", String(!folded));
    card.folded = folded;
  };

  const makeCard = (example, index) => {
    const element = byId("card").content.firstElementChild.cloneNode(true);
    const find = (selector) => element.querySelector(selector);
    const card = { element, example, index, tokens: find(".tokens"), more: find(".more"), border: find(".border"), at: -1 };
    const length = example.ids.length;
    element.id = `example-${index}`;
    element.card = card;
    const title = find("h2");
    title.id = `title-${index}`;
    title.append(example.source, make("span", "", `  ${example.row}`));
    if (example.part[1] > 1) title.append(make("span", "", `  part ${example.part[0]} of ${example.part[1]}`));
    element.setAttribute("aria-labelledby", title.id);
    find(".counts").textContent = `${plural(length, "token")} · ${number(example.trained)} trained (${percent(example.trained, length)} %)`;
    const strip = find(".strip");
    strip.style.background = gradient(example);
    strip.addEventListener("click", (event) => {
      const box = strip.getBoundingClientRect();
      fold(card, false);
      point(card, Math.min(length - 1, Math.floor(((event.clientX - box.left) / box.width) * length)), "center");
    });
    if (example.warnings.length) {
      const list = find(".warnings");
      list.hidden = false;
      list.append(...example.warnings.map((warning) => make("li", "", warning)));
    }
    if (example.cut[0]) {
      const cut = find(".cut");
      cut.hidden = false;
      cut.textContent = `✂ Cut here: ${plural(example.cut[0], "more token")}, ${number(example.cut[1])} of them to be learned.`;
    }
    card.tokens.setAttribute("aria-label", `${plural(length, "token")}; arrow keys go along them`);
    card.more.hidden = length <= COLLAPSE_TOKENS;
    card.more.addEventListener("click", () => fold(card, !card.folded));
    fold(card, true);
    // About as high as it will be, so that the scroll bar tells the truth before it is drawn.
    card.tokens.style.minHeight = `${Math.min(26, 1.4 * Math.ceil(length / 22))}rem`;
    return card;
  };

  const makeLost = (lost) => {
    const element = make("article", "card lost");
    element.tabIndex = -1;
    const head = make("header");
    const title = make("h2", "", lost.source);
    title.append(make("span", "", `  ${lost.row}`));
    head.append(title, make("span", "counts", lost.verdict));
    const what = make("p", "", `${lost.message} `);
    what.append(make("code", "", lost.rule));
    element.append(head, what, make("p", "", lost.cure));
    return { element, lost };
  };

  const cards = data.examples.map(makeCard);
  const losses = data.lost.map(makeLost);
  const lostTitle = make("h2", "part", "Rows without an example");

  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) draw(entry.target.card);
        else forget(entry.target.card);
      }
    },
    { rootMargin: "1200px 0px" },
  );

  // -- micro-batches -----------------------------------------------------------------------------

  const note = make(
    "p",
    "note",
    "The examples of this page as one rank would cut them, were they the window of one step. The bars show the documents of each micro-batch, and in green what of them is trained on.",
  );

  const lane = (members, longest) => {
    const row = make("div", "lane");
    for (const index of members) {
      const { example } = cards[index];
      const button = make("button");
      button.type = "button";
      button.style.flex = `${example.ids.length} 0 0`;
      button.style.backgroundImage = gradient(example);
      button.title = `${example.row}: ${plural(example.ids.length, "token")}, ${number(example.trained)} trained`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => go(cards[index]));
      row.append(button);
    }
    const used = members.reduce((sum, index) => sum + cards[index].example.ids.length, 0);
    if (longest > used) {
      const rest = make("span");
      rest.style.flex = `${longest - used} 0 0`;
      row.append(rest);
    }
    return row;
  };

  const lengthOf = (members) => members.reduce((sum, index) => sum + cards[index].example.ids.length, 0);
  const widest = Math.max(1, ...data.microBatches.map(lengthOf));

  const batchHead = (members, n) => {
    const head = make("section", "batch");
    const shape = data.packed ? "end to end in one row" : "one padded row each";
    const title = make("h2", "", `Micro-batch ${n + 1} of ${data.microBatches.length} `);
    title.append(make("small", "", `${plural(members.length, "document")}, ${plural(lengthOf(members), "token")}, ${shape}`));
    head.append(title);
    const longest = Math.max(...members.map((index) => cards[index].example.ids.length));
    if (data.packed) head.append(lane(members, widest));
    else head.append(...members.map((index) => lane([index], longest)));
    return head;
  };

  const batches = data.microBatches.map((members, n) => ({ members, head: batchHead(members, n) }));

  const layOut = () => {
    observer.disconnect();
    const asBatches = order.value === "batches";
    const elements = [];
    for (const card of cards) card.border.hidden = true;
    if (asBatches) {
      elements.push(note);
      for (const { members, head } of batches) {
        elements.push(head);
        let column = 0;
        members.forEach((index, n) => {
          const card = cards[index];
          card.column = data.packed ? column : 0;
          card.border.hidden = n === 0;
          card.border.textContent = data.packed
            ? `border of documents · column ${number(column)} · positions start again at 0 · no look across`
            : "next row of the micro-batch";
          column += card.example.ids.length;
          elements.push(card.element);
        });
      }
    } else {
      for (const card of cards) {
        card.column = null;
        elements.push(card.element);
      }
    }
    if (losses.length) elements.push(lostTitle, ...losses.map((loss) => loss.element));
    main.replaceChildren(...elements);
    for (const card of cards) observer.observe(card.element);
  };

  // -- filters, kept in the address behind # so that a view can be shared -------------------------

  const wholeText = (card) => (card.text ??= card.example.ids.map((_, i) => textOf(card.example, i)).join("").toLowerCase());

  const filter = () => {
    const wanted = text.value.toLowerCase();
    let shown = 0;
    for (const card of cards) {
      const passes =
        (!source.value || card.example.source === source.value) &&
        (!warned.checked || card.example.warnings.length > 0) &&
        (!wanted || wholeText(card).includes(wanted));
      card.element.hidden = !passes;
      if (passes && shown++ < FIRST_CARDS) draw(card);
    }
    let lostShown = 0;
    for (const { element, lost } of losses) {
      element.hidden = (source.value && lost.source !== source.value) || Boolean(wanted);
      lostShown += element.hidden ? 0 : 1;
    }
    lostTitle.hidden = lostShown === 0;
    for (const { members, head } of batches) head.hidden = members.every((index) => cards[index].element.hidden);
    byId("count").textContent = `${number(shown)} of ${plural(cards.length, "example")}`;
    byId("none").hidden = shown + lostShown > 0;
  };

  const remember = () => {
    const state = new URLSearchParams();
    if (source.value) state.set("source", source.value);
    if (text.value) state.set("text", text.value);
    if (warned.checked) state.set("warned", "1");
    if (order.value) state.set("order", order.value);
    if (edges.checked) state.set("edges", "1");
    if (open.checked) state.set("open", "1");
    const theme = document.documentElement.dataset.theme;
    if (theme) state.set("theme", theme);
    history.replaceState(null, "", `#${state}`);
  };

  const recall = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    source.value = state.get("source") ?? "";
    if (source.selectedIndex < 0) source.value = "";
    text.value = state.get("text") ?? "";
    warned.checked = state.has("warned");
    order.value = state.get("order") === "batches" ? "batches" : "";
    edges.checked = state.has("edges");
    open.checked = state.has("open");
    const theme = state.get("theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
    apply();
  };

  const apply = () => {
    main.classList.toggle("edges", edges.checked);
    document.body.classList.toggle("has-edges", edges.checked);
    for (const card of cards) fold(card, !open.checked);
    layOut();
    filter();
  };

  byId("bar").addEventListener("submit", (event) => event.preventDefault());
  for (const control_ of [source, warned, text]) {
    control_.addEventListener("input", () => {
      filter();
      remember();
    });
  }
  for (const control_ of [order, edges, open]) {
    control_.addEventListener("input", () => {
      apply();
      remember();
    });
  }
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remember();
  });
  addEventListener("hashchange", () => {
    if (location.hash !== "#examples") recall();
  });

  // -- what a token is, on pointing at it or by the keyboard --------------------------------------

  const describe = (card, i) => {
    const { example } = card;
    const id = example.ids[i];
    const weight = (card.weights ??= weightsOf(example))[i];
    const said = textOf(example, i);
    const lines = [said === "" ? `id ${id}` : `id ${id}   ${JSON.stringify(said)}`];
    lines.push(weight > 0 ? `trained on, weight ${weight}` : i === 0 ? "first token: nothing predicts it" : "read only");
    if (control.has(id)) lines.push("control token");
    if (example.parts[i]) {
      lines.push(`bytes ${example.parts[i]}: part of a character`);
      const others = [];
      for (let j = i + 1; textOf(example, j) === "" && example.parts[j]; j++) others.push(`${example.ids[j]} (${example.parts[j]})`);
      if (others.length) lines.push(`the rest of it: ${others.join(", ")}`);
    }
    lines.push(`position ${number(i)} of ${number(example.ids.length)}`);
    if (card.column) lines.push(`column ${number(card.column + i)} of the micro-batch`);
    return lines.join("\n");
  };

  const showTip = (card, span) => {
    tip.textContent = describe(card, span.position);
    tip.hidden = false;
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const above = box.top - own.height - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
  };

  const point = (card, i, block = "nearest") => {
    draw(card);
    card.tokens.children[card.at]?.classList.remove("at");
    card.at = i;
    const span = card.tokens.children[i];
    span.classList.add("at");
    span.scrollIntoView({ block });
    showTip(card, span);
  };

  const leave = (card) => {
    card.tokens.children[card.at]?.classList.remove("at");
    card.at = -1;
    tip.hidden = true;
  };

  main.addEventListener("mouseover", (event) => {
    const span = event.target.closest(".tokens > span");
    if (span) showTip(span.closest(".card").card, span);
    else tip.hidden = true;
  });
  main.addEventListener("mouseleave", () => (tip.hidden = true));
  main.addEventListener("focusout", (event) => {
    const tokens = event.target.closest(".tokens");
    if (tokens) leave(tokens.closest(".card").card);
  });
  addEventListener("scroll", () => (tip.hidden = true), { passive: true });

  const go = (card) => {
    card.element.scrollIntoView({ block: "start" });
    card.element.focus({ preventScroll: true });
  };

  const alongTokens = (event, card) => {
    const last = card.example.ids.length - 1;
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -last - 1, End: last + 1 };
    if (event.key === "Escape") {
      leave(card);
      card.element.focus();
    } else if (event.key in steps) {
      fold(card, false);
      point(card, Math.max(0, Math.min(last, card.at + steps[event.key])));
    } else {
      return;
    }
    event.preventDefault();
  };

  const alongCards = (step) => {
    const visible = [...main.querySelectorAll(".card:not([hidden])")];
    const here = visible.indexOf(document.activeElement?.closest(".card"));
    const next = visible[Math.max(0, Math.min(visible.length - 1, here + step))];
    if (next) go({ element: next });
  };

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    if (target.matches?.("input, select, textarea")) return;
    if (target.matches?.(".tokens")) alongTokens(event, target.closest(".card").card);
    if (event.defaultPrevented) return;
    if (event.key === "j") alongCards(1);
    else if (event.key === "k") alongCards(-1);
    else if (event.key === "/") text.focus();
    else if (event.key === "Enter" && target.matches?.(".card") && target.card) target.card.tokens.focus();
    else return;
    event.preventDefault();
  });

  recall();
})();
