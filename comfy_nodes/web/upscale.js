// QArtSR Upscale: greys out inputs that have no effect, and after a run shows a line about it and a slider over before and after.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { removePreview } from "./preview.js";

const NODE = "QArtSRUpscale";
const BY_SCALE = "scale, or long_side";
const HEIGHT = 260; // of slider and line, in pixels, at least

const find = (node, name) => node.widgets?.find((widget) => widget.name === name);

function greyOut(node) {
  const value = (name) => find(node, name)?.value;
  const size = value("size") ?? BY_SCALE;
  const idle = {
    scale: size !== BY_SCALE || value("long_side") > 0,
    long_side: size !== BY_SCALE,
    side: !["long side", "short side"].includes(size),
    megapixels: size !== "megapixels",
    seed: !value("sample_posterior"),
  };
  for (const [name, disabled] of Object.entries(idle)) {
    const widget = find(node, name);
    if (widget) widget.disabled = disabled;
  }
  node.setDirtyCanvas?.(true, true);
}

function element(parent, tag, style, text) {
  const made = document.createElement(tag);
  made.style.cssText = style;
  if (text) made.textContent = text;
  parent?.append(made);
  return made;
}

// What is shown below the node's inputs. With several runs (a list of images) the buttons go from one to another.
class Comparison {
  constructor() {
    this.box = element(null, "div", "display:flex;flex-direction:column;gap:6px;width:100%;height:100%;font:12px sans-serif");
    this.stage = element(this.box, "div",
      "position:relative;flex:1;min-height:180px;overflow:hidden;background:#161616;border-radius:4px;cursor:ew-resize");
    const whole = "position:absolute;inset:0;width:100%;height:100%;object-fit:contain;pointer-events:none;user-select:none";
    this.before = element(this.stage, "img", whole);
    this.after = element(this.stage, "img", whole);
    this.before.alt = "before";
    this.after.alt = "after";
    this.divider = element(this.stage, "div",
      "position:absolute;top:0;bottom:0;width:2px;margin-left:-1px;background:#fff;box-shadow:0 0 3px #000;pointer-events:none");
    const tag = "position:absolute;top:6px;padding:1px 6px;border-radius:3px;background:#000a;color:#fff;pointer-events:none;";
    element(this.stage, "span", tag + "left:6px", "before");
    element(this.stage, "span", tag + "right:6px", "after");
    const foot = element(this.box, "div", "display:flex;gap:6px;align-items:center;color:var(--input-text,#ccc)");
    const button = "background:none;border:1px solid currentColor;border-radius:3px;color:inherit;padding:0 6px;cursor:pointer";
    this.back = element(foot, "button", button, "‹");
    this.line = element(foot, "div", "flex:1;user-select:text;line-height:1.35");
    this.next = element(foot, "button", button, "›");
    this.back.title = "image before";
    this.next.title = "next image";
    this.back.onclick = () => this.show(this.index - 1);
    this.next.onclick = () => this.show(this.index + 1);
    for (const image of [this.before, this.after]) image.onerror = () => (this.stage.style.display = "none");
    this.stage.addEventListener("pointermove", (event) => {
      const { left, width } = this.stage.getBoundingClientRect();
      this.divide(((event.clientX - left) / width) * 100);
    });
    // The canvas is moved and zoomed over the slider as anywhere else.
    this.box.addEventListener("wheel", (event) => app.canvas?.processMouseWheel?.(event));
    this.stage.addEventListener("pointerdown", (event) => event.button === 1 && app.canvas?.processMouseDown?.(event));
    this.divide(50);
  }

  divide(percent) {
    const at = Math.min(100, Math.max(0, percent));
    this.after.style.clipPath = `inset(0 0 0 ${at}%)`;
    this.divider.style.left = `${at}%`;
  }

  fill(lines, pairs) {
    this.lines = lines;
    this.pairs = pairs;
    this.show(pairs.length - 1);
  }

  show(index) {
    this.index = (index + this.pairs.length) % this.pairs.length;
    const pair = this.pairs[this.index];
    const url = (name) => api.apiURL(`/view?filename=${encodeURIComponent(name)}&type=temp&subfolder=`);
    this.stage.style.display = "";
    this.before.src = url(pair.before);
    this.after.src = url(pair.after);
    const several = this.pairs.length > 1;
    this.back.style.display = this.next.style.display = several ? "" : "none";
    this.line.textContent = (several ? `${this.index + 1} of ${this.pairs.length}: ` : "") + (this.lines[this.index] ?? "");
  }
}

function showComparison(node, message) {
  if (!message?.qartsr_pair?.length) return;
  if (!node.qartsrComparison) {
    const shown = (node.qartsrComparison = new Comparison());
    const widget = node.addDOMWidget("before_after", "qartsr_before_after", shown.box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    });
    widget.serialize = false;
    removePreview(node);
    node.setSize([node.size[0], node.computeSize()[1] + 10]);
  }
  node.qartsrComparison.fill(message.text ?? [], message.qartsr_pair);
  removePreview(node);
  setTimeout(() => removePreview(node), 700); // the last one may be loading
}

app.registerExtension({
  name: "QArtSR.Upscale",
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name !== NODE) return;
    const { onExecuted, onConfigure } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      showComparison(this, message);
    };
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      greyOut(this);
    };
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const variation = find(node, "sample_posterior");
    if (variation && (variation.label ?? variation.name) === variation.name) variation.label = "add variation";
    for (const name of ["size", "long_side", "sample_posterior"]) {
      const widget = find(node, name);
      if (!widget) continue;
      const callback = widget.callback;
      widget.callback = function () {
        callback?.apply(this, arguments);
        greyOut(node);
      };
    }
    greyOut(node);
  },
});
