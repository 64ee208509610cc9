"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const NS = "http://www.w3.org/2000/svg";
  const storage = {
    get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* a page from a file may have no storage */ } },
  };

  // Theme: as the system says, until somebody chooses.
  const button = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`); };
  const before = storage.get("onecurve-theme");
  if (before === "dark" || before === "light") root.dataset.theme = before;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; storage.set("onecurve-theme", root.dataset.theme); name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  const place = (share, low, high) => low + share * (high - low);
  const short = (v) => {
    if (!Number.isFinite(v)) return "not finite";
    const size = Math.abs(v);
    if (Number.isInteger(v) || size >= 1000) return Math.round(v).toLocaleString("en-US");
    return size < 1e-3 ? v.toExponential(2) : v.toPrecision(4);
  };

  // A two-sided exponential average whose length is `share` of the curve, so that it lags behind nothing; 0 = as it is.
  const smooth = (values, share) => {
    const count = values.length;
    if (count < 3 || share <= 0) return values;
    const keep = Math.exp(-1 / Math.max(0.5, share * count));
    const total = values.map((v) => -v), weight = values.map(() => -1);
    let sum = 0, norm = 0;
    for (let n = 0; n < count; n++) { sum = sum * keep + values[n]; norm = norm * keep + 1; total[n] += sum; weight[n] += norm; }
    sum = 0; norm = 0;
    for (let n = count - 1; n >= 0; n--) { sum = sum * keep + values[n]; norm = norm * keep + 1; total[n] += sum; weight[n] += norm; }
    return total.map((v, n) => v / weight[n]);
  };

  class Plot {
    constructor(figure) {
      this.data = JSON.parse(figure.querySelector("script").textContent);
      this.svg = figure.querySelector(".plot svg");
      this.cursor = this.svg.querySelector(".cursor");
      this.readout = figure.querySelector(".values");
      this.traces = this.data.traces.map((trace) => ({ ...trace, shown: trace.y }));
      const lines = [...this.svg.querySelectorAll("path.smooth")];
      for (const trace of this.traces) if (!trace.points) trace.line = lines.shift();
      this.styles = [...this.svg.querySelectorAll(".smooth, .evals, .exact")].map((node) => [...node.classList].find((c) => /^s\d$/.test(c)));
      this.steps = [...new Set(this.traces.flatMap((trace) => trace.x))].sort((a, b) => a - b);
      this.at = this.steps.length - 1;
      this.aim(figure);
    }
    aim(figure) {
      const aim = document.createElement("div");
      aim.className = "aim";
      aim.tabIndex = 0;
      aim.setAttribute("role", "slider");
      aim.setAttribute("aria-label", `${figure.querySelector("h3").textContent}: values by ${this.data.xLabel}`);
      aim.setAttribute("aria-valuemin", this.steps[0]);
      aim.setAttribute("aria-valuemax", this.steps[this.steps.length - 1]);
      this.node = aim;
      this.tell();
      const box = this.data.box, width = this.svg.viewBox.baseVal.width;
      aim.addEventListener("pointermove", (event) => {
        const bounds = aim.getBoundingClientRect();
        const share = ((event.clientX - bounds.left) / bounds.width * width - box[0]) / (box[2] - box[0]);
        const wanted = place(share, ...this.data.x);
        let best = 0;
        this.steps.forEach((step, n) => { if (Math.abs(step - wanted) < Math.abs(this.steps[best] - wanted)) best = n; });
        this.at = best;
        this.show();
      });
      aim.addEventListener("pointerleave", () => { if (document.activeElement !== aim) this.hide(); });
      aim.addEventListener("blur", () => this.hide());
      aim.addEventListener("focus", () => { if (aim.matches(":focus-visible")) this.show(); });
      aim.addEventListener("keydown", (event) => {
        const many = Math.max(1, Math.round(this.steps.length / 20));
        const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -many, PageUp: many, Home: -1e9, End: 1e9 };
        if (!(event.key in moves)) return;
        event.preventDefault();
        this.at = Math.min(this.steps.length - 1, Math.max(0, this.at + moves[event.key]));
        this.show();
      });
      this.svg.parentNode.appendChild(aim);
    }
    across(x) { return place((x - this.data.x[0]) / (this.data.x[1] - this.data.x[0]), this.data.box[0], this.data.box[2]); }
    up(y) {
      const scale = this.data.log ? (v) => Math.log10(Math.max(v, 1e-300)) : (v) => v;
      const [low, high] = this.data.y.map(scale);
      return place(Math.min(3, Math.max(-2, (scale(y) - low) / (high - low))), this.data.box[3], this.data.box[1]);
    }
    nearest(trace, x) {
      let best = 0;
      trace.x.forEach((step, n) => { if (Math.abs(step - x) < Math.abs(trace.x[best] - x)) best = n; });
      return best;
    }
    values() {
      const x = this.steps[this.at], reach = (this.data.x[1] - this.data.x[0]) * 0.06;
      return this.traces.map((trace, n) => ({ trace, n, i: this.nearest(trace, x) })).filter(({ trace, i }) => Math.abs(trace.x[i] - x) <= reach);
    }
    tell() {
      const parts = this.values().map(({ trace, i }) => `${trace.label} ${short(trace.shown[i])}`);
      const text = `${this.data.xLabel} ${short(this.steps[this.at])}: ${parts.join(", ")}`;
      this.node.setAttribute("aria-valuenow", this.steps[this.at]);
      this.node.setAttribute("aria-valuetext", text);
      return text;
    }
    show() {
      const x = this.across(this.steps[this.at]), box = this.data.box;
      this.cursor.textContent = "";
      const line = document.createElementNS(NS, "line");
      for (const [key, value] of [["x1", x], ["x2", x], ["y1", box[1]], ["y2", box[3]]]) line.setAttribute(key, value);
      this.cursor.appendChild(line);
      for (const { trace, n, i } of this.values()) {
        const y = this.up(trace.shown[i]);
        if (y < box[1] - 4 || y > box[3]) continue;
        const dot = document.createElementNS(NS, "circle");
        dot.setAttribute("class", this.styles[n] || "s0");
        dot.setAttribute("cx", this.across(trace.x[i]));
        dot.setAttribute("cy", y);
        dot.setAttribute("r", 4);
        this.cursor.appendChild(dot);
      }
      this.readout.textContent = this.tell();
    }
    hide() { this.cursor.textContent = ""; this.readout.textContent = ""; }
    smooth(share) {
      for (const trace of this.traces) {
        if (!trace.line) continue;
        trace.shown = smooth(trace.y, share);
        trace.line.setAttribute("d", trace.shown.map((y, n) => `${n ? "L" : "M"}${this.across(trace.x[n]).toFixed(1)} ${this.up(y).toFixed(1)}`).join(""));
      }
    }
  }

  const plots = [...document.querySelectorAll("figure[data-plot]")].map((figure) => new Plot(figure));
  const slider = document.getElementById("smoothing");
  if (slider) {
    const smoothAll = () => {
      document.getElementById("smoothed").textContent = `${slider.value}%`;
      for (const plot of plots) plot.smooth(slider.value / 100);
    };
    slider.addEventListener("input", smoothAll);
    smoothAll();
  }
})();
