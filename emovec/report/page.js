"use strict";
const STEPS = 8, MISSING = -32768;
const number = (v) => {
  if (!Number.isFinite(v)) return "n/a";
  const size = Math.abs(v), text = size.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0);
  return (Number(text) === 0 ? "" : v < 0 ? "\u2212" : "+") + text;
};
const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

// --- theme: as the system has it until the reader chooses
const root = document.documentElement;
const remembered = (value) => {
  try {
    if (value === undefined) return localStorage.getItem("emovec-theme");
    localStorage.setItem("emovec-theme", value);
  } catch { /* pages from a file may have no storage */ }
  return null;
};
const chosen = remembered();
if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  remembered(root.dataset.theme = dark ? "light" : "dark");
});

// --- the text of a reading
const tip = document.getElementById("tip");
const decode = (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Int16Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true));
};

function heatmap(card) {
  const data = JSON.parse(card.querySelector("script").textContent);
  const levels = decode(data.scores), width = data.names.length;
  const tokens = [...card.querySelectorAll("[data-i]")];
  const buttons = [...card.querySelectorAll(".chips button")], select = card.querySelector("select");
  const score = (token, concept) => {
    const level = levels[token * width + concept];
    return level === MISSING ? NaN : level * data.quantum;
  };
  let concept = data.names.indexOf(buttons[0].dataset.name), current = -1;

  const colour = (value) => {
    if (Number.isNaN(value)) return "z";
    const step = Math.floor((Math.min(1, Math.abs(value) / data.limit)) * STEPS + 0.5);
    return step === 0 ? "z" : (value > 0 ? "p" : "n") + step;
  };
  const show = (name) => {
    concept = data.names.indexOf(name);
    tokens.forEach((span, i) => { span.className = span.className.replace(/^\S+/, colour(score(i, concept))); });
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.name === name)));
    select.value = name;
  };
  buttons.forEach((button) => button.addEventListener("click", () => show(button.dataset.name)));
  select.addEventListener("change", () => show(select.value));

  const row = (token, k, most) => {
    const value = score(token, k), line = element("div", "row"), track = element("span", "track"), bar = element("i", value < 0 ? "down" : "up");
    bar.style.left = "0";
    bar.style.width = `${Number.isFinite(value) ? Math.min(100, 100 * Math.abs(value) / most) : 0}%`;
    track.append(bar);
    line.append(element("span", "name", data.names[k]), track, element("span", "value", number(value)));
    return line;
  };
  const describe = (i) => {
    const head = element("header"), position = data.first + i * data.every;
    const piece = data.pieces[i].replaceAll("\n", "\u21b5").trim();
    head.append(element("b", "", piece === "" ? (data.pieces[i] === "" ? "part of a character" : "space") : piece), element("span", "", `token ${position}`));
    const best = data.names.map((_, k) => k).filter((k) => !Number.isNaN(score(i, k))).sort((a, b) => score(i, b) - score(i, a)).slice(0, 5);
    const most = Math.max(...[...best, concept].map((k) => Math.abs(score(i, k))).filter(Number.isFinite), 1e-9);
    const own = row(i, concept, most);
    own.classList.add("own");
    tip.replaceChildren(head, ...best.map((k) => row(i, k, most)), own);
    if (position === 0) tip.append(element("p", "", "The first token is an attention sink: its scores mean nothing and enter no average."));
  };
  const point = (i) => {
    tokens[current]?.classList.remove("on");
    current = i;
    tip.hidden = i < 0;
    if (i < 0) return;
    tokens[i].classList.add("on");
    describe(i);
    const box = tokens[i].getClientRects()[0] ?? tokens[i].getBoundingClientRect();
    const above = box.bottom + tip.offsetHeight + 12 > innerHeight;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above ? Math.max(8, box.top - tip.offsetHeight - 8) : box.bottom + 8}px`;
  };
  const text = card.querySelector(".text");
  const under = (event) => event.target.closest?.("[data-i]");
  text.addEventListener("pointerover", (event) => { if (under(event)) point(tokens.indexOf(under(event))); });
  text.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") point(-1); });
  text.addEventListener("blur", () => point(-1));
  text.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") point(-1);
    if (!move) return;
    event.preventDefault();
    point(Math.max(0, Math.min(tokens.length - 1, current + move)));
    tokens[current].scrollIntoView({ block: "nearest" });
  });
  document.addEventListener("pointerdown", (event) => { if (!text.contains(event.target)) point(-1); });
  addEventListener("scroll", () => { if (current >= 0 && document.activeElement !== text) point(-1); }, { passive: true });
}
document.querySelectorAll(".heat").forEach(heatmap);

// --- charts over the tokens: one line through all of a section
document.querySelectorAll(".lines").forEach((grid) => {
  const data = JSON.parse(grid.querySelector(":scope > script").textContent);
  const charts = [...grid.querySelectorAll(".chart")].map((chart) => {
    const output = chart.querySelector("output");
    return { svg: chart.querySelector("svg"), cross: chart.querySelector(".cross"), output, mean: [...output.childNodes], values: chart.dataset.values.split(",") };
  });
  const point = (token) => charts.forEach(({ cross, output, mean, values }) => {
    const x = token < 0 ? -9 : data.left + data.step * (token + 0.5);
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    if (token < 0) return output.replaceChildren(...mean);
    const piece = data.pieces[token].replaceAll("\n", "\u21b5").trim();
    output.replaceChildren(values[token] === "" ? "n/a" : number(Number(values[token])), element("small", "", ` ${piece}`));
  });
  charts.forEach(({ svg }) => {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * data.width;
      const token = Math.floor((x - data.left) / data.step);
      point(token < data.pieces.length ? token : -1);
    });
    svg.addEventListener("pointerleave", () => point(-1));
  });
});
