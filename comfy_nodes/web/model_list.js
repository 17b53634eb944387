// The lists of models say what each model is for; what is stored and sent stays the model's name.
import { app } from "../../scripts/app.js";

const labels = { QArtSRLoadModel: {}, QArtSRLoadVideoModel: {} }; // by node

function takeLabels(node, definition) {
  labels[node] = definition?.input?.required?.model?.[1]?.qartsr_labels ?? labels[node];
}

app.registerExtension({
  name: "QArtSR.ModelList",
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name in labels) takeLabels(definition.name, definition);
  },
  refreshComboInNodes(definitions) {
    for (const node in labels) takeLabels(node, definitions[node]);
  },
  nodeCreated(node) {
    const widget = node.comfyClass in labels && node.widgets?.find((each) => each.name === "model");
    if (!widget) return;
    const labelled = (name) => {
      const label = labels[node.comfyClass][name];
      return label ? `${name}: ${label}` : (name ?? "");
    };
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
