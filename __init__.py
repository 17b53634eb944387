"""Lets a clone of this repository load from ComfyUI's custom_nodes/; the nodes are in comfy_nodes/. Nothing else imports this."""

if __package__:
    from .comfy_nodes import comfy_entrypoint as comfy_entrypoint

WEB_DIRECTORY = "comfy_nodes/web"
