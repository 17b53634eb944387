const stores = () => document.querySelector("#vue-app")?.__vue_app__?.config?.globalProperties?.$pinia?._s;

// What was shown while it ran; the frontend leaves it on the node.
export function removePreview(node) {
  const at = node.widgets?.findIndex((widget) => widget.name === "$$canvas-image-preview") ?? -1;
  if (at >= 0) {
    node.widgets[at].onRemove?.();
    node.widgets.splice(at, 1);
  }
  node.imgs = undefined;
  stores()?.get("nodeOutput")?.revokePreviewsByExecutionId?.(String(node.id)); // of Vue nodes
  node.setDirtyCanvas?.(true, true);
}
