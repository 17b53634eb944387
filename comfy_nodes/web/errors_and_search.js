// Shows what went wrong in a node of ours, also where the frontend only says that it failed; and among nodes whose names match a
// search equally well, the one that most people look for comes first.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SECONDS = 20; // that a message stays
const FIRST = "QArtSRUpscale";

function showError({ detail }) {
  if (!detail?.node_type?.startsWith("QArtSR")) return;
  const summary = LiteGraph.registered_node_types[detail.node_type]?.title ?? detail.node_type;
  // Older frontends open a dialog with the message.
  setTimeout(() => {
    if (document.querySelector('[role="dialog"]')) return;
    app.extensionManager?.toast?.add({ severity: "error", summary, detail: detail.exception_message, life: SECONDS * 1000 });
  }, 600);
}

function rankFirst() {
  const stores = document.querySelector("#vue-app")?.__vue_app__?.config?.globalProperties?.$pinia?._s;
  const node = stores?.get("nodeDef")?.nodeDefsByName?.[FIRST];
  if (!node?.postProcessSearchScores || node.qartsrRanked) return;
  const process = node.postProcessSearchScores;
  node.qartsrRanked = true;
  node.postProcessSearchScores = function (scores) {
    const [match, popularity, ...others] = process.call(this, scores);
    return [match, popularity - 1, ...others]; // lower is earlier; nodes of ComfyUI have thousands
  };
}

app.registerExtension({
  name: "QArtSR.ErrorsAndSearch",
  setup() {
    api.addEventListener("execution_error", showError);
    document.addEventListener("keydown", rankFirst, true); // a search begins with a key; definitions may have been read anew
  },
});
