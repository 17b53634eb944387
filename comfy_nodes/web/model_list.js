// The list of QArtSR Load Model says what each model is for; what is stored and sent stays the model's name.
import { app } from "../../scripts/app.js";

const NODE = "QArtSRLoadModel";
let labels = {};

function takeLabels(definition) {
  labels = definition?.input?.required?.model?.[1]?.qartsr_labels ?? labels;
}

const labelled = (name) => (labels[name] ? `${name}: ${labels[name]}` : (name ?? ""));

app.registerExtension({
  name: "QArtSR.ModelList",
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name === NODE) takeLabels(definition);
  },
  refreshComboInNodes(definitions) {
    takeLabels(definitions[NODE]);
  },
  nodeCreated(node) {
    const widget = node.comfyClass === NODE && node.widgets?.find((each) => each.name === "model");
    if (!widget) return;
    widget.options.getOptionLabel = labelled; // newer frontends
    Object.defineProperty(widget, "_displayValue", { get: () => labelled(widget.value), configurable: true });
    const onClick = widget.onClick;
    widget.onClick = function (options) {
      const x = options.e.canvasX - options.node.pos[0];
      const isArrow = x < 40 || x > (this.width || options.node.size[0]) - 40;
      if (isArrow || !Array.isArray(this.options.values)) return onClick.call(this, options);
      const entries = this.options.values.map((value) => ({ content: labelled(value), value }));
      new LiteGraph.ContextMenu(entries, {
        scale: Math.max(1, options.canvas.ds.scale),
        event: options.e,
        className: "dark",
        callback: (entry) => this.setValue(entry.value, options),
      });
    };
    node.setSize([Math.max(node.size[0], 420), node.size[1]]);
  },
});
