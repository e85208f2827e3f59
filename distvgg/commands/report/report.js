"use strict";
// The controls of the report. `spec` names the Bokeh models by their ids; see page.py.
(() => {
  const spec = JSON.parse(document.getElementById("spec").textContent);
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;
  // A page that reloads itself keeps its state. Storage may be forbidden, e.g. in a sandbox.
  const stored = {
    read() {
      try { return JSON.parse(sessionStorage.getItem("distvgg " + location.pathname)) ?? {}; }
      catch { return {}; }
    },
    write(state) {
      try { sessionStorage.setItem("distvgg " + location.pathname, JSON.stringify(state)); }
      catch { /* the state is lost at the next reload */ }
    },
  };
  const state = { axis: "step", mode: Object.keys(spec.modes)[0], hidden: [], classes: null,
                  ...stored.read() };
  if (!(state.mode in spec.modes)) state.mode = Object.keys(spec.modes)[0];
  const hidden = new Set(state.hidden);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let model;  // of an id

  function showUnits() {
    const inMode = new Set(spec.modes[state.mode]);
    each(".unit", (button) => {
      const key = button.dataset.unit;
      button.hidden = !inMode.has(key);
      button.setAttribute("aria-pressed", String(!hidden.has(key)));
    });
    const visible = (key) => inMode.has(key) && !hidden.has(key);
    for (const [filter, rows] of spec.shown) {
      model(filter).indices = [...rows.keys()].filter((row) => visible(rows[row]));
    }
    document.getElementById("all").hidden = ![...hidden].some((key) => inMode.has(key));
    save();
  }

  function showAxis() {
    for (const id of spec.glyphs) {
      const glyph = model(id), at = { field: state.axis };
      for (const name of ["x", "xs", "x0", "x1"]) {
        if (name in glyph.attributes) glyph[name] = at;
      }
    }
    for (const id of spec.curves) {
      model(id).below[0].axis_label = spec.labels[state.axis];
    }
    for (const id of spec.hovers) {
      const hover = model(id), place = hover.tooltips.at(-1)[1];
      hover.tooltips = [...hover.tooltips.slice(0, -1), [spec.labels[state.axis], place]];
    }
    resetRanges();
    save();
  }

  // Ranges that a zoom has fixed follow the data of the new axis again.
  function resetRanges() {
    for (const id of spec.curves) {
      const plot = model(id);
      for (const range of [plot.x_range, plot.y_range]) range.have_updated_interactively = false;
    }
    for (const id of spec.curves) viewOf(id)?.reset?.();
  }

  function viewOf(id) {
    for (const root of Object.values(Bokeh.index)) {
      if (root.model.id === id) return root;
    }
    return null;
  }

  // Elements also within shadow roots, in which Bokeh keeps its own.
  function* deep(root, selector) {
    yield* root.querySelectorAll(selector);
    for (const element of root.querySelectorAll("*")) {
      if (element.shadowRoot) yield* deep(element.shadowRoot, selector);
    }
  }

  function colour() {
    const style = getComputedStyle(document.documentElement);
    
    const quiet = style.getPropertyValue("--quiet").trim();
    const line = style.getPropertyValue("--line").trim();
    for (const id of spec.themed.axes) {
      model(id).setv({
        axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null,
        major_label_text_color: quiet, axis_label_text_color: quiet,
        axis_label_text_font_style: "normal", axis_label_text_font_size: "12px",
      });
    }
    for (const id of spec.themed.grids) model(id).grid_line_color = line;
    document.documentElement.dataset.scheme = dark.matches ? "dark" : "light";
    
  }

  function showClasses(key) {
    each(".classes", (part) => { part.hidden = part.dataset.classes !== key; });
    const cells = spec.cells.of?.[key];
    if (cells) {
      const source = model(spec.cells.source);
      source.data = { ...Object.fromEntries(Object.entries(source.data)), ...cells };
    }
    state.classes = key;
    save();
  }

  function narrow() {
    const small = matchMedia("(max-width: 700px)").matches;
    const plot = document.querySelector('[data-plot="confusion"]') && spec.confusion
      ? model(spec.confusion) : null;
    if (plot) {
      plot.below[0].major_label_text_font_size = small ? "0px" : "11px";
      plot.left[0].major_label_text_font_size = small ? "9px" : "11px";
    }
  }

  function insertExamples() {
    const text = document.getElementById("examples")?.textContent;
    const strips = text ? JSON.parse(text) : {};
    each("img[data-class]", (img) => { img.src = strips[img.dataset.class]; });
  }

  const save = () => stored.write({ ...state, hidden: [...hidden] });

  function listen() {
    each("input[name=axis]", (input) => {
      input.checked = input.value === state.axis;
      input.addEventListener("change", () => { state.axis = chosen("axis"); showAxis(); });
    });
    each("input[name=mode]", (input) => {
      input.checked = input.value === state.mode;
      input.addEventListener("change", () => { state.mode = chosen("mode"); showUnits(); });
    });
    each(".unit", (button) => {
      const key = button.dataset.unit;
      button.addEventListener("click", () => {
        hidden.has(key) ? hidden.delete(key) : hidden.add(key);
        showUnits();
      });
      button.addEventListener("dblclick", () => {
        spec.modes[state.mode].forEach((other) => hidden.add(other));
        hidden.delete(key);
        showUnits();
      });
    });
    document.getElementById("all").addEventListener("click", () => { hidden.clear(); showUnits(); });
    const classes = document.getElementById("of-classes");
    classes?.addEventListener("change", () => showClasses(classes.value));
    if (classes && spec.cells.of?.[state.classes]) {
      classes.value = state.classes;
      showClasses(state.classes);
    }
    dark.addEventListener("change", colour);
    addEventListener("resize", narrow);
  }

  function start() {
    const roots = document.querySelectorAll("[data-root-id]").length;
    if (!globalThis.Bokeh?.documents?.length || Object.keys(Bokeh.index).length < roots) {
      setTimeout(start, 20);
      return;
    }
    const doc = Bokeh.documents[0];
    model = (id) => doc.get_model_by_id(id);
    if (matchMedia("(pointer: coarse)").matches) {  // a finger scrolls the page
      for (const id of spec.themed.plots) model(id).toolbar.active_drag = null;
      for (const events of deep(document, ".bk-events")) {
        events.style.touchAction = "pan-y pinch-zoom";
      }
    }
    insertExamples();
    colour();
    narrow();
    listen();
    showUnits();
    if (state.axis !== "step") showAxis();
    document.documentElement.dataset.ready = "true";
  }
  start();
})();
