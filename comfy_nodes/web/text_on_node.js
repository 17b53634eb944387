// Shows the text that a node returns for its UI in a read-only box on the node, as core's Preview Any does.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";
import { removePreview } from "./preview.js";

const NODES = ["QArtSRModelInfo", "QArtSRImport", "QArtSRVideoUpscale", "QArtSRVideoFrames"];
const WITH_PREVIEW = ["QArtSRVideoUpscale", "QArtSRVideoFrames"]; // while they run

app.registerExtension({
  name: "QArtSR.TextOnNode",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const onNodeCreated = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      const { widget } = ComfyWidgets.STRING(this, "shown", ["STRING", { multiline: true }], app);
      widget.options.read_only = true;
      if (widget.inputEl) widget.inputEl.readOnly = true;
      widget.serialize = false;
      widget.serializeValue = () => undefined;
      this.setSize([Math.max(this.size[0], 420), Math.max(this.size[1], 260)]);
    };
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      const widget = this.widgets?.find((each) => each.name === "shown");
      if (widget) widget.value = (message.text ?? []).join("\n");
      if (!WITH_PREVIEW.includes(nodeData.name)) return;
      removePreview(this);
      setTimeout(() => removePreview(this), 700); // the last one may be loading
    };
  },
});
