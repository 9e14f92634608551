// What the views share; irkit.widgets.base puts it in front of each view's own module, in one scope.

const STOPS = {
  viridis: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
  cividis: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
};

/** 256 colours as [r, g, b], between stops taken from matplotlib's map of the name. */
function colourMap(name) {
  const stops = STOPS[name].split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((from, part) => Math.round(from + (place - low) * (stops[low + 1][part] - from)));
  });
}

/** The same colours as 32-bit pixels of an ImageData, which lie in memory as r, g, b, a. */
function pixels(map) {
  const made = new Uint8ClampedArray(4 * map.length);
  map.forEach((rgb, index) => made.set([...rgb, 255], 4 * index));
  return new Uint32Array(made.buffer);
}

const css = ([r, g, b]) => `rgb(${r},${g},${b})`;

/** Black or white, whichever can be read on the colour. */
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 105 ? "#000" : "#fff");

/** A DOM element; properties named on... are listeners, `aria-...`, `role` and `for` attributes. */
function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A view's root, which hides its static twin while it is there. Its keys are its own: Jupyter's shortcuts stay out. */
function root(model, el, name, label) {
  const made = make("div", { className: `irkit-view irkit-${name}`, role: "group", "aria-label": label });
  // JupyterLab listens as events bubble up; Notebook 7 before they come here, and looks at the focused element alone.
  made.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
  made.addEventListener("keydown", (event) => event.stopPropagation());
  made.append(make("style", {}, `.irkit-twin-${model.get("twin_id")} { display: none; }`));
  el.append(made);
  return made;
}

/** A drop-down that follows a trait of the model, and sets it to what `read` makes of a value; without a label to be seen it has the trait's name. */
function choice(model, trait, label, options, read = String) {
  const select = make("select", {
    ...(label ? {} : { "aria-label": trait }),
    onchange: () => {
      model.set(trait, read(select.value));
      model.save_changes();
    },
  });
  for (const [value, text] of Object.entries(options)) select.append(make("option", { value }, text));
  const follow = () => (select.value = model.get(trait));
  model.on(`change:${trait}`, follow);
  follow();
  return make("label", {}, label, " ", select);
}

/** A labelled box to tick that follows a trait of the model, and sets it. */
function tick(model, trait, label) {
  const box = make("input", {
    type: "checkbox",
    onchange: () => {
      model.set(trait, box.checked);
      model.save_changes();
    },
  });
  const follow = () => (box.checked = model.get(trait));
  model.on(`change:${trait}`, follow);
  follow();
  return make("label", {}, box, " ", label);
}

/** A box of text beside the pointer. */
function tooltip(parent) {
  const box = make("div", { className: "irkit-tip", hidden: true, "aria-hidden": "true" });
  parent.append(box);
  return {
    show(event, ...content) {
      box.replaceChildren(...content);
      box.hidden = false;
      const frame = parent.getBoundingClientRect();
      const x = event.clientX - frame.left + 14;
      const y = event.clientY - frame.top + 14;
      box.style.left = `${Math.max(0, Math.min(x, frame.width - box.offsetWidth - 4))}px`;
      box.style.top = `${y + box.offsetHeight > frame.height ? Math.max(0, y - box.offsetHeight - 24) : y}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

/**
 * Calls `draw` when the element comes into sight, changes its size, or the theme changes: a canvas that a windowed
 * notebook took out of the page comes back blank. Returns what ends it.
 */
function whenSeen(element, draw) {
  const seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && draw());
  const sized = new ResizeObserver(() => draw());
  const themed = new MutationObserver(() => {
    draw();
    setTimeout(draw, 300); // the stylesheets come behind the attributes, and the page is hidden between
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  seen.observe(element);
  sized.observe(element);
  themed.observe(document.body, { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name"] });
  dark.addEventListener("change", draw);
  return () => {
    [seen, sized, themed].forEach((each) => each.disconnect());
    dark.removeEventListener("change", draw);
  };
}

/** `draw`, once a frame at most. */
function oncePerFrame(draw) {
  let asked = 0;
  return () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      draw();
    });
  };
}

/** Makes the canvas so large, in CSS pixels, and gives its context, cleared and scaled to the device's pixels. */
function sheet(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== across || canvas.height !== down) Object.assign(canvas, { width: across, height: down });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  Object.assign(context, { lineWidth: 1, textAlign: "left", textBaseline: "middle", globalAlpha: 1 });
  return context;
}

/** The theme's colours, as they are now. */
function theme(element) {
  const style = getComputedStyle(element);
  const named = (name) => style.getPropertyValue(name).trim();
  return { ink: style.color, faint: named("--irkit-faint"), line: named("--irkit-line"), accent: named("--irkit-accent"), font: style.fontFamily };
}

/** A token as a label: white space to be seen, and not too long. */
function tokenLabel(token, longest = 14) {
  const seen = token.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll("\u0120", "·");
  return seen.length > longest ? `${seen.slice(0, longest - 1)}…` : seen || "∅";
}

/** A typed array of what a bytes trait or a message's buffer holds. */
const typed = (view, Type) => new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const OUT = "#c2562d"; // what is taken out, on light and dark grounds

const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

/** A slider and a box for a number, which both tell `changed`; the box takes numbers beyond the slider's ends. */
function slider(label, { min, max, step }, changed) {
  const tell = (input) => {
    const value = Number(input.value);
    if (input.value === "" || !Number.isFinite(value)) return;
    show(value, input);
    changed(value);
  };
  const range = make("input", { type: "range", min, max, step, "aria-label": label, oninput: () => tell(range) });
  const whole = Number.isInteger(step);
  const box = make("input", { type: "number", step: whole ? 1 : "any", "aria-label": `${label}, as a number`, onchange: () => tell(box) });
  if (whole) Object.assign(box, { min, max });
  function show(value, but = null) {
    if (range !== but && Number(range.value) !== value) range.value = value;
    const rounded = Number(value.toFixed(3));
    if (box !== but && document.activeElement !== box) box.value = rounded;
  }
  return { element: make("span", { className: "irkit-slider" }, range, box), show };
}
